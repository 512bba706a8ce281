"""Tiny checkpoints, texts and finished outputs, each made once a session. Tests that change one change a copy."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin cost tiny products 20 times their work on a busy machine

import tiny

from streamprune.pipeline.compress import CompressResult, compress


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny source checkpoints by name, made on first use; never changed."""
    folder = tmp_path_factory.mktemp("sources")
    makers: dict[str, Callable[[Path], Path]] = {
        "llama": tiny.write_llama,  # grouped KV heads, biases, tied, bf16
        "llama-plain": lambda path: tiny.write_llama(path, kv_heads=4, biases=False, tied=False),
        "llama-sharded": lambda path: tiny.write_as_safetensors_shards(source("llama"), path),
        "ministral": tiny.write_ministral,
        "mistral": tiny.write_mistral,
        "opt": tiny.write_opt,  # biases, tied, fp16
        "opt-bin": lambda path: tiny.write_as_bin_shards(source("opt"), path),
        "qwen2": tiny.write_qwen2,
        "qwen3": tiny.write_qwen3,
    }

    def source(name: str) -> Path:
        path = folder / name
        return path if path.exists() else makers[name](path)

    return source


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny.text(20_000, seed=1))
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that no calibration saw."""
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(tiny.text(2_000, seed=2))
    return path


@pytest.fixture(scope="session")
def prune(sources: Callable[[str], Path], calibration: Path) -> Callable[..., CompressResult]:
    """`compress` of a tiny source by name, with short calibration unless told otherwise."""

    def run(source: str | Path, out: Path, **settings: Any) -> CompressResult:
        model = sources(source) if isinstance(source, str) else source
        return compress(model, out, **{"calibration": str(calibration), **tiny.CALIBRATION, **settings})

    return run


@pytest.fixture(scope="session")
def outputs(prune: Callable[..., CompressResult], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Finished outputs by source and settings, compressed on first use; never changed."""
    folder = tmp_path_factory.mktemp("outputs")
    made: dict[tuple[Any, ...], Path] = {}

    def output(source: str, **settings: Any) -> Path:
        key = (source, *sorted(settings.items()))
        if key not in made:
            out = folder / str(len(made))
            prune(source, out, **settings)
            made[key] = out
        return made[key]

    return output


@pytest.fixture
def copy_of(outputs: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a finished output that a test may damage."""

    def copy(source: str, **settings: Any) -> Path:
        return Path(shutil.copytree(outputs(source, **settings), tmp_path / "copy"))

    return copy
