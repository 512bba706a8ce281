"""Pruning the layers that share one input: they share a permutation, and are searched as one matrix.

selection -> shuffle -> refinement -> reconstruction, as far as the configuration asks for them. After each step every
layer's kept score and output error are recorded, to show what the step gained. The search sees all rows of all layers
at once; everything else works on pieces of rows, to keep memory small.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.metrics import channel_factor, check_scores, score
from streamprune.pruning.reconstruction import reconstruct_weight
from streamprune.pruning.refinement import SHRINKAGE_ROWS, choose_shrinkage, quadratic_form, refine_mask
from streamprune.pruning.selection import relative, select, stable_product, stable_sum
from streamprune.pruning.shuffle import search_in_heads, search_permutation
from streamprune.pruning.statistics import ChannelStatistics, SecondMoments
from streamprune.stopping import safe_point
from streamprune_kernels import kept_sums, select_weights

Timed = Callable[[str], AbstractContextManager[None]]
Heads = tuple[int, int, int]  # query heads, KV heads, size of a head
ROWS_AT_ONCE = 2048  # of one layer, after the search


@dataclass(frozen=True)
class Step:
    """A layer's figures after one step of pruning.

    name            "selection" in the source's channel order, "shuffle", "refinement" or "reconstruction"
    retained_score  sum of the kept scores
    output_error    ||(W - V) X|| / ||W X|| over the calibration tokens, from second moments; None without them
    corrected_error what refinement with correction lowers, over ||W X||^2: negative if it compensates for more of the
                    error of earlier blocks than pruning costs; None without correction
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
class _Channels:
    """The group's input channels, in the order in which masks are chosen.

    permutation  int64 [in], the source's channel at each place; None: the source's order
    bounds       places of each diagonal block of second moments; all places where none were gathered
    moments      the second moments of all samples in those blocks, or None
    shrinkage    of each block, for refinement
    """

    permutation: torch.Tensor | None
    bounds: tuple[tuple[int, int], ...]
    moments: list[torch.Tensor] | None
    shrinkage: tuple[float, ...]

    def ordered(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [rows, in] in the source's order, put into this one."""
        return rows if self.permutation is None else rows.index_select(1, self.permutation)

    def energy(self, rows: torch.Tensor) -> torch.Tensor | None:
        """r H r^T of each row, float64 [rows]; channels of different blocks count as uncorrelated."""
        if self.moments is None:
            return None
        parts = zip(self.bounds, self.moments, strict=True)
        return torch.stack([quadratic_form(rows[:, begin:end], block) for (begin, end), block in parts]).sum(dim=0)


@dataclass(frozen=True)
class _Rows:
    """Some rows of one layer: scores float32 [rows, in], the linear term of correction or None, and the weights.

    These are float32 and in the order of the scores where there are second moments; nothing else looks at them.
    """

    scores: torch.Tensor
    weight: torch.Tensor
    linear: torch.Tensor | None


@dataclass(frozen=True)
class _RowSums:
    """What a step leaves of each row, float64 [rows]: kept score, d H d^T and d l^T of what is lost (None: unknown)."""

    retained: torch.Tensor
    lost: torch.Tensor | None
    slope: torch.Tensor | None


def prune_group(
    weights: Mapping[str, torch.Tensor],
    statistics: ChannelStatistics,
    config: PruneConfig,
    *,
    heads: Heads | None,
    fixed: bool,
    timed: Timed,
) -> PrunedGroup:
    """Prune the weights [out, in], by layer name, that share one input. Consumes the statistics' moments.

    `heads`: the permutation stays inside heads. `fixed`: the order of channels is not this group's to choose. Raises
    NumericsError where scores or fitted weights are not finite.
    """
    factor = channel_factor(statistics, config)
    if factor is not None and statistics.moments is None and (fixed or not config.search_stages):
        return _select_alone(weights, factor, config, timed)
    counts = [len(weight) for weight in weights.values()]
    with timed("select"):
        each = [score(weight, statistics, config) for weight in weights.values()]
        scores = torch.cat(each) if len(each) > 1 else each[0]
    bounds = ((0, scores.shape[1]),) if statistics.moments is None else statistics.moments.bounds
    shrinkage: tuple[float, ...] = ()
    if config.refine:
        with timed("refine"):
            shrinkage = _shrinkage(weights, scores, statistics, config)
    with timed("search"):
        permutation = None if fixed else _search(scores, bounds, heads, config)
    with timed("select"):
        channels = _Channels(permutation, bounds, _whole_moments(statistics.moments, permutation), shrinkage)
    keep, written, steps = {}, {}, {}
    for name, own_scores in zip(weights, scores.split(counts), strict=True):
        pieces = []
        for first in range(0, len(own_scores), ROWS_AT_ONCE):
            safe_point()
            rows = slice(first, first + ROWS_AT_ONCE)
            with timed("select"):
                linear = _linear(weights[name], rows, statistics, config)
                weight = weights[name][rows]
                piece = _Rows(own_scores[rows], weight if channels.moments is None else weight.float(), linear)
            pieces.append(_prune_rows(piece, channels, weights[name].dtype, config, timed))
        keep[name] = torch.cat([piece.keep for piece in pieces]) if len(pieces) > 1 else pieces[0].keep
        if config.reconstruct:
            written[name] = torch.cat([piece.written for piece in pieces if piece.written is not None])
        steps[name] = _steps(pieces)
    return PrunedGroup(permutation, keep, written, steps, shrinkage)


def _select_alone(
    weights: Mapping[str, torch.Tensor], factor: torch.Tensor, config: PruneConfig, timed: Timed
) -> PrunedGroup:
    """Selection without the scores |W_ij| * factor_j in memory, if no other step follows."""
    keep: dict[str, torch.Tensor] = {}
    steps: dict[str, tuple[Step, ...]] = {}
    with timed("select"):
        for name, weight in weights.items():
            safe_point()
            keep[name], retained = select_weights(weight, factor, config.pattern.kept, config.pattern.group_size)
            check_scores(float(retained.sum()), config)
            steps[name] = (Step("selection", stable_sum(retained), None, None),)
    return PrunedGroup(None, keep, {}, steps, ())


@dataclass(frozen=True)
class _PrunedRows:
    """keep bool [rows, in]; written: fitted weights in the source's dtype, or None; whole: w H w^T of each row."""

    keep: torch.Tensor
    written: torch.Tensor | None
    whole: torch.Tensor | None
    sums: dict[str, _RowSums]


def _prune_rows(
    given: _Rows, channels: _Channels, dtype: torch.dtype, config: PruneConfig, timed: Timed
) -> _PrunedRows:
    """Prune rows piece by piece; only the permutation connects them."""
    sums: dict[str, _RowSums] = {}
    written = None
    with timed("select"):
        keep = channels.ordered(select(given.scores, config.pattern))
        scores = channels.ordered(given.scores)
        weight = given.weight if channels.moments is None else channels.ordered(given.weight)
        rows = _Rows(scores, weight, None if given.linear is None else channels.ordered(given.linear))
        whole = channels.energy(weight)
        sums["selection"] = _row_sums(rows, channels, keep)
        if channels.permutation is not None:
            keep = select(scores, config.pattern)
            sums["shuffle"] = _row_sums(rows, channels, keep)
    if config.refine:
        with timed("refine"):
            keep = _refine(rows, channels, keep, config.pattern)
            sums["refinement"] = _row_sums(rows, channels, keep)
    if config.reconstruct:
        with timed("reconstruct"):
            written = _reconstruct(rows, channels, keep).to(dtype)
            if not bool(torch.isfinite(written).all()):
                raise NumericsError(f"reconstructed weights are beyond {dtype}")
            sums["reconstruction"] = _row_sums(rows, channels, keep, written)
    return _PrunedRows(keep, written, whole, sums)


def _row_sums(rows: _Rows, channels: _Channels, keep: torch.Tensor, written: torch.Tensor | None = None) -> _RowSums:
    """After a step; `written` are fitted weights [rows, in], where the kept ones are not the source's."""
    retained = kept_sums(rows.scores, keep)
    if channels.moments is None:
        return _RowSums(retained, None, None)
    lost = torch.where(keep, 0, rows.weight) if written is None else rows.weight - written.to(torch.float32)
    slope = None if rows.linear is None else (lost * rows.linear).sum(dim=1, dtype=torch.float64)
    return _RowSums(retained, channels.energy(lost), slope)


def _steps(pieces: list[_PrunedRows]) -> tuple[Step, ...]:
    """A layer's steps from all of its rows. Raises NumericsError if the terms of a sum overflowed float32."""

    def total(parts: Iterable[torch.Tensor | None]) -> float | None:
        present = [part for part in parts if part is not None]
        if not all(bool(part.isfinite().all()) for part in present):
            raise NumericsError(
                "weights times second moments of the input are beyond float32; --no-refine without --reconstruct needs "
                "none"
            )
        return stable_sum(torch.cat(present)) if present else None

    whole = total(piece.whole for piece in pieces)
    steps = []
    for name in pieces[0].sums:
        sums = [piece.sums[name] for piece in pieces]
        retained, lost = total(part.retained for part in sums), total(part.lost for part in sums)
        slope = total(part.slope for part in sums)
        error = corrected = None
        if whole is not None and lost is not None:
            error = relative(lost, whole)
            corrected = None if slope is None else (lost + 2 * slope) / whole if whole > 0 else 0.0
        steps.append(Step(name, retained or 0.0, error, corrected))
    return tuple(steps)


def _search(
    scores: torch.Tensor, bounds: tuple[tuple[int, int], ...], heads: Heads | None, config: PruneConfig
) -> torch.Tensor | None:
    """Search for a permutation, inside heads and inside blocks of second moments; None for the identity."""
    if not config.search_stages:
        return None
    if heads is not None:
        found = search_in_heads(scores, heads, config)
    else:
        found = torch.cat([begin + search_permutation(scores[:, begin:end], config) for begin, end in bounds])
    return None if torch.equal(found, torch.arange(len(found), device=found.device)) else found


def _shrinkage(
    weights: Mapping[str, torch.Tensor], scores: torch.Tensor, statistics: ChannelStatistics, config: PruneConfig
) -> tuple[float, ...]:
    """Of each block of second moments; chosen in the source's channel order, which spares shuffling the halves."""
    moments = statistics.moments
    assert moments is not None, "refinement needs second moments"
    if config.shrinkage is not None:
        return (config.shrinkage,) * len(moments.bounds)
    step = max(1, len(scores) // SHRINKAGE_ROWS)
    of_layers = scores.split([len(weight) for weight in weights.values()])
    keep = select(torch.cat([layer[::step] for layer in of_layers]), config.pattern)
    rows = torch.cat([weight[::step].to(torch.float32) for weight in weights.values()])
    parts = zip(*moments.halves, moments.bounds, strict=True)
    return tuple(
        choose_shrinkage(rows[:, begin:end], keep[:, begin:end], (even, odd), config.pattern)
        for even, odd, (begin, end) in parts
    )


def _whole_moments(moments: SecondMoments | None, permutation: torch.Tensor | None) -> list[torch.Tensor] | None:
    """The moments of all samples, block by block, with channel permutation[j] at place j."""
    if moments is None:
        return None
    whole = moments.take_whole()
    if permutation is None:
        return whole
    for index, (begin, end) in enumerate(moments.bounds):
        places = permutation[begin:end] - begin
        whole[index] = whole[index][places][:, places]
    return whole


def _linear(
    weight: torch.Tensor, rows: slice, statistics: ChannelStatistics, config: PruneConfig
) -> torch.Tensor | None:
    """The linear term of correction (refinement.py) of some rows of a layer, float32 [rows, in]; None without it."""
    if statistics.output_cross is not None:
        return (config.correction or 0.0) * statistics.output_cross[rows]
    if statistics.moments is None or statistics.moments.cross is None:
        return None
    parts = zip(statistics.moments.bounds, statistics.moments.cross, strict=True)
    products = [stable_product(weight[rows, begin:end].to(torch.float32), cross) for (begin, end), cross in parts]
    return (config.correction or 0.0) * torch.cat(products, dim=1)


def _refine(rows: _Rows, channels: _Channels, keep: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    assert channels.moments is not None, "refinement needs second moments"
    masks = []
    for (begin, end), moments, strength in zip(channels.bounds, channels.moments, channels.shrinkage, strict=True):
        linear = None if rows.linear is None else rows.linear[:, begin:end]
        masks.append(refine_mask(rows.weight[:, begin:end], keep[:, begin:end], moments, pattern, strength, linear))
    return torch.cat(masks, dim=1)


def _reconstruct(rows: _Rows, channels: _Channels, keep: torch.Tensor) -> torch.Tensor:
    assert channels.moments is not None, "reconstruction needs second moments"
    fitted = []
    for (begin, end), moments in zip(channels.bounds, channels.moments, strict=True):
        linear = None if rows.linear is None else rows.linear[:, begin:end]
        fitted.append(reconstruct_weight(rows.weight[:, begin:end], keep[:, begin:end], moments, linear))
    return torch.cat(fitted, dim=1)
