"""The header of a safetensors file, checked before anything is read by it.

Layout of the format: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes without gaps.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, open_regular, parse_json, read_exactly
from streamprune.errors import CheckpointError

MAX_DIMENSIONS = 64  # of a torch tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTISED_DTYPES = ("F8_", "F6_", "F4")  # how the format's names of them begin
QUANTISED = "the source is quantised; give an unquantised checkpoint, or let transformers dequantise it and save it"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `offset_bytes` from the start of the file, for `size_bytes`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries by tensor name and the file's string metadata.

    Raises CheckpointError for anything that is not a well-formed file whose tensors fill its data exactly.
    """
    file, file_bytes = open_regular(path)
    with file:
        header_bytes = int.from_bytes(read_exactly(file, min(8, file_bytes), path), "little")
        if file_bytes < 8 or header_bytes > file_bytes - 8:
            raise CheckpointError(f"{path}: truncated or not safetensors (header longer than the file)")
        if header_bytes > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: its header has {header_bytes} bytes, at most {MAX_JSON_BYTES} are read")
        text = read_exactly(file, header_bytes, path)
    try:
        header = parse_json(text)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not strings")
        data_start = 8 + header_bytes
        kinds = {name: value["dtype"] for name, value in header.items()}
        if quantised := next((n for n, kind in kinds.items() if str(kind).startswith(QUANTISED_DTYPES)), None):
            raise CheckpointError(f"{path}: tensor {quantised!r:.80} is {kinds[quantised]!s:.20}: {QUANTISED}")
        entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed ({error})") from error
    _check_layout(path, entries, data_start, file_bytes)
    return entries, metadata


def _entry(name: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unsupported dtype {value['dtype']!r:.20}")
    dtype = DTYPES[value["dtype"]]
    begin, end = value["data_offsets"]
    if not isinstance(value["shape"], list):
        raise ValueError(f"tensor {name!r} has a shape that is no list")
    if len(value["shape"]) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {len(value['shape'])} dimensions")
    shape = tuple(value["shape"])
    numbers = (begin, end, *shape)
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"tensor {name!r} has a negative, huge or fractional size")
    if math.prod(length or 1 for length in shape) >= 2**62:
        raise ValueError(f"tensor {name!r} has a shape that overflows")
    size_bytes = dtype.itemsize * math.prod(shape)
    if end - begin != size_bytes:
        raise ValueError(f"tensor {name!r} spans {end - begin} bytes but its shape needs {size_bytes}")
    return TensorEntry(dtype, shape, data_start + begin, size_bytes)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes)):
        if entry.offset_bytes != position:
            raise CheckpointError(f"{path}: tensor {name!r} overlaps another or leaves a gap")
        position += entry.size_bytes
    if position != file_bytes:
        raise CheckpointError(f"{path}: truncated or padded: tensors end at byte {position}, the file at {file_bytes}")
