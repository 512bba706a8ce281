"""Launchers of packed_product.cpp: products of packed N:M weights on a processor.

Up to MOST_VECTORS rows of x are multiplied by the packed bytes themselves, each read once. For more, a tile of rows
becomes float32 in the cache, and torch's own product reads it there. Both compute in float32. Neither depends on the
number of threads.
"""

import ctypes
from functools import cache

import torch

from streamprune_kernels.cpu import library

PATHS = ("portable", "avx2", "avx512")  # sets of instructions, as packed_product.cpp numbers them
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # of values, likewise
MOST_VECTORS = 8
TILE_BYTES = 16 << 20  # of float32; measured: docs/benchmarks.md


@cache
def paths() -> tuple[str, ...]:
    """Sets of instructions that this processor has, the best last; none where the package was built without kernels."""
    compiled = library()
    return PATHS[: compiled.best_product_path() + 1] if compiled is not None else ()


def multiply_few(x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, path: str | None = None) -> torch.Tensor:
    """x W^T, float32 [vectors, out]; x float32 [vectors, in] of at most MOST_VECTORS vectors.

    values bfloat16, float16 or float32 [out, kept] and mask uint8 [out, ceil(in/8)] as in reference.py. The sums of a
    vector are the same whatever others are beside it. Raises ValueError where a row of the mask does not keep as many
    as there are values, or for a `path` that this processor lacks (default: its best).
    """
    if not 1 <= len(x) <= MOST_VECTORS:
        raise ValueError(f"{len(x)} vectors are not 1 to {MOST_VECTORS}")
    x, y = x.contiguous(), torch.empty(len(x), len(values))
    packed = _Packed(values, mask, x.shape[1], path)
    packed.check(packed.compiled.product_rows(*packed.arguments, x.data_ptr(), len(x), y.data_ptr(), *packed.how))
    return y


def multiply_many(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    path: str | None = None,
    tile_bytes: int = TILE_BYTES,
) -> torch.Tensor:
    """x W^T + bias in x's dtype [tokens, out], for any number of tokens; the rest as in `multiply_few`.

    Memory beside x and the result is one tile.
    """
    packed = _Packed(values, mask, x.shape[1], path)
    rows = max(1, min(len(values), tile_bytes // (4 * x.shape[1])))
    tile, inputs = torch.empty(rows, x.shape[1]), x.to(torch.float32)
    y = torch.empty(len(x), len(values), dtype=x.dtype)
    for first in range(0, len(values), rows):
        part = y[:, first : first + rows]
        weight = tile[: part.shape[1]]
        packed.check(
            packed.compiled.float_rows(*packed.arguments, first, len(weight), weight.data_ptr(), *packed.how)
        )
        product = part if y.dtype == torch.float32 else torch.empty(part.shape)
        torch.mm(inputs, weight.T, out=product)
        if bias is not None:
            product += bias[first : first + rows]
        if product is not part:
            part.copy_(product)
    return y


class _Packed:
    """A packed matrix as the compiled functions take it, which reads and writes nothing beyond its tensors."""

    def __init__(self, values: torch.Tensor, mask: torch.Tensor, in_features: int, path: str | None) -> None:
        if library() is None:
            raise ValueError("streamprune was built without its compiled kernels; install a C++ compiler, then it again")
        if path is not None and path not in paths():
            raise ValueError(f"this processor has no path {path!r}; it has {', '.join(paths())}")
        self.compiled: ctypes.CDLL = library()
        self.values, self.mask = values.contiguous(), mask.contiguous()  # held, so that the pointers stay valid
        sizes = len(values), in_features, values.shape[1]
        self.arguments = self.values.data_ptr(), self.mask.data_ptr(), TYPES[values.dtype], *sizes
        self.how = PATHS.index(path or paths()[-1]), torch.get_num_threads()

    def check(self, wrong: int) -> None:
        if wrong:
            raise ValueError(f"a mask does not keep {self.values.shape[1]} values in every row")
