"""N:M selection, and the sums it is judged by."""

import math

import torch

from streamprune.config import NMPattern


def select(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Mask bool [out, in]: the N highest scores of every M consecutive channels, exactly N.

    On equal scores the lower channel is kept: ranks are counted by comparisons, since topk's order among ties is not
    specified.
    """
    out_features, in_features = scores.shape
    m = pattern.group_size
    groups = scores.view(out_features, in_features // m, m)
    columns = [groups[:, :, i].contiguous() for i in range(m)]
    ranks = [torch.zeros(columns[0].shape, dtype=torch.int8, device=scores.device) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            i_first = columns[i] >= columns[j]
            ranks[j] += i_first
            ranks[i] += ~i_first
    keep = torch.stack([rank < pattern.kept for rank in ranks], dim=2)
    return keep.view(out_features, in_features)


def retained_score(scores: torch.Tensor, keep: torch.Tensor) -> float:
    """Sum of the kept scores, exact over rows in any order."""
    return stable_sum(torch.where(keep, scores, 0).sum(dim=1, dtype=torch.float64))


def weighted_error(weight: torch.Tensor, keep: torch.Tensor, rms: torch.Tensor) -> float:
    """||(W - W') diag(rms)|| / ||W diag(rms)|| (Frobenius): what dropping costs if input channels were independent.

    weight [out, in], keep bool [out, in], rms [in], all in one channel order. 0 for a weight of zeros.
    """
    energy = (weight.to(torch.float64) * rms.to(torch.float64)).square_()
    total = stable_sum(energy.sum(dim=1))
    dropped = stable_sum(energy.masked_fill_(keep, 0).sum(dim=1))
    return math.sqrt(dropped / total) if total > 0 else 0.0


def stable_sum(x: torch.Tensor) -> float:
    """Exactly rounded sum of a vector: the same for any order, thread count or chunking."""
    return math.fsum(x.tolist())
