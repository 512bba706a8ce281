"""The sparse product of packed N:M weights and what it stands on; imported as `streamprune_kernels`.

Importing it needs neither CuPy nor a driver nor a GPU.
"""

from streamprune_kernels.cpu import (
    add_range,
    count_values,
    excess_sums,
    expand,
    kept_sums,
    library,
    local_swaps,
    pack_values,
    refine_rows,
    select_groups,
    squared_distances,
    weighted_squares,
)
from streamprune_kernels.operator import packed_linear
from streamprune_kernels.packed_product import FEW_ROWS
from streamprune_kernels.reference import (
    LEAST_EXPONENT,
    nm_linear,
    nth_best,
    pack_mask,
    unpack_mask,
)

__all__ = [
    "FEW_ROWS",
    "LEAST_EXPONENT",
    "add_range",
    "count_values",
    "excess_sums",
    "expand",
    "kept_sums",
    "library",
    "local_swaps",
    "nm_linear",
    "nth_best",
    "pack_mask",
    "pack_values",
    "packed_linear",
    "refine_rows",
    "select_groups",
    "squared_distances",
    "unpack_mask",
    "weighted_squares",
]
