"""Choosing which weights of a group are kept, and the sums that the choice is judged by: launchers of selection.cpp.

reference.py has the definitions, which run where tensors are not on a processor.
"""

import torch

from streamprune_kernels import reference
from streamprune_kernels.native import TYPES, library_for


def select_groups(scores: torch.Tensor, kept: int, group_size: int) -> torch.Tensor:
    """Mask bool [out, in] of the `kept` highest of every group of scores float32 [out, in]; of equal ones the lower."""
    compiled = library_for(scores)
    if compiled is None or scores.dtype != torch.float32:
        return reference.select_groups(scores, kept, group_size)
    scores = scores.contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool)
    compiled.select_groups(scores.data_ptr(), *scores.shape, group_size, kept, keep.data_ptr(), torch.get_num_threads())
    return keep


def select_weights(
    weight: torch.Tensor, factor: torch.Tensor, kept: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_groups` by the scores |weight| * factor, which are never in memory, and their `kept_sums`.

    weight [out, in] finite; factor float32 [in], not negative. Returns the mask and the sums, float64 [out].
    """
    compiled = library_for(weight)
    if compiled is None or weight.dtype not in TYPES:
        return reference.select_weights(weight, factor, kept, group_size)
    if factor.shape != weight.shape[1:] or factor.dtype != torch.float32 or weight.shape[1] % group_size:
        raise ValueError(f"{factor.dtype} factors {list(factor.shape)} do not fit a weight {list(weight.shape)}")
    weight, factor = weight.contiguous(), factor.contiguous()
    keep, sums = torch.empty(weight.shape, dtype=torch.bool), torch.empty(len(weight), dtype=torch.float64)
    sizes = *weight.shape, group_size, kept
    result = keep.data_ptr(), sums.data_ptr()
    compiled.select_weights(
        weight.data_ptr(), TYPES[weight.dtype], factor.data_ptr(), *sizes, *result, torch.get_num_threads()
    )
    return keep, sums


def kept_sums(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Sum of the kept values of each row, float64 [rows]; x float32 [rows, width] finite, keep bool of its shape."""
    compiled = library_for(x)
    if compiled is None or x.dtype != torch.float32:
        return reference.kept_sums(x, keep)
    x, keep, sums = x.contiguous(), keep.contiguous(), torch.empty(len(x), dtype=torch.float64)
    compiled.kept_sums(x.data_ptr(), keep.data_ptr(), *x.shape, sums.data_ptr(), torch.get_num_threads())
    return sums


def weighted_squares(x: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of (x * scale)^2 of each row, float64 [rows]: over the dropped columns, and over all.

    x [rows, width] finite, keep bool of its shape, scale float32 [width].
    """
    compiled = library_for(x)
    if compiled is None or x.dtype not in TYPES:
        return reference.weighted_squares(x, keep, scale)
    x, keep, scale = x.contiguous(), keep.contiguous(), scale.contiguous()
    dropped, whole = torch.empty(2, len(x), dtype=torch.float64)
    tensors = x.data_ptr(), TYPES[x.dtype], keep.data_ptr(), scale.data_ptr()
    compiled.weighted_squares(*tensors, *x.shape, dropped.data_ptr(), whole.data_ptr(), torch.get_num_threads())
    return dropped, whole
