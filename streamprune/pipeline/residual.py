"""One permutation of the residual stream for the whole model, folded into everything that reads or writes it.

It is found before the first block, from the rows that read the stream (q, k, v and gate, up of every block), each
column times the size of that input in a pre-pass: a few sequences through the dense model, block by block. Every tensor
is put in the new order when it is read from the source, so the rest of the job does not know.
"""

from collections.abc import Callable, Mapping

import torch

from streamprune.model.blocks import Observer, RunnableBlock, dense_block, layers_observed
from streamprune.model.folding import FoldedPermutation
from streamprune.model.streaming import block_inputs, embed, text_inputs
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.writing.journal import Journal
from streamprune.pruning.shuffle import search_permutation

NAME = "residual.permutation"
PRE_PASS_SEQUENCES = 2  # of the calibration text
MAX_ROWS = 16384  # of all blocks together that the search sees, evenly spaced


def residual_permutation(job: Job, journal: Journal, tick: Callable[[], None]) -> FoldedPermutation:
    """The permutation of a job, found now or kept in its journal, and every tensor that it reorders.

    `tick` is called at safe points of the pre-pass.
    """
    path = journal.work / "residual.json"
    kept = journal.read(path)
    if kept is None:
        kept = {NAME: search_permutation(_reading_rows(job, tick), job.config).tolist()}
        journal.write(path, kept)
    return FoldedPermutation(NAME, torch.tensor(kept[NAME]), residual_sides(job))


def residual_sides(job: Job) -> tuple[tuple[str, int], ...]:
    """Every parameter with a dimension along the residual stream: (name, dimension)."""
    skeleton = job.source.skeleton
    table = skeleton.residual
    assert table is not None  # make_plan refuses it
    sides = [(name, dim) for name, dim in table.outer if name in skeleton.outer_parameters]
    for block in skeleton.blocks:
        full = ((f"{block.name}.{name}", dim) for name, dim in table.block)
        sides += [(name, dim) for name, dim in full if name in block.parameters]
    # Embeddings of another width than the stream's (OPT-350m) are projected into it; then the projections are in the
    # table, and the embeddings are not along the stream.
    return tuple((name, dim) for name, dim in sides if job.source.stored(name).shape[dim] == skeleton.hidden_size)


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


def _reading_rows(job: Job, tick: Callable[[], None]) -> torch.Tensor:
    """|W| times the inputs' root mean square, float32 [rows, hidden], of evenly spaced rows that read the stream.

    The inputs are those of the dense model on the first calibration sequences.
    """
    skeleton, arithmetic = job.source.skeleton, job.arithmetic
    inputs = text_inputs(job.source)
    arguments = embed(skeleton, inputs, job.tokens[:1], arithmetic, None, tick)
    recorded = [block_inputs(skeleton, inputs, row, arithmetic) for row in job.tokens[:PRE_PASS_SEQUENCES]]
    states = [one.hidden_states.to(arithmetic.device) for one in recorded]
    readers = sum(not group.producers for group in skeleton.blocks[0].groups)
    parts = []
    for block in skeleton.blocks:
        tensors = job.source.read(block.parameters)
        runnable = RunnableBlock(block.name, dense_block(skeleton, block, tensors, arithmetic), arguments[block.index])
        groups = [group for group in block.groups if not group.producers]
        energy = {group.name: torch.zeros(skeleton.hidden_size, dtype=torch.float64) for group in groups}
        observers = {block.local(name): _adding(sums) for name, sums in energy.items()}
        with layers_observed(runnable.module, observers, job.tokens.shape[1]):
            for place, x in enumerate(states):
                states[place] = runnable.run(x)
                tick()
        for group in groups:
            weights = [layer.read(tensors[layer.parameter]).to(torch.float32) for layer in group.layers]
            rows = torch.cat(weights)
            rows = rows[:: max(1, len(rows) * readers * len(skeleton.blocks) // MAX_ROWS)].abs()
            rows = rows * energy[group.name].sqrt().to(torch.float32)
            parts.append(rows / rows.mean().clamp(min=torch.finfo(torch.float32).tiny))  # no block outweighs others
    return torch.cat(parts)


def _adding(energy: torch.Tensor) -> Observer:
    """Adds each channel's sum of squares to float64 [in]."""

    def observe(x: torch.Tensor, y: torch.Tensor) -> None:
        energy.add_(x.to(torch.float64).square_().sum(dim=0).cpu())

    return observe
