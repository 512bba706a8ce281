"""One permutation of the residual stream for the whole model, folded into everything that reads or writes it.

It is found from the weights alone, before the first block: the rows that read the stream (q, k, v and gate, up of every
block), each column times the weight of the norm before it, which is about the size of that input. Every tensor is put
in the new order when it is read from the source, so the rest of the job does not know.
"""

from collections.abc import Mapping

import torch

from streamprune.checkpoint.reader import open_file
from streamprune.checkpoint.writer import write_safetensors
from streamprune.pipeline.block_pruning import FoldedPermutation
from streamprune.pipeline.job import Job
from streamprune.pipeline.journal import Journal
from streamprune.pruning.shuffle import search_permutation

NAME = "residual.permutation"
MOST_ROWS = 16384  # of all blocks together that the search sees, evenly spaced


def residual_permutation(job: Job, journal: Journal) -> FoldedPermutation:
    """The permutation of a job, found now or kept in its journal, and every tensor that it reorders."""
    path = journal.work / "residual.safetensors"
    if not path.exists():
        found = search_permutation(_reading_rows(job), job.config)
        write_safetensors(path, {NAME: found.to(torch.int32)}, journal.temporary)
    permutation = open_file(path).read([NAME])[NAME].long()
    return FoldedPermutation(NAME, permutation, residual_sides(job))


def residual_sides(job: Job) -> tuple[tuple[str, int], ...]:
    """Every parameter with a dimension along the residual stream: (name, dimension)."""
    skeleton = job.skeleton
    table = skeleton.architecture.residual
    sides = [(name, dim) for name, dim in table.outer if name in skeleton.outer_parameters()]
    for prefix, index in zip(skeleton.blocks, range(len(skeleton.blocks)), strict=True):
        existing = set(skeleton.block_parameters(index))
        sides += [(f"{prefix}.{name}", dim) for name, dim in table.block if f"{prefix}.{name}" in existing]
    # Embeddings of another width than the stream's (OPT-350m) are projected into it; then the projections are in the
    # table, and the embeddings are not along the stream.
    return tuple(side for side in sides if _size(job, side) == skeleton.hidden_size)


def reordered(tensors: Mapping[str, torch.Tensor], residual: FoldedPermutation | None) -> dict[str, torch.Tensor]:
    """Tensors by parameter name with the residual stream in its new order."""
    if residual is None:
        return dict(tensors)
    result = dict(tensors)
    for name, dim in residual.reorders:
        if name in result:
            result[name] = result[name].index_select(dim, residual.permutation.to(result[name].device))
    return result


def source_order(channels: torch.Tensor, weight: str, residual: FoldedPermutation | None) -> torch.Tensor:
    """Values [in] of a weight's input channels, back in the source's order where the residual stream is that input."""
    if residual is None or (weight, 1) not in residual.reorders:
        return channels
    return torch.empty_like(channels).index_copy_(0, residual.permutation, channels)


def _size(job: Job, side: tuple[str, int]) -> int:
    name, dim = side
    return job.checkpoint.tensors[job.names[name]].shape[dim]


def _reading_rows(job: Job) -> torch.Tensor:
    """|W| times the norm's weight, float32 [rows, hidden], of evenly spaced rows that read the residual stream."""
    skeleton = job.skeleton
    groups = len(skeleton.blocks) * len(skeleton.architecture.residual.norms)
    parts = []
    for index, prefix in enumerate(skeleton.blocks):
        by_first = {group.layers[0]: names for group, names in skeleton.group_layers(index)}
        for first, norm in skeleton.architecture.residual.norms.items():
            names = [f"{name}.weight" for name in by_first[first]]
            sources = [job.names[name] for name in (*names, f"{prefix}.{norm}.weight")]
            *weights, scale = job.checkpoint.read(sources).values()
            rows = torch.cat([weight.to(torch.float32) for weight in weights])
            rows = rows[:: max(1, len(rows) * groups // MOST_ROWS)].abs() * scale.to(torch.float32).abs()
            parts.append(rows / rows.mean())  # no block outweighs the others by its scale
    return torch.cat(parts)
