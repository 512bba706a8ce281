"""Safetensors headers: read as the safetensors library reads them, and every malformed file is refused in one line."""

import re
import struct
from pathlib import Path

import pytest
import torch
from attacks.malformed_headers import MALFORMED, one_entry
from safetensors import safe_open
from safetensors.torch import save_file

from streamprune.checkpoint.safetensors_header import DTYPES, read_header
from streamprune.errors import CheckpointError


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_file_is_refused_in_one_line_naming_it(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[fault]())
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_absent_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: cannot be read \("):
            read_header(path)


def test_the_well_formed_file_that_the_malformed_ones_are_made_from_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one_entry())
    entries, metadata = read_header(path)
    header_bytes = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert list(entries) == ["a"]
    assert entries["a"].dtype == torch.float32
    assert entries["a"].shape == (1,)
    assert entries["a"].offset_bytes == 8 + header_bytes
    assert entries["a"].size_bytes == 4
    assert metadata == {}


def test_headers_of_all_dtypes_equal_the_safetensors_librarys(tmp_path: Path) -> None:
    shapes = ((), (0,), (3,), (2, 5), (4, 0, 2))
    tensors = {f"{name}{shape}": torch.ones(shape, dtype=dtype) for name, dtype in DTYPES.items() for shape in shapes}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "streamprune": "[1]"})
    entries, metadata = read_header(path)
    with safe_open(path, "pt") as library:
        assert set(entries) == set(library.keys()) == set(tensors)
        assert metadata == library.metadata() == {"format": "pt", "streamprune": "[1]"}
        for name in library.keys():  # noqa: SIM118 (the library's object is no mapping)
            piece = library.get_slice(name)
            assert list(entries[name].shape) == piece.get_shape()
            assert DTYPES[piece.get_dtype()] == entries[name].dtype == tensors[name].dtype
            assert entries[name].size_bytes == tensors[name].nbytes
