"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import layer_from_tensors, packed_tensors, tensor_names
from streamprune.checkpoint.reader import open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.checkpoint.writer import Pieces, write_safetensors
from streamprune.config import PruneConfig
from streamprune.errors import BlockErrorExceeded, CheckpointError, Interrupted, JobMismatchError
from streamprune.model.arithmetic import peak_memory_bytes, return_free_memory
from streamprune.model.blocks import Observer, dense_block, layers_observed, run_block
from streamprune.model.streaming import BlockArguments, TextInputs, advance, embed, load_block, text_inputs
from streamprune.pipeline.block_pruning import FoldedPermutation, PrunedBlock, PrunedLayer, prune_block
from streamprune.pipeline.job import Job
from streamprune.pipeline.journal import Journal
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.progress import Progress, StageTimes
from streamprune.pipeline.residual import reordered, source_order
from streamprune.pipeline.source import SourceBlock, parameters_of, read_source, source_blocks
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

    def advance(
        self,
        block: nn.Module,
        index: int,
        arguments: BlockArguments,
        states: HiddenStates,
        target: HiddenStates,
        observe: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda index, x, y: None,
    ) -> None:
        """Run block `index` on every sequence."""
        job = self.job
        name, batch = job.skeleton.blocks[index], job.plan.micro_batch
        advance(block, name, arguments[index], states, target, job.arithmetic, self.tick, observe, batch)

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
    sources = source_blocks(run.job, range(len(entries), len(blocks)))
    run.open_files.callback(sources.close)
    left = range(len(entries), len(blocks))
    if run.job.config.validate:
        following = _pruned_blocks(run, tuple(entries), sources)
    else:
        following = (_prune_unseen(run, index, sources) for index in left)
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
    arguments, streams = _inputs_of_next_block(run, finished)
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


@dataclass(frozen=True)
class _Streams:
    """Inputs of a block: behind the pruned blocks, and for every k-th sequence behind the dense ones."""

    hidden: HiddenStates
    reference: HiddenStates | None

    def close(self) -> None:
        for states in (self.hidden, self.reference):
            if states is not None:
                states.close()


def _inputs_of_next_block(run: Run, entries: Sequence[dict[str, Any]]) -> tuple[BlockArguments, _Streams]:
    """Hidden states for the first unfinished block: those on disk if they are whole, or made again by replaying."""
    job = run.job
    inputs = text_inputs(job.skeleton, job.checkpoint, job.names, lambda tensors: reordered(tensors, run.residual))
    arguments, hidden = _resumed(run, inputs, entries, "hidden", job.tokens, _written_block)
    if not job.config.correction:
        return arguments, _Streams(hidden, None)
    tokens = job.tokens[:: job.config.correction_stride]
    return arguments, _Streams(hidden, _resumed(run, inputs, entries, "reference", tokens, _source_block)[1])


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
    tensors = parameters_of(job, index, read_source(job, index), run.residual)
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


def _compress_block(
    run: Run, index: int, sources: Iterator[SourceBlock], arguments: BlockArguments, streams: _Streams
) -> tuple[dict[str, Any], _Streams]:
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
        files = _write_block(run, index, pruned)
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
            tensors = parameters_of(job, index, read_source(job, index), run.residual)
            files = _write_block(run, index, PrunedBlock({}, tensors, ()))
        for sequence in range(len(dense)):
            following.write(sequence, dense.read(sequence))
        synced.append(run.background.submit(following.sync))
        layers = []
    if outcome != "pruned":
        logger.warning("%s: %s, block error %.4g above %g", name, outcome, error, job.config.max_block_error)
    dense.close()
    for done in synced:
        done.result()
    entry = {
        "name": name,
        "outcome": outcome,
        "block_error": error,
        "layers": layers,
        "source_tensors": digests,
        "files": files,
        "hidden_states": following.checksums,
        "reference_states": None if reference is None else reference.checksums,
        "moments": moments,
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }
    return entry, _Streams(following, reference)


def _prune_unseen(run: Run, index: int, sources: Iterator[SourceBlock]) -> dict[str, Any]:
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
        files = _write_block(run, index, pruned)
    return {
        "name": job.skeleton.blocks[index],
        "outcome": "pruned",
        "block_error": None,
        "layers": [_about_layer(job, index, layer, result, None) for layer, result in pruned.layers.items()],
        "source_tensors": digests,
        "files": files,
        "moments": _about_moments({}),
        "timings": {"seconds": timed.seconds, "peak_memory_bytes": peak_memory_bytes()},
    }


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


def _write_block(run: Run, index: int, pruned: PrunedBlock) -> dict[str, str]:
    """Write a block's shard, and beside the journal its folded permutations and input RMS; returns their digests.

    Layers are packed one tensor at a time while the shard is written.
    """
    tensors: dict[str, torch.Tensor | Pieces] = {**pruned.others}
    evidence: dict[str, torch.Tensor] = {fold.name: fold.permutation.cpu().to(torch.int32) for fold in pruned.folded}
    for name, layer in pruned.layers.items():
        tensors.update(packed_tensors(name, layer.written, layer.keep, layer.gather, run.job.config.pattern))
        evidence[f"{name}.input_rms"] = source_order(layer.rms.cpu(), f"{name}.weight", run.residual)
    about = [about_permutation(fold) for fold in pruned.folded]
    beside, shard = run.journal.evidence_path(index), run.journal.out / run.job.shard_name(index)
    digests = {beside: write_safetensors(beside, evidence, run.journal.temporary, about)}
    digests[shard] = write_safetensors(shard, tensors, run.journal.temporary)
    return {str(path.relative_to(run.journal.out)): digest for path, digest in digests.items()}


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

    with timed("sparse pass"), layers_observed(block, observers, job.tokens.shape[1]):
        run.advance(block, index, arguments, states, following, observe)
    synced.append(run.background.submit(following.sync))
    layers = []
    with timed("validate"):
        for layer, result in pruned.layers.items():
            written = block.get_submodule(layer.removeprefix(f"{name}."))
            bias = pruned.others.get(f"{layer}.bias")
            errors = layer_errors(layer, written, result, bias, samples[layer].tokens, job.arithmetic)
            layers.append(_about_layer(job, index, layer, result, errors))
            check_packed_bits(layer, result, layer_from_tensors(layer, shard.read(tensor_names(shard, layer))))
        for parameter, tensor in pruned.others.items():
            check_bits(parameter, tensor, shard.read([parameter])[parameter])
    return total.value, layers
