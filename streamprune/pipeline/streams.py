"""The hidden states between two blocks: found on disk by a job that goes on, or made again by replaying."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from streamprune.checkpoint.manifest import JournalEntry
from streamprune.checkpoint.reader import Checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.errors import CheckpointError
from streamprune.model.blocks import dense_block, load_block
from streamprune.model.expert_streaming import Load, advance_by_parts
from streamprune.model.skeleton import Block
from streamprune.model.source import Source
from streamprune.model.streaming import BlockArguments, TextInputs, embed, text_inputs
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.reading import parameters_of, read_part
from streamprune.pipeline.residual import reordered
from streamprune.pipeline.run import Run
from streamprune.stopping import safe_point


@dataclass(frozen=True)
class Streams:
    """Inputs of a block: behind the pruned blocks, and for every k-th sequence behind the dense ones."""

    hidden: HiddenStates
    reference: HiddenStates | None

    def close(self) -> None:
        for states in (self.hidden, self.reference):
            if states is not None:
                states.close()


def inputs_of_next_block(run: Run, entries: Sequence[JournalEntry]) -> tuple[BlockArguments, Streams]:
    """Hidden states for the first unfinished block: those on disk if they are whole, or made again by replaying."""
    job = run.job
    inputs = text_inputs(job.source, lambda tensors: reordered(tensors, run.residual))
    arguments, hidden = _resumed(run, inputs, entries, "hidden", job.tokens, _written_block)
    if not job.config.correction:
        return arguments, Streams(hidden, None)
    tokens = job.tokens[:: job.config.correction_stride]
    return arguments, Streams(hidden, _resumed(run, inputs, entries, "reference", tokens, _source_block)[1])


def _resumed(
    run: Run,
    inputs: TextInputs,
    entries: Sequence[JournalEntry],
    kind: str,
    tokens: torch.Tensor,
    parts_of: Callable[[Run, Block, JournalEntry], Load],
) -> tuple[BlockArguments, HiddenStates]:
    job, finished = run.job, len(entries)
    if finished:
        states = run.inputs_of(finished, kind, len(tokens))
        recorded = entries[-1].hidden_states if kind == "hidden" else entries[-1].reference_states
        states.checksums = list(recorded or ())
        if _is_whole(states):
            return embed(job.source.skeleton, inputs, job.tokens, job.arithmetic, None, run.watch.tick), states
        states.close()
    states = run.inputs_of(0, kind, len(tokens))
    run.watch.progress.stage("embeddings")
    arguments = embed(job.source.skeleton, inputs, tokens, job.arithmetic, states, run.watch.tick)
    for block, entry in zip(job.source.blocks, entries, strict=False):
        run.watch.progress.stage("replaying")
        following = run.inputs_of(block.index + 1, kind, len(tokens))
        load, streams = parts_of(run, block, entry), (states, following)
        advance_by_parts(
            block, load, arguments[block.index], streams, job.arithmetic, run.scratch, run.watch.tick,
            job.plan.micro_batch,
        )  # fmt: skip
        states.close()
        states = following
    return arguments, states


def _written_block(run: Run, block: Block, entry: JournalEntry) -> Load:
    shard = open_file(run.journal.out / run.job.shard_name(block))
    written = written_source(run.job, block, shard, (layer.name for layer in entry.record.layers))
    return lambda part: load_block(written, part, run.job.arithmetic)


def written_source(job: Job, block: Block, shard: Checkpoint, pruned: Iterable[str]) -> Source:
    """A written block's shard as what it is loaded from; `pruned` are its packed layers."""
    names = {name: name for name in block.parameters}
    return Source(job.source.skeleton, shard, names, dict.fromkeys(pruned, job.config.pattern))


def _source_block(run: Run, block: Block, entry: JournalEntry) -> Load:
    job = run.job

    def load(part: Block) -> nn.Module:
        tensors = parameters_of(job, read_part(job, part), run.residual)
        return dense_block(job.source.skeleton, part, tensors, job.arithmetic)

    return load


def _is_whole(states: HiddenStates) -> bool:
    if any(checksum is None for checksum in states.checksums):
        return False
    try:
        for index in range(len(states)):
            safe_point()
            states.read(index)
    except CheckpointError:
        return False
    return True
