"""Memory that is reused for reading large tensors.

An allocator returns large memory to the system and asks for it again at the next block. The system clears it first,
which takes longer than reading into it (docs/benchmarks.md).
"""

import math
import weakref

import torch

MIN_BYTES = 1 << 20  # smaller tensors have memory of their own, which allocators keep


class Buffers:
    """Hands out tensors; once a tensor is released, its memory serves the next one of its size.

    Several threads may ask for them. Never holds more than was in use at one time. With `pinned` the memory is
    page-locked, so that a GPU can fetch it.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._free: dict[int, list[torch.Tensor]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_BYTES:
            return torch.empty(shape, dtype=dtype)
        free = self._free.setdefault(size, [])
        try:  # not asked first: another thread may take the last one meanwhile
            memory = free.pop()
        except IndexError:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        lent = memory.numpy()  # lives as long as any view of the tensor does
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
