"""Packed N:M weights times one to eight vectors, for decoding: bound by memory, so that packed weights save time there.

`nm_decode` reads values and mask once, as they lie packed, and sums in float32. `reference.nm_linear` defines it.
"""

import math

import torch

from streamprune_kernels.gemm import ALIGNMENT_BYTES, TYPE_NAMES, NMWeight
from streamprune_kernels.launch import Launch, Run, on_device, refuse_gradients

MAX_VECTORS = 8
CHUNK_VALUES = 8  # of 16 bits in 16 bytes, which are read at once
CHUNK_COLUMNS = 128  # whose mask is 16 bytes
TILE_COLUMNS = 2048  # decode.cu's own constant, as are the next three
THREADS = 256
BLOCK_ROWS = 16
BLOCK_ROWS_24 = {1: 8, 2: 8, 4: 16, 8: 16}  # by the vectors that a kernel for 2:4 takes


def decode_unsuitable(weight: NMWeight, vectors: int) -> str | None:
    """Why a weight cannot be multiplied by so many vectors here, in one line; None where it can."""
    if not 1 <= vectors <= MAX_VECTORS:
        return f"decoding takes 1 to {MAX_VECTORS} vectors at once, not {vectors}: use nm_linear_cuda"
    if weight.in_features % CHUNK_COLUMNS:
        return (
            f"decoding needs in_features in multiples of {CHUNK_COLUMNS}, not {weight.in_features}: use nm_linear_cuda"
        )
    if weight.values.shape[1] % CHUNK_VALUES:
        return f"decoding needs rows of a multiple of 8 values, not {weight.values.shape[1]}: use nm_linear_cuda"
    if not tile_columns(weight):
        return f"decoding does not take {weight.kept}:{weight.group_size} of {weight.in_features}: use nm_linear_cuda"
    return None


def tile_columns(weight: NMWeight) -> int:
    """Columns of a tile: as many as fit whose masks and values are whole chunks of 16 bytes; 0 if none are."""
    if weight.in_features <= TILE_COLUMNS:
        return weight.in_features
    groups = CHUNK_VALUES // math.gcd(weight.kept, CHUNK_VALUES)
    unit = math.lcm(CHUNK_COLUMNS, groups * weight.group_size)
    return TILE_COLUMNS // unit * unit


def nm_decode(
    x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None = None, *, run: Run = on_device
) -> torch.Tensor:
    """y [vectors, out] = x W^T + b of x [vectors, in], one to eight; x, bias [out] and y in the values' type.

    Raises ValueError for tensors that do not fit, and for what `decode_unsuitable` names.
    """
    refuse_gradients("decoding", x=x, values=weight.values, bias=bias)
    if x.dtype not in TYPE_NAMES or x.dtype != weight.values.dtype:
        raise ValueError(f"x {x.dtype} and values {weight.values.dtype}: decoding takes both float16 or both bfloat16")
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x {list(x.shape)} is not [vectors, {weight.in_features}]")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias {list(bias.shape)} {bias.dtype} does not fit [{weight.out_features}] {x.dtype}")
    reason = decode_unsuitable(weight, len(x))
    if reason:
        raise ValueError(reason)
    for name, tensor in {"x": x, "values": weight.values, "mask": weight.mask, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT_BYTES:
            raise ValueError(f"{name} is not contiguous and aligned to {ALIGNMENT_BYTES} bytes: pass {name}.clone()")
    y = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
    kernel_vectors = 1 << (len(x) - 1).bit_length()
    kernel = f"{TYPE_NAMES[x.dtype]}_{kernel_vectors}"
    sizes: tuple[int, ...] = (len(x), weight.out_features, weight.in_features)
    if (weight.kept, weight.group_size) == (2, 4):
        kernel, block_rows = f"decode24_{kernel}", BLOCK_ROWS_24[kernel_vectors]
    else:
        kernel, block_rows = f"decode_{kernel}", BLOCK_ROWS
        sizes += (weight.kept, weight.group_size, tile_columns(weight))
    grid = (-(-weight.out_features // block_rows), 1, 1)
    tensors = (weight.values, weight.mask, x, bias, y)
    run(Launch("decode", kernel, grid, (THREADS, 1, 1), 0, (*tensors, *sizes)))
    return y
