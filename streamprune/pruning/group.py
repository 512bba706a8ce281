"""Pruning the layers that share one input: they share a permutation, and are searched and refined as one matrix.

selection -> shuffle -> refinement -> reconstruction, as far as the configuration asks for them; after each step every
layer's kept score and output error are noted, so that a reader sees what the step bought.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.metrics import score
from streamprune.pruning.reconstruction import reconstruct_weight
from streamprune.pruning.refinement import choose_shrinkage, quadratic_form, refine_mask
from streamprune.pruning.selection import select, stable_product, stable_sum
from streamprune.pruning.shuffle import search_in_heads, search_permutation
from streamprune.pruning.statistics import ChannelStatistics, SecondMoments

Timed = Callable[[str], AbstractContextManager[None]]
Heads = tuple[int, int, int]  # query heads, KV heads, size of a head


@dataclass(frozen=True)
class Step:
    """What a layer is after one step of pruning.

    name            "selection" in the source's channel order, "shuffle", "refinement" or "reconstruction"
    retained_score  sum of the kept scores
    output_error    ||(W - V) X|| / ||W X|| over the calibration tokens, from second moments; None without them
    corrected_error what refinement with correction lowers, over ||W X||^2: negative where it undoes more of earlier
                    blocks' error than pruning costs; None without correction
    """

    name: str
    retained_score: float
    output_error: float | None
    corrected_error: float | None


@dataclass(frozen=True)
class PrunedGroup:
    """Layers of one input by name: rows in the source's order, columns in that of `permutation` (None: the source's).

    keep       bool [out, in]
    written    fitted weights [out, in] in the source's dtype; empty without reconstruction
    shrinkage  that refinement used, for each block of second moments; empty without refinement
    """

    permutation: torch.Tensor | None
    keep: dict[str, torch.Tensor]
    written: dict[str, torch.Tensor]
    steps: dict[str, tuple[Step, ...]]
    shrinkage: tuple[float, ...]


@dataclass(frozen=True)
class _Problem:
    """The group's rows in one channel order: scores and weights float32 [rows, in], and what is known of the input.

    bounds  columns of each diagonal block of second moments; all columns where none were gathered
    whole   the second moments of all samples in those blocks, or None
    linear  the linear term of correction float32 [rows, in] (refinement.py), or None
    """

    scores: torch.Tensor
    weight: torch.Tensor
    bounds: tuple[tuple[int, int], ...]
    whole: list[torch.Tensor] | None
    linear: torch.Tensor | None

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], statistics: ChannelStatistics, config: PruneConfig) -> "_Problem":
        weight = torch.cat([layer.to(torch.float32) for layer in weights.values()])
        scores = torch.cat([score(layer, statistics, config) for layer in weights.values()])
        moments, linear = statistics.moments, None
        if moments is None:
            return cls(scores, weight, ((0, weight.shape[1]),), None, None)
        if statistics.output_cross is not None:
            linear = config.correction * statistics.output_cross
        elif moments.cross is not None:
            parts = zip(weight.split(moments.widths, dim=1), moments.cross, strict=True)
            linear = config.correction * torch.cat([stable_product(*part) for part in parts], dim=1)
        return cls(scores, weight, moments.bounds, moments.whole(), linear)

    def permuted(self, p: torch.Tensor) -> "_Problem":
        """The same with channel p[j] at place j; a permutation inside the blocks of second moments."""
        whole = None
        if self.whole is not None:
            places = [p[begin:end] - begin for begin, end in self.bounds]
            whole = [block[place][:, place] for block, place in zip(self.whole, places, strict=True)]
        return _Problem(
            self.scores.index_select(1, p),
            self.weight.index_select(1, p),
            self.bounds,
            whole,
            None if self.linear is None else self.linear.index_select(1, p),
        )

    def energy(self, rows: torch.Tensor) -> torch.Tensor | None:
        """r H r^T of each row, float64 [rows]; channels of different blocks count as uncorrelated."""
        if self.whole is None:
            return None
        parts = zip(rows.split([len(block) for block in self.whole], dim=1), self.whole, strict=True)
        return torch.stack([quadratic_form(part, block) for part, block in parts]).sum(dim=0)


def prune_group(
    weights: Mapping[str, torch.Tensor],
    statistics: ChannelStatistics,
    config: PruneConfig,
    *,
    heads: Heads | None,
    fixed: bool,
    timed: Timed,
) -> PrunedGroup:
    """Prune weights [out, in], by layer name, of one input.

    `heads`: the permutation stays inside heads. `fixed`: the order of channels is not this group's to choose. Raises
    NumericsError where scores or fitted weights are not finite.
    """
    counts = [len(weight) for weight in weights.values()]
    taken: list[list[Step]] = []
    shrinkage: tuple[float, ...] = ()
    fitted = None
    with timed("select"):
        problem = _Problem.of(weights, statistics, config)
        whole_energy = problem.energy(problem.weight)
        keep = select(problem.scores, config.pattern)
        taken.append(_steps("selection", problem, keep, torch.where(keep, 0, problem.weight), whole_energy, counts))
    if config.refine:
        with timed("refine"):
            shrinkage = _shrinkage(problem, keep, statistics.moments, config)
    with timed("search"):
        permutation = None if fixed else _search(problem, heads, config)
    if permutation is not None:
        with timed("select"):
            problem = problem.permuted(permutation)
            keep = select(problem.scores, config.pattern)
            taken.append(_steps("shuffle", problem, keep, torch.where(keep, 0, problem.weight), whole_energy, counts))
    if config.refine:
        with timed("refine"):
            keep = _refine(problem, keep, shrinkage, config.pattern)
            dropped = torch.where(keep, 0, problem.weight)
            taken.append(_steps("refinement", problem, keep, dropped, whole_energy, counts))
    if config.reconstruct:
        with timed("reconstruct"):
            fitted = _reconstruct(problem, keep).to(next(iter(weights.values())).dtype)
            if not bool(torch.isfinite(fitted).all()):
                raise NumericsError(f"reconstructed weights are beyond {fitted.dtype}")
            lost = problem.weight - fitted.to(torch.float32)
            taken.append(_steps("reconstruction", problem, keep, lost, whole_energy, counts))
    return PrunedGroup(
        permutation,
        dict(zip(weights, keep.split(counts), strict=True)),
        {} if fitted is None else dict(zip(weights, fitted.split(counts), strict=True)),
        {name: tuple(step[layer] for step in taken) for layer, name in enumerate(weights)},
        shrinkage,
    )


def _steps(
    name: str,
    problem: _Problem,
    keep: torch.Tensor,
    lost: torch.Tensor,
    whole_energy: torch.Tensor | None,
    counts: list[int],
) -> list[Step]:
    """Each layer after a step, by the difference `lost` float32 [rows, in] between dense and pruned weights."""
    retained = torch.where(keep, problem.scores, 0).sum(dim=1, dtype=torch.float64).split(counts)
    lost_energy = problem.energy(lost)
    if whole_energy is None or lost_energy is None:
        return [Step(name, stable_sum(rows), None, None) for rows in retained]
    whole = [stable_sum(rows) for rows in whole_energy.split(counts)]
    own = [stable_sum(rows) for rows in lost_energy.split(counts)]
    errors = [_ratio(math.sqrt(max(a, 0.0)), math.sqrt(b)) for a, b in zip(own, whole, strict=True)]
    corrected: list[float | None] = [None] * len(counts)
    if problem.linear is not None:
        slopes = (lost * problem.linear).sum(dim=1, dtype=torch.float64).split(counts)
        corrected = [_ratio(a + 2 * stable_sum(s), b) for a, s, b in zip(own, slopes, whole, strict=True)]
    return [Step(name, stable_sum(rows), e, c) for rows, e, c in zip(retained, errors, corrected, strict=True)]


def _search(problem: _Problem, heads: Heads | None, config: PruneConfig) -> torch.Tensor | None:
    """The permutation found, None for the identity; it stays inside heads, and inside blocks of second moments."""
    scores = problem.scores
    if heads is not None:
        found = search_in_heads(scores, heads, config)
    else:
        parts = [begin + search_permutation(scores[:, begin:end], config) for begin, end in problem.bounds]
        found = torch.cat(parts)
    return None if torch.equal(found, torch.arange(len(found), device=found.device)) else found


def _shrinkage(
    problem: _Problem, keep: torch.Tensor, moments: SecondMoments | None, config: PruneConfig
) -> tuple[float, ...]:
    """Of each block of second moments; chosen in the source's channel order, which spares shuffling the halves."""
    if config.shrinkage is not None:
        return (config.shrinkage,) * len(problem.bounds)
    assert moments is not None, "refinement needs second moments"
    halves = zip(*moments.halves, problem.bounds, strict=True)
    return tuple(
        choose_shrinkage(problem.weight[:, begin:end], keep[:, begin:end], (even, odd), config.pattern)
        for even, odd, (begin, end) in halves
    )


def _refine(problem: _Problem, keep: torch.Tensor, shrinkage: tuple[float, ...], pattern: NMPattern) -> torch.Tensor:
    assert problem.whole is not None, "refinement needs second moments"
    masks = []
    for (begin, end), moments, strength in zip(problem.bounds, problem.whole, shrinkage, strict=True):
        linear = None if problem.linear is None else problem.linear[:, begin:end]
        weight, mask = problem.weight[:, begin:end], keep[:, begin:end]
        masks.append(refine_mask(weight, mask, moments, pattern, strength, linear))
    return torch.cat(masks, dim=1)


def _reconstruct(problem: _Problem, keep: torch.Tensor) -> torch.Tensor:
    whole = problem.whole
    assert whole is not None, "reconstruction needs second moments"
    widths = [len(block) for block in whole]
    slopes = [None] * len(whole) if problem.linear is None else problem.linear.split(widths, dim=1)
    parts = zip(problem.weight.split(widths, dim=1), keep.split(widths, dim=1), whole, slopes, strict=True)
    return torch.cat([reconstruct_weight(*part) for part in parts], dim=1)


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole > 0 else 0.0
