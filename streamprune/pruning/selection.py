"""N:M selection, and the sums it is judged by."""

import math
import sys

import torch

from streamprune.config import NMPattern
from streamprune.stopping import safe_point
from streamprune_kernels import select_groups, weighted_squares

INNER_AT_ONCE = 512
OF_ZEROS = sys.float_info.max


def select(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Mask bool [out, in]: the N highest scores of every M consecutive channels, exactly N.

    On equal scores the lower channel is kept.
    """
    return select_groups(scores, pattern.kept, pattern.group_size)


def weighted_error(weight: torch.Tensor, keep: torch.Tensor, rms: torch.Tensor) -> float:
    """||(W - W') diag(rms)|| / ||W diag(rms)|| (Frobenius): what dropping costs if input channels were independent.

    weight [out, in], keep bool [out, in], rms [in], all in one channel order. 0 for a weight of zeros.
    """
    dropped, whole = map(stable_sum, weighted_squares(weight, keep, rms))
    return math.sqrt(dropped / whole) if whole > 0 else 0.0


def relative(squared_error: float, squared_norm: float) -> float:
    """||error|| / ||norm|| from their squares; 0 for no error, and OF_ZEROS, above every budget, if only the norm is 0.

    Not infinity, which JSON lacks. Rounding may have left squares slightly below 0.
    """
    error, norm = max(squared_error, 0.0), max(squared_norm, 0.0)
    if norm == 0:
        return 0.0 if error == 0 else OF_ZEROS
    return math.sqrt(error / norm)


def stable_sum(x: torch.Tensor) -> float:
    """Exactly rounded sum of a vector: the same for any order, thread count or chunking."""
    return math.fsum(x.tolist())


def stable_product(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b, float32, the same bits for any thread count; added to `into` where that is given.

    Long inner dimensions are cut: a BLAS may divide one among its threads, and then rounding depends on their number
    (measured for MKL at 777 and more with few rows; at 512 only for a single row).
    """
    product = torch.zeros(a.shape[0], b.shape[1], device=a.device) if into is None else into
    for first in range(0, a.shape[1], INNER_AT_ONCE):
        safe_point()
        inner = slice(first, first + INNER_AT_ONCE)
        product.addmm_(a[:, inner], b[inner])
    return product
