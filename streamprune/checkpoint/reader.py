"""A Hugging Face checkpoint folder, read tensor by tensor.

Only headers are read when a checkpoint is opened. Safetensors are read by `pread` into fresh memory (a memory map of a
truncated file is SIGBUS, which no error message survives); `.bin` shards by torch.load with mmap and weights_only, one
shard at a time, copied and released.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from streamprune.checkpoint.safetensors_header import TensorEntry, read_header
from streamprune.checkpoint.torch_file import load_bin
from streamprune.checkpoint.untrusted import MAX_KEY_CHARACTERS, open_regular, parse_json, read_json
from streamprune.errors import CheckpointError, NumericsError
from streamprune.stopping import safe_point
from streamprune_kernels import all_finite

SAFETENSORS_INDEX, BIN_INDEX = INDEX_FILES = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SAFETENSORS_FILE, BIN_FILE = "model.safetensors", "pytorch_model.bin"
SAMPLE_BYTES = 65_536  # of each tensor, for the fingerprint
Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # a tensor of a shape and dtype, uninitialised
PIECE_BYTES = 1 << 23  # of a large tensor that is copied: allocators reuse pieces of this size, not larger ones


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint: the file it lies in, its dtype and shape; `entry` for safetensors only.

    slice_of: it is that tensor's slice of that number along the first dimension.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    entry: TensorEntry | None
    slice_of: tuple[str, int] | None = None

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: which tensor lies where, by the checkpoint's own names."""

    folder: Path
    tensors: dict[str, TensorSource]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors on the CPU in their stored dtypes, each in memory of its own.

        Raises CheckpointError for a missing tensor or a file that ends early, NumericsError for NaN or infinity.
        """
        tensors = self.read_unchecked(names)
        self.check_finite(tensors)
        return tensors

    def read_unchecked(self, names: Iterable[str], empty: Empty = new_tensor) -> dict[str, torch.Tensor]:
        """Like `read`, without checking the values: it computes nothing, so it does not slow threads that do.

        `empty` makes the tensors that are read into.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.tensors:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete")
        result: dict[str, torch.Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.tensors[name].path, []).append(name)
        for path, in_file in by_file.items():
            first = self.tensors[in_file[0]]
            read = self._read_bin if first.entry is None else self._read_raw
            result.update(read(path, in_file, empty))
        return {name: result[name] for name in wanted}

    def will_read(self, names: Iterable[str]) -> None:
        """Hint to the system to fetch the named tensors from disk; nothing waits for it, and it cannot fail."""
        sources = [self.tensors[name] for name in names if name in self.tensors]
        for path in {source.path for source in sources if source.entry is not None}:
            with suppress(AttributeError, CheckpointError, OSError), _opened(path) as file:
                for entry in (source.entry for source in sources if source.path == path and source.entry is not None):
                    os.posix_fadvise(file.fileno(), entry.offset_bytes, entry.size_bytes, os.POSIX_FADV_WILLNEED)

    def row_reader(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from row numbers int64 [n] to those rows [n, width] of a matrix, which itself is not read."""
        source = self.tensors[name]
        matrix = _of_bin(load_bin(source.path), name, source) if source.entry is None else None

        def rows_of(rows: torch.Tensor) -> torch.Tensor:
            wanted, places = rows.unique(return_inverse=True)
            if matrix is not None:
                found = matrix[wanted]
            else:
                entry = _entry_of(source)
                found = torch.empty(len(wanted), *entry.shape[1:], dtype=entry.dtype)
                row_bytes = entry.size_bytes // entry.shape[0]
                with _opened(source.path) as file:
                    for place, row in enumerate(wanted.tolist()):
                        start = entry.offset_bytes + row * row_bytes
                        read_into(file.fileno(), found[place], start, source.path)
            self.check_finite({name: found})
            return found[places]

        return rows_of

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor in pieces of whole rows, at most PIECE_BYTES unless a row is longer; checked like `read`."""
        source = self.tensors[name]
        if not source.shape or source.size_bytes <= PIECE_BYTES:
            yield self.read([name])[name]
            return
        matrix = _of_bin(load_bin(source.path), name, source) if source.entry is None else None
        row_bytes = source.size_bytes // source.shape[0]
        rows = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, source.shape[0], rows):
            safe_point()
            count = min(rows, source.shape[0] - first)
            if matrix is not None:
                piece = matrix[first : first + count].clone()
            else:
                entry = _entry_of(source)
                piece = torch.empty(count, *source.shape[1:], dtype=source.dtype)
                with _opened(source.path) as file:
                    read_into(file.fileno(), piece, entry.offset_bytes + first * row_bytes, source.path)
            self.check_finite({name: piece})
            yield piece

    def check_finite(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise NumericsError, naming the tensor, where one of this checkpoint's holds NaN or infinity."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise NumericsError(f"{self.folder}: tensor {name} holds NaN or infinity; it cannot be pruned")

    def _read_raw(self, path: Path, names: list[str], empty: Empty) -> dict[str, torch.Tensor]:
        result = {}
        with _opened(path) as file:
            for name in sorted(names, key=lambda name: _entry_of(self.tensors[name]).offset_bytes):
                safe_point()
                entry = _entry_of(self.tensors[name])
                tensor = empty(entry.shape, entry.dtype)
                read_into(file.fileno(), tensor, entry.offset_bytes, path)
                result[name] = tensor
        return result

    def _read_bin(self, path: Path, names: list[str], empty: Empty) -> dict[str, torch.Tensor]:
        state = load_bin(path)
        found = {name: _of_bin(state, name, self.tensors[name]) for name in names}
        return {name: empty(tuple(tensor.shape), tensor.dtype).copy_(tensor) for name, tensor in found.items()}

    def sliced(self, names: Iterable[str]) -> "Checkpoint":
        """This checkpoint with the slices along the first dimension of the named tensors, "NAME[0]" and so on, in their
        places. Raises CheckpointError for a tensor without that dimension.
        """
        tensors = dict(self.tensors)
        for name in names:
            whole = tensors.pop(name)
            if not whole.shape:
                raise CheckpointError(f"{self.folder}: tensor {name} is one number, and no row of experts")
            slices = {f"{name}[{place}]": _slice(name, whole, place) for place in range(whole.shape[0])}
            if twice := next((part for part in slices if part in tensors), None):
                raise CheckpointError(f"{self.folder}: tensor {twice} is there beside {name}, of which it is a slice")
            tensors.update(slices)
        return Checkpoint(self.folder, tensors)

    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and 64 KiB from the middle of each tensor.

        Tells two fine-tunes of one model apart without reading them whole.
        """
        digest = hashlib.sha256()
        for name, source in sorted(self.tensors.items()):
            digest.update(f"{name} {source.dtype} {source.shape}\n".encode())
            if source.entry is not None:
                start = source.entry.offset_bytes + max(0, source.size_bytes - SAMPLE_BYTES) // 2
                with _opened(source.path) as file:
                    digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, source.size_bytes), start))
        for path in sorted({source.path for source in self.tensors.values() if source.entry is None}):
            state = load_bin(path)
            for name in sorted(state):
                flat = state[name].detach().reshape(-1).view(torch.uint8)
                start = max(0, flat.numel() - SAMPLE_BYTES) // 2
                digest.update(flat[start : start + SAMPLE_BYTES].numpy().tobytes())
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with safetensors or `pytorch_model*.bin`, sharded or single.

    Raises CheckpointError where files are missing, malformed, or disagree with their index.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that holds config.json and the weights")
    for single, index, opener in (  # a single file goes before an index, as in from_pretrained
        (SAFETENSORS_FILE, SAFETENSORS_INDEX, _open_safetensors),
        (BIN_FILE, BIN_INDEX, _open_bin),
    ):
        if (folder / single).exists():
            return Checkpoint(folder, opener(folder / single))
        if (folder / index).exists():
            return Checkpoint(folder, _open_sharded(folder, folder / index, opener))
    raise CheckpointError(f"{folder}: holds neither {SAFETENSORS_FILE} nor {BIN_FILE}, sharded or single")


def open_index(path: Path) -> Checkpoint:
    """Open the safetensors files that an index beside them names; errors as of `open_checkpoint`."""
    return Checkpoint(path.parent, _open_sharded(path.parent, path, _open_safetensors))


def open_file(path: Path) -> Checkpoint:
    """Open one safetensors file by itself."""
    return Checkpoint(path.parent, _open_safetensors(path))


def read_about(path: Path) -> Any:
    """The plain data that `write_safetensors` kept in a file's metadata; None where there is none."""
    _, metadata = read_header(path)
    try:
        return parse_json(metadata["streamprune"].encode()) if "streamprune" in metadata else None
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata is not valid JSON ({error})") from error


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of a CPU tensor's bytes in row-major order."""
    return hashlib.sha256(byte_view(tensor.contiguous())).hexdigest()


def read_into(descriptor: int, tensor: torch.Tensor, offset_bytes: int, path: Path) -> None:
    """Fill a contiguous CPU tensor from a file by pread. Raises CheckpointError where the file ends early."""
    view = byte_view(tensor)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset_bytes + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise CheckpointError(f"{path}: ends before byte {offset_bytes + len(view)}; the file is truncated")
        done += count


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, without a copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()  # a buffer to type checkers from Python 3.12 on
    return memoryview(array)


def _slice(name: str, whole: TensorSource, place: int) -> TensorSource:
    shape, entry = whole.shape[1:], whole.entry
    if entry is not None:
        size = whole.dtype.itemsize * math.prod(shape)
        entry = replace(entry, shape=shape, offset_bytes=entry.offset_bytes + place * size, size_bytes=size)
    return TensorSource(whole.path, whole.dtype, shape, entry, (name, place))


def _of_bin(state: Mapping[str, torch.Tensor], name: str, source: TensorSource) -> torch.Tensor:
    """A tensor of a .bin shard, or a slice of one; in its mapped memory."""
    whole, place = source.slice_of or (name, None)
    return state[whole].detach() if place is None else state[whole].detach()[place]


def _opened(path: Path) -> BinaryIO:
    return open_regular(path)[0]


def _entry_of(source: TensorSource) -> TensorEntry:
    if source.entry is None:
        raise TypeError(f"{source.path} is not a safetensors file")
    return source.entry


def _open_sharded(folder: Path, index_path: Path, opener: Any) -> dict[str, TensorSource]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{index_path}: has no weight_map from tensor names to file names")
    shards: dict[str, dict[str, TensorSource]] = {}
    tensors: dict[str, TensorSource] = {}
    for name, file_name in weight_map.items():
        if (
            len(file_name) > MAX_KEY_CHARACTERS
            or file_name != Path(file_name).name
            or file_name.startswith(".")
            or not file_name.isprintable()
        ):
            raise CheckpointError(f"{index_path}: {file_name[:80]!r} is not the name of a file in the folder")
        if file_name not in shards:
            shards[file_name] = opener(folder / file_name)
        if name not in shards[file_name]:
            raise CheckpointError(f"{index_path}: tensor {name} is not in {file_name}, where the index has it")
        tensors[name] = shards[file_name][name]
    return tensors


def _open_safetensors(path: Path) -> dict[str, TensorSource]:
    entries, _ = read_header(path)
    return {name: TensorSource(path, entry.dtype, entry.shape, entry) for name, entry in entries.items()}


def _open_bin(path: Path) -> dict[str, TensorSource]:
    return {name: TensorSource(path, t.dtype, tuple(t.shape), None) for name, t in load_bin(path).items()}
