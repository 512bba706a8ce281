"""Equal jobs give equal bytes, whatever the threads, the process, or the kind of file that the source lies in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from streamprune.pipeline.compress import CompressResult, compress


def test_twice_in_one_process(
    prune: Callable[..., CompressResult], outputs: Callable[..., Path], tmp_path: Path
) -> None:
    prune("llama", tmp_path / "again")
    assert tiny.digests(tmp_path / "again") == tiny.digests(outputs("llama"))
    assert len(tiny.digests(tmp_path / "again")) == 14


@pytest.mark.parametrize(
    "settings", [{}, {"shuffle": "residual+global+local+assignment", "reconstruct": True, "moments_width": 64}], ids=str
)
@pytest.mark.parametrize("source", ["llama", "opt"])
def test_one_thread_or_two(
    source: str,
    settings: dict[str, Any],
    prune: Callable[..., CompressResult],
    outputs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Of the defaults, with correction; and of everything else that computes."""
    expected = tiny.digests(outputs(source, **settings))
    former = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = prune(source, tmp_path / str(threads), **settings)
            assert tiny.read_json(tmp_path / str(threads) / "timings.json")["threads"] == threads
            assert tiny.digests(tmp_path / str(threads)) == expected
            assert result.manifest_sha256 == expected[tiny.MANIFEST]
    finally:
        torch.set_num_threads(former)


@pytest.mark.parametrize("pace", [(1, 0), (1, 2), (2, 1), (3, 1), (4, 7)], ids=str)
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("llama", {}),
        ("opt", {}),
        ("llama", {"shuffle": "residual+global+local+assignment", "reconstruct": True, "moments_width": 64}),
    ],
    ids=str,
)
def test_any_micro_batch_and_prefetch_depth(
    source: str,
    settings: dict[str, Any],
    pace: tuple[int, int],
    prune: Callable[..., CompressResult],
    outputs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Of four sequences one, two, three or all at once; none, one, two or all blocks ahead."""
    micro_batch, prefetch = pace
    prune(source, tmp_path / "out", micro_batch=micro_batch, prefetch=prefetch, **settings)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs(source, **settings))


def test_another_process_folder_and_hash_seed(
    sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(sources("llama"), tmp_path / "elsewhere" / "llama")
    text = shutil.copyfile(calibration, tmp_path / "other-name.txt")
    command = [sys.executable, "-m", "streamprune", "compress", str(moved), "--out", str(tmp_path / "out")]
    numbers = ["--samples", "4", "--sequence-length", "48", "--dtype", "float32", "--calibration", str(text), "--quiet"]
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "2"}
    subprocess.run(command + numbers, check=True, env=environment, capture_output=True, cwd=tmp_path)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))


@pytest.mark.parametrize(("one", "other"), [("opt", "opt-bin"), ("llama", "llama-sharded")])
def test_kinds_of_source_files(one: str, other: str, outputs: Callable[..., Path]) -> None:
    """The shards are the same bytes; the manifest names the source's own tensors, the card its folder."""
    first, second = tiny.digests(outputs(one)), tiny.digests(outputs(other))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {tiny.MANIFEST, tiny.MANIFEST_DIGEST, "README.md"}


def test_scratch_elsewhere(prune: Callable[..., CompressResult], outputs: Callable[..., Path], tmp_path: Path) -> None:
    """Same bytes, hidden states lie there and not in the output folder, and nothing stays behind."""
    seen: set[str] = set()

    def look() -> bool:
        seen.update(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.bin"))
        return False

    (tmp_path / "scratch").mkdir()
    prune("llama", tmp_path / "out", scratch=tmp_path / "scratch", should_stop=look)
    assert seen
    assert all(name.startswith("scratch/") for name in seen)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))


@pytest.mark.parametrize(
    ("settings", "sequences"),
    [({"correction": 0.0}, 3 * 4), ({"refine": False}, 3 * 4), ({}, 3 * 4 + 2 * 2), ({"correction_stride": 1}, 5 * 4)],
    ids=str,
)
def test_scratch_is_three_sets_of_hidden_states_and_two_of_the_reference(
    settings: dict[str, Any], sequences: int, prune: Callable[..., CompressResult], tmp_path: Path
) -> None:
    """The bytes at any moment are at most what the plan says: inputs, dense outputs, next inputs; and with correction
    the reference's inputs and outputs, of every k-th sequence."""
    most: list[int] = []

    def look() -> bool:
        most.append(sum(path.stat().st_size for path in tmp_path.rglob("*.bin")))
        return False

    prune("llama", tmp_path / "out", should_stop=look, **settings)
    assert max(most) == sequences * 48 * 64 * 4


def test_public_function_takes_what_the_package_exports(
    sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """`streamprune.compress` is the function of the command line, with strings for paths."""
    import streamprune

    settings: dict[str, Any] = {"calibration": str(calibration), **tiny.CALIBRATION}
    result = streamprune.compress(str(sources("opt")), str(tmp_path / "out"), **settings)
    assert isinstance(result, CompressResult)
    assert streamprune.compress is compress
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("opt"))
