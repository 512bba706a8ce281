"""Mask refinement where the weights lie: `refine_rows`.

On a GPU the kernel of refine.cu runs, on a processor that of cpu.py; reference.py has the definition.
`refine_rows_cuda` is the kernel alone: tensors on one device; `run` (launch.py) is the device, tests put a CPU there.
"""

from functools import cache

import torch

from streamprune_kernels import cpu
from streamprune_kernels.launch import Launch, Run, on_device, runner_for

THREADS = 256  # refine.cu's own constant
BLOCK_ROWS = 8  # one for each warp
MAX_PLACES = 64  # of a group: a mask is a word
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
    run = runner_for(weight) if weight.numel() else None
    if run is None:
        return cpu.refine_rows(weight, keep, q, moments, places, off_diagonal, least_gain)
    return refine_rows_cuda(weight, keep, q, moments, places, off_diagonal, least_gain, run=run)


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
