"""Pruning one block in memory: scores, permutations, masks, and which tensors a folded permutation reorders."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.errors import NumericsError
from streamprune.model.architectures import InputGroup
from streamprune.model.skeleton import Skeleton
from streamprune.pruning.metrics import score
from streamprune.pruning.reconstruction import reconstruct_weight
from streamprune.pruning.refinement import choose_shrinkage, quadratic_form, refine_mask
from streamprune.pruning.selection import select, stable_sum, weighted_error
from streamprune.pruning.shuffle import search_permutation
from streamprune.pruning.statistics import ChannelStatistics, SecondMoments

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Step:
    """What a layer is after one step of pruning.

    name            "selection" in the source's channel order, "shuffle", "refinement" or "reconstruction"
    retained_score  sum of the kept scores
    output_error    ||(W - V) X|| / ||W X|| over the calibration tokens, from second moments; None without them
    corrected_error the same with what correction adds (refinement.py) under the root, less a constant, as a square:
                    what refinement lowers, and so negative where it undoes more than it costs; None without correction
    """

    name: str
    retained_score: float
    output_error: float | None
    corrected_error: float | None


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned linear layer in the channel order of the output.

    weight     source values [out, in], rows and columns permuted, nothing dropped yet
    written    the same tensor, or where weights were reconstructed the fitted ones, in the source's dtype
    keep       bool [out, in], the mask
    gather     int64 [in], the permutation to apply to the input at run time, or None
    rms        float32 [in], the inputs' root mean square in the channel order before this block's permutations
    shrinkage  of the second moments in refinement, one for each of their blocks; empty without refinement
    """

    weight: torch.Tensor
    written: torch.Tensor
    keep: torch.Tensor
    gather: torch.Tensor | None
    rms: torch.Tensor
    steps: tuple[Step, ...]
    shrinkage: tuple[float, ...]
    weighted_error: float


@dataclass(frozen=True)
class FoldedPermutation:
    """A permutation that is applied once, to the tensors themselves: place j holds source index permutation[j]."""

    name: str
    permutation: torch.Tensor
    reorders: tuple[tuple[str, int], ...]  # (tensor, dimension)


@dataclass(frozen=True)
class PrunedBlock:
    """A block's pruned layers, its other parameters (in the order of the output), and the permutations folded in."""

    layers: dict[str, PrunedLayer]
    others: dict[str, torch.Tensor]
    folded: tuple[FoldedPermutation, ...]


@dataclass(frozen=True)
class _GroupResult:
    """Of the layers that share an input: columns permuted, rows in the source's order."""

    permutation: torch.Tensor | None
    keep: dict[str, torch.Tensor]
    written: dict[str, torch.Tensor]  # of reconstructed layers
    steps: dict[str, list[Step]]
    shrinkage: tuple[float, ...]


def prune_block(
    skeleton: Skeleton,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    statistics: Mapping[str, ChannelStatistics],
    prunable: set[str],
    config: PruneConfig,
    timed: Timed,
) -> PrunedBlock:
    """Prune a block's source tensors (by full name); `statistics` of a layer's input by the layer's full name."""
    results: dict[str, _GroupResult] = {}
    folded: list[FoldedPermutation] = []
    for group, names in skeleton.group_layers(index):
        if not prunable.issuperset(names):
            continue
        weights = {name: tensors[name + ".weight"] for name in names}
        heads = _fold_heads(skeleton, group, config)
        fixed = config.residual and not group.producers  # the residual stream's permutation is this group's
        result = _prune_group(weights, statistics[names[0]], heads, fixed, config, timed)
        results.update(dict.fromkeys(names, result))
        if result.permutation is not None and can_fold(skeleton, group, config):
            folded += _fold(skeleton, index, names[0], result.permutation, group, heads)
    rows = {tensor: f.permutation for f in folded for tensor, dim in f.reorders if dim == 0}
    folded_inputs = {tensor for f in folded for tensor, dim in f.reorders if dim == 1}
    layers = {}
    for name, result in results.items():
        columns = result.permutation
        weight, keep, rms = tensors[name + ".weight"], result.keep[name], statistics[name].rms
        weight = weight if columns is None else weight[:, columns]
        error = weighted_error(weight, keep, rms if columns is None else rms[columns])
        weight, keep = (_reordered(t, rows.get(name + ".weight")).contiguous() for t in (weight, keep))
        written = result.written.get(name)
        written = weight if written is None else _reordered(written, rows.get(name + ".weight")).contiguous()
        gather = None if name + ".weight" in folded_inputs else columns
        steps = tuple(result.steps[name])
        layers[name] = PrunedLayer(weight, written, keep, gather, rms, steps, result.shrinkage, error)
    pruned = {name + ".weight" for name in layers}
    existing = set(skeleton.block_parameters(index))
    others = {name: _reordered(tensors[name], rows.get(name)) for name in sorted(existing - pruned)}
    kept = tuple(
        FoldedPermutation(f.name, f.permutation, tuple(r for r in f.reorders if r[0] in existing)) for f in folded
    )
    return PrunedBlock(layers, others, kept)


def can_fold(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> bool:
    """Whether a permutation of the group's input folds into its producers; elsewhere it is stored.

    Attention's output folds inside heads only, if asked for, and only where groups of M do not cross heads.
    """
    if not group.per_head:
        return bool(group.producers)
    return config.fold == "heads" and skeleton.heads()[2] % config.pattern.group_size == 0


def moment_unit(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> int:
    """Channels that blocks of second moments do not divide: a group of M, or a head that a permutation stays inside."""
    heads = _fold_heads(skeleton, group, config)
    return config.pattern.group_size if heads is None else heads[2]


def _fold_heads(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> tuple[int, int, int] | None:
    return skeleton.heads() if group.per_head and can_fold(skeleton, group, config) else None


def _prune_group(
    weights: Mapping[str, torch.Tensor],
    statistics: ChannelStatistics,
    heads: tuple[int, int, int] | None,
    fixed: bool,
    config: PruneConfig,
    timed: Timed,
) -> _GroupResult:
    """Layers that share an input share a permutation: the search and refinement see their rows as one matrix."""
    names, counts = list(weights), [len(weight) for weight in weights.values()]
    steps: dict[str, list[Step]] = {name: [] for name in names}
    shrinkage: tuple[float, ...] = ()
    moments = statistics.moments
    with timed("select"):
        scores = torch.cat([score(weight, statistics, config) for weight in weights.values()])
        dense = torch.cat([weight.to(torch.float32) for weight in weights.values()])
        keep = select(scores, config.pattern)
        whole = None if moments is None else moments.whole()
        energy = None if whole is None else _energy(dense, whole).split(counts)
        linear = None if moments is None or moments.cross is None else config.correction * _times(dense, moments.cross)

    def record(step: str, difference: torch.Tensor) -> None:
        """Note a step, by the difference float32 [out, in] between the dense and the pruned weights."""
        kept = torch.where(keep, scores, 0).sum(dim=1, dtype=torch.float64).split(counts)
        quadratic = None if whole is None else _energy(difference, whole).split(counts)
        undone = None if linear is None else (difference * linear).sum(dim=1, dtype=torch.float64).split(counts)
        for i, name in enumerate(names):
            error = corrected = None
            if energy is not None and quadratic is not None:
                layer, own = stable_sum(energy[i]), stable_sum(quadratic[i])
                error = _ratio(math.sqrt(max(own, 0.0)), math.sqrt(layer))
                corrected = None if undone is None else _ratio(own + 2 * stable_sum(undone[i]), layer)
            steps[name].append(Step(step, stable_sum(kept[i]), error, corrected))

    with timed("select"):
        record("selection", torch.where(keep, 0, dense))
    with timed("search"):
        permutation = None if fixed else _search(scores, heads, moments, config)
    if permutation is not None:
        with timed("select"):
            scores, dense = scores[:, permutation].contiguous(), dense[:, permutation].contiguous()
            keep = select(scores, config.pattern)
            moments = None if moments is None else moments.permuted(permutation)
            whole = None if moments is None else moments.whole()
            linear = None if linear is None else linear[:, permutation].contiguous()
            record("shuffle", torch.where(keep, 0, dense))
    if config.refine and moments is not None and whole is not None:
        with timed("refine"):
            keep, shrinkage = _refine(dense, keep, moments, whole, linear, config)
            record("refinement", torch.where(keep, 0, dense))
    written: dict[str, torch.Tensor] = {}
    if config.reconstruct and whole is not None:
        with timed("reconstruct"):
            fitted = _reconstruct(dense, keep, whole, linear).to(next(iter(weights.values())).dtype)
            if not bool(torch.isfinite(fitted).all()):
                raise NumericsError(f"{names[0]}: reconstructed weights are beyond {fitted.dtype}")
            record("reconstruction", dense - torch.where(keep, fitted.to(torch.float32), 0))
            written = dict(zip(names, fitted.split(counts), strict=True))
    return _GroupResult(permutation, dict(zip(names, keep.split(counts), strict=True)), written, steps, shrinkage)


def _search(
    scores: torch.Tensor, heads: tuple[int, int, int] | None, moments: SecondMoments | None, config: PruneConfig
) -> torch.Tensor | None:
    """The permutation found, None for the identity; it stays inside heads, and inside blocks of second moments."""
    if heads is not None:
        found = _search_in_heads(scores, heads, config)
    else:
        bounds = ((0, scores.shape[1]),) if moments is None else moments.bounds
        found = torch.cat([begin + search_permutation(scores[:, begin:end], config) for begin, end in bounds])
    return None if torch.equal(found, torch.arange(len(found), device=found.device)) else found


def _refine(
    dense: torch.Tensor,
    keep: torch.Tensor,
    moments: SecondMoments,
    whole: list[torch.Tensor],
    linear: torch.Tensor | None,
    config: PruneConfig,
) -> tuple[torch.Tensor, tuple[float, ...]]:
    masks, strengths = [], []
    for block, (begin, end) in enumerate(moments.bounds):
        weight, mask = dense[:, begin:end], keep[:, begin:end]
        halves = moments.halves[0][block], moments.halves[1][block]
        strength = config.shrinkage
        if strength is None:
            strength = choose_shrinkage(weight, mask, halves, config.pattern)
        part = None if linear is None else linear[:, begin:end]
        masks.append(refine_mask(weight, mask, whole[block], config.pattern, strength, part))
        strengths.append(strength)
    return torch.cat(masks, dim=1), tuple(strengths)


def _reconstruct(
    dense: torch.Tensor, keep: torch.Tensor, whole: list[torch.Tensor], linear: torch.Tensor | None
) -> torch.Tensor:
    widths = [len(block) for block in whole]
    weights, masks = dense.split(widths, dim=1), keep.split(widths, dim=1)
    slopes = [None] * len(whole) if linear is None else linear.split(widths, dim=1)
    return torch.cat([reconstruct_weight(*part) for part in zip(weights, masks, whole, slopes, strict=True)], dim=1)


def _times(rows: torch.Tensor, blocks: list[torch.Tensor]) -> torch.Tensor:
    """Rows [out, in] times a matrix in diagonal blocks."""
    parts = rows.split([len(block) for block in blocks], dim=1)
    return torch.cat([part @ block for part, block in zip(parts, blocks, strict=True)], dim=1)


def _energy(rows: torch.Tensor, moments: list[torch.Tensor]) -> torch.Tensor:
    """r H r^T of each row over all samples, float64 [out]; channels of different blocks count as uncorrelated."""
    parts = rows.split([len(block) for block in moments], dim=1)
    energies = [quadratic_form(part, block) for part, block in zip(parts, moments, strict=True)]
    return torch.stack(energies).sum(dim=0)


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole > 0 else 0.0


def _search_in_heads(scores: torch.Tensor, heads: tuple[int, int, int], config: PruneConfig) -> torch.Tensor:
    """One permutation for each KV head, serving all of its query heads: their columns are searched as stacked rows."""
    query_heads, kv_heads, head_dim = heads
    share = query_heads // kv_heads
    by_head = scores.view(-1, kv_heads, share, head_dim).permute(1, 0, 2, 3)
    inside = [search_permutation(by_head[head].reshape(-1, head_dim), config) for head in range(kv_heads)]
    return torch.cat([head * head_dim + inside[head // share] for head in range(query_heads)])


def _fold(
    skeleton: Skeleton,
    index: int,
    layer: str,
    permutation: torch.Tensor,
    group: InputGroup,
    heads: tuple[int, int, int] | None,
) -> list[FoldedPermutation]:
    prefix = skeleton.blocks[index]
    rows = tuple((f"{prefix}.{producer}.{part}", 0) for producer in group.producers for part in ("weight", "bias"))
    name, columns = f"{layer}.input_permutation", ((f"{layer}.weight", 1),)
    if heads is None:
        return [FoldedPermutation(name, permutation, columns + rows)]
    query_heads, kv_heads, head_dim = heads
    if query_heads == kv_heads:
        return [FoldedPermutation(name, permutation, columns + rows)]
    # Grouped KV heads: the value rows are fewer than the inputs that they produce.
    first_of_each = permutation.view(kv_heads, query_heads // kv_heads, head_dim)[:, 0] % head_dim
    value_rows = (first_of_each + head_dim * torch.arange(kv_heads, device=permutation.device)[:, None]).reshape(-1)
    producer = f"{prefix}.{group.producers[0]}.output_permutation"
    return [FoldedPermutation(name, permutation, columns), FoldedPermutation(producer, value_rows, rows)]


def _reordered(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]
