"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import layer_from_tensors, tensor_names
from streamprune.checkpoint.reader import Checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.config import PruneConfig
from streamprune.errors import BlockErrorExceeded, JobMismatchError
from streamprune.model.arithmetic import peak_memory_bytes, return_free_memory
from streamprune.model.blocks import Observer, dense_block, layers_observed, run_block
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.streaming import BlockArguments, load_block
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.entries import about_layer, about_moments, digests_of, stage_block
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.run import Run
from streamprune.pipeline.source import SourceBlock, parameters_of, read_source, source_blocks
from streamprune.pipeline.streams import Streams, inputs_of_next_block
from streamprune.pipeline.unseen import unseen_blocks
from streamprune.pipeline.validation import (
    BlockErrorSum,
    InputSample,
    check_bits,
    check_packed_bits,
    layer_errors,
)
from streamprune.pruning.statistics import ChannelStatistics

logger = logging.getLogger("streamprune")


def compress_blocks(run: Run, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compress every block that `entries` does not hold yet; returns the entries of all blocks."""
    blocks = run.job.skeleton.blocks
    check_outcomes(run.job.config, entries)
    if len(entries) == len(blocks):
        return entries
    run.progress.start(len(blocks), len(entries), len(run.job.tokens))
    left = range(len(entries), len(blocks))
    following = _pruned_blocks(run, tuple(entries)) if run.job.config.validate else unseen_blocks(run, left)
    run.open_files.callback(following.close)
    for index, entry in zip(left, following, strict=True):
        run.journal.record(index, entry)
        entries.append(entry)
        if run.job.config.validate:  # without passes a block's memory is the next one's; to fetch it anew takes long
            return_free_memory()
        run.progress.block_done(blocks[index], entry)
    return entries


def _pruned_blocks(run: Run, finished: Sequence[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
    """The entries of the blocks that follow; each is to be in the journal before the next is asked for."""
    left = range(len(finished), len(run.job.skeleton.blocks))
    sources = source_blocks(run.job, left)
    run.open_files.callback(sources.close)
    arguments, streams = inputs_of_next_block(run, finished)
    for index in left:
        entry, following = _compress_block(run, index, sources, arguments, streams)
        yield entry
        streams.close()
        streams = following
    streams.close()


def outcome_of(error: float, max_block_error: float | None, on_excess: str) -> str:
    """What the gate makes of a block error: "pruned", or "kept dense", "warned", "stopped" above the budget."""
    if max_block_error is None or error <= max_block_error:
        return "pruned"
    return {"keep-dense": "kept dense", "warn": "warned", "stop": "stopped"}[on_excess]


def check_outcomes(config: PruneConfig, entries: list[dict[str, Any]]) -> None:
    """Raise JobMismatchError where a finished block would have ended otherwise under these settings."""
    for entry in entries if config.validate else ():
        now = outcome_of(entry["block_error"], config.max_block_error, config.on_excess)
        if now != entry["outcome"]:
            raise JobMismatchError(
                f"{entry['name']}: was {entry['outcome']} at block error {entry['block_error']:.4g}, "
                f"with these settings it would be {now}; use the former --max-block-error and --on-excess, or --restart"
            )


def _compress_block(
    run: Run, index: int, sources: Iterator[SourceBlock], arguments: BlockArguments, streams: Streams
) -> tuple[dict[str, Any], Streams]:
    job, name = run.job, run.job.skeleton.blocks[index]
    timed = StageTimes(job.arithmetic.device)
    with timed("read"):
        source = next(sources)
        digests, tensors = source.digests, parameters_of(job, source, run.residual)
        del source
    dense = run.hidden_states("dense", len(job.tokens))
    reference = None
    if streams.reference is not None:
        reference = run.inputs_of(index + 1, "reference", len(streams.reference))
    run.progress.stage(f"{name} dense")
    statistics = _dense_pass(run, index, tensors, arguments, streams, dense, reference, timed)
    moments = about_moments(statistics)
    pruned = prune_block(job.skeleton, index, tensors, statistics, set(job.plan.blocks[index]), job.config, timed)
    del tensors, statistics
    with timed("write"):
        staged = stage_block(run, index, pruned)
    run.progress.stage(f"{name} sparse")
    following = run.inputs_of(index + 1, "hidden", len(job.tokens))
    synced = [run.background.submit(file.sync) for file in staged]
    if reference is not None:
        synced.append(run.background.submit(reference.sync))
    shard = open_file(staged[-1].temporary)
    block, samples, error = _sparse_pass(run, index, pruned, shard, arguments, streams.hidden, dense, following, timed)
    synced.append(run.background.submit(following.sync))
    with timed("validate"):
        layers = _validated(run, index, pruned, shard, block, samples)
    del block, samples
    outcome = outcome_of(error, job.config.max_block_error, job.config.on_excess)
    if outcome == "stopped":
        raise BlockErrorExceeded(
            f"{name}: block error {error:.4g} is above --max-block-error {job.config.max_block_error:g}; raise it, or "
            "choose --on-excess keep-dense or warn"
        )
    if outcome == "kept dense":
        with timed("write"):
            tensors = parameters_of(job, read_source(job, index), run.residual)
            staged = stage_block(run, index, PrunedBlock({}, tensors, ()))
        for sequence in range(len(dense)):
            following.write(sequence, dense.read(sequence))
        synced += [run.background.submit(file.sync) for file in (*staged, following)]
        layers = []
    if outcome != "pruned":
        logger.warning("%s: %s, block error %.4g above %g", name, outcome, error, job.config.max_block_error)
    dense.close()
    with timed("write"):
        for done in synced:
            done.result()
        for file in staged:
            file.publish()
    entry = {
        "name": name,
        "outcome": outcome,
        "block_error": error,
        "layers": layers,
        "source_tensors": digests,
        "files": digests_of(run, staged),
        "hidden_states": following.checksums,
        "reference_states": None if reference is None else reference.checksums,
        "moments": moments,
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, Streams(following, reference)


def _dense_pass(
    run: Run,
    index: int,
    tensors: dict[str, torch.Tensor],
    arguments: BlockArguments,
    streams: Streams,
    dense: HiddenStates,
    reference: HiddenStates | None,
    timed: StageTimes,
) -> dict[str, ChannelStatistics]:
    """Pass 1: the dense block's outputs, and the statistics of every layer's input, by the layer's full name.

    Every `correction_stride`-th sequence also goes through the block behind dense blocks alone, into `reference`.
    """
    job, name = run.job, run.job.skeleton.blocks[index]
    block = dense_block(job.skeleton, index, tensors, job.arithmetic.device, job.arithmetic.dtype)
    observation = BlockObservation(job, index, timed)

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        position, skipped = divmod(sequence, job.config.correction_stride)
        if streams.reference is None or reference is None or skipped:
            return
        with timed("reference pass"):
            states = streams.reference.read(position).to(job.arithmetic.device)
            output = observation.compare(lambda: run_block(block, states, arguments[index], name))
            reference.write(position, output)

    with timed("dense pass"), layers_observed(block, observation.observers, job.tokens.shape[1]):
        run.advance(block, index, arguments, streams.hidden, dense, observe)
    return observation.result()


def _sparse_pass(
    run: Run,
    index: int,
    pruned: PrunedBlock,
    shard: Checkpoint,
    arguments: BlockArguments,
    states: HiddenStates,
    dense: HiddenStates,
    following: HiddenStates,
    timed: StageTimes,
) -> tuple[nn.Module, dict[str, InputSample], float]:
    """Pass 2, from the shard as read back: the block, samples of its layers' inputs, and its error."""
    job, name = run.job, run.job.skeleton.blocks[index]
    packed = dict.fromkeys(pruned.layers, job.config.pattern)
    with timed("read"):
        names = {parameter: parameter for parameter in job.skeleton.block_parameters(index)}
        block = load_block(job.skeleton, index, shard, names, packed, job.arithmetic)
    samples: dict[str, InputSample] = {}
    observers: dict[str, Observer] = {}
    for _, members in job.skeleton.group_layers(index):
        if members[0] in pruned.layers:
            sample = InputSample(len(states))
            samples.update(dict.fromkeys(members, sample))
            observers[members[0].removeprefix(f"{name}.")] = sample.observe
    total = BlockErrorSum()

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        total.add(x, dense.read(sequence).to(x.device), y)

    with timed("sparse pass"), layers_observed(block, observers, job.tokens.shape[1]):
        run.advance(block, index, arguments, states, following, observe)
    return block, samples, total.value


def _validated(
    run: Run, index: int, pruned: PrunedBlock, shard: Checkpoint, block: nn.Module, samples: Mapping[str, InputSample]
) -> list[dict[str, Any]]:
    """The entries of a written block's layers. Raises KernelFault where a bit or a product is not what it must be."""
    job, name = run.job, run.job.skeleton.blocks[index]
    layers = []
    for layer, result in pruned.layers.items():
        written = block.get_submodule(layer.removeprefix(f"{name}."))
        assert isinstance(written, PackedLinear)
        bias = pruned.others.get(f"{layer}.bias")
        errors = layer_errors(layer, written, result, bias, samples[layer].tokens, job.arithmetic)
        layers.append(about_layer(job, index, layer, result, errors))
        check_packed_bits(layer, result, layer_from_tensors(layer, shard.read(tensor_names(shard, layer))))
    for parameter, tensor in pruned.others.items():
        check_bits(parameter, tensor, shard.read([parameter])[parameter])
    return layers
