"""Malformed safetensors files, one fault each: bytes, whatever the format says about them."""

import json
import struct
from collections.abc import Callable
from typing import Any

FOUR = b"\0\0\x80\x3f"  # 1.0 in float32


def entry(dtype: Any = "F32", shape: Any = (1,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_of(header: Any, data: bytes = FOUR, length: int | None = None) -> bytes:
    """A file with this header (bytes, or what json makes of it), whatever the format says about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_entry(**changes: Any) -> bytes:
    return file_of({"a": {**entry(), **changes}})


MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "seven bytes": lambda: b"\x02\0\0\0\0\0\0",
    "no header": lambda: struct.pack("<Q", 0),
    "header length beyond the file": lambda: file_of({"a": entry()}, length=10_000),
    "header length of 2^64 - 1": lambda: file_of({"a": entry()}, length=2**64 - 1),
    "header cut short": lambda: file_of({"a": entry()}, length=20),
    "data truncated": lambda: file_of({"a": entry()}, FOUR[:3]),
    "data absent": lambda: file_of({"a": entry()}, b""),
    "bytes after the last tensor": lambda: file_of({"a": entry()}, FOUR + b"\0"),
    "overlap": lambda: file_of({"a": entry(), "b": entry(begin=2, end=6)}, b"\0" * 6),
    "same bytes twice": lambda: file_of({"a": entry(), "b": entry()}),
    "gap between tensors": lambda: file_of({"a": entry(), "b": entry(begin=8, end=12)}, b"\0" * 12),
    "gap before the first tensor": lambda: file_of({"a": entry(begin=4, end=8)}, b"\0" * 8),
    "empty tensor inside another": lambda: file_of({"a": entry(), "b": entry(shape=(0,), begin=2, end=2)}),
    "span larger than shape times dtype": lambda: file_of({"a": entry(end=8)}, b"\0" * 8),
    "span smaller than shape times dtype": lambda: file_of({"a": entry(shape=(2,))}),
    "offsets reversed": lambda: one_entry(data_offsets=[4, 0]),
    "three offsets": lambda: one_entry(data_offsets=[0, 2, 4]),
    "offsets of strings": lambda: one_entry(data_offsets=["0", "4"]),
    "negative offset": lambda: one_entry(data_offsets=[-4, 0]),
    "offset beyond 2^63": lambda: one_entry(data_offsets=[2**63, 2**63 + 4]),
    "negative length": lambda: one_entry(shape=[-1]),
    "two negative lengths": lambda: one_entry(shape=[-1, -1]),
    "length beyond 2^63": lambda: one_entry(shape=[2**63]),
    "length of 5,000 digits": lambda: file_of(
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000)
    ),
    "lengths whose product overflows": lambda: one_entry(shape=[2**62, 2**62]),
    "length of true": lambda: one_entry(shape=[True]),
    "length of 1.0": lambda: one_entry(shape=[1.0]),
    "length of NaN": lambda: one_entry(shape=[float("nan")]),
    "length of null": lambda: one_entry(shape=[None]),
    "shape of a string": lambda: one_entry(shape="1"),
    "shape of an object": lambda: one_entry(shape={}),
    "shape of a number": lambda: one_entry(shape=1),
    "unknown dtype": lambda: one_entry(dtype="F7"),
    "dtype of a list": lambda: one_entry(dtype=["F32"]),
    "dtype in lower case": lambda: one_entry(dtype="f32"),
    "tensor without dtype": lambda: file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}),
    "tensor without shape": lambda: file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "tensor without offsets": lambda: file_of({"a": {"dtype": "F32", "shape": [1]}}),
    "tensor of a list": lambda: file_of({"a": ["F32", [1], [0, 4]]}),
    "tensor of null": lambda: file_of({"a": None}),
    "header of a list": lambda: file_of([entry()]),
    "header of a string": lambda: file_of("a"),
    "header of null": lambda: file_of(None),
    "not JSON": lambda: file_of(b"{'a': 1}"),
    "tensor name twice": lambda: file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "dtype twice": lambda: file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
    "not UTF-8": lambda: file_of(b'{"\xff":%s}' % json.dumps(entry()).encode()),
    "UTF-16": lambda: file_of(json.dumps({"a": entry()}).encode("utf-16")),
    "deeply nested list": lambda: file_of(b"[" * 100_000),
    "deeply nested object": lambda: file_of(b'{"a":' * 100_000),
    "65 dimensions": lambda: one_entry(shape=[1] * 65),
    "190,000 dimensions": lambda: one_entry(shape=[1] * 190_000),
    "half a surrogate pair in a name": lambda: file_of(b'{"\\ud800":%s}' % json.dumps(entry()).encode()),
    "metadata of a list": lambda: file_of({"__metadata__": ["x"], "a": entry()}),
    "metadata of numbers": lambda: file_of({"__metadata__": {"x": 1}, "a": entry()}),
    "metadata of null": lambda: file_of({"__metadata__": None, "a": entry()}),
    "two million empty lists": lambda: file_of(b"[" + b"[]," * 2_000_000 + b"0]"),
    "a billion spaces claimed": lambda: file_of({"a": entry()}, length=10**9),
    "line break in a faulty tensor's name": lambda: file_of({"a\nb": entry(dtype="F7")}),
    "line break in an overlapping tensor's name": lambda: file_of({"a\nb": entry(), "c\nd": entry()}),
}
