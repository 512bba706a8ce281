"""Calibration statistics of a layer's inputs.

On a processor `add_range` and then `count_values` run kernels of statistics.cpp; reference.py defines both. On a GPU
`add_tokens_cuda` does both in one pass by statistics.cu, for activations in their own type: `add_tokens` is that, in
plain torch.
"""

from dataclasses import dataclass

import torch

from streamprune_kernels import launch, reference
from streamprune_kernels.launch import Launch, Run, on_device
from streamprune_kernels.native import library_for

TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
ALIGNMENT_BYTES = 16
THREADS = 256  # statistics.cu's own constant, as are the next two
ROW_BYTES = 64  # of a block's channels
MAX_BINS = 4096
STATIC_BYTES = 6 * 1024  # of shared memory, at most, beside the rows that stay in it
PORTABLE_SHARED_BYTES = 48 * 1024  # what every device has for a block
RESERVED_BYTES = 1024  # of a multiprocessor's, for each block, from sm_80 on


@dataclass(frozen=True)
class Windows:
    """Histograms of all channels: bin i of channel c covers (first_bin[c] + i + [0, 1)) * 2^exponent[c].

    exponent and first_bin int32 [channels], counts int32 [channels, bins] with neighbouring bins side by side.
    """

    exponent: torch.Tensor
    first_bin: torch.Tensor
    counts: torch.Tensor


def add_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor) -> None:
    """Update float32 `low` and `high` and float64 `square_sum`, all [channels], by x float32 [tokens, channels]."""
    compiled = library_for(x)
    if compiled is None:
        reference.add_range(x, low, high, square_sum)
        return
    x, state = x.contiguous(), (tensor.data_ptr() for tensor in (low, high, square_sum))
    compiled.channel_range(x.data_ptr(), *x.shape, *state, torch.get_num_threads())


def count_values(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    exponent: torch.Tensor,
    first_bin: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Count values in windows of bins that widen as values need it; reference.count_values is the definition."""
    compiled = library_for(x)
    if compiled is None:
        reference.count_values(x, low, high, exponent, first_bin, counts)
        return
    x = x.contiguous()
    windows = (tensor.data_ptr() for tensor in (low, high, exponent, first_bin, counts))
    compiled.count_values(x.data_ptr(), *x.shape, *windows, counts.shape[1], counts.stride(0), torch.get_num_threads())


def add_tokens(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor, windows: Windows | None = None
) -> None:
    """Update the statistics by activations x [tokens, channels] of any floating-point type, in plain torch."""
    x = x.to(torch.float32)
    reference.add_range(x, low, high, square_sum)
    if windows is not None:
        reference.count_values(x, low, high, windows.exponent, windows.first_bin, windows.counts)


def statistics_unsuitable(x: torch.Tensor) -> str | None:
    """Why `add_tokens_cuda` does not take activations, in one line; None where it does."""
    if x.dim() != 2 or x.dtype not in TYPE_NAMES or not x.shape[1]:
        return f"x {x.dtype} {list(x.shape)} is not [tokens, channels] of float16, bfloat16 or float32"
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT_BYTES:
        return f"x is not contiguous and aligned to {ALIGNMENT_BYTES} bytes: pass x.clone()"
    if x.shape[1] * x.itemsize % ALIGNMENT_BYTES:
        return f"rows of {x.shape[1]} channels are no multiple of {ALIGNMENT_BYTES} bytes: use add_tokens"
    return None


def add_tokens_on_gpu(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor, windows: Windows | None = None
) -> bool:
    """`add_tokens_cuda` where a GPU runs it and it takes x; returns whether, and leaves all as it was if not."""
    run = launch.runner_for(x)
    if run is None or statistics_unsuitable(x) is not None:
        return False
    add_tokens_cuda(x, low, high, square_sum, windows, run=run)
    return True


def add_tokens_cuda(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    square_sum: torch.Tensor,
    windows: Windows | None = None,
    *,
    run: Run = on_device,
    shared_bytes: int | None = None,
) -> None:
    """Update float32 `low` and `high`, float64 `square_sum` [channels] and the windows by x [tokens, channels].

    x is float16, bfloat16 or float32. Histograms, `low` and `high` are exactly `add_tokens`'s; sums differ by rounding,
    and are the same at every run. A value that is not finite makes its channel's sum of squares so; a NaN also becomes
    its `low` and `high`. Such a channel's values are not counted, from that call on (`add_tokens` does not take them).
    `shared_bytes`, of shared memory for a block, is the device's if not given. Raises ValueError for tensors that do
    not fit.
    """
    _check(x, low, high, square_sum, windows)
    tokens, channels = x.shape
    if not tokens:
        return
    limit = _shared_bytes(x.device) if shared_bytes is None else shared_bytes
    resident = min(tokens, max(limit - STATIC_BYTES, 0) // ROW_BYTES) if windows is not None else 0
    histogram = (None, None, None) if windows is None else (windows.exponent, windows.first_bin, windows.counts)
    bins, stride = (0, 0) if windows is None else (windows.counts.shape[1], windows.counts.stride(0))
    arguments = (x, low, high, square_sum, *histogram, tokens, channels, bins, stride, resident)
    grid = (-(-channels * x.itemsize // ROW_BYTES), 1, 1)
    kernel = f"add_tokens_{TYPE_NAMES[x.dtype]}"
    run(Launch("statistics", kernel, grid, (THREADS, 1, 1), resident * ROW_BYTES, arguments))


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have."""
    if device.type != "cuda":
        return PORTABLE_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - RESERVED_BYTES


def _check(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor, windows: Windows | None
) -> None:
    if reason := statistics_unsuitable(x):
        raise ValueError(reason)
    states = {"low": (low, torch.float32), "high": (high, torch.float32), "square_sum": (square_sum, torch.float64)}
    if windows is not None:
        states |= {"exponent": (windows.exponent, torch.int32), "first_bin": (windows.first_bin, torch.int32)}
        _check_counts(x, windows.counts)
    for name, (state, dtype) in states.items():
        if state.shape != (x.shape[1],) or state.dtype != dtype or not state.is_contiguous():
            raise ValueError(f"{name} {state.dtype} {list(state.shape)} is not contiguous {dtype} [{x.shape[1]}]")
        if state.device != x.device:
            raise ValueError(f"{name} is on {state.device}, x on {x.device}: move them to one device")


def _check_counts(x: torch.Tensor, counts: torch.Tensor) -> None:
    if counts.dim() != 2 or counts.dtype != torch.int32 or len(counts) != x.shape[1] or counts.stride(1) != 1:
        raise ValueError(f"counts {counts.dtype} {list(counts.shape)} is not int32 [{x.shape[1]}, bins]")
    if not 1 <= counts.shape[1] <= MAX_BINS:
        raise ValueError(f"a histogram has 1 to {MAX_BINS} bins, not {counts.shape[1]}")
    if counts.device != x.device:
        raise ValueError(f"counts is on {counts.device}, x on {x.device}: move them to one device")
