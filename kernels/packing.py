"""Packing and its reverse where the tensors lie: `pack_mask`, `unpack_mask`, `pack_values` and `expand`.

On a GPU kernels of packing.cu run, on a processor those of packing.cpp; all give the bits of reference.py. The
functions `..._cuda` are the kernels alone: tensors on one device and contiguous; `run` (launch.py) is the device, tests
put a CPU there.
"""

import torch

from streamprune_kernels import launch, reference
from streamprune_kernels.launch import Argument, Launch, Run, on_device
from streamprune_kernels.native import library_for, path_number

THREADS = 256
BLOCK_ROWS = 8  # one for each warp
VALUE_BYTES = (1, 2, 4, 8)  # that a processor moves
CUDA_VALUE_BYTES = (2, 4)


def pack_mask(keep: torch.Tensor, *, path: str | None = None) -> torch.Tensor:
    """bool [out, in] to uint8 [out, ceil(in/8)], little end first; padding bits are 0.

    `path`, here and in the functions below, is one of `native.paths()` for a processor to take instead of its best.
    """
    if (run := _runner(keep)) is not None:
        return pack_mask_cuda(keep.contiguous(), run=run)
    compiled = library_for(keep)
    if compiled is None or keep.dim() != 2 or keep.dtype != torch.bool or not keep.numel():
        return reference.pack_mask(keep)
    (rows, width), keep = keep.shape, keep.contiguous()
    mask = torch.empty(rows, -(-width // 8), dtype=torch.uint8)
    how = path_number(compiled, path), torch.get_num_threads()
    compiled.pack_mask(keep.data_ptr(), rows, width, mask.data_ptr(), *how)
    return mask


def unpack_mask(mask: torch.Tensor, in_features: int, *, path: str | None = None) -> torch.Tensor:
    """uint8 [out, ceil(in/8)] to bool [out, in]."""
    if (run := _runner(mask)) is not None:
        return unpack_mask_cuda(mask.contiguous(), in_features, run=run)
    compiled = library_for(mask)
    fits = mask.dim() == 2 and mask.dtype == torch.uint8 and mask.shape[1] == -(-in_features // 8)
    if compiled is None or not fits or not mask.numel():
        return reference.unpack_mask(mask, in_features)
    mask, keep = mask.contiguous(), torch.empty(len(mask), in_features, dtype=torch.bool)
    how = path_number(compiled, path), torch.get_num_threads()
    compiled.unpack_mask(mask.data_ptr(), *keep.shape, keep.data_ptr(), *how)
    return keep


def pack_values(weight: torch.Tensor, keep: torch.Tensor, *, path: str | None = None) -> torch.Tensor:
    """Kept values of a weight [out, in] in ascending channel, bits untouched.

    Raises ValueError where rows keep different numbers of them.
    """
    if weight.itemsize in CUDA_VALUE_BYTES and (run := _runner(weight)) is not None:
        return pack_values_cuda(weight.contiguous(), keep.contiguous(), run=run)
    rows, width = weight.shape
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise ValueError(f"a mask {list(keep.shape)} does not fit a weight {list(weight.shape)}")
    kept = int(keep[0].sum()) if rows else 0
    compiled = library_for(weight)
    if compiled is None or not kept or weight.itemsize not in VALUE_BYTES:
        return reference.pack_values(weight, keep)
    weight, keep, values = weight.contiguous(), keep.contiguous(), torch.empty(rows, kept, dtype=weight.dtype)
    sizes, how = (rows, width, kept, weight.itemsize), (path_number(compiled, path), torch.get_num_threads())
    if compiled.pack_rows(weight.data_ptr(), keep.data_ptr(), *sizes, values.data_ptr(), *how):
        raise ValueError(f"rows of a mask do not all keep the {kept} values that the first does")
    return values


def expand(
    values: torch.Tensor,
    mask: torch.Tensor,
    in_features: int,
    permutation: torch.Tensor | None = None,
    *,
    path: str | None = None,
) -> torch.Tensor:
    """Dense weight [out, in] in the values' dtype, dropped weights +0, columns in the order of the source.

    With `permutation` [in], place j holds source channel p[j]. Raises ValueError where a row of the mask does not keep
    as many as there are values, and for a permutation that is none.
    """
    if values.itemsize in CUDA_VALUE_BYTES and (run := _runner(values)) is not None:
        return expand_cuda(values.contiguous(), mask.contiguous(), in_features, permutation, run=run)
    compiled = library_for(values)
    if compiled is None or not values.numel() or values.itemsize not in VALUE_BYTES:
        return reference.expand(values, mask, in_features, permutation)
    rows, kept = values.shape
    if mask.shape != (rows, -(-in_features // 8)) or mask.dtype != torch.uint8:
        raise ValueError(f"a mask {list(mask.shape)} does not fit {rows} rows of {in_features} channels")
    values, mask, dense = values.contiguous(), mask.contiguous(), torch.empty(rows, in_features, dtype=values.dtype)
    place = None if permutation is None else permutation.to(torch.int32).contiguous()
    pointers = values.data_ptr(), mask.data_ptr(), None if place is None else place.data_ptr()
    sizes, how = (rows, in_features, kept, values.itemsize), (path_number(compiled, path), torch.get_num_threads())
    fits = place is None or place.shape == (in_features,)
    wrong = compiled.expand_rows(*pointers, *sizes, dense.data_ptr(), *how) if fits else -1
    if wrong < 0:
        raise ValueError("the permutation of a packed layer is not one")
    if wrong:
        raise ValueError(f"a mask does not keep {kept} values in every row")
    return dense


def _runner(tensor: torch.Tensor) -> Run | None:
    """What runs the kernels on a matrix; None where nothing does, and for an empty one."""
    return launch.runner_for(tensor) if tensor.dim() == 2 and tensor.numel() else None


def pack_mask_cuda(keep: torch.Tensor, *, run: Run = on_device) -> torch.Tensor:
    """bool [out, in] to uint8 [out, ceil(in/8)]. Raises ValueError for another type or shape."""
    _check_matrix(keep, "keep", torch.bool)
    mask = torch.empty(keep.shape[0], -(-keep.shape[1] // 8), dtype=torch.uint8, device=keep.device)
    _run("pack_mask", (keep, mask, *keep.shape), len(keep), run)
    return mask


def unpack_mask_cuda(mask: torch.Tensor, in_features: int, *, run: Run = on_device) -> torch.Tensor:
    """uint8 [out, ceil(in/8)] to bool [out, in]. Raises ValueError for another type or shape."""
    _check_mask(mask, in_features)
    keep = torch.empty(len(mask), in_features, dtype=torch.bool, device=mask.device)
    _run("unpack_mask", (mask, keep, *keep.shape), len(mask), run)
    return keep


def pack_values_cuda(weight: torch.Tensor, keep: torch.Tensor, *, run: Run = on_device) -> torch.Tensor:
    """Kept values of a weight [out, in] of 16 or 32 bits in ascending channel, bits untouched.

    Raises ValueError for tensors that do not fit, and where rows keep different numbers of values.
    """
    _check_matrix(weight, "weight")
    _check_matrix(keep, "keep", torch.bool)
    if keep.shape != weight.shape or keep.device != weight.device:
        raise ValueError(f"a mask {list(keep.shape)} on {keep.device} does not fit a weight {list(weight.shape)}")
    kept = int(keep[0].sum())
    values = torch.empty(len(weight), kept, dtype=weight.dtype, device=weight.device)
    counts = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
    arguments = (weight, keep, values, counts, *weight.shape, kept)
    _run(f"pack_values_{8 * _value_bytes(weight)}", arguments, len(weight), run)
    if not bool((counts == kept).all()):
        raise ValueError(f"rows of a mask do not all keep the {kept} values that the first does")
    return values


def expand_cuda(
    values: torch.Tensor,
    mask: torch.Tensor,
    in_features: int,
    permutation: torch.Tensor | None = None,
    *,
    run: Run = on_device,
) -> torch.Tensor:
    """Dense weight [out, in] in the values' type of 16 or 32 bits; dropped weights are +0.

    With `permutation` [in] (place j holds source channel p[j]) the columns are put back in the source's order. Raises
    ValueError for tensors that do not fit, and where a row of the mask does not keep as many as there are values.
    """
    _check_matrix(values, "values")
    _check_mask(mask, in_features)
    if len(mask) != len(values) or mask.device != values.device:
        raise ValueError(f"a mask {list(mask.shape)} on {mask.device} does not fit values {list(values.shape)}")
    places = None if permutation is None else _checked_permutation(permutation, in_features, values.device)
    dense = torch.empty(len(values), in_features, dtype=values.dtype, device=values.device)
    counts = torch.empty(len(values), dtype=torch.int32, device=values.device)
    arguments = (values, mask, places, dense, counts, *dense.shape, values.shape[1])
    _run(f"expand_{8 * _value_bytes(values)}", arguments, len(values), run)
    if not bool((counts == values.shape[1]).all()):
        raise ValueError(f"a mask does not keep {values.shape[1]} values in every row")
    return dense


def _run(kernel: str, arguments: tuple[Argument, ...], rows: int, run: Run) -> None:
    run(Launch("packing", kernel, (-(-rows // BLOCK_ROWS), 1, 1), (THREADS, 1, 1), 0, arguments))


def _value_bytes(tensor: torch.Tensor) -> int:
    if tensor.itemsize not in CUDA_VALUE_BYTES:
        raise ValueError(f"packing on a GPU takes values of 16 or 32 bits, not {tensor.dtype}: use the plain functions")
    return tensor.itemsize


def _check_matrix(tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> None:
    if tensor.dim() != 2 or not tensor.numel() or (dtype and tensor.dtype != dtype):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype or 'values'} [out, in]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")


def _check_mask(mask: torch.Tensor, in_features: int) -> None:
    _check_matrix(mask, "mask", torch.uint8)
    if mask.shape[1] != -(-in_features // 8):
        raise ValueError(f"a mask {list(mask.shape)} does not fit rows of {in_features} channels")


def _checked_permutation(permutation: torch.Tensor, in_features: int, device: torch.device) -> torch.Tensor:
    """As contiguous int32; a kernel writes where it points, so that it must be one."""
    places = permutation.to(device=device, dtype=torch.int32).contiguous()
    if not torch.equal(places.sort().values, torch.arange(in_features, dtype=torch.int32, device=device)):
        raise ValueError("the permutation of a packed layer is not one")
    return places
