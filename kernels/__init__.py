"""The sparse product of packed N:M weights and what it stands on; imported as `streamprune_kernels`.

Importing it needs neither CuPy nor a driver nor a GPU.
"""

from streamprune_kernels.cpu import (
    add_range,
    count_bins,
    excess_sums,
    library,
    move_windows,
    refine_rows,
    select_groups,
)
from streamprune_kernels.reference import expand, nm_linear, pack_mask, pack_values, unpack_mask

__all__ = [
    "add_range",
    "count_bins",
    "excess_sums",
    "expand",
    "library",
    "move_windows",
    "nm_linear",
    "pack_mask",
    "pack_values",
    "refine_rows",
    "select_groups",
    "unpack_mask",
]
