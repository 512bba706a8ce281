"""Mask refinement where the weights lie: `refine_rows`.

On a GPU the kernel of refine.cu runs, on a processor that of refine.cpp; reference.py has the definition.
`refine_rows_cuda` is the kernel alone: tensors on one device; `run` (launch.py) is the device, tests put a CPU there.
"""

import itertools
from functools import cache

import torch
from torch.nn import functional

from streamprune_kernels import launch, reference
from streamprune_kernels.launch import Launch, Run, on_device
from streamprune_kernels.native import LANES, library_for

THREADS = 256  # refine.cu's own constant
BLOCK_ROWS = 8  # one for each warp
MAX_PLACES = 64  # of a group: a mask is a word
MAX_PATTERNS = 256  # of a group that a processor tries one by one
MAX_SHARED_BYTES = 48 * 1024  # of a block, on every device


def refine_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    q: torch.Tensor,
    moments: torch.Tensor,
    places: torch.Tensor,
    off_diagonal: float,
    least_gain: float,
) -> int:
    """One pass of coordinate descent over the groups of every row; returns how many groups changed.

    The tensors are those of reference.refine_rows, which is the definition, and contiguous; `places` on any device.
    """
    run = launch.runner_for(weight) if weight.numel() else None
    if run is not None:
        return refine_rows_cuda(weight, keep, q, moments, places, off_diagonal, least_gain, run=run)
    compiled = library_for(weight)
    if compiled is None:
        return reference.refine_rows(weight, keep, q, moments, places, off_diagonal, least_gain)
    for tensor in (weight, keep, q, moments):
        if not tensor.is_contiguous():
            raise ValueError("refine_rows works in place on contiguous tensors")
    kept_places, terms = _cost_terms(tuple(map(tuple, places.tolist())), places.shape[1])
    tensors = (tensor.data_ptr() for tensor in (weight, keep, q, moments))
    sizes = *weight.shape, places.shape[1], len(kept_places)
    patterns = kept_places.data_ptr(), terms.data_ptr(), terms.shape[1]
    changes = off_diagonal, least_gain
    return int(compiled.refine_rows(*tensors, *sizes, *patterns, *changes, torch.get_num_threads()))


@cache
def _cost_terms(places: tuple[tuple[bool, ...], ...], m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns as uint8, and the terms that each one's cost sums, float32 [M + M(M-1)/2 + 1, patterns rounded up].

    The last row is what a cost starts with: infinity in the lanes that are no pattern.
    """
    kept = torch.tensor(places, dtype=torch.bool).view(-1, m)
    if len(kept) > MAX_PATTERNS:
        raise ValueError(f"{len(kept)} patterns are too many to try one by one")
    dropped = (~kept).to(torch.float32).T
    pairs = [dropped[i] * dropped[j] for i, j in itertools.combinations(range(m), 2)]
    padding = (0, -len(kept) % LANES)
    terms = functional.pad(torch.cat([dropped, torch.stack(pairs)]), padding)
    start = functional.pad(torch.zeros(1, len(kept)), padding, value=torch.inf)
    return kept.to(torch.uint8), torch.cat([terms, start]).contiguous()


def refine_rows_cuda(
    weight: torch.Tensor,
    keep: torch.Tensor,
    q: torch.Tensor,
    moments: torch.Tensor,
    places: torch.Tensor,
    off_diagonal: float,
    least_gain: float,
    *,
    run: Run = on_device,
) -> int:
    """As `refine_rows`. A group is left alone where a change of its cost is not a number.

    The bits are the same at every run. Raises ValueError for tensors that do not fit.
    """
    (rows, width), m = weight.shape, places.shape[1]
    tensors = {"weight": (weight, torch.float32), "keep": (keep, torch.bool), "q": (q, torch.float32)}
    for name, (tensor, dtype) in {**tensors, "moments": (moments, torch.float32)}.items():
        shape = (width, width) if name == "moments" else (rows, width)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name} {tensor.dtype} {list(tensor.shape)} on {tensor.device} is not {dtype} {list(shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError("refine_rows works in place on contiguous tensors")
    shared_bytes = BLOCK_ROWS * width * q.itemsize
    if not 1 <= m <= MAX_PLACES or width % m or shared_bytes > MAX_SHARED_BYTES:
        most = MAX_SHARED_BYTES // (BLOCK_ROWS * q.itemsize)
        raise ValueError(
            f"refinement on a GPU takes {most} columns in groups of {MAX_PLACES} at most, not {width} columns in "
            f"groups of {m}"
        )
    table = _masks(tuple(map(tuple, places.tolist())), weight.device)
    changed = torch.empty(rows, dtype=torch.int32, device=weight.device)
    sizes = rows, width, m, len(places)
    arguments = (weight, keep, q, moments, table, changed, *sizes, off_diagonal, least_gain)
    run(Launch("refine", "refine_rows", (-(-rows // BLOCK_ROWS), 1, 1), (THREADS, 1, 1), shared_bytes, arguments))
    return int(changed.sum())


@cache
def _masks(places: tuple[tuple[bool, ...], ...], device: torch.device) -> torch.Tensor:
    """Patterns as bits, place i in bit i, int64 [patterns]."""
    bits = [sum(1 << i for i, kept in enumerate(pattern) if kept) for pattern in places]
    return torch.tensor([word - (word >> 63 << 64) for word in bits], dtype=torch.int64, device=device)
