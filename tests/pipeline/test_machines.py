"""A job that was interrupted goes on where its bytes would be the same, and is refused by name elsewhere."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.errors import Interrupted, JobMismatchError
from streamprune.model import arithmetic
from streamprune.model.arithmetic import Arithmetic
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.planning import job
from streamprune.pipeline.planning.job import resolve_job, surroundings
from streamprune.pipeline.planning.plan import Resources
from streamprune.text.calibration import Calibration

Prune = Callable[..., CompressResult]
VERSION = importlib.metadata.version
GPU = Arithmetic(torch.device("cuda"), torch.bfloat16)


def calibrated(text: Path) -> Calibration:
    return Calibration(str(text), samples=2, sequence_length=48)


@pytest.fixture(scope="module")
def unfinished(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted after its first block."""
    out = tmp_path_factory.mktemp("machines") / "out"
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=(out / ".work" / "block-00000.json").exists)
    return out


@pytest.fixture(scope="module")
def finished(outputs: Callable[..., Path]) -> Path:
    return outputs("llama")


def other_version(name: str) -> Callable[[str], str]:
    return lambda asked: "0.0.1" if asked == name else VERSION(asked)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "named", "finished_too"),
    [
        (arithmetic, "processor_name", lambda dtype: "Other AVX512", r"compute\.processor: .*, Other AVX512 now", True),
        (arithmetic, "library", lambda: None, r"compute\.kernels: compiled there, plain now", True),
        (job, "rounding", lambda *about: "0123456789abcdef", r"rounding: .* now", False),
        (importlib.metadata, "version", other_version("torch"), r"versions\.torch: .* there, 0\.0\.1 now", False),
        (importlib.metadata, "version", other_version("scipy"), r"versions\.scipy: .* there, 0\.0\.1 now", False),
    ],
    ids=["processor", "kernels", "rounding", "torch", "scipy"],
)
def test_another_machine_is_refused_by_name(
    module: Any,
    attribute: str,
    value: Any,
    named: str,
    finished_too: bool,
    prune: Prune,
    unfinished: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finished output is recognised under other versions, which it does not record."""
    monkeypatch.setattr(module, attribute, value)
    with pytest.raises(JobMismatchError, match=named):
        prune("llama", unfinished)
    if finished_too:
        with pytest.raises(JobMismatchError, match=named):
            prune("llama", finished)
    else:
        assert prune("llama", finished).status == "already finished"


def test_what_a_finished_output_records(finished: Path) -> None:
    identity = tiny.read_json(finished / tiny.MANIFEST)["identity"]
    assert identity["compute"] == Arithmetic(torch.device("cpu"), torch.float32).identity
    assert "rounding" not in identity
    assert "versions" not in identity


@pytest.mark.parametrize(
    ("shuffle", "decides"), [("assignment", True), ("residual+assignment", True), ("local", False)]
)
def test_scipy_counts_where_it_searches(
    shuffle: str, decides: bool, sources: Callable[[str], Path], calibration: Path
) -> None:
    config = PruneConfig(NMPattern(2, 4), shuffle=shuffle)
    about, with_other_pace = (
        surroundings(
            resolve_job(
                sources("llama"), config, calibrated(calibration), Resources("cpu", "float32", micro_batch=count)
            )
        )
        for count in (1, 2)
    )
    assert ("scipy" in about["versions"]) is decides
    assert len(about["rounding"]) == 16
    assert with_other_pace == about


def test_versions_of_a_gpus_libraries(
    sources: Callable[[str], Path], calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "gpu_versions", lambda device: {"cuda": "13.0", "cupy": "14.2.0"})
    monkeypatch.setattr(job, "rounding", lambda device, dtype, rows: f"{device} {dtype} {rows}")
    on_cpu = resolve_job(
        sources("llama"), PruneConfig(NMPattern(2, 4)), calibrated(calibration), Resources("cpu", "float32")
    )
    about = surroundings(replace(on_cpu, arithmetic=GPU))
    assert about["versions"].items() >= {"cuda": "13.0", "cupy": "14.2.0", "torch": VERSION("torch")}.items()
    assert about["rounding"] == "cuda torch.bfloat16 48"


@pytest.mark.parametrize(
    ("device", "tokens", "expected"),
    [("cpu", 2048, {}), ("cuda", 2048, {"sequences_at_once": 3}), ("cuda", 256, {"sequences_at_once": 1})],
)
def test_on_a_gpu_the_number_of_sequences_at_once_counts(device: str, tokens: int, expected: dict[str, int]) -> None:
    """Short ones go one by one whatever is asked for, so that the same job goes on."""
    plan: Any = SimpleNamespace(micro_batch=3, sequence_length=tokens)
    assert job._pace_that_decides(Arithmetic(torch.device(device), torch.float32), plan) == expected
