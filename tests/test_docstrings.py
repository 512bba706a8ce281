"""The examples in the docstrings of what is public: run as they stand, with a tiny model in place of a real one."""

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import streamprune

WITHOUT = {"StreampruneError"} | {name for name in streamprune.__all__ if name.endswith("Result")}  # nothing to call


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(getattr(streamprune, name)) or "")


@pytest.mark.parametrize("name", sorted(set(streamprune.__all__) - WITHOUT))
def test_examples_give_what_they_say(
    name: str, sources: Callable[[str], Path], outputs: Callable[..., Path], calibration: Path, tmp_path: Path
) -> None:
    """model and pruned are folders of a tiny LLaMA, out is one that is not there, text a file."""
    assert examples(name), f"the docstring of {name} has no example"
    given = {"streamprune": streamprune, "torch": torch, "out": tmp_path / "out", "text": calibration}
    given |= {"model": sources("llama"), "pruned": outputs("llama")}
    report: list[str] = []
    test = doctest.DocTest(examples(name), given, name, None, 0, None)
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert outcome.attempted == len(examples(name))
    assert not outcome.failed, "".join(report)
