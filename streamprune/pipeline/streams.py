"""The hidden states between two blocks: found on disk by a job that goes on, or made again by replaying."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.reader import open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.errors import CheckpointError
from streamprune.model.blocks import dense_block
from streamprune.model.streaming import BlockArguments, TextInputs, embed, load_block, text_inputs
from streamprune.pipeline.residual import reordered
from streamprune.pipeline.run import Run
from streamprune.pipeline.source import parameters_of, read_source


@dataclass(frozen=True)
class Streams:
    """Inputs of a block: behind the pruned blocks, and for every k-th sequence behind the dense ones."""

    hidden: HiddenStates
    reference: HiddenStates | None

    def close(self) -> None:
        for states in (self.hidden, self.reference):
            if states is not None:
                states.close()


def inputs_of_next_block(run: Run, entries: Sequence[dict[str, Any]]) -> tuple[BlockArguments, Streams]:
    """Hidden states for the first unfinished block: those on disk if they are whole, or made again by replaying."""
    job = run.job
    inputs = text_inputs(job.skeleton, job.checkpoint, job.names, lambda tensors: reordered(tensors, run.residual))
    arguments, hidden = _resumed(run, inputs, entries, "hidden", job.tokens, _written_block)
    if not job.config.correction:
        return arguments, Streams(hidden, None)
    tokens = job.tokens[:: job.config.correction_stride]
    return arguments, Streams(hidden, _resumed(run, inputs, entries, "reference", tokens, _source_block)[1])


def _resumed(
    run: Run,
    inputs: TextInputs,
    entries: Sequence[dict[str, Any]],
    kind: str,
    tokens: torch.Tensor,
    block_of: Callable[[Run, int, dict[str, Any]], nn.Module],
) -> tuple[BlockArguments, HiddenStates]:
    job, finished = run.job, len(entries)
    if finished:
        states = run.inputs_of(finished, kind, len(tokens))
        states.checksums = list(entries[-1][f"{kind}_states"])
        if _is_whole(states):
            return embed(job.skeleton, inputs, job.tokens, job.arithmetic, None, run.tick), states
        states.close()
    states = run.inputs_of(0, kind, len(tokens))
    run.progress.stage("embeddings")
    arguments = embed(job.skeleton, inputs, tokens, job.arithmetic, states, run.tick)
    for index, entry in enumerate(entries):
        run.progress.stage("replaying")
        block = block_of(run, index, entry)
        following = run.inputs_of(index + 1, kind, len(tokens))
        run.advance(block, index, arguments, states, following)
        states.close()
        states = following
    return arguments, states


def _written_block(run: Run, index: int, entry: dict[str, Any]) -> nn.Module:
    job = run.job
    shard = open_file(run.journal.out / job.shard_name(index))
    packed = dict.fromkeys((layer["name"] for layer in entry["layers"]), job.config.pattern)
    names = {name: name for name in job.skeleton.block_parameters(index)}
    return load_block(job.skeleton, index, shard, names, packed, job.arithmetic)


def _source_block(run: Run, index: int, entry: dict[str, Any]) -> nn.Module:
    job = run.job
    tensors = parameters_of(job, read_source(job, index), run.residual)
    return dense_block(job.skeleton, index, tensors, job.arithmetic.device, job.arithmetic.dtype)


def _is_whole(states: HiddenStates) -> bool:
    if any(checksum is None for checksum in states.checksums):
        return False
    try:
        for index in range(len(states)):
            states.read(index)
    except CheckpointError:
        return False
    return True
