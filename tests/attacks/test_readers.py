"""The readers of untrusted bytes on what hypothesis makes: a right answer or CheckpointError, never anything else."""

import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some
from safetensors.torch import save

from attacks.catalogue import Malformed
from streamprune.checkpoint.manifest import Manifest, read_record
from streamprune.checkpoint.packed import PackedLayer, check_contents, pack_layer
from streamprune.checkpoint.reader import open_checkpoint, open_file
from streamprune.checkpoint.safetensors_header import read_header
from streamprune.checkpoint.torch_file import load_bin
from streamprune.checkpoint.untrusted import MAX_JSON_DEPTH, parse_json, read_json
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError

EXAMPLES = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.zeros(0, dtype=torch.int64),
    "d": torch.tensor(3, dtype=torch.uint8),
}
SAFETENSORS = save(TENSORS)
NUMBERS = some.one_of(
    some.integers(-2, 40), some.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**30, True, 1.0, None, "4"])
)
VALUES = some.recursive(
    some.one_of(some.none(), some.booleans(), some.integers(), some.floats(), some.text(max_size=5)),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        yield Path(folder) / "file"


Read = TypeVar("Read")


def refused_or(read: Callable[[Path], Read], path: Path) -> Read | None:
    """What a reader makes of a file, or None where it refuses it as it should, in one line that names it."""
    try:
        return read(path)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return None


def assert_header_holds(content: bytes, path: Path) -> None:
    """Read a header; what is accepted holds together, and every tensor of it can be read."""
    path.write_bytes(content)
    if (accepted := refused_or(read_header, path)) is None:
        return
    entries, metadata = accepted
    assert all(isinstance(text, str) for text in (*metadata, *metadata.values()))
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset_bytes, entry.size_bytes)):
        assert entry.offset_bytes == end
        assert entry.size_bytes == entry.dtype.itemsize * numpy.prod(entry.shape, dtype=object)
        end += entry.size_bytes
    assert end == len(content)
    tensors = open_file(path).read_unchecked(entries)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: e.shape for n, e in entries.items()}


@EXAMPLES
@given(content=some.binary(max_size=300))
def test_header_of_random_bytes(content: bytes, path: Path) -> None:
    assert_header_holds(content, path)


@EXAMPLES
@given(text=some.binary(max_size=120), data=some.binary(max_size=16))
def test_header_of_random_text_of_the_right_length(text: bytes, data: bytes, path: Path) -> None:
    assert_header_holds(struct.pack("<Q", len(text)) + text + data, path)


@EXAMPLES
@given(
    edits=some.lists(some.tuples(some.integers(0, len(SAFETENSORS) - 1), some.integers(0, 255)), min_size=1, max_size=4)
)
def test_header_with_some_bytes_changed(edits: list[tuple[int, int]], path: Path) -> None:
    content = bytearray(SAFETENSORS)
    for position, value in edits:
        content[position] = value
    assert_header_holds(bytes(content), path)


@EXAMPLES
@given(
    name=some.sampled_from("abcd"),
    dtype=some.sampled_from(["F32", "BF16", "I64", "U8", "BOOL", "F7", "f32", 4, None]),
    shape=some.lists(NUMBERS, max_size=4),
    offsets=some.lists(NUMBERS, min_size=1, max_size=3),
)
def test_header_with_one_entry_changed(name: str, dtype: Any, shape: Any, offsets: Any, path: Path) -> None:
    size = struct.unpack("<Q", SAFETENSORS[:8])[0]
    header = json.loads(SAFETENSORS[8 : 8 + size])
    for field, value in (("dtype", dtype), ("shape", shape), ("data_offsets", offsets)):
        changed = {**header, name: {**header[name], field: value}}
        text = json.dumps(changed).encode()
        assert_header_holds(struct.pack("<Q", len(text)) + text + SAFETENSORS[8 + size :], path)


@EXAMPLES
@given(cut=some.integers(0, len(SAFETENSORS) - 1))
def test_header_of_a_file_that_is_cut(cut: int, path: Path) -> None:
    path.write_bytes(SAFETENSORS[:cut])
    with pytest.raises(CheckpointError):
        read_header(path)


@EXAMPLES
@given(value=VALUES)
def test_json_is_read_as_json_or_refused(value: Any, path: Path) -> None:
    content = json.dumps(value).encode()
    path.write_bytes(content)
    read = refused_or(read_json, path)
    if read is None:
        assert not isinstance(value, dict) or b"\\ud" in content
    else:
        assert repr(read) == repr(json.loads(content))


@EXAMPLES
@given(
    content=some.binary(max_size=60)
    | some.text(alphabet='{}[]",:0123456789truefalsn\\ud8', max_size=60).map(str.encode)
)
def test_json_of_random_bytes(content: bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError:
        return
    assert repr(value) == repr(json.loads(content))


@EXAMPLES
@given(depth=some.integers(1, 2 * MAX_JSON_DEPTH), kind=some.sampled_from(["[]", "{}"]))
def test_json_is_refused_where_it_is_nested_too_deeply_and_only_there(depth: int, kind: str) -> None:
    opening, closing = ("[", "]") if kind == "[]" else ('{"a":', "}")
    content = (opening * depth + "1" + closing * depth).encode()
    if depth <= MAX_JSON_DEPTH:
        assert parse_json(content) == json.loads(content)
    else:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(content)


@EXAMPLES
@given(value=some.dictionaries(some.sampled_from([*Manifest.__struct_fields__, "more"]), VALUES, max_size=8))
def test_a_manifest_of_any_json_is_refused(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError):
        read_record(path, Manifest)


@EXAMPLES
@given(
    pattern=some.sampled_from([NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 3), NMPattern(5, 12)]),
    flips=some.lists(some.tuples(some.integers(0, 4), some.integers(0, 63)), max_size=3),
    swap=some.none() | some.tuples(some.integers(0, 35), some.integers(-3, 40)),
    seed=some.integers(0, 100),
)
def test_a_packed_layer_is_accepted_exactly_where_every_group_keeps_n(
    pattern: NMPattern, flips: list[tuple[int, int]], swap: tuple[int, int] | None, seed: int
) -> None:
    """Against a count by plain Python, bit by bit, over 36 or 60 channels with padding bits."""
    channels = 60 if pattern.group_size in (4, 12, 3) else 56
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(5, channels // pattern.group_size, pattern.group_size, generator=draw).argsort(2)
    keep = (order < pattern.kept).view(5, channels)
    permutation = torch.randperm(channels, generator=draw)
    layer = pack_layer(torch.randn(5, channels, generator=draw), keep, permutation)
    check_contents("layer", layer, pattern)
    mask, stored = layer.mask.clone(), layer.permutation
    assert stored is not None
    for row, bit in flips:
        assume(bit < 8 * mask.shape[1])
        mask[row, bit // 8] ^= 1 << bit % 8
    if swap is not None:
        stored[swap[0]] = swap[1]
    bits = [[int(mask[row, j // 8]) >> j % 8 & 1 for j in range(8 * mask.shape[1])] for row in range(5)]
    size = pattern.group_size
    right = all(sum(row[g : g + size]) == pattern.kept for row in bits for g in range(0, channels, size))
    right = right and not any(any(row[channels:]) for row in bits)
    right = right and sorted(stored.tolist()) == list(range(channels))
    damaged = PackedLayer(layer.values, mask, stored)
    if right:
        check_contents("layer", damaged, pattern)
    else:
        with pytest.raises(CheckpointError, match="layer layer: "):
            check_contents("layer", damaged, pattern)


def saved(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


ARCHIVE, LEGACY = saved(legacy=False), saved(legacy=True)


def assert_bin_holds(content: bytes, path: Path) -> None:
    """Open a `.bin`; what is accepted can be read, and takes no more than twice its bytes."""
    path = path.with_name("pytorch_model.bin")
    path.write_bytes(content)
    if (tensors := refused_or(load_bin, path)) is None:
        return
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) <= max(2 * len(content), 1 << 20)
    read = open_checkpoint(path.parent).read_unchecked(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


@EXAMPLES
@given(
    whole=some.sampled_from([ARCHIVE, LEGACY]),
    edits=some.lists(some.tuples(some.floats(0, 0.999), some.integers(0, 255)), min_size=1, max_size=4),
)
def test_bin_with_some_bytes_changed(whole: bytes, edits: list[tuple[float, int]], path: Path) -> None:
    content = bytearray(whole)
    for place, value in edits:
        content[int(place * len(content))] = value
    assert_bin_holds(bytes(content), path)


@EXAMPLES
@given(edits=some.lists(some.tuples(some.floats(0, 0.999), some.integers(0, 255)), min_size=1, max_size=4))
def test_bin_with_its_pickle_changed(edits: list[tuple[float, int]], path: Path) -> None:
    """Bytes of the pickle alone, where sizes, offsets and what is called stand."""
    begin = ARCHIVE.index(b"\x80\x02}")
    end = ARCHIVE.index(b"PK", begin)
    content = bytearray(ARCHIVE)
    for place, value in edits:
        content[begin + int(place * (end - begin))] = value
    assert_bin_holds(bytes(content), path)


@EXAMPLES
@given(whole=some.sampled_from([ARCHIVE, LEGACY]), share=some.floats(0, 0.999))
def test_bin_that_is_cut(whole: bytes, share: float, path: Path) -> None:
    assert_bin_holds(whole[: int(share * len(whole))], path)


def test_an_entry_of_the_catalogue_may_write_only_where_its_job_has_begun() -> None:
    refused = Malformed("x", "llama", "plan", 3, "", lambda case: None, "why")
    begun = Malformed("x", "llama", "compress", 6, "", lambda case: None, "why", journal=True)
    assert not any(refused.may_write(name) for name in ("out", "out/.work", "model/config.json"))
    assert [name for name in ("out", "out/.work/x", "out/config.json") if begun.may_write(name)] == [
        "out",
        "out/.work/x",
    ]
