"""Launcher of packed_product.cpp: products of packed N:M weights on a processor.

Few rows of x are bound by memory: they multiply weights as these come, a step of columns at a time. Many are bound by
arithmetic: there a kept weight multiplies many of them, and a dropped one costs nothing. Sums are float32.
Neither depends on the number of threads, nor does a row's result on the other rows, as long as they stay few or many.
"""

from functools import cache

import torch

from streamprune_kernels.native import TYPES, library, path_number

FEW_ROWS = 24  # up to here the kernel for few is the faster; measured: docs/benchmarks.md


@cache
def has_pairs() -> bool:
    """Does this processor multiply pairs of bfloat16 (AVX-512 BF16)?"""
    compiled = library()
    return compiled is not None and bool(compiled.has_product_pairs())


def packed_product(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    permutation: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
    many: bool | None = None,
    pairs: bool | None = None,
) -> torch.Tensor:
    """x W^T [rows, out] of x [rows, in] and a packed W as in reference.py, all on the processor, rounded to `dtype`.

    values bfloat16, float16 or float32 [out, kept]; mask uint8 [out, ceil(in/8)]; permutation int32 [in], the column of
    x that each place of the mask belongs to. Where x and values are bfloat16 and the processor has instructions for it,
    columns are multiplied in pairs, and subnormal numbers are taken for zero. `path`, of `native.paths()`, `many` and
    `pairs` choose what runs instead. Raises ValueError where a row of the mask does not keep as many as there are
    values, for a path or pairs that are not there, and where nothing was compiled.
    """
    compiled = library()
    if compiled is None:
        raise ValueError("no compiled kernels here: the package was built without a C++ compiler")
    number = path_number(compiled, path)
    many = len(x) > FEW_ROWS if many is None else many
    have_pairs = path is None and x.dtype == values.dtype == torch.bfloat16 and has_pairs()
    if pairs and not have_pairs:
        raise ValueError(f"no pairs here: they take bfloat16, not {x.dtype} by {values.dtype}, and AVX-512 BF16")
    pairs = have_pairs if pairs is None else pairs
    # held until the end, so that their pointers stay valid
    x, values, mask = (x if pairs else x.to(torch.float32)).contiguous(), values.contiguous(), mask.contiguous()
    place = None if permutation is None else permutation.contiguous()
    (rows, in_features), (out_features, kept) = x.shape, values.shape
    rounded = pairs and dtype == torch.bfloat16
    y = torch.empty(rows, out_features, dtype=torch.bfloat16 if rounded else torch.float32)
    packed, sizes = (values.data_ptr(), mask.data_ptr()), (out_features, in_features, kept)
    inputs = x.data_ptr(), None if place is None else place.data_ptr(), rows, y.data_ptr()
    if pairs:
        wrong = compiled.product_pairs(*packed, *sizes, *inputs, many, rounded, torch.get_num_threads())
    else:
        how = many, number, torch.get_num_threads()
        wrong = compiled.product_rows(*packed, TYPES[values.dtype], *sizes, *inputs, *how)
    if wrong:
        raise ValueError(f"a mask does not keep {kept} values in every row")
    return y if y.dtype == dtype else y.to(dtype)
