"""Files that are whole or absent: written beside their place, synced, then renamed.

`safetensors` writes several metadata keys in random order, so a shard carries at most one key with one JSON string.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from streamprune.errors import OutputError


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], temporary: Path, about: Any = None) -> None:
    """Write CPU tensors as one safetensors file; `about` is plain data kept as JSON under the key "streamprune".

    Without it the one key is "format", which loaders of plain checkpoints look for.
    """
    metadata = {"streamprune": canonical_json(about)} if about is not None else {"format": "pt"}
    write_atomically(path, temporary, lambda target: save_file(tensors, target, metadata=metadata))


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
    try:
        write(target)
        target.chmod(0o644)  # safetensors makes files that only their owner reads
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        target.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); mend that and run again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{path}: cannot be written ({error}); mend that and run again") from error


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
