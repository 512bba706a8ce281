"""Many tensors read at once, again and again: large pieces of files, several on their way, into memory that stays.

By direct I/O, where the file system has it: nothing is copied, and what is read once in every pass does not push other
files out of the page cache. docs/benchmarks.md has what it is worth.
"""

import fcntl
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch

from streamprune.checkpoint.reader import Checkpoint, TensorSource, byte_view
from streamprune.checkpoint.safetensors_header import TensorEntry
from streamprune.checkpoint.torch_file import load_bin
from streamprune.checkpoint.untrusted import open_regular
from streamprune.errors import CheckpointError

ALIGNMENT_BYTES = 4096  # of places in files and in memory, as direct I/O wants them
PIECE_BYTES = 8 << 20  # of one request
READERS = 4  # requests on their way
GAP_BYTES = 1 << 20  # of other tensors between two: reading them costs less than another request


@dataclass(frozen=True)
class Span:
    """A range of a file, from byte `start`, and its place in the memory; tensors take up `needed` bytes of it."""

    path: Path
    start: int
    needed: int
    place: int


@dataclass(frozen=True)
class Layout:
    """Where tensors lie in memory that they are read into together.

    spans   read as they are; `moved` (from, to, bytes) are tensors that lie in them at no multiple of their dtype
    copied  tensors of .bin files, which have a form of their own
    """

    spans: tuple[Span, ...]
    moved: tuple[tuple[int, int, int], ...]
    copied: dict[Path, tuple[str, ...]]
    tensors: dict[str, TensorSource]
    places: dict[str, int]
    size_bytes: int

    @property
    def read_bytes(self) -> int:
        """From disk."""
        copied = sum(self.tensors[name].size_bytes for names in self.copied.values() for name in names)
        return copied + sum(span.needed for span in self.spans)

    def views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, in memory that they were read into, without a copy."""
        return {name: _view(memory, self.places[name], source) for name, source in self.tensors.items()}


@dataclass
class _Room:
    """Memory that is handed out from its start on."""

    size_bytes: int = 0

    def take(self, count: int) -> int:
        place = self.size_bytes
        self.size_bytes += _up(count)
        return place


def lay_out(checkpoint: Checkpoint, names: Iterable[str]) -> Layout:
    """Plan the reading of tensors of a checkpoint, which must be there."""
    tensors = {name: checkpoint.tensors[name] for name in names}
    entries = {name: source.entry for name, source in tensors.items() if source.entry is not None}
    room, spans = _Room(), list[Span]()
    places: dict[str, int] = {}
    by_file: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset_bytes):
        by_file.setdefault(tensors[name].path, {})[name] = entry
    for path, inside in by_file.items():
        for some in _near(inside):
            start = inside[some[0]].offset_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
            needed = inside[some[-1]].offset_bytes + inside[some[-1]].size_bytes - start
            spans.append(Span(path, start, needed, room.take(needed)))
            places |= {name: spans[-1].place + inside[name].offset_bytes - start for name in some}
    moved = []
    for name in [name for name, place in places.items() if place % tensors[name].dtype.itemsize]:
        moved.append((places[name], room.take(tensors[name].size_bytes), tensors[name].size_bytes))
        places[name] = moved[-1][1]
    copied: dict[Path, tuple[str, ...]] = {}
    for name in [name for name in tensors if name not in entries]:
        copied[tensors[name].path] = (*copied.get(tensors[name].path, ()), name)
        places[name] = room.take(tensors[name].size_bytes)
    return Layout(tuple(spans), tuple(moved), copied, tensors, places, room.size_bytes)


def aligned_memory(size_bytes: int) -> torch.Tensor:
    """uint8 [size_bytes] as direct I/O wants it, in huge pages where there are any: reading is 1.4 times as fast."""
    pages = mmap.mmap(-1, _up(max(size_bytes, 1)))
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@dataclass
class Reading:
    """Tensors on their way into memory."""

    layout: Layout
    memory: torch.Tensor
    pieces: list[Future[None]]

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for them; their views by name. Raises CheckpointError where a file cannot be read or ends early."""
        for piece in self.pieces:
            piece.result()
        for start, end, count in self.layout.moved:
            self.memory[end : end + count] = self.memory[start : start + count]
        return self.layout.views(self.memory)


@dataclass
class Reader:
    """Reads what layouts say, in the order in which it is asked; a context in which its files are open."""

    direct: bool = True
    _files: dict[Path, tuple[int, bool]] = field(default_factory=dict)  # descriptor, and whether it reads directly
    _open: ExitStack = field(default_factory=ExitStack)
    _opening: Lock = field(default_factory=Lock)

    def __enter__(self) -> "Reader":
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()

    def start(self, layout: Layout, memory: torch.Tensor) -> Reading:
        """Begin to read into memory of at least the layout's size."""
        pieces = [
            self._pool.submit(self._read_piece, span, first, memory)
            for span in layout.spans
            for first in range(0, span.needed, PIECE_BYTES)
        ]
        pieces += [self._pool.submit(_copy_bin, layout, path, memory) for path in layout.copied]
        return Reading(layout, memory, pieces)

    def _read_piece(self, span: Span, first: int, memory: torch.Tensor) -> None:
        descriptor, direct = self._file(span.path)
        needed = min(PIECE_BYTES, span.needed - first)
        asked = _up(needed) if direct else needed  # the last of a file comes short
        view = byte_view(memory[span.place + first : span.place + first + asked])
        done = 0
        while done < needed:
            try:
                count = os.preadv(descriptor, [view[done:]], span.start + first + done)
            except OSError as error:
                raise CheckpointError(f"{span.path}: cannot be read ({error.strerror})") from error
            if count == 0:
                end = span.start + first + needed
                raise CheckpointError(f"{span.path}: ends before byte {end}; the file is truncated")
            done += count
        if not direct:
            _forget(descriptor, span.start + first, needed)

    def _file(self, path: Path) -> tuple[int, bool]:
        with self._opening:
            if path not in self._files:
                file = self._open.enter_context(open_regular(path)[0])
                self._files[path] = file.fileno(), self.direct and _made_direct(file.fileno())
            return self._files[path]


def _made_direct(descriptor: int) -> bool:
    """Have a file read past the page cache; False where its system cannot."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(descriptor, [byte_view(aligned_memory(ALIGNMENT_BYTES))], 0)
    except (AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def _forget(descriptor: int, start: int, count: int) -> None:
    with suppress(AttributeError, OSError):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def _copy_bin(layout: Layout, path: Path, memory: torch.Tensor) -> None:
    state = load_bin(path)
    for name in layout.copied[path]:
        _view(memory, layout.places[name], layout.tensors[name]).copy_(state[name].detach())


def _near(entries: dict[str, TensorEntry]) -> list[list[str]]:
    """Names in order of their places, cut where more than GAP_BYTES lie between two."""
    runs: list[list[str]] = []
    end = 0
    for name, entry in entries.items():
        if not runs or entry.offset_bytes - end > GAP_BYTES:
            runs.append([])
        runs[-1].append(name)
        end = entry.offset_bytes + entry.size_bytes
    return runs


def _view(memory: torch.Tensor, place: int, source: TensorSource) -> torch.Tensor:
    return memory[place : place + source.size_bytes].view(source.dtype).view(source.shape)


def _up(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
