"""Pruning one block in memory: scores, permutations, masks, and which tensors a folded permutation reorders."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.errors import numerics_named
from streamprune.model.architectures import InputGroup
from streamprune.model.skeleton import Skeleton
from streamprune.pruning.group import Heads, PrunedGroup, Step, Timed, prune_group
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
    skeleton: Skeleton,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    statistics: dict[str, ChannelStatistics],
    prunable: set[str],
    config: PruneConfig,
    timed: Timed,
) -> PrunedBlock:
    """Prune a block's source tensors (by full name); `statistics` of a layer's input by the layer's full name.

    The statistics of the layers that are pruned are taken out, and freed as they are used up.
    """
    results: dict[str, PrunedGroup] = {}
    rms: dict[str, torch.Tensor] = {}
    folded: list[FoldedPermutation] = []
    for group, names in skeleton.group_layers(index):
        if not prunable.issuperset(names):
            continue
        weights = {name: tensors[name + ".weight"] for name in names}
        heads = _fold_heads(skeleton, group, config)
        fixed = config.residual and not group.producers  # the residual stream's permutation is this group's
        shared = statistics[names[0]]
        rms.update({name: statistics.pop(name).rms for name in names})
        with numerics_named(names[0]):
            result = prune_group(weights, shared, config, heads=heads, fixed=fixed, timed=timed)
        del shared
        results.update(dict.fromkeys(names, result))
        if result.permutation is not None and can_fold(skeleton, group, config):
            folded += _fold(skeleton, index, names[0], result.permutation, group, heads)
    rows = {tensor: f.permutation for f in folded for tensor, dim in f.reorders if dim == 0}
    folded_inputs = {tensor for f in folded for tensor, dim in f.reorders if dim == 1}
    layers = {}
    for name, result in results.items():
        columns = result.permutation
        weight, keep = tensors[name + ".weight"], result.keep[name]
        weight = weight if columns is None else weight[:, columns]
        error = weighted_error(weight, keep, rms[name] if columns is None else rms[name][columns])
        weight, keep = (_reordered(t, rows.get(name + ".weight")).contiguous() for t in (weight, keep))
        written = result.written.get(name)
        written = weight if written is None else _reordered(written, rows.get(name + ".weight")).contiguous()
        gather = None if name + ".weight" in folded_inputs else columns
        steps = result.steps[name]
        layers[name] = PrunedLayer(weight, written, keep, gather, rms[name], steps, result.shrinkage, error)
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


def _fold_heads(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> Heads | None:
    return skeleton.heads() if group.per_head and can_fold(skeleton, group, config) else None


def _fold(
    skeleton: Skeleton,
    index: int,
    layer: str,
    permutation: torch.Tensor,
    group: InputGroup,
    heads: Heads | None,
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
