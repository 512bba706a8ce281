"""Hidden states in a scratch file, one chunk for each sequence, written and read by pwrite and pread.

No memory map: a full disk under a map is SIGBUS. Every chunk has a checksum, so that a torn file is noticed.
"""

import ctypes
import errno
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch
import xxhash

from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.reader import Empty, byte_view, new_tensor, read_into
from streamprune.checkpoint.writer import output_errors
from streamprune.errors import CheckpointError, OutputError

MAX_WRITING = 2  # chunks that wait for the disk, of one file


def allocated_bytes(status: os.stat_result) -> int:
    """Of a file's bytes those that it has space for: a sparse or a compressed one has less than its length."""
    return min(status.st_size, status.st_blocks * 512)


def reserve(descriptor: int, count: int) -> None:
    """Have space for a file of `count` bytes, so that a full disk is seen now; nothing where it has it from before.

    Where the file system cannot reserve (NFS 3), it is made that long, and a full disk is seen when it is written to:
    posix_fallocate would write to each of its blocks instead, for every file. Raises OSError.
    """
    status = os.fstat(descriptor)
    if allocated_bytes(status) >= count:
        return
    reason = _fallocate(descriptor, count)
    while reason == errno.EINTR:
        reason = _fallocate(descriptor, count)
    if reason in (errno.EOPNOTSUPP, errno.ENOSYS):
        os.truncate(descriptor, max(count, status.st_size))
    elif reason:
        raise OSError(reason, os.strerror(reason))


def _fallocate(descriptor: int, count: int) -> int:
    """The system's own call; 0, or the number of its error."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return ctypes.get_errno() if call(descriptor, 0, 0, count) else 0


def _reserved(path: Path, count: int) -> FileIO:
    """A scratch file, opened, with space for `count` bytes. Raises OutputError."""
    file = None
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+")
        reserve(file.fileno(), count)
    except OSError as error:
        if file is not None:
            file.close()
        if error.errno == errno.ELOOP:
            raise OutputError(f"{path}: is a symbolic link where hidden states belong; remove it") from error
        raise OutputError(
            f"{path}: no room for {count} bytes of hidden states ({error.strerror}); free space or give --scratch a "
            "larger folder"
        ) from error
    return file


class HiddenStates:
    """`sequences` chunks of shape [1, tokens, hidden] in one file.

    Holds the open file and the checksums (XXH3) of what was written. For blocks on a GPU (`for_gpu`) chunks pass
    through page-locked memory, which is reused, and a thread reads the chunk after the requested one, and writes, while
    the GPU computes.
    """

    def __init__(
        self, path: Path, sequences: int, tokens: int, hidden: int, dtype: torch.dtype, *, for_gpu: bool = False
    ) -> None:
        self.path = path
        self.shape = (1, tokens, hidden)
        self.dtype = dtype
        self.chunk_bytes = tokens * hidden * dtype.itemsize
        self.checksums: list[int | None] = [None] * sequences
        self._empty: Empty = Buffers(pinned=True).empty if for_gpu else new_tensor
        self._worker = ThreadPoolExecutor(1, "hidden-states") if for_gpu else None  # in the order of what it is given
        self._writing: deque[Future[None]] = deque()
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None
        self._file = _reserved(path, sequences * self.chunk_bytes)

    def __len__(self) -> int:
        return len(self.checksums)

    def write(self, index: int, states: torch.Tensor) -> None:
        """Store the hidden states of one sequence. With a GPU a disk error may be raised by a later call."""
        if tuple(states.shape) != self.shape:
            raise ValueError(f"hidden states of shape {tuple(states.shape)} where {self.shape} belongs")
        if self._worker is None:
            self._store(index, states.detach().to("cpu", self.dtype).contiguous())
            return
        self._ahead = None
        self._await_writing(MAX_WRITING - 1)
        chunk = self._empty(self.shape, self.dtype).copy_(states.detach())
        self._writing.append(self._worker.submit(self._store, index, chunk))

    def read(self, index: int) -> torch.Tensor:
        """Hidden states of one sequence, [1, tokens, hidden] on the CPU. Raises CheckpointError where they are torn."""
        if self._worker is None:
            return self._load(index)
        self._await_writing()
        found, self._ahead = self._ahead, None
        reading = found[1] if found is not None and found[0] == index else self._worker.submit(self._load, index)
        if index + 1 < len(self):
            self._ahead = index + 1, self._worker.submit(self._load, index + 1)
        return reading.result()

    def sync(self) -> None:
        """Make what was written survive a power loss. Raises OutputError if the disk fails."""
        self._await_writing()
        with output_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, once or more often; it stays, for a resumed job or a later block."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
        self._ahead, self._empty = None, new_tensor  # page-locked memory goes to the next file
        self._file.close()

    def _await_writing(self, most: int = 0) -> None:
        """Wait until at most `most` chunks are still to be written. Raises OutputError where the disk did not."""
        while len(self._writing) > most:
            try:
                oldest = self._writing.popleft()
            except IndexError:  # a thread that syncs took it
                return
            oldest.result()

    def _store(self, index: int, chunk: torch.Tensor) -> None:
        view = byte_view(chunk)
        with output_errors(self.path):
            _write_at(self._file.fileno(), view, index * self.chunk_bytes)
        self.checksums[index] = xxhash.xxh3_64_intdigest(view)

    def _load(self, index: int) -> torch.Tensor:
        chunk = self._empty(self.shape, self.dtype)
        read_into(self._file.fileno(), chunk, index * self.chunk_bytes, self.path)
        if xxhash.xxh3_64_intdigest(byte_view(chunk)) != self.checksums[index]:
            raise CheckpointError(f"{self.path}: hidden states of sequence {index} are damaged")
        return chunk


class RowFile:
    """Rows [sequences, rows, width] in one file, read and written some at a time.

    For what lives while a block is worked on: there is no checksum, and nothing is left to be gone on with.
    """

    def __init__(self, path: Path, sequences: int, rows: int, width: int, dtype: torch.dtype) -> None:
        self.path, self.rows, self.width, self.dtype = path, rows, width, dtype
        self.row_bytes = width * dtype.itemsize
        self._file = _reserved(path, sequences * rows * self.row_bytes)

    def write(self, sequence: int, first: int, rows: torch.Tensor) -> None:
        """Store consecutive rows [n, width] from the place `first` on."""
        view = byte_view(rows.detach().to("cpu", self.dtype).contiguous())
        with output_errors(self.path):
            _write_at(self._file.fileno(), view, self._offset(sequence, first))

    def read(self, sequence: int, first: int, count: int) -> torch.Tensor:
        """Consecutive rows [count, width] on the CPU."""
        rows = torch.empty(count, self.width, dtype=self.dtype)
        read_into(self._file.fileno(), rows, self._offset(sequence, first), self.path)
        return rows

    def take(self, sequence: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ascending places int64 [n], [n, width] on the CPU."""
        found = torch.empty(len(rows), self.width, dtype=self.dtype)
        for place, first, count in _runs(rows):
            part = found[place : place + count]
            read_into(self._file.fileno(), part, self._offset(sequence, first), self.path)
        return found

    def put(self, sequence: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Store values [n, width] at ascending places int64 [n]."""
        for place, first, count in _runs(rows):
            self.write(sequence, first, values[place : place + count])

    def close(self) -> None:
        """Close the file and remove it."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _offset(self, sequence: int, row: int) -> int:
        return (sequence * self.rows + row) * self.row_bytes


def _runs(rows: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Of ascending numbers int64 [n] the runs without a gap: place of the first, the first, how many."""
    if not len(rows):
        return
    starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    numbers = rows[starts[:-1]].tolist()
    for start, end, number in zip(starts, starts[1:], numbers, strict=False):
        yield start, number, end - start


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
