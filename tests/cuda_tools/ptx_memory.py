"""Memory of the PTX interpreter: the tensors that a kernel was given, and a block's shared memory; nothing else."""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from cuda_tools.ptx_text import PtxError

CHUNK = 16  # bytes of the widest access; windows begin and end at multiples, so that words of any size index them
SHARED_START = 1024  # what sm_80 and later keep for themselves of a block's window; an address 0 is then a mistake
UNWRITTEN = 0xFF  # every byte of what was never written: NaN in all floating-point types
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Range:
    """Bytes [start, end) of a memory, in an array that begins at the chunk in which `start` lies."""

    def __init__(self, start: int, end: int, chunks: np.ndarray) -> None:
        self.start, self.end = start, end
        self.first = start // CHUNK * CHUNK
        self.words = {size: chunks.view(dtype) for size, dtype in UNSIGNED.items()}
        self.words[CHUNK] = chunks.view(np.complex128)  # numpy's widest type; only ever copied

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return (addresses - self.first) // size


class Memory:
    """Ranges that may be read and written; addresses are int64 arrays, one a lane."""

    def __init__(self, name: str, ranges: Sequence[Range]) -> None:
        self.name = name
        self.ranges = list(ranges)

    def load(self, addresses: np.ndarray, dtype: npt.DTypeLike, count: int = 1) -> np.ndarray:
        """`count` neighbours of a type at each address, [lanes, count]."""
        size = np.dtype(dtype).itemsize * count
        found = None
        for range_, lanes in self._find(addresses, size):
            words = range_.words[size][range_.index(addresses[lanes], size)]
            if found is None:
                if len(words) == len(addresses):
                    return np.ascontiguousarray(words).view(dtype).reshape(-1, count)
                found = np.empty(len(addresses), words.dtype)
            found[lanes] = words
        assert found is not None
        return found.view(dtype).reshape(-1, count)

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Values [lanes, count] of one type, at each address. Raises PtxError for two different ones at one address."""
        size = values.itemsize * values.shape[1]
        for range_, lanes in self._find(addresses, size):
            words, index = range_.words[size], range_.index(addresses[lanes], size)
            new = np.ascontiguousarray(values[lanes])
            words[index] = new.view(words.dtype)[:, 0]
            if (words[index].view(np.uint8) != new.view(np.uint8).ravel()).any():
                raise PtxError(f"{self.name} store: lanes write different values to one address")

    def update(self, addresses: np.ndarray, values: np.ndarray, function: np.ufunc) -> None:
        """Atomically make each address's integer function(old, value)."""
        for range_, lanes in self._find(addresses, values.itemsize):
            words = range_.words[values.itemsize].view(values.dtype)
            function.at(words, range_.index(addresses[lanes], values.itemsize), values[lanes])

    def check(self, addresses: np.ndarray, size: int) -> None:
        """Raises PtxError for an access out of bounds or unaligned."""
        self._find(addresses, size)

    def fill(self, addresses: np.ndarray, size: int) -> None:
        """Make `size` bytes at each address what was never written."""
        self.store(addresses, np.full((len(addresses), size), UNWRITTEN, np.uint8))

    def _find(self, addresses: np.ndarray, size: int) -> list[tuple[Range, np.ndarray | slice]]:
        """Ranges that the accesses lie in, each with its lanes. Raises PtxError for one outside, or not aligned."""
        if (addresses % size).any():
            raise PtxError(
                f"{self.name} access of {size} bytes at {int(addresses[addresses % size != 0][0])}: unaligned"
            )
        low, high = int(addresses.min()), int(addresses.max())
        for range_ in self.ranges:
            if range_.start <= low and high + size <= range_.end:
                return [(range_, slice(None))]
        found: list[tuple[Range, np.ndarray | slice]] = []
        missing = np.ones(len(addresses), bool)
        for range_ in self.ranges:
            inside = (addresses >= range_.start) & (addresses + size <= range_.end) & missing
            if inside.any():
                found.append((range_, inside))
                missing &= ~inside
        if missing.any():
            raise PtxError(self._outside(int(addresses[missing][0]), size))
        return found

    def _outside(self, address: int, size: int) -> str:
        nearest = min(self.ranges, key=lambda one: max(one.start - address, address - one.end), default=None)
        where = "nothing" if nearest is None else f"bytes {nearest.start} to {nearest.end}"
        return f"{self.name} access of {size} bytes at {address} out of bounds: nearest is {where}"


def global_memory(tensors: Sequence[torch.Tensor]) -> Memory:
    """The tensors' own memory on the CPU, at its own addresses; each from its first element to its last."""
    ranges = []
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"the interpreter runs on CPU tensors, not on {tensor.device}")
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
            first, beyond = start // CHUNK * CHUNK, -(-end // CHUNK) * CHUNK
            window = (ctypes.c_uint8 * (beyond - first)).from_address(first)
            ranges.append(Range(start, end, np.ctypeslib.as_array(window)))
    return Memory("global", ranges)


def shared_memory(size: int) -> Memory:
    """A block's shared memory of `size` bytes, not yet written."""
    chunks = np.full(-(-size // CHUNK) * CHUNK, UNWRITTEN, np.uint8)
    return Memory("shared", [Range(SHARED_START, SHARED_START + size, chunks)] if size else [])
