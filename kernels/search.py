"""The searches over orders of channels where the scores lie: `hinge_sums` and `local_swaps`.

On a GPU kernels of search.cu run, on a processor those of search.cpp; reference.py defines both. The functions
`..._cuda` are the kernels alone: tensors on one device and contiguous; `run` (launch.py) is the device, tests put a CPU
there.
"""

import torch
from torch.nn import functional

from streamprune_kernels import launch, reference
from streamprune_kernels.launch import Launch, Run, on_device
from streamprune_kernels.native import LANES, library_for

THREADS = 256  # search.cu's own constant, as are the next three
TILE = 64  # places of a tile, each way
ROWS = 32  # of a tile
PITCH_BYTES = 4 * (TILE + 4)  # of a tile's row
SUMS_SHARED_BYTES = 2 * ROWS * PITCH_BYTES
SWAPS_SHARED_BYTES = SUMS_SHARED_BYTES + ROWS * TILE * 4  # and the best two of each group
PART_ROWS = 256  # that a block of threads sums; always the same, so that the bits are


def hinge_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Sum over rows of max(0, s_b - t_i), float32 [n_t, n_s]; s [n_s, rows] and t [n_t, rows] float32."""
    run = launch.runner_for(s) if s.numel() and t.numel() else None
    if run is not None:
        return hinge_sums_cuda(s.contiguous(), t.contiguous(), run=run)
    compiled = library_for(s)
    if compiled is None:
        return reference.hinge_sums(s, t)
    # max(0, s - t) = max(s, t) - t; padding adds 0 to both sums
    padding = -s.shape[1] % LANES
    padded_s, padded_t = (functional.pad(x, (0, padding)) if padding else x.contiguous() for x in (s, t))
    sums = torch.empty(len(t), len(s))
    scores = padded_s.data_ptr(), len(s), padded_t.data_ptr(), len(t), padded_s.shape[1]
    compiled.sum_of_maxima(*scores, sums.data_ptr(), torch.get_num_threads())
    return sums.sub_(t.sum(dim=1)[:, None])


def local_swaps(
    s: torch.Tensor, start: torch.Tensor, block: int, kept: int, group_size: int, rounds: int, least_gain: float
) -> torch.Tensor:
    """Greedy swaps of channels inside blocks of places; reference.local_swaps is the definition."""
    run = launch.runner_for(s) if s.numel() else None
    if run is not None:
        return local_swaps_cuda(s.contiguous(), start, block, kept, group_size, rounds, least_gain, run=run)
    compiled = library_for(s)
    if compiled is None:
        return reference.local_swaps(s, start, block, kept, group_size, rounds, least_gain)
    padding = -s.shape[1] % LANES  # rows of zeros add nothing
    padded = functional.pad(s, (0, padding)) if padding else s.contiguous()
    order = start.clone(memory_format=torch.contiguous_format)
    sizes = *padded.shape, block, group_size, kept, rounds
    compiled.local_swaps(padded.data_ptr(), *sizes, least_gain, order.data_ptr(), torch.get_num_threads())
    return order


def hinge_sums_cuda(s: torch.Tensor, t: torch.Tensor, *, run: Run = on_device) -> torch.Tensor:
    """Sum over rows of max(0, s_b - t_i), float32 [n_t, n_s]; s [n_s, rows] and t [n_t, rows] float32, t maybe -inf.

    The bits are the same at every run. Raises ValueError for tensors that do not fit.
    """
    _check_scores(s, "s")
    _check_scores(t, "t")
    if s.shape[1] != t.shape[1] or s.device != t.device:
        raise ValueError(f"t {list(t.shape)} on {t.device} does not fit s {list(s.shape)} on {s.device}")
    (n_s, rows), n_t = s.shape, len(t)
    parts = -(-rows // PART_ROWS)
    sums = torch.empty(parts, n_t, n_s, device=s.device)
    grid = (parts, -(-n_s // TILE), -(-n_t // TILE))
    arguments = (s, t, sums, n_s, n_t, rows, PART_ROWS)
    run(Launch("search", "hinge_sums", grid, (THREADS, 1, 1), SUMS_SHARED_BYTES, arguments))
    return sums.sum(dim=0, dtype=torch.float64).to(torch.float32)


def local_swaps_cuda(
    s: torch.Tensor,
    start: torch.Tensor,
    block: int,
    kept: int,
    group_size: int,
    rounds: int,
    least_gain: float,
    *,
    run: Run = on_device,
) -> torch.Tensor:
    """Channel at each place, int64 [channels], after greedy swaps inside each `block` of places.

    s float32 [channels, rows], scores by channel; start int64 [channels], a permutation. What is swapped is what
    reference.local_swaps says, but for rounding, and the same at every run. Raises ValueError for tensors that do not
    fit, and for channels or blocks that are no whole groups.
    """
    _check_scores(s, "s")
    channels, rows = s.shape
    if start.shape != (channels,) or start.dtype != torch.int64 or start.device != s.device:
        raise ValueError(f"start {start.dtype} {list(start.shape)} on {start.device} does not fit s {list(s.shape)}")
    if not 0 < kept < group_size <= TILE:
        raise ValueError(f"the search on a GPU takes N of up to {TILE}, not {kept}:{group_size}")
    if channels % group_size or block < group_size or block % group_size:
        raise ValueError(f"{channels} channels in blocks of {block} are not groups of {group_size}")
    order = start.clone(memory_format=torch.contiguous_format)
    size = min(block, channels)
    blocks = channels // size + (channels % size >= 2 * group_size)  # a single group has nothing to swap with
    groups = size // group_size
    if groups < 2:
        return order
    gain = torch.empty(blocks, size, size, device=s.device)
    best_gain = torch.empty(blocks, groups, groups, device=s.device)
    best_swap, marks = (torch.empty(blocks, n, groups, dtype=torch.int32, device=s.device) for n in (groups, 3))
    sizes = channels, rows, size, group_size, kept, rounds
    arguments = (s, order, gain, best_gain, best_swap, marks, *sizes, least_gain)
    run(Launch("search", "local_swaps", (blocks, 1, 1), (THREADS, 1, 1), SWAPS_SHARED_BYTES, arguments))
    return order


def _check_scores(tensor: torch.Tensor, name: str) -> None:
    if tensor.dim() != 2 or not tensor.numel() or tensor.dtype != torch.float32:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float32 [channels, rows]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
