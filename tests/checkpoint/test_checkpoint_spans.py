"""Tensors read in large pieces are the tensors, however files lay them out; memory is used again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from streamprune.checkpoint import spans
from streamprune.checkpoint.reader import open_checkpoint
from streamprune.checkpoint.spans import Reader, aligned_memory, lay_out
from streamprune.errors import CheckpointError


def shifted(source: Path, folder: Path) -> Path:
    """A copy whose header ends at an odd byte, so that no tensor lies at a multiple of its dtype."""
    tiny.copy_without_weights(source, folder)
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2 == 1
    return folder


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama-sharded", "opt-bin", "shifted", "pieces", "gaps"])
def test_they_are_what_reading_one_by_one_gives(
    kind: str, direct: bool, sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"pieces": ("PIECE_BYTES", 8192), "gaps": ("GAP_BYTES", 100)}.items():
        if kind == name:
            monkeypatch.setattr(spans, *value)
    folder = shifted(sources("llama"), tmp_path / "odd") if kind == "shifted" else sources(
        kind if "-" in kind else "llama"
    )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    blocks = [[name for name in checkpoint.tensors if f"layers.{number}." in name][::2] for number in range(3)]
    layouts = [lay_out(checkpoint, names) for names in blocks]
    memory = aligned_memory(max(layout.size_bytes for layout in layouts))
    with Reader(direct=direct) as reader:
        for names, layout in zip(blocks, layouts, strict=True):
            found = reader.start(layout, memory).finish()
            expected = checkpoint.read(names)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in names)
            assert {tensor.untyped_storage().data_ptr() for tensor in found.values()} == {memory.data_ptr()}
            assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    counts = {"shifted": len(blocks[0]), "gaps": 0}
    assert len(layouts[0].moved) == counts.get(kind, 0)
    assert len(layouts[0].spans) == {"llama-sharded": 3, "opt-bin": 0, "gaps": len(blocks[0])}.get(kind, 1) or (
        kind == "gaps" and len(layouts[0].spans) > 1
    )


def test_direct_reading_leaves_the_page_cache_alone(
    sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system reads directly, the flag is set; where it does not, pages are given back after reading."""
    checkpoint = open_checkpoint(sources("llama"))
    layout = lay_out(checkpoint, checkpoint.tensors)
    memory, forgotten = aligned_memory(layout.size_bytes), []
    monkeypatch.setattr(spans, "_forget", lambda _, start, count: forgotten.append((start, count)))
    with Reader() as reader:
        reader.start(layout, memory).finish()
        [(descriptor, direct)] = reader._files.values()
        assert direct == spans._made_direct(descriptor)
        assert (forgotten == []) == direct
    forgotten.clear()
    with Reader(direct=False) as reader:
        reader.start(layout, memory).finish()
    assert forgotten == [(layout.spans[0].start, layout.spans[0].needed)]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 5000, 4096])
def test_a_file_that_became_shorter(direct: bool, left: int, sources: Callable[[str], Path], tmp_path: Path) -> None:
    tiny.copy_without_weights(sources("llama"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes((sources("llama") / "model.safetensors").read_bytes())
    checkpoint = open_checkpoint(path.parent)
    layout = lay_out(checkpoint, checkpoint.tensors)
    os.truncate(path, left)
    with Reader(direct=direct) as reader, pytest.raises(CheckpointError, match="the file is truncated"):
        reader.start(layout, aligned_memory(layout.size_bytes)).finish()
