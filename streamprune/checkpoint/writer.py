"""Files that are whole or absent: written to a temporary path, synced, then renamed. Their modes follow the umask.

A shard's tensors are made one after the other while it is written, so only the one being written is in memory. Its
metadata holds one key with one JSON string.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.reader import byte_view
from streamprune.checkpoint.safetensors_header import DTYPES
from streamprune.errors import OutputError
from streamprune.stopping import safe_point

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Pieces:
    """A tensor that is made while it is written: `make` yields CPU tensors, the consecutive pieces of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Staged:
    """A whole file at its temporary path: it can be read while it is synced, and is then published."""

    path: Path
    temporary: Path  # the file itself, until it is published
    digest: str  # sha256 of its bytes

    def sync(self) -> None:
        """Wait until it is on disk. Raises OutputError."""
        with output_errors(self.path):
            _sync_file(self.temporary)

    def publish(self) -> None:
        """Rename it to its place, once it is synced. Raises OutputError."""
        with output_errors(self.path):
            _rename(self.temporary, self.path)


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Pieces], temporary: Path, about: Any = None
) -> str:
    """Write tensors as one safetensors file, as stage_safetensors does, and publish it; returns its sha256."""
    staged = stage_safetensors(path, tensors, temporary, about)
    staged.sync()
    staged.publish()
    return staged.digest


def stage_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Pieces], temporary: Path, about: Any = None
) -> Staged:
    """Write tensors as one safetensors file that is to be `path`, into the folder `temporary`.

    `about` is plain data kept as JSON under the key "streamprune"; without it the one key is "format", which loaders of
    plain checkpoints look for. As in the reference implementation wide dtypes come first, so that all are aligned.
    """
    metadata = {"streamprune": canonical_json(about)} if about is not None else {"format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.dtype.itemsize * math.prod(tensor.shape)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    target = temporary / path.name
    with output_errors(path), target.open("wb", buffering=0) as file:

        def put(data: Any) -> None:
            digest.update(data)
            done = 0
            while done < len(data):
                done += file.write(data[done:])

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            for piece in tensor.make() if isinstance(tensor, Pieces) else (tensor,):
                safe_point()
                put(byte_view(piece.cpu().contiguous()))
                del piece  # before the next one is made
        if file.tell() != 8 + len(text) + offset:
            raise ValueError(f"{path}: the tensors' pieces are not of the sizes announced")
    return Staged(path, target, digest.hexdigest())


def write_json(path: Path, value: Any, temporary: Path) -> None:
    """Write plain data as indented JSON with sorted keys and a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", temporary)


def write_text(path: Path, text: str, temporary: Path) -> None:
    """Write a UTF-8 text file."""
    write_atomically(path, temporary, lambda target: target.write_bytes(text.encode()))


def write_atomically(path: Path, temporary: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a path in the folder `temporary`, sync it, rename it to `path`, sync the folder.

    `temporary` must lie on the same file system. Raises OutputError where the disk is full or the folder not writable.
    """
    target = temporary / path.name
    with output_errors(path):
        write(target)
        _sync_file(target)
        _rename(target, path)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); mend that and run again") from error


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _rename(target: Path, path: Path) -> None:
    target.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON without spaces, keys sorted: equal data, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
