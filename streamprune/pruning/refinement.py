"""Mask refinement: coordinate descent over groups on the layer's output error. Kept weights are not touched.

For one output row with dropped weights d the squared output error over the calibration tokens is d H d^T, H = X^T X the
inputs' second moments (often called the Hessian in this field). Scores see only the diagonal of H. Here each group of M
in turn takes the best of its patterns given all others, until nothing changes: the error never rises. H from few tokens
is overfitted, so it is shrunk towards its diagonal, by a strength that held-out samples choose (docs/method.md).

Correction: after pruned blocks the inputs X differ from the dense model's X_dense. The mask can compensate for a share
c of the effect on the outputs, by lowering ||c (X_dense - X) w + X d||^2 instead: beside d H d^T it has the linear term
2 d (c w C)^T with C = (X_dense - X)^T X (asymmetric calibration, as GPTAQ, arXiv 2504.02692, does for quantization).
"""

import itertools
import math
from functools import cache

import torch

from streamprune.config import NMPattern
from streamprune.pruning.selection import stable_product
from streamprune_kernels import refine_rows

BLOCK_WIDTH = 192  # columns refined by one product with what is dropped everywhere
MAX_PASSES = 4  # groups that change fall by about half from pass to pass; their effect was not measured beyond
MIN_GAIN = 1e-6  # share of a group's sum of w^2 h that a change must save: below lies float32's noise
SHRINKAGES = (0.05, 0.15, 0.3, 0.5)  # tried on one half of the samples and judged on the other
SHRINKAGE_ROWS = 64  # rows that the strength is chosen on
SHRINKAGE_PASSES = 1
MAX_PATTERNS = 256  # more are not tried one by one


def refine_mask(
    weight: torch.Tensor,
    keep: torch.Tensor,
    moments: torch.Tensor,
    pattern: NMPattern,
    shrinkage: float,
    linear: torch.Tensor | None = None,
    passes: int = MAX_PASSES,
) -> torch.Tensor:
    """A mask bool [out, in] whose objective under the shrunk moments is at most that of `keep`, row by row.

    The objective is d H d^T + 2 d l^T. weight float32 [out, in], moments H float32 [in, in] and linear l float32
    [out, in] (None: 0), all in the mask's order of channels. "At most" is up to float32's rounding.
    """
    places = group_patterns(pattern)
    off_diagonal = 1.0 - shrinkage
    width = max(BLOCK_WIDTH // pattern.group_size, 1) * pattern.group_size
    blocks = [slice(begin, begin + width) for begin in range(0, weight.shape[1], width)]
    weights = [weight[:, columns].contiguous() for columns in blocks]
    own = [moments[columns, columns].contiguous() for columns in blocks]
    masks = [_copy(keep[:, columns]) for columns in blocks]
    dropped = torch.where(keep, 0, weight)
    for _ in range(passes):
        changed = 0
        for columns, block, h, mask in zip(blocks, weights, own, masks, strict=True):
            q = stable_product(dropped, moments[:, columns]).mul_(off_diagonal)
            if linear is not None:
                q += linear[:, columns]
            count = refine_rows(block, mask, q, h, places, off_diagonal, MIN_GAIN)
            if count:
                dropped[:, columns] = torch.where(mask, 0, block)
                changed += count
        if not changed:
            break
    return torch.cat(masks, dim=1)


def choose_shrinkage(
    weight: torch.Tensor,
    keep: torch.Tensor,
    halves: tuple[torch.Tensor, torch.Tensor],
    pattern: NMPattern,
) -> float:
    """How far to shrink the moments of all samples: the strength chosen on one half that does best on the other.

    About SHRINKAGE_ROWS rows are enough. All samples are twice as many as a half: a strength of s on a half stands for
    s / (2 - s) on all of them.
    """
    seen, unseen = halves
    if not bool(unseen.diagonal().any()):  # a single sequence leaves nothing to judge by: take the strongest shrinkage
        return SHRINKAGES[-1] / (2 - SHRINKAGES[-1])

    def held_out(strength: float) -> float:
        refined = refine_mask(weight, keep, seen, pattern, strength, passes=SHRINKAGE_PASSES)
        return float(objective(weight, refined, unseen).sum())

    best = min(SHRINKAGES, key=held_out)
    return best / (2 - best)


def objective(
    weight: torch.Tensor,
    keep: torch.Tensor,
    moments: torch.Tensor,
    shrinkage: float = 0,
    linear: torch.Tensor | None = None,
) -> torch.Tensor:
    """d H d^T + 2 d l^T of each row's dropped weights, float64 [out], off-diagonal H times 1 - shrinkage."""
    dropped = torch.where(keep, 0, weight)
    value = quadratic_form(dropped, moments)
    if shrinkage:
        diagonal = (dropped.square() * moments.diagonal()).sum(dim=1, dtype=torch.float64)
        value = (1 - shrinkage) * value + shrinkage * diagonal
    return value if linear is None else value + 2 * (dropped * linear).sum(dim=1, dtype=torch.float64)


def quadratic_form(rows: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """r H r^T of each row, float64 [out]; rows [out, in] and symmetric moments [in, in] float32.

    By strips of columns, of which only what lies on and below the diagonal is multiplied.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for begin in range(0, len(moments), BLOCK_WIDTH):
        end = begin + BLOCK_WIDTH
        strip = rows[:, begin:end]
        product = stable_product(rows[:, end:], moments[end:, begin:end]).mul_(2)
        stable_product(strip, moments[begin:end, begin:end], into=product)
        total += product.mul_(strip).sum(dim=1, dtype=torch.float64)
    return total


def _copy(block: torch.Tensor) -> torch.Tensor:
    return block.clone(memory_format=torch.contiguous_format)


@cache
def group_patterns(pattern: NMPattern) -> torch.Tensor:
    """The places that each pattern of a group keeps, bool [C(M, N), M]; [0, M] if there are too many to try."""
    n, m = pattern.kept, pattern.group_size
    if math.comb(m, n) > MAX_PATTERNS:
        return torch.zeros(0, m, dtype=torch.bool)
    places = torch.zeros(math.comb(m, n), m, dtype=torch.bool)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        places[row, list(kept)] = True
    return places
