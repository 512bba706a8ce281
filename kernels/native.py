"""The compiled kernels of this folder's .cpp files: the library that they make, loaded by ctypes.

It is built with the package where a C++ compiler is there. Without it, and for tensors that are not on a processor,
launchers run their plain version of reference.py: the same numbers up to rounding, several times slower. Threads are
as many as torch's; results do not depend on their number.
"""

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path

import torch

INTERFACE = 15  # of the compiled functions; this and native.cpp's number are raised together
LANES = 16  # floats of a vector
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of values, as the compiled functions number them
PATHS = ("portable", "avx2", "avx512")  # sets of instructions, as instructions.h numbers them
POINTER, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "sum_of_maxima": [POINTER, INT64, POINTER, INT64, INT64, POINTER, INT64],
    "channel_range": [POINTER, INT64, INT64, POINTER, POINTER, POINTER, INT64],
    "count_values": [POINTER, INT64, INT64, *[POINTER] * 5, INT64, INT64, INT64],
    "local_swaps": [POINTER, *[INT64] * 6, FLOAT, POINTER, INT64],
    "select_groups": [POINTER, *[INT64] * 4, POINTER, INT64],
    "select_weights": [POINTER, INT64, POINTER, *[INT64] * 4, POINTER, POINTER, INT64],
    "kept_sums": [POINTER, POINTER, INT64, INT64, POINTER, INT64],
    "weighted_squares": [POINTER, INT64, POINTER, POINTER, INT64, INT64, POINTER, POINTER, INT64],
    "count_not_finite": [POINTER, *[INT64] * 4],
    "squared_distances": [POINTER, POINTER, INT64, INT64, POINTER, INT64],
    "pack_mask": [POINTER, INT64, INT64, POINTER, INT64, INT64],
    "unpack_mask": [POINTER, INT64, INT64, POINTER, INT64, INT64],
    "pack_rows": [POINTER, POINTER, *[INT64] * 4, POINTER, INT64, INT64],
    "expand_rows": [*[POINTER] * 3, *[INT64] * 4, POINTER, INT64, INT64],
    "refine_rows": [*[POINTER] * 4, *[INT64] * 4, POINTER, POINTER, INT64, FLOAT, FLOAT, INT64],
    "best_path": [],
    "product_rows": [POINTER, POINTER, *[INT64] * 4, POINTER, POINTER, INT64, POINTER, *[INT64] * 3],
    "has_product_pairs": [],
    "product_pairs": [POINTER, POINTER, *[INT64] * 3, POINTER, POINTER, INT64, POINTER, *[INT64] * 3],
    "xor_of_words": [POINTER, INT64, INT64],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was built without a compiler.

    Raises ImportError where they were compiled from another version of the code.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.exists():
            loaded = ctypes.CDLL(str(path))
            number = getattr(loaded, "interface_number", lambda: 0)()
            if number != INTERFACE:
                raise ImportError(f"{path} has interface {number}, {INTERFACE} is needed; install streamprune again")
            for name, arguments in SIGNATURES.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = arguments, INT64  # nothing reads that of a void one
            return loaded
    return None


def paths() -> tuple[str, ...]:
    """Sets of instructions that this processor has, the best last; none where the package was built without kernels."""
    compiled = library()
    return PATHS[: compiled.best_path() + 1] if compiled is not None else ()


def library_for(x: torch.Tensor) -> ctypes.CDLL | None:
    """The compiled kernels where they take a tensor: on a processor."""
    return library() if x.device.type == "cpu" else None


def path_number(compiled: ctypes.CDLL, path: str | None) -> int:
    """Number of a set of instructions, of the best without a name. Raises ValueError for one that is not here."""
    best: int = compiled.best_path()
    if path is None:
        return best
    if path not in PATHS[: best + 1]:
        raise ValueError(f"no compiled path {path} here; there are: {', '.join(PATHS[: best + 1])}")
    return PATHS.index(path)
