"""Problems of mask refinement, for the kernels of a processor and of a GPU."""

import torch

from streamprune.config import NMPattern
from streamprune.pruning.refinement import group_patterns

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_problem(pattern: NMPattern, rows: int, groups: int, tokens: int, seed: int, off: float = 0.8) -> Problem:
    """weight, keep, q, moments, places: q as refine_mask makes it, with a linear term."""
    generator = torch.Generator().manual_seed(seed)
    m, width = pattern.group_size, groups * pattern.group_size
    weight = torch.randn(rows, width, generator=generator)
    order = torch.rand(rows, groups, m, generator=generator).argsort(dim=2)
    keep = (order < pattern.kept).view(rows, width)
    x = torch.randn(tokens, width, generator=generator) + torch.randn(tokens, 1, generator=generator)
    moments = x.T @ x
    linear = torch.randn(rows, width, generator=generator) * tokens * 0.1
    q = torch.where(keep, 0, weight) @ moments + linear / off
    return weight, keep, q, moments, group_patterns(pattern)


def clone(problem: Problem) -> Problem:
    return tuple(tensor.clone() for tensor in problem)  # type: ignore[return-value]


def whole_problem(pattern: NMPattern, rows: int, groups: int) -> Problem:
    """One whose arithmetic is exact: small whole numbers throughout."""
    weight, keep, _, _, places = random_problem(pattern, rows, groups, 9, 1)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-4, 5, weight.shape, generator=generator).float()
    x = torch.randint(-2, 3, (11, weight.shape[1]), generator=generator).float()
    moments = x.T @ x
    linear = torch.randint(-20, 21, weight.shape, generator=generator).float()
    return weight, keep, torch.where(keep, 0, weight) @ moments + linear, moments, places
