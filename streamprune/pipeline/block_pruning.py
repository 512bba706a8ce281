"""Pruning one block in memory: scores, permutations, masks, and what folded permutations reorder."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.errors import numerics_named
from streamprune.model.folding import FoldedPermutation, folded_permutations
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


def _reordered(tensor: torch.Tensor, rows: torch.Tensor | None, dim: int = 0) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(dim, rows)
