"""Pruning one block in memory: scores, permutations, masks, and which tensors a folded permutation reorders."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.errors import numerics_named
from streamprune.model.skeleton import Block, Heads, LayerGroup
from streamprune.model.weights import WeightView
from streamprune.pruning.group import PrunedGroup, Step, Timed, prune_group
from streamprune.pruning.selection import weighted_error
from streamprune.pruning.statistics import ChannelStatistics


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


def prune_block(
    block: Block,
    tensors: Mapping[str, torch.Tensor],
    statistics: dict[str, ChannelStatistics],
    layers: Collection[str],
    heads: Heads,
    config: PruneConfig,
    timed: Timed,
) -> PrunedBlock:
    """Prune a block's source tensors (by full name); `statistics` of a layer's input by the layer's full name.

    Only groups all of whose `layers` are named are pruned. The statistics of these are taken out, and freed as they are
    used up.
    """
    results: dict[str, PrunedGroup] = {}
    rms: dict[str, torch.Tensor] = {}
    folded: list[FoldedPermutation] = []
    for group in block.groups:
        if not set(layers).issuperset(group.names):
            continue
        weights = {layer.name: layer.read(tensors[layer.parameter]) for layer in group.layers}
        inside = _fold_heads(group, heads, config)
        fixed = config.residual and not group.producers  # the residual stream's permutation is this group's
        shared = statistics[group.name]
        rms.update({name: statistics.pop(name).rms for name in group.names})
        with numerics_named(group.name):
            result = prune_group(weights, shared, config, heads=inside, fixed=fixed, timed=timed)
        del shared
        results.update(dict.fromkeys(group.names, result))
        if result.permutation is not None and can_fold(group, heads, config):
            folded += folded_permutations(block, group, result.permutation, inside)
    views = {name: view for name, view in block.layers.items() if name in results}
    inputs = {(view.parameter, view.input_dim) for view in block.layers.values()}
    reorders = [(side, f.permutation) for f in folded for side in f.reorders]
    rows = {side[0]: (permutation, side[1]) for side, permutation in reorders if side not in inputs}
    folded_inputs = {side[0] for side, _ in reorders if side in inputs}
    pruned = {}
    for name, view in views.items():
        stored = view.parameter not in folded_inputs
        of_rows, _ = rows.get(view.parameter, (None, 0))
        pruned[name] = _pruned_layer(view, tensors, results[name], rms[name], of_rows, stored)
    others = sorted(set(block.parameters) - {view.parameter for view in views.values()})
    kept = tuple(
        FoldedPermutation(f.name, f.permutation, tuple(r for r in f.reorders if r[0] in block.parameters))
        for f in folded
    )
    return PrunedBlock(pruned, {name: _reordered(tensors[name], *rows.get(name, (None, 0))) for name in others}, kept)


def _pruned_layer(
    view: WeightView,
    tensors: Mapping[str, torch.Tensor],
    result: PrunedGroup,
    rms: torch.Tensor,
    rows: torch.Tensor | None,
    stored: bool,
) -> PrunedLayer:
    """A layer in the output's order: columns by its group's permutation (`stored`: not folded), rows by `rows`."""
    columns = result.permutation
    weight, keep = view.read(tensors[view.parameter]), result.keep[view.name]
    weight = weight if columns is None else weight[:, columns]
    error = weighted_error(weight, keep, rms if columns is None else rms[columns])
    weight, keep = (_reordered(tensor, rows).contiguous() for tensor in (weight, keep))
    fitted = result.written.get(view.name)
    written = weight if fitted is None else _reordered(fitted, rows).contiguous()
    gather = columns if stored else None
    return PrunedLayer(weight, written, keep, gather, rms, result.steps[view.name], result.shrinkage, error)


def can_fold(group: LayerGroup, heads: Heads, config: PruneConfig) -> bool:
    """Whether a permutation of the group's input folds into its producers; elsewhere it is stored.

    Attention's output folds inside heads only, if asked for, and only where groups of M do not cross heads.
    """
    if not group.per_head:
        return bool(group.producers)
    return config.fold == "heads" and heads.size % config.pattern.group_size == 0


def moment_unit(group: LayerGroup, heads: Heads, config: PruneConfig) -> int:
    """Channels that blocks of second moments do not divide: a group of M, or a head that a permutation stays inside."""
    inside = _fold_heads(group, heads, config)
    return config.pattern.group_size if inside is None else inside.size


def _fold_heads(group: LayerGroup, heads: Heads, config: PruneConfig) -> Heads | None:
    return heads if group.per_head and can_fold(group, heads, config) else None


def folded_permutations(
    block: Block, group: LayerGroup, permutation: torch.Tensor, heads: Heads | None
) -> list[FoldedPermutation]:
    """How a permutation int64 [in] of a group's input folds into its producers; `heads`: it stays inside these."""
    views = [block.layers[name] for name in group.producers]
    sides = [((view.parameter, 1 - view.input_dim), (f"{view.name}.bias", 0)) for view in views]
    rows, reader = tuple(side for pair in sides for side in pair), group.layers[0]
    name, columns = f"{group.name}.input_permutation", ((reader.parameter, reader.input_dim),)
    of_rows = _of_producer(permutation, group, heads)
    if of_rows is permutation:
        return [FoldedPermutation(name, permutation, columns + rows)]
    producer = f"{group.producers[0]}.output_permutation"
    return [FoldedPermutation(name, permutation, columns), FoldedPermutation(producer, of_rows, rows)]


def _of_producer(permutation: torch.Tensor, group: LayerGroup, heads: Heads | None) -> torch.Tensor:
    """The permutation of a producer's rows, int64 [rows]: the input's own, unless they are fewer or more."""
    if heads is not None and heads.queries != heads.key_values:  # value rows are fewer than the inputs that they make
        permutation = permutation.view(heads.key_values, -1, heads.size)[:, 0] % heads.size
        starts = heads.size * torch.arange(heads.key_values, device=permutation.device)[:, None]
        permutation = (permutation + starts).reshape(-1)
    if group.times > 1:
        rows = torch.arange(group.times * len(permutation), device=permutation.device)
        rows = rows.view(-1, group.times).T if group.interleaved else rows.view(group.times, -1)
        permutation = rows[:, permutation].T.flatten() if group.interleaved else rows[:, permutation].flatten()
    return permutation


def _reordered(tensor: torch.Tensor, rows: torch.Tensor | None, dim: int = 0) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(dim, rows)
