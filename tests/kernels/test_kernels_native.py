"""The compiled library, the job without it, and libraries of another version."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from streamprune import PackedLinear
from streamprune.config import NMPattern
from streamprune.runtime.verify import verify
from streamprune_kernels import native, operator

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from streamprune.model import arithmetic

    for module in (native, operator, arithmetic):
        monkeypatch.setattr(module, "library", lambda: None)
    arithmetic.warn_without_kernels.cache_clear()
    yield
    arithmetic.warn_without_kernels.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_layers_without_the_library_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        PackedLinear.from_dense(torch.ones(2, 8))(torch.ones(3, 8))
    (line,) = caplog.messages
    assert "packed products take several times longer; install a C++ compiler" in line


@pytest.mark.parametrize("source", ["llama", "opt"])
@pytest.mark.usefixtures("without_library")
def test_a_job_without_the_library(
    source: str,
    prune: Callable[..., Any],
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Works, says so in one line, and another identity keeps its bytes from being mixed with the compiled ones'."""
    prune(source, tmp_path / "out")
    (line,) = [message for message in caplog.messages if "compiled kernels" in message]
    assert "\n" not in line
    assert line.endswith("install a C++ compiler and then streamprune again")
    assert verify(tmp_path / "out", source=sources(source)).faults == []
    manifest = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)
    assert manifest["identity"]["compute"]["kernels"] == "plain"


def test_a_job_with_the_library_says_compiled_and_no_word(
    outputs: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tiny.read_json(outputs("llama") / tiny.MANIFEST)
    assert manifest["identity"]["compute"]["kernels"] == "compiled"
    assert caplog.messages == []


def test_plain_and_compiled_agree_on_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamprune.pruning.refinement import refine_mask
    from streamprune.pruning.selection import select

    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(40, 448, generator=generator), torch.randn(600, 448, generator=generator)
    moments, pattern = x.T @ x, NMPattern(2, 4)
    keep = select(weight.abs(), pattern)
    compiled = refine_mask(weight, keep, moments, pattern, 0.1)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(compiled, refine_mask(weight, keep, moments, pattern, 0.1))
    assert not torch.equal(compiled, keep)


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.raises(ImportError, match="install streamprune again"):
        native.library.__wrapped__()
