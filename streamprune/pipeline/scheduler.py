"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import layer_from_tensors, pack_layer
from streamprune.checkpoint.reader import open_file, tensor_digest
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.checkpoint.writer import file_digest, write_safetensors
from streamprune.config import PruneConfig
from streamprune.errors import (
    BlockErrorExceeded,
    CheckpointError,
    Interrupted,
    JobMismatchError,
    numerics_named,
)
from streamprune.model.arithmetic import peak_memory_bytes, return_free_memory
from streamprune.model.blocks import Observer, dense_block, layers_observed, run_block
from streamprune.model.streaming import BlockArguments, advance, embed, input_parameters, load_block, read_outer
from streamprune.pipeline.block_pruning import FoldedPermutation, PrunedBlock, moment_unit, prune_block
from streamprune.pipeline.job import Job
from streamprune.pipeline.journal import Journal
from streamprune.pipeline.progress import Progress, StageTimes
from streamprune.pipeline.residual import reordered, source_order
from streamprune.pipeline.validation import BlockErrorSum, InputSample, check_bits, check_packed_bits, layer_errors
from streamprune.pruning.statistics import ChannelStatistics, LayerTokens, StatisticsAccumulator

logger = logging.getLogger("streamprune")


@dataclass(frozen=True)
class Run:
    """One run of a job: where it writes and who watches."""

    job: Job
    journal: Journal
    scratch: Path
    progress: Progress
    should_stop: Callable[[], bool]
    open_files: ExitStack  # closes the hidden states, however the job ends
    background: Executor  # waits for disks while the processor works
    residual: FoldedPermutation | None = None  # of the residual stream, for the whole model

    def tick(self) -> None:
        """A safe point: one sequence is done. Raises Interrupted when asked to stop."""
        self.progress.sample_done()
        if self.should_stop():
            raise Interrupted(f"{self.journal.out}: interrupted; run again to go on after the last finished block")

    def inputs_of(self, index: int, kind: str, samples: int) -> HiddenStates:
        """The inputs of a block. Two files of a kind take turns: a block's outputs go where its predecessor's inputs
        were, into pages that are there already.
        """
        return self.hidden_states(f"{kind}-{index % 2}", samples)

    def hidden_states(self, name: str, samples: int) -> HiddenStates:
        length = self.job.tokens.shape[1]
        hidden, dtype = self.job.skeleton.hidden_size, self.job.arithmetic.dtype
        states = HiddenStates(self.scratch / f"{name}.bin", samples, length, hidden, dtype)
        self.open_files.callback(states.close)
        return states


def compress_blocks(run: Run, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compress every block that `entries` does not hold yet; returns the entries of all blocks."""
    blocks = run.job.skeleton.blocks
    check_outcomes(run.job.config, entries)
    if len(entries) == len(blocks):
        return entries
    run.progress.start(len(blocks), len(entries), len(run.job.tokens))
    arguments, streams = _inputs_of_next_block(run, entries)
    sources = _source_blocks(run, range(len(entries), len(blocks)))
    run.open_files.callback(sources.close)
    for index in range(len(entries), len(blocks)):
        entry, following = _compress_block(run, index, sources, arguments, streams)
        run.journal.record(index, entry)
        entries.append(entry)
        streams.close()
        streams = following
        return_free_memory()
        run.progress.block_done(blocks[index], entry)
    streams.close()
    return entries


def outcome_of(error: float, max_block_error: float | None, on_excess: str) -> str:
    """What the gate makes of a block error: "pruned", or "kept dense", "warned", "stopped" above the budget."""
    if max_block_error is None or error <= max_block_error:
        return "pruned"
    return {"keep-dense": "kept dense", "warn": "warned", "stop": "stopped"}[on_excess]


def check_outcomes(config: PruneConfig, entries: list[dict[str, Any]]) -> None:
    """Raise JobMismatchError where a finished block would have ended otherwise under these settings."""
    for entry in entries:
        now = outcome_of(entry["block_error"], config.max_block_error, config.on_excess)
        if now != entry["outcome"]:
            raise JobMismatchError(
                f"{entry['name']}: was {entry['outcome']} at block error {entry['block_error']:.4g}, "
                f"with these settings it would be {now}; use the former --max-block-error and --on-excess, or --restart"
            )


@dataclass(frozen=True)
class _Streams:
    """Inputs of a block: behind the pruned blocks, and for every k-th sequence behind the dense ones."""

    hidden: HiddenStates
    reference: HiddenStates | None

    def close(self) -> None:
        for states in (self.hidden, self.reference):
            if states is not None:
                states.close()


def _inputs_of_next_block(run: Run, entries: list[dict[str, Any]]) -> tuple[BlockArguments, _Streams]:
    """Hidden states for the first unfinished block: those on disk if they are whole, or made again by replaying."""
    job = run.job
    outer = read_source_outer(run, input_parameters(job.skeleton))
    arguments, hidden = _resumed(run, outer, entries, "hidden", job.tokens, _written_block)
    if not job.config.correction:
        return arguments, _Streams(hidden, None)
    tokens = job.tokens[:: job.config.correction_stride]
    return arguments, _Streams(hidden, _resumed(run, outer, entries, "reference", tokens, _source_block)[1])


def _resumed(
    run: Run,
    outer: dict[str, torch.Tensor],
    entries: list[dict[str, Any]],
    kind: str,
    tokens: torch.Tensor,
    block_of: Callable[[Run, int, dict[str, Any]], nn.Module],
) -> tuple[BlockArguments, HiddenStates]:
    job, finished = run.job, len(entries)
    if finished:
        states = run.inputs_of(finished, kind, len(tokens))
        states.checksums = list(entries[-1][f"{kind}_states"])
        if _is_whole(states):
            return embed(job.skeleton, outer, job.tokens, job.arithmetic, None, run.tick), states
        states.close()
    states = run.inputs_of(0, kind, len(tokens))
    run.progress.stage("embeddings")
    arguments = embed(job.skeleton, outer, tokens, job.arithmetic, states, run.tick)
    for index, entry in enumerate(entries):
        run.progress.stage("replaying")
        block = block_of(run, index, entry)
        following = run.inputs_of(index + 1, kind, len(tokens))
        advance(block, entry["name"], arguments[index], states, following, job.arithmetic, run.tick)
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
    tensors = _parameters_of(run, index, _read_source(run, index))
    return dense_block(job.skeleton, index, tensors, job.arithmetic.device, job.arithmetic.dtype)


@dataclass(frozen=True)
class _SourceBlock:
    """A block's parameters as the source stores them, by its names, and their digests."""

    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]


def _source_blocks(run: Run, indices: Iterable[int]) -> Generator[_SourceBlock, None, None]:
    """The blocks of `indices` in order; while one is worked on the next is read, if there is memory for it.

    The thread that reads makes no arithmetic but checksums, so it takes no core from the one that computes.
    """
    if not run.job.plan.memory.next_block:
        yield from (_read_source(run, index) for index in indices)
        return
    left = list(indices)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        upcoming = reader.submit(_read_source, run, left[0])
        for following in [*left[1:], None]:
            block = upcoming.result()
            if following is not None:
                upcoming = reader.submit(_read_source, run, following)
            yield block


def _read_source(run: Run, index: int) -> _SourceBlock:
    job = run.job
    tensors = job.checkpoint.read_unchecked(job.names[name] for name in job.skeleton.block_parameters(index))
    return _SourceBlock(tensors, {name: tensor_digest(tensor) for name, tensor in tensors.items()})


def _parameters_of(run: Run, index: int, source: _SourceBlock) -> dict[str, torch.Tensor]:
    """A block's parameters by name, checked, on the job's device, the residual stream in the job's order."""
    job = run.job
    job.checkpoint.check_finite(source.tensors)
    parameters = job.skeleton.block_parameters(index)
    device = job.arithmetic.device
    return reordered({name: source.tensors[job.names[name]].to(device) for name in parameters}, run.residual)


def read_source_outer(
    run: Run, parameters: list[str], digests: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Parameters outside the blocks, the residual stream in the job's order; notes the source's digests."""
    tensors = read_outer(run.job.skeleton, run.job.checkpoint, run.job.names, parameters)
    if digests is not None:
        digests.update((run.job.names[name], tensor_digest(tensor)) for name, tensor in tensors.items())
    return reordered(tensors, run.residual)


def _is_whole(states: HiddenStates) -> bool:
    if any(checksum is None for checksum in states.checksums):
        return False
    try:
        for index in range(len(states)):
            states.read(index)
    except CheckpointError:
        return False
    return True


def _compress_block(
    run: Run, index: int, sources: Iterator[_SourceBlock], arguments: BlockArguments, streams: _Streams
) -> tuple[dict[str, Any], _Streams]:
    job, name = run.job, run.job.skeleton.blocks[index]
    timed = StageTimes()
    with timed("read"):
        source = next(sources)
        digests, tensors = source.digests, _parameters_of(run, index, source)
        del source
    dense = run.hidden_states("dense", len(job.tokens))
    reference = None
    if streams.reference is not None:
        reference = run.inputs_of(index + 1, "reference", len(streams.reference))
    run.progress.stage(f"{name} dense")
    statistics = _dense_pass(run, index, tensors, arguments, streams, dense, reference, timed)
    moments_bytes = sum(shared.moments_bytes for shared in {id(s): s for s in statistics.values()}.values())
    split = sorted({name for name, s in statistics.items() if s.moments is not None and len(s.moments.bounds) > 1})
    prunable = set(job.plan.blocks[index])
    pruned = prune_block(job.skeleton, index, tensors, statistics, prunable, job.config, timed)
    del tensors, statistics
    with timed("write"):
        _write_block(run, index, pruned)
    run.progress.stage(f"{name} sparse")
    following = run.inputs_of(index + 1, "hidden", len(job.tokens))
    synced = [] if reference is None else [run.background.submit(reference.sync)]
    error, layers = _sparse_pass(run, index, pruned, arguments, streams.hidden, dense, following, synced, timed)
    outcome = outcome_of(error, job.config.max_block_error, job.config.on_excess)
    if outcome == "stopped":
        raise BlockErrorExceeded(
            f"{name}: block error {error:.4g} is above --max-block-error {job.config.max_block_error:g}; raise it, or "
            "choose --on-excess keep-dense or warn"
        )
    if outcome == "kept dense":
        with timed("write"):
            _write_block(run, index, PrunedBlock({}, _parameters_of(run, index, _read_source(run, index)), ()))
        for sequence in range(len(dense)):
            following.write(sequence, dense.read(sequence))
        synced.append(run.background.submit(following.sync))
        layers = []
    if outcome != "pruned":
        logger.warning("%s: %s, block error %.4g above %g", name, outcome, error, job.config.max_block_error)
    dense.close()
    for done in synced:
        done.result()
    files = [run.journal.out / job.shard_name(index), run.journal.evidence_path(index)]
    entry = {
        "name": name,
        "outcome": outcome,
        "block_error": error,
        "layers": layers,
        "source_tensors": digests,
        "files": {str(path.relative_to(run.journal.out)): file_digest(path) for path in files},
        "hidden_states": following.checksums,
        "reference_states": None if reference is None else reference.checksums,
        "moments": {"bytes": moments_bytes, "layers_in_blocks": split},
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, _Streams(following, reference)


def _dense_pass(
    run: Run,
    index: int,
    tensors: dict[str, torch.Tensor],
    arguments: BlockArguments,
    streams: _Streams,
    dense: HiddenStates,
    reference: HiddenStates | None,
    timed: StageTimes,
) -> dict[str, ChannelStatistics]:
    """Pass 1: the dense block's outputs, and the statistics of every layer's input, by the layer's full name.

    Every `correction_stride`-th sequence also goes through the block behind dense blocks alone, into `reference`.
    """
    job, name = run.job, run.job.skeleton.blocks[index]
    block = dense_block(job.skeleton, index, tensors, job.arithmetic.device, job.arithmetic.dtype)
    accumulators: dict[str, StatisticsAccumulator] = {}  # by the first layer of each input group
    seen: dict[str, LayerTokens] = {}
    observers: dict[str, Observer] = {}
    for group, names in job.skeleton.group_layers(index):
        if names[0] in job.plan.blocks[index]:
            out_features, channels = job.plan.blocks[index][names[0]].shape
            unit = moment_unit(job.skeleton, group, job.config)
            accumulators[names[0]] = StatisticsAccumulator(
                channels, job.config, job.arithmetic.device, unit, out_features if len(names) == 1 else None
            )
            observers[names[0].removeprefix(f"{name}.")] = functools.partial(_note, seen, names[0])

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        pruned = dict(seen)
        with timed("statistics"):
            for layer, accumulator in accumulators.items():
                with numerics_named(layer):
                    accumulator.add(pruned[layer].inputs)
        position, skipped = divmod(sequence, job.config.correction_stride)
        if streams.reference is None or reference is None or skipped:
            return
        with timed("reference pass"):
            states = streams.reference.read(position).to(job.arithmetic.device)
            reference.write(position, run_block(block, states, arguments[index], name))
        with timed("statistics"):
            for layer, accumulator in accumulators.items():
                accumulator.add_reference(seen[layer], pruned[layer])

    with timed("dense pass"), layers_observed(block, observers):
        advance(block, name, arguments[index], streams.hidden, dense, job.arithmetic, run.tick, observe)
    statistics: dict[str, ChannelStatistics] = {}
    with timed("statistics"):
        for _, names in job.skeleton.group_layers(index):
            if names[0] in accumulators:
                statistics.update(dict.fromkeys(names, accumulators[names[0]].result()))
    return statistics


def _note(seen: dict[str, LayerTokens], name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    seen[name] = LayerTokens(x, y)


def _write_block(run: Run, index: int, pruned: PrunedBlock) -> None:
    """Write a block's shard, and beside the journal its folded permutations and input RMS."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in pruned.others.items()}
    evidence = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        tensors.update(pack_layer(layer.written.cpu(), layer.keep.cpu(), _on_cpu(layer.gather)).tensors(name))
        evidence[f"{name}.input_rms"] = source_order(layer.rms.cpu(), f"{name}.weight", run.residual)
    about = [about_permutation(fold) for fold in pruned.folded]
    write_safetensors(run.journal.evidence_path(index), evidence, run.journal.temporary, about)
    write_safetensors(run.journal.out / run.job.shard_name(index), tensors, run.journal.temporary)


def about_permutation(fold: FoldedPermutation) -> dict[str, Any]:
    """A folded permutation's entry in the list of reordered tensors (docs/format.md)."""
    return {"permutation": fold.name, "reorders": [list(item) for item in fold.reorders]}


def _sparse_pass(
    run: Run,
    index: int,
    pruned: PrunedBlock,
    arguments: BlockArguments,
    states: HiddenStates,
    dense: HiddenStates,
    following: HiddenStates,
    synced: list[Future[None]],
    timed: StageTimes,
) -> tuple[float, list[dict[str, Any]]]:
    """Pass 2, from the shard as read back from disk: the next block's inputs, the block's error and its layers'."""
    job, name = run.job, run.job.skeleton.blocks[index]
    shard = open_file(run.journal.out / job.shard_name(index))
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

    with timed("sparse pass"), layers_observed(block, observers):
        advance(block, name, arguments[index], states, following, job.arithmetic, run.tick, observe)
    synced.append(run.background.submit(following.sync))
    layers = []
    with timed("validate"):
        shard_tensors = shard.read(shard.tensors)
        for layer, result in pruned.layers.items():
            written = block.get_submodule(layer.removeprefix(f"{name}."))
            bias = pruned.others.get(f"{layer}.bias")
            errors = layer_errors(layer, written, result, bias, samples[layer].tokens, job.arithmetic)
            plan = job.plan.blocks[index][layer]
            layers.append(
                {
                    "name": layer,
                    "pattern": str(job.config.pattern),
                    "shape": list(plan.shape),
                    "dense_bytes": plan.dense_bytes,
                    "packed_bytes": plan.packed_bytes,
                    "permutation_bytes": 0 if result.gather is None else 4 * len(result.gather),
                    "steps": [dataclasses.asdict(step) for step in result.steps],
                    "shrinkage": list(result.shrinkage),
                    "weighted_error": result.weighted_error,
                    **dataclasses.asdict(errors),
                }
            )
            check_packed_bits(layer, result, layer_from_tensors(layer, shard_tensors))
        for parameter, tensor in pruned.others.items():
            check_bits(parameter, tensor, shard_tensors[parameter])
    return total.value, layers


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.cpu() if tensor is not None else None
