"""`.bin` files that are none, hold code, or claim more than their bytes."""

import functools
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attacks.catalogue import Catalogue, Make

CATALOGUE = Catalogue()
SINGLE, BIN = "model.safetensors", "pytorch_model.bin"


class Payload:
    """Unpickles into a call that makes a folder where it must not."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def as_bin(make_content: Callable[[], Any]) -> Make:
    """The llama with a pytorch_model.bin in place of its safetensors."""

    def make(case: Path) -> None:
        (case / "model" / SINGLE).unlink()
        with warnings.catch_warnings(action="ignore"):  # that a kind of tensor is new, or old
            content = make_content()
        path = case / "model" / BIN
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return make


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    path = Path(f"/dev/shm/malformed-{os.getpid()}.zip")
    try:
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in records.items():
                file.writestr(name, content)
        return path.read_bytes()
    finally:
        path.unlink()


def pickled_tensor(shape: tuple[int, ...], stride: tuple[int, ...], numel: int, stored: int) -> bytes:
    """An archive with one tensor as torch.save writes it, with sizes of our choice."""
    ints = lambda values: b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"  # noqa: E731
    data = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n"
    data += b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x08"
    data += struct.pack("<q", numel) + b"tQK\x00" + ints(shape) + ints(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    data += b"Rs."
    return archive({"archive/data.pkl": data, "archive/data/0": b"\0" * stored, "archive/version": b"3\n"})


BINS: dict[str, tuple[Callable[[], Any], str]] = {
    "code in the pickle": (lambda: {"a": torch.ones(1), "b": Payload()}, "is not a .bin of plain tensors"),
    "a bare pickle of code": (lambda: pickle.dumps(Payload()), "is not a .bin of plain tensors"),
    "code of protocol 4": (lambda: pickle.dumps(Payload(), protocol=4), "is not a .bin of plain tensors"),
    "code in the archive's pickle": (
        lambda: archive({"archive/data.pkl": pickle.dumps(Payload(), 2), "archive/version": b"3\n"}),
        "is not a .bin of plain tensors",
    ),
    "empty": (lambda: b"", "is not a .bin of plain tensors"),
    "zeros": (lambda: b"\0" * 64, "is not a .bin of plain tensors"),
    "text": (lambda: b"weights", "is not a .bin of plain tensors"),
    "HTML": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "is not a .bin of plain tensors"),
    "a torn zip": (lambda: b"PK\3\4 not a zip", "is not a .bin of plain tensors"),
    "an empty zip": (lambda: b"PK\5\6" + b"\0" * 18, "is not a .bin of plain tensors"),
    "a zip without a pickle": (lambda: archive({"archive/version": b"3\n"}), "is not a .bin of plain tensors"),
    "a zip of text": (lambda: archive({"notes.txt": b"hello"}), "is not a .bin of plain tensors"),
    "a pickle that ends early": (lambda: archive({"archive/data.pkl": b"\x80\x02}"}), "is not a .bin of plain tensors"),
    "a zip bomb": (
        lambda: archive({"archive/data.pkl": b"0" * 200_000_000}, zipfile.ZIP_DEFLATED),
        "is compressed; torch.save compresses none",
    ),
    "a pickle of three megabytes": (
        lambda: archive({"archive/data.pkl": b"\x80\x02" + b"}0" * 1_500_000 + b"."}),
        "a pickle of 3000003 bytes where at most 2097152 are read",
    ),
    "30,000 records": (
        lambda: archive({f"archive/data/{i}": b"" for i in range(30_000)}),
        "30000 records where at most 20000 are read",
    ),
    "a list": (lambda: [torch.ones(1)], "is not a state dict of tensors"),
    "a dict of dicts": (lambda: {"a": {"b": torch.ones(1)}}, "is not a state dict of tensors"),
    "a dict of numbers": (lambda: {"a": 1}, "is not a state dict of tensors"),
    "keys of numbers": (lambda: {1: torch.ones(1)}, "tensor 1 has no name of plain text"),
    "keys of other letters": (lambda: {"\N{SNOWMAN}": torch.ones(1)}, "has no name of plain text"),
    "an expanded view": (lambda: {"a": torch.ones(1).expand(10**6, 10**6)}, "claims [1000000, 1000000] of a storage"),
    "an expanded row": (lambda: {"a": torch.ones(64).expand(10**6, 64)}, "claims [1000000, 64] of a storage"),
    "a sparse tensor": (lambda: {"a": torch.eye(3).to_sparse()}, "only plain numbers are read"),
    "a compressed sparse tensor": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "only plain numbers are read"),
    "a meta tensor": (lambda: {"a": torch.empty(10**6, 10**6, device="meta")}, "only plain numbers are read"),
    "complex numbers": (lambda: {"a": torch.ones(3, dtype=torch.complex64)}, "only plain numbers are read"),
    "float8": (lambda: {"a": torch.ones(3).to(torch.float8_e4m3fn)}, "is torch.float8_e4m3fn: the source is quantised"),
    "quantised": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        "is torch.qint8: the source is quantised",
    ),
    "many views of one storage": (
        lambda: (lambda base: {f"{i}": base.view(100, 1000) for i in range(50)})(torch.ones(100_000)),
        "its tensors claim 20000000 bytes",
    ),
    "a storage larger than its record": (lambda: pickled_tensor((10**6,), (1,), 10**6, 4), "is not a .bin"),
    "a storage of 2^50 numbers": (lambda: pickled_tensor((2**50,), (1,), 2**50, 4), "is not a .bin"),
    "a shape larger than its storage": (lambda: pickled_tensor((10**6,), (1,), 1, 4), "is not a .bin"),
    "strides of zero": (lambda: pickled_tensor((10**6, 10**6), (0, 0), 1, 4), "claims [1000000, 1000000] of a storage"),
    "a stride below zero": (lambda: pickled_tensor((2,), (-1,), 2, 8), "is not a .bin"),
    "a length below zero": (lambda: pickled_tensor((-5,), (1,), 2, 8), "is not a .bin"),
    "a storage of -1 numbers": (lambda: pickled_tensor((1,), (1,), -1, 8), "is not a .bin"),
}
for fault, (make_content, message) in BINS.items():
    CATALOGUE.put(f"bin: {fault}", "llama", "plan", 3, message, as_bin(make_content), "one file, one fault")


def cut_bin(case: Path, share: float) -> None:
    path = case / "model" / "pytorch_model-00002-of-00002.bin"
    os.truncate(path, int(path.stat().st_size * share))


def harmed_bin(case: Path, part: bytes, places: int) -> None:
    path = case / "model" / "pytorch_model-00001-of-00002.bin"
    content = bytearray(path.read_bytes())
    at = content.index(part) + places
    content[at : at + 4] = b"\xff" * 4
    path.write_bytes(content)


for share in (0.0, 0.01, 0.5, 0.9, 0.999):
    make = functools.partial(cut_bin, share=share)
    CATALOGUE.put(f"bin shard cut at {share:.1%}", "opt-bin", "plan", 3, "is not a .bin", make, "a stopped download")
for part, places in ((b"storage", 0), (b"_rebuild_tensor_v2", 4), (b"HalfStorage", 30), (b"PK\1\2", 0)):
    make = functools.partial(harmed_bin, part=part, places=places)
    what = f"bin shard harmed {places} bytes after {part!r}"
    CATALOGUE.put(what, "opt-bin", "plan", 3, "is not a .bin", make, "four bytes of ones in its records")


@CATALOGUE.entry("opt-bin", "plan", 3, "is not a regular file")
def a_bin_shard_that_is_a_pipe(case: Path) -> None:
    """As for safetensors."""
    path = case / "model" / "pytorch_model-00002-of-00002.bin"
    path.unlink()
    os.mkfifo(path)
