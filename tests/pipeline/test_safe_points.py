"""A job ends at whichever safe point it is asked to, and goes on to the bytes of an uninterrupted one."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from streamprune.errors import Interrupted
from streamprune.pipeline.compress import CompressResult

Prune = Callable[..., CompressResult]
EVERYTHING = {"shuffle": "residual+local+assignment", "reconstruct": True}
LOOPS = {  # that ask, beside those over sequences
    "assignment_shuffle", "_retained", "stable_product", "prune_group", "stage_safetensors", "_read_raw", "validated",
}  # fmt: skip
RESUMED = {"start", "_is_whole"}  # where finished blocks are looked through
STOPS = 8  # places at which a job is stopped, evenly spaced


def recorded(asked: list[str]) -> Callable[[], bool]:
    """A question that notes the loop from which it is asked, through the watch and the safe point."""

    def should_stop() -> bool:
        frame: Any = sys._getframe(1)
        while frame.f_code.co_name in ("stop_if_asked", "check", "tick", "safe_point"):
            frame = frame.f_back
        asked.append(frame.f_code.co_name)
        return False

    return should_stop


def after(count: int) -> Callable[[], bool]:
    """A question that is answered by yes from the given time on."""
    asked = iter(range(sys.maxsize))
    return lambda: next(asked) >= count


@pytest.mark.parametrize("source", ["llama", "opt-bin"])
def test_stopped_anywhere(source: str, prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    expected, asked = tiny.digests(outputs(source, **EVERYTHING)), list[str]()
    prune(source, tmp_path / "whole", should_stop=recorded(asked), **EVERYTHING)
    assert set(asked) >= LOOPS - ({"_read_raw"} if source == "opt-bin" else set())
    for stop in range(STOPS):
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted, match=r"stopped after \d of 3 blocks; the same command goes on"):
            prune(source, out, should_stop=after(len(asked) * stop // STOPS), **EVERYTHING)
        prune(source, out, **EVERYTHING)
        assert tiny.digests(out) == expected, f"stopped at question {len(asked) * stop // STOPS} of {len(asked)}"


def test_a_resumed_job_can_be_stopped_before_it_works(prune: Prune, tmp_path: Path) -> None:
    """Checking what is finished takes long where much is."""
    out, asked = tmp_path / "out", list[str]()
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=(out / ".work" / "block-00001.json").exists)
    prune("llama", out, should_stop=recorded(asked))
    assert set(asked[: len(asked) // 2]) >= RESUMED


def test_a_budget_that_is_over_stops_a_job(prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    """At once, if nothing fits; a finished job is finished whatever the budget."""
    with pytest.raises(Interrupted, match=r"stopped after 0 of 3 blocks; the same command goes on"):
        prune("llama", tmp_path / "out", time_budget="1s")
    assert prune("llama", tmp_path / "out", time_budget="99h").status == "finished"
    assert prune("llama", tmp_path / "out", time_budget="1s").status == "already finished"
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))
