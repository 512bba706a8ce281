"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.packed import layer_from_tensors, pack_layer
from streamprune.checkpoint.reader import open_file, tensor_digest
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.checkpoint.writer import file_digest, write_safetensors
from streamprune.config import PruneConfig
from streamprune.errors import BlockErrorExceeded, CheckpointError, Interrupted, JobMismatchError, NumericsError
from streamprune.model.arithmetic import peak_memory_bytes
from streamprune.model.blocks import dense_block, inputs_observed
from streamprune.model.streaming import BlockArguments, advance, embed, input_parameters, load_block, read_outer
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.job import Job
from streamprune.pipeline.journal import Journal
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.validation import BlockErrorSum, InputSample, check_bits, check_packed_bits, layer_errors
from streamprune.pruning.statistics import ChannelStatistics, StatisticsAccumulator

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

    def tick(self) -> None:
        """A safe point: one sequence is done. Raises Interrupted when asked to stop."""
        self.progress.sample_done()
        if self.should_stop():
            raise Interrupted(f"{self.journal.out}: interrupted; run again to go on after the last finished block")

    def hidden_states(self, name: str) -> HiddenStates:
        samples, length = self.job.tokens.shape
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
    arguments, states = _inputs_of_next_block(run, entries)
    for index in range(len(entries), len(blocks)):
        entry, following = _compress_block(run, index, arguments, states)
        run.journal.record(index, entry)
        entries.append(entry)
        states.close(remove=True)
        states = following
        run.progress.block_done(blocks[index], entry)
    states.close(remove=True)
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


def _inputs_of_next_block(run: Run, entries: list[dict[str, Any]]) -> tuple[BlockArguments, HiddenStates]:
    """Hidden states for the first unfinished block: those on disk if they are whole, or made again by replaying."""
    job, finished = run.job, len(entries)
    outer = read_outer(job.skeleton, job.checkpoint, job.names, input_parameters(job.skeleton))
    if finished:
        states = run.hidden_states(f"hidden-{finished:05d}")
        states.checksums = list(entries[-1]["hidden_states"])
        if _is_whole(states):
            return embed(job.skeleton, outer, job.tokens, job.arithmetic, None, run.tick), states
        states.close(remove=True)
    states = run.hidden_states("hidden-00000")
    run.progress.stage("embeddings")
    arguments = embed(job.skeleton, outer, job.tokens, job.arithmetic, states, run.tick)
    for index, entry in enumerate(entries):
        run.progress.stage("replaying")
        shard = open_file(run.journal.out / job.shard_name(index))
        packed = dict.fromkeys((layer["name"] for layer in entry["layers"]), job.config.pattern)
        names = {name: name for name in job.skeleton.block_parameters(index)}
        block = load_block(job.skeleton, index, shard, names, packed, job.arithmetic)
        following = run.hidden_states(f"hidden-{index + 1:05d}")
        advance(block, entry["name"], arguments[index], states, following, job.arithmetic, run.tick)
        states.close(remove=True)
        states = following
    return arguments, states


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
    run: Run, index: int, arguments: BlockArguments, states: HiddenStates
) -> tuple[dict[str, Any], HiddenStates]:
    job, name = run.job, run.job.skeleton.blocks[index]
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        parameters = job.skeleton.block_parameters(index)
        source = job.checkpoint.read(job.names[parameter] for parameter in parameters)
        digests = {original: tensor_digest(tensor) for original, tensor in source.items()}
        tensors = {parameter: source[job.names[parameter]].to(job.arithmetic.device) for parameter in parameters}
        del source
    dense = run.hidden_states("dense")
    run.progress.stage(f"{name} dense")
    statistics = _dense_pass(run, index, tensors, arguments, states, dense, seconds)
    with _timed(seconds, "prune"):
        prunable = set(job.plan.blocks[index])
        pruned = prune_block(job.skeleton, index, tensors, statistics, prunable, job.config)
    with _timed(seconds, "write"):
        _write_block(run, index, pruned)
    run.progress.stage(f"{name} sparse")
    following = run.hidden_states(f"hidden-{index + 1:05d}")
    error, layers = _sparse_pass(run, index, pruned, arguments, states, dense, following, seconds)
    outcome = outcome_of(error, job.config.max_block_error, job.config.on_excess)
    if outcome == "stopped":
        raise BlockErrorExceeded(
            f"{name}: block error {error:.4g} is above --max-block-error {job.config.max_block_error:g}; raise it, or "
            "choose --on-excess keep-dense or warn"
        )
    if outcome == "kept dense":
        with _timed(seconds, "write"):
            _write_block(run, index, PrunedBlock({}, tensors, ()))
        for sequence in range(len(dense)):
            following.write(sequence, dense.read(sequence))
        layers = []
    if outcome != "pruned":
        logger.warning("%s: %s, block error %.4g above %g", name, outcome, error, job.config.max_block_error)
    following.sync()
    dense.close(remove=True)
    files = [run.journal.out / job.shard_name(index), run.journal.evidence_path(index)]
    entry = {
        "name": name,
        "outcome": outcome,
        "block_error": error,
        "layers": layers,
        "source_tensors": digests,
        "files": {str(path.relative_to(run.journal.out)): file_digest(path) for path in files},
        "hidden_states": following.checksums,
        "timings": {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, following


def _dense_pass(
    run: Run,
    index: int,
    tensors: dict[str, torch.Tensor],
    arguments: BlockArguments,
    states: HiddenStates,
    dense: HiddenStates,
    seconds: dict[str, float],
) -> dict[str, ChannelStatistics]:
    """Pass 1: the dense block's outputs, and the statistics of every layer's input, by the layer's full name."""
    job, prefix = run.job, f"{run.job.skeleton.blocks[index]}."
    bins = job.config.entropy_bins if job.config.metric == "esparse" else None
    block = dense_block(job.skeleton, index, tensors, job.arithmetic.device, job.arithmetic.dtype)
    accumulators, observers = {}, {}
    for _, names in job.skeleton.group_layers(index):
        if names[0] in job.plan.blocks[index]:
            channels = job.plan.blocks[index][names[0]].shape[1]
            accumulator = StatisticsAccumulator(channels, bins, job.arithmetic.device)
            accumulators.update(dict.fromkeys(names, accumulator))
            observers[names[0].removeprefix(prefix)] = _observer(names[0], accumulator, seconds)
    with _timed(seconds, "dense pass"), inputs_observed(block, observers):
        advance(block, run.job.skeleton.blocks[index], arguments[index], states, dense, job.arithmetic, run.tick)
    seconds["dense pass"] -= seconds.get("statistics", 0.0)
    statistics: dict[str, ChannelStatistics] = {}
    with _timed(seconds, "statistics"):
        for _, names in job.skeleton.group_layers(index):
            if names[0] in accumulators:
                with _named(names[0]):
                    statistics.update(dict.fromkeys(names, accumulators[names[0]].result()))
    return statistics


def _write_block(run: Run, index: int, pruned: PrunedBlock) -> None:
    """Write a block's shard, and beside the journal its folded permutations and input RMS."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in pruned.others.items()}
    evidence = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        tensors.update(pack_layer(layer.weight.cpu(), layer.keep.cpu(), _on_cpu(layer.gather)).tensors(name))
        evidence[f"{name}.input_rms"] = layer.rms.cpu()
    about = [{"permutation": fold.name, "reorders": [list(item) for item in fold.reorders]} for fold in pruned.folded]
    write_safetensors(run.journal.evidence_path(index), evidence, run.journal.temporary, about)
    write_safetensors(run.journal.out / run.job.shard_name(index), tensors, run.journal.temporary)


def _sparse_pass(
    run: Run,
    index: int,
    pruned: PrunedBlock,
    arguments: BlockArguments,
    states: HiddenStates,
    dense: HiddenStates,
    following: HiddenStates,
    seconds: dict[str, float],
) -> tuple[float, list[dict[str, Any]]]:
    """Pass 2, from the shard as read back from disk: the next block's inputs, the block's error and its layers'."""
    job, name = run.job, run.job.skeleton.blocks[index]
    shard = open_file(run.journal.out / job.shard_name(index))
    packed = dict.fromkeys(pruned.layers, job.config.pattern)
    with _timed(seconds, "read"):
        names = {parameter: parameter for parameter in job.skeleton.block_parameters(index)}
        block = load_block(job.skeleton, index, shard, names, packed, job.arithmetic)
    samples: dict[str, InputSample] = {}
    observers: dict[str, Callable[[torch.Tensor], None]] = {}
    for _, members in job.skeleton.group_layers(index):
        if members[0] in pruned.layers:
            sample = InputSample(len(states))
            samples.update(dict.fromkeys(members, sample))
            observers[members[0].removeprefix(f"{name}.")] = sample.observe
    total = BlockErrorSum()

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        total.add(x, dense.read(sequence).to(x.device), y)

    with _timed(seconds, "sparse pass"), inputs_observed(block, observers):
        advance(block, name, arguments[index], states, following, job.arithmetic, run.tick, observe)
    layers = []
    with _timed(seconds, "validate"):
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
                    "retained_score_start": result.retained_start,
                    "retained_score": result.retained,
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


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Say in whose input it was that a number was not finite."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer}: {error}") from error


def _observer(
    layer: str, accumulator: StatisticsAccumulator, seconds: dict[str, float]
) -> Callable[[torch.Tensor], None]:
    def observe(x: torch.Tensor) -> None:
        with _timed(seconds, "statistics"), _named(layer):
            accumulator.add(x)

    return observe
