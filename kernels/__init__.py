"""The sparse product of packed N:M weights and what it stands on; imported as `streamprune_kernels`.

Importing it needs neither CuPy nor a driver nor a GPU.
"""

from streamprune_kernels.gemm import (
    MAX_SHARED_TOKENS,
    NMWeight,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear,
    sparse_linear_with_error,
)
from streamprune_kernels.launch import KernelUnavailable, unsupported_reason
from streamprune_kernels.metadata import SparseWeight, sparse_unsuitable, sparse_weight
from streamprune_kernels.native import library
from streamprune_kernels.operator import packed_linear, packed_linear_with_error, packed_metadata
from streamprune_kernels.packed_product import FEW_ROWS
from streamprune_kernels.packing import expand, pack_mask, pack_values, unpack_mask
from streamprune_kernels.reference import MIN_EXPONENT, nm_linear, nth_best
from streamprune_kernels.refine import refine_rows
from streamprune_kernels.search import hinge_sums, local_swaps
from streamprune_kernels.selection import kept_sums, select_groups, select_weights, weighted_squares
from streamprune_kernels.statistics import add_range, count_values
from streamprune_kernels.validation import all_finite, squared_distances

__all__ = [
    "FEW_ROWS",
    "MAX_SHARED_TOKENS",
    "MIN_EXPONENT",
    "KernelUnavailable",
    "NMWeight",
    "SparseWeight",
    "add_range",
    "all_finite",
    "count_values",
    "expand",
    "hinge_sums",
    "kept_sums",
    "library",
    "local_swaps",
    "nm_linear",
    "nm_linear_cuda",
    "nm_linear_with_error",
    "nm_weight",
    "nth_best",
    "pack_mask",
    "pack_values",
    "packed_linear",
    "packed_linear_with_error",
    "packed_metadata",
    "refine_rows",
    "select_groups",
    "select_weights",
    "sparse_linear",
    "sparse_linear_with_error",
    "sparse_unsuitable",
    "sparse_weight",
    "squared_distances",
    "unpack_mask",
    "unsupported_reason",
    "weighted_squares",
]
