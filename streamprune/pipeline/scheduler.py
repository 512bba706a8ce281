"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import layer_from_tensors, packed_tensors, tensor_names
from streamprune.checkpoint.reader import Checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.checkpoint.writer import Pieces, Staged, stage_safetensors
from streamprune.config import PruneConfig
from streamprune.errors import BlockErrorExceeded, JobMismatchError
from streamprune.model.arithmetic import peak_memory_bytes, return_free_memory
from streamprune.model.blocks import Observer, dense_block, layers_observed, run_block
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.streaming import BlockArguments, load_block
from streamprune.pipeline.block_pruning import FoldedPermutation, PrunedBlock, PrunedLayer, prune_block
from streamprune.pipeline.job import Job
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.residual import source_order
from streamprune.pipeline.run import Run
from streamprune.pipeline.source import SourceBlock, parameters_of, read_source, source_blocks
from streamprune.pipeline.streams import Streams, inputs_of_next_block
from streamprune.pipeline.validation import (
    BlockErrorSum,
    InputSample,
    LayerErrors,
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
    sources = source_blocks(run.job, range(len(entries), len(blocks)))
    run.open_files.callback(sources.close)
    left = range(len(entries), len(blocks))
    if run.job.config.validate:
        following = _pruned_blocks(run, tuple(entries), sources)
    else:
        following = _pruned_unseen(run, left, sources)
    for index, entry in zip(left, following, strict=True):
        run.journal.record(index, entry)
        entries.append(entry)
        return_free_memory()
        run.progress.block_done(blocks[index], entry)
    return entries


def _pruned_blocks(
    run: Run, finished: Sequence[dict[str, Any]], sources: Iterator[SourceBlock]
) -> Iterator[dict[str, Any]]:
    """The entries of the blocks that follow; each is to be in the journal before the next is asked for."""
    arguments, streams = inputs_of_next_block(run, finished)
    for index in range(len(finished), len(run.job.skeleton.blocks)):
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
    timed = StageTimes()
    with timed("read"):
        source = next(sources)
        digests, tensors = source.digests, parameters_of(job, index, source, run.residual)
        del source
    dense = run.hidden_states("dense", len(job.tokens))
    reference = None
    if streams.reference is not None:
        reference = run.inputs_of(index + 1, "reference", len(streams.reference))
    run.progress.stage(f"{name} dense")
    statistics = _dense_pass(run, index, tensors, arguments, streams, dense, reference, timed)
    moments = _about_moments(statistics)
    pruned = prune_block(job.skeleton, index, tensors, statistics, set(job.plan.blocks[index]), job.config, timed)
    del tensors, statistics
    with timed("write"):
        staged = _stage_block(run, index, pruned)
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
            tensors = parameters_of(job, index, read_source(job, index), run.residual)
            staged = _stage_block(run, index, PrunedBlock({}, tensors, ()))
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
        "files": _digests(run, staged),
        "hidden_states": following.checksums,
        "reference_states": None if reference is None else reference.checksums,
        "moments": moments,
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, Streams(following, reference)


def _pruned_unseen(run: Run, left: Iterable[int], sources: Iterator[SourceBlock]) -> Iterator[dict[str, Any]]:
    """The entries of blocks pruned by their weights alone; one is synced while the next is worked on."""

    def publish(staged: Sequence[Staged]) -> None:
        for file in staged:
            file.sync()
            file.publish()

    waiting: deque[tuple[dict[str, Any], Future[None]]] = deque()
    for index in left:
        entry, staged = _prune_unseen(run, index, sources)
        waiting.append((entry, run.background.submit(publish, staged)))
        if len(waiting) > 1:
            entry, published = waiting.popleft()
            published.result()
            yield entry
    for entry, published in waiting:
        published.result()
        yield entry


def _prune_unseen(run: Run, index: int, sources: Iterator[SourceBlock]) -> tuple[dict[str, Any], Sequence[Staged]]:
    """A block pruned by its weights alone: no text passes it, and nothing is known of its error."""
    job = run.job
    timed = StageTimes()
    with timed("read"):
        source = next(sources)
        digests, tensors = source.digests, parameters_of(job, index, source, run.residual)
        del source
    plans = job.plan.blocks[index]
    statistics = {layer: ChannelStatistics.unseen(plan.shape[1]) for layer, plan in plans.items()}
    pruned = prune_block(job.skeleton, index, tensors, statistics, set(plans), job.config, timed)
    del tensors
    with timed("write"):
        staged = _stage_block(run, index, pruned)
    entry = {
        "name": job.skeleton.blocks[index],
        "outcome": "pruned",
        "block_error": None,
        "layers": [_about_layer(job, index, layer, result, None) for layer, result in pruned.layers.items()],
        "source_tensors": digests,
        "files": _digests(run, staged),
        "moments": _about_moments({}),
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, staged


def _about_moments(statistics: Mapping[str, ChannelStatistics]) -> dict[str, Any]:
    """Memory of all second moments of a block, and the layers whose inputs were too wide for one matrix of them."""
    each = {id(shared): shared for shared in statistics.values()}.values()
    split = [name for name, s in statistics.items() if s.moments is not None and len(s.moments.bounds) > 1]
    return {"bytes": sum(shared.moments_bytes for shared in each), "layers_in_blocks": sorted(split)}


def _about_layer(job: Job, index: int, name: str, pruned: PrunedLayer, errors: LayerErrors | None) -> dict[str, Any]:
    """A layer's entry in the manifest."""
    plan = job.plan.blocks[index][name]
    return {
        "name": name,
        "pattern": str(job.config.pattern),
        "shape": list(plan.shape),
        "dense_bytes": plan.dense_bytes,
        "packed_bytes": plan.packed_bytes,
        "permutation_bytes": 0 if pruned.gather is None else 4 * len(pruned.gather),
        "steps": [dataclasses.asdict(step) for step in pruned.steps],
        "shrinkage": list(pruned.shrinkage),
        "weighted_error": pruned.weighted_error,
        "kernel_error": None if errors is None else errors.kernel_error,
        "layer_error": None if errors is None else errors.layer_error,
    }


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


def _stage_block(run: Run, index: int, pruned: PrunedBlock) -> tuple[Staged, Staged]:
    """Write a block's folded permutations and input RMS, which lie beside the journal until the end, and its shard.

    Layers are packed one tensor at a time while the shard is written.
    """
    tensors: dict[str, torch.Tensor | Pieces] = {**pruned.others}
    evidence: dict[str, torch.Tensor] = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        tensors.update(packed_tensors(name, layer.written, layer.keep, layer.gather, run.job.config.pattern))
        evidence[f"{name}.input_rms"] = source_order(layer.rms.cpu(), f"{name}.weight", run.residual)
    about = [about_permutation(fold) for fold in pruned.folded]
    beside, shard = run.journal.evidence_path(index), run.journal.out / run.job.shard_name(index)
    temporary = run.journal.temporary
    return stage_safetensors(beside, evidence, temporary, about), stage_safetensors(shard, tensors, temporary)


def _digests(run: Run, staged: Iterable[Staged]) -> dict[str, str]:
    return {str(file.path.relative_to(run.journal.out)): file.digest for file in staged}


def about_permutation(fold: FoldedPermutation) -> dict[str, Any]:
    """A folded permutation's entry in the list of reordered tensors (docs/format.md)."""
    return {"permutation": fold.name, "reorders": [list(item) for item in fold.reorders]}


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
        layers.append(_about_layer(job, index, layer, result, errors))
        check_packed_bits(layer, result, layer_from_tensors(layer, shard.read(tensor_names(shard, layer))))
    for parameter, tensor in pruned.others.items():
        check_bits(parameter, tensor, shard.read([parameter])[parameter])
    return layers
