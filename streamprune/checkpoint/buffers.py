"""Memory that large tensors are read into again and again.

An allocator gives large memory back to the system, and takes it anew for the next block: the system clears it first,
which takes longer than to read into it (docs/benchmarks.md).
"""

import math
import weakref

import torch

LEAST_BYTES = 1 << 20  # smaller tensors have memory of their own, which allocators keep


class Buffers:
    """Hands out tensors; the memory of one that nobody holds any more is the next one's of its size.

    Several threads may ask for them. No more is ever held than was in use at one time. With `pinned` it is page-locked,
    so that a GPU fetches it itself.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: dict[int, list[torch.Tensor]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        free = self._free.setdefault(size, [])
        try:  # not asked first: another thread may take the last one meanwhile
            memory = free.pop()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        lent = memory.numpy()  # lives as long as any view of the tensor does
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
