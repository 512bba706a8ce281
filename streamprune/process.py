"""The process that computes: its memory and its threads.

`map_large_pieces` changes the whole process, so programs call it, as the command line does; library functions do not.
"""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE_PIECE_BYTES = 1 << 23  # with smaller ones peaks vary less, but more activations take new memory
FREE_TOP_BYTES = 1 << 26  # kept at the end of the heap; glibc forgets its own value when the other is set


@contextmanager
def threads_left(others: int) -> Iterator[None]:
    """Compute with so many threads that `others` have processors left.

    OpenMP threads spin at barriers, so one descheduled thread stalls all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - others))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far (VmHWM; ru_maxrss would start at the parent's)."""
    status = Path("/proc/self/status")
    peak = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if peak:
        return int(peak[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def map_large_pieces() -> None:
    """Have every piece of LARGE_PIECE_BYTES or more mapped by itself, so that freeing it returns it to the system.

    By default glibc raises that size to the size freed last, up to 32 MiB, and then takes such pieces from the heap.
    How much small pieces fragment it differs from block to block, by tens of MB: the more blocks, the higher the peak.
    Applies to the whole process and changes no result. Does nothing without glibc.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, LARGE_PIECE_BYTES)
        option(M_TRIM_THRESHOLD, FREE_TOP_BYTES)


def return_free_memory() -> None:
    """Return freed memory to the system; glibc would keep what small pieces leave. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
