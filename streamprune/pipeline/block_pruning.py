"""Pruning one block in memory: scores, permutations, masks, and which tensors a folded permutation reorders."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.model.architectures import InputGroup
from streamprune.model.skeleton import Skeleton
from streamprune.pruning.metrics import score
from streamprune.pruning.selection import retained_score, select, weighted_error
from streamprune.pruning.shuffle import search_permutation
from streamprune.pruning.statistics import ChannelStatistics


@dataclass(frozen=True)
class PrunedLayer:
    """A pruned linear layer in the channel order of the output.

    weight          source values [out, in], rows and columns permuted, nothing dropped yet
    keep            bool [out, in], the mask
    gather          int64 [in], the permutation to apply to the input at run time, or None
    rms             float32 [in], the inputs' root mean square in the source's channel order
    retained_start  retained score in the source's channel order; `retained` after the shuffles
    """

    weight: torch.Tensor
    keep: torch.Tensor
    gather: torch.Tensor | None
    rms: torch.Tensor
    retained_start: float
    retained: float
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
    masks: dict[str, torch.Tensor]  # columns permuted, rows in the source's order
    permutation: torch.Tensor | None
    retained: dict[str, tuple[float, float]]


def prune_block(
    skeleton: Skeleton,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    statistics: Mapping[str, ChannelStatistics],
    prunable: set[str],
    config: PruneConfig,
) -> PrunedBlock:
    """Prune a block's source tensors (by full name); `statistics` of a layer's input by the layer's full name."""
    results: dict[str, _GroupResult] = {}
    folded: list[FoldedPermutation] = []
    for group, names in skeleton.group_layers(index):
        if not prunable.issuperset(names):
            continue
        weights = {name: tensors[name + ".weight"] for name in names}
        heads = _fold_heads(skeleton, group, config)
        result = _prune_group(weights, statistics[names[0]], heads, config)
        results.update(dict.fromkeys(names, result))
        if result.permutation is not None and can_fold(skeleton, group, config):
            folded += _fold(skeleton, index, names[0], result.permutation, group, heads)
    rows = {tensor: f.permutation for f in folded for tensor, dim in f.reorders if dim == 0}
    folded_inputs = {tensor for f in folded for tensor, dim in f.reorders if dim == 1}
    layers = {}
    for name, result in results.items():
        columns = result.permutation
        weight, keep, rms = tensors[name + ".weight"], result.masks[name], statistics[name].rms
        weight = weight if columns is None else weight[:, columns]
        error = weighted_error(weight, keep, rms if columns is None else rms[columns])
        if name + ".weight" in rows:
            weight, keep = weight[rows[name + ".weight"]], keep[rows[name + ".weight"]]
        gather = None if name + ".weight" in folded_inputs else columns
        layers[name] = PrunedLayer(weight.contiguous(), keep, gather, rms, *result.retained[name], error)
    pruned = {name + ".weight" for name in layers}
    existing = set(skeleton.block_parameters(index))
    others = {name: _reordered(tensors[name], rows.get(name)) for name in sorted(existing - pruned)}
    kept = tuple(
        FoldedPermutation(f.name, f.permutation, tuple(r for r in f.reorders if r[0] in existing)) for f in folded
    )
    return PrunedBlock(layers, others, kept)


def can_fold(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> bool:
    """Whether a permutation of the group's input folds into its producers.

    Inside heads only where groups of M do not cross heads; elsewhere it is stored and applied at run time.
    """
    return bool(group.producers) and not (group.per_head and skeleton.heads()[2] % config.pattern.group_size)


def _fold_heads(skeleton: Skeleton, group: InputGroup, config: PruneConfig) -> tuple[int, int, int] | None:
    return skeleton.heads() if group.per_head and can_fold(skeleton, group, config) else None


def _prune_group(
    weights: Mapping[str, torch.Tensor],
    statistics: ChannelStatistics,
    heads: tuple[int, int, int] | None,
    config: PruneConfig,
) -> _GroupResult:
    """Layers that share an input share a permutation: the search sees their rows as one matrix."""
    scores = {name: score(weight, statistics, config) for name, weight in weights.items()}
    joint = torch.cat(list(scores.values()))
    found = search_permutation(joint, config) if heads is None else _search_in_heads(joint, heads, config)
    permutation = None if torch.equal(found, torch.arange(len(found), device=found.device)) else found
    masks, retained = {}, {}
    for name, layer_scores in scores.items():
        masks[name] = select(layer_scores, config.pattern)
        start = end = retained_score(layer_scores, masks[name])
        if permutation is not None:
            permuted = layer_scores[:, permutation]
            masks[name] = select(permuted, config.pattern)
            end = retained_score(permuted, masks[name])
        retained[name] = (start, end)
    return _GroupResult(masks, permutation, retained)


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
