"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from streamprune.checkpoint.manifest import BlockRecord, BlockTimings, JournalEntry, LayerRecord
from streamprune.checkpoint.packed import layer_from_tensors, tensor_names
from streamprune.checkpoint.reader import Checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.model.blocks import Observer, RunnableBlock, dense_block, layers_observed, load_block
from streamprune.model.forward import Arguments
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.gate import gate
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.reading import BlockTensors, parameters_of, read_ahead, read_block
from streamprune.pipeline.run import Run
from streamprune.pipeline.streams import Streams, inputs_of_next_block, written_source
from streamprune.pipeline.validation import (
    BlockErrorSum,
    InputSample,
    check_bits,
    check_packed_bits,
    layer_errors,
)
from streamprune.pipeline.writing.entries import StagedBlock, digests_of, layer_record, moments_record, stage_block
from streamprune.process import peak_memory_bytes
from streamprune.pruning.statistics import ChannelStatistics


@dataclass(frozen=True)
class BlockWork:
    """A block while it is worked on.

    arguments  what it is called with beside hidden states
    inputs     behind the pruned blocks before it, and for every k-th sequence behind the dense ones
    dense      room for its outputs in pass 1
    outputs    room for its outputs in pass 2, and behind dense blocks: the next block's inputs
    """

    run: Run
    block: Block
    arguments: Arguments
    inputs: Streams
    dense: HiddenStates
    outputs: Streams
    timed: StageTimes


def pruned_blocks(run: Run, finished: Sequence[JournalEntry]) -> Generator[JournalEntry, None, None]:
    """The entries of the blocks that follow; each is to be in the journal before the next is asked for."""
    left = run.job.source.blocks[len(finished) :]
    sources = read_ahead(run.job, left)
    run.open_files.callback(sources.close)
    arguments, inputs = inputs_of_next_block(run, finished)
    for block in left:
        work = _work_on(run, block, arguments[block.index], inputs)
        yield _compress_block(work, sources)
        inputs.close()
        inputs = work.outputs
    inputs.close()


def _work_on(run: Run, block: Block, arguments: Arguments, inputs: Streams) -> BlockWork:
    samples, following = len(run.job.tokens), block.index + 1
    reference = inputs.reference
    outputs = Streams(
        run.inputs_of(following, "hidden", samples),
        None if reference is None else run.inputs_of(following, "reference", len(reference)),
    )
    timed = StageTimes(run.job.arithmetic.device)
    return BlockWork(run, block, arguments, inputs, run.hidden_states("dense", samples), outputs, timed)


def _compress_block(work: BlockWork, sources: Iterator[BlockTensors]) -> JournalEntry:
    run, job, block, timed = work.run, work.run.job, work.block, work.timed
    with timed("read"):
        read = next(sources)
        digests, tensors = read.digests, parameters_of(job, read, run.residual)
        del read
    statistics = _dense_pass(work, tensors)
    moments = moments_record(statistics)
    layers, heads = job.plan.blocks[block.index], job.source.skeleton.heads
    pruned = prune_block(block, tensors, statistics, layers, heads, job.config, timed)
    del tensors, statistics
    with timed("write"):
        staged = stage_block(run, block, pruned)
    synced: list[Future[None]] = [run.background.submit(file.sync) for file in staged]
    if work.outputs.reference is not None:
        synced.append(run.background.submit(work.outputs.reference.sync))
    shard = open_file(staged.shard.temporary)
    module, samples, error = _sparse_pass(work, pruned, shard)
    synced.append(run.background.submit(work.outputs.hidden.sync))
    with timed("validate"):
        records = tuple(_validated(work, pruned, shard, module, samples))
    del pruned, module, samples
    outcome = gate(block.name, error, job.config)
    if outcome == "kept dense":
        staged, records = _kept_dense(work), ()
        synced += [run.background.submit(file.sync) for file in (*staged, work.outputs.hidden)]
    work.dense.close()
    with timed("write"):
        for done in synced:
            done.result()
        for file in staged:
            file.publish()
    reference = work.outputs.reference
    return JournalEntry(
        record=BlockRecord(block.name, outcome, error, moments, records),
        source_tensors=digests,
        files=digests_of(run, staged),
        hidden_states=tuple(work.outputs.hidden.checksums),
        reference_states=None if reference is None else tuple(reference.checksums),
        timings=BlockTimings(timed.seconds, peak_memory_bytes()),
    )


def _dense_pass(work: BlockWork, tensors: dict[str, torch.Tensor]) -> dict[str, ChannelStatistics]:
    """Pass 1: the dense block's outputs, and the statistics of every layer's input, by the layer's full name.

    Every `correction_stride`-th sequence also goes through the block behind dense blocks alone.
    """
    run, job, block, timed = work.run, work.run.job, work.block, work.timed
    run.watch.progress.stage(f"{block.name} dense")
    module = dense_block(job.source.skeleton, block, tensors, job.arithmetic)
    runnable = RunnableBlock(block.name, module, work.arguments)
    observation = BlockObservation(job, block, timed)
    behind_dense, reference = work.inputs.reference, work.outputs.reference

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        position, skipped = divmod(sequence, job.config.correction_stride)
        if behind_dense is None or reference is None or skipped:
            return
        with timed("reference pass"):
            states = behind_dense.read(position).to(job.arithmetic.device)
            reference.write(position, observation.compare(lambda: runnable.run(states)))

    with timed("dense pass"), layers_observed(module, observation.observers, job.tokens.shape[1]):
        run.advance(runnable, work.inputs.hidden, work.dense, observe)
    return observation.result()


def _sparse_pass(
    work: BlockWork, pruned: PrunedBlock, shard: Checkpoint
) -> tuple[nn.Module, dict[str, InputSample], float]:
    """Pass 2, from the shard as read back: the module, a sample of each input by its group's name, its error."""
    run, job, block, timed = work.run, work.run.job, work.block, work.timed
    run.watch.progress.stage(f"{block.name} sparse")
    with timed("read"):
        module = load_block(written_source(job, block, shard, pruned.layers), block, job.arithmetic)
    samples = {group.name: InputSample(len(job.tokens)) for group in block.groups if group.name in pruned.layers}
    observers: dict[str, Observer] = {block.local(name): sample.observe for name, sample in samples.items()}
    total, hidden = BlockErrorSum(), job.source.skeleton.hidden_size

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        dense = work.dense.read(sequence).to(x.device)
        total.add(*(states[..., :hidden] for states in (x, dense, y)))

    with timed("sparse pass"), layers_observed(module, observers, job.tokens.shape[1]):
        run.advance(RunnableBlock(block.name, module, work.arguments), work.inputs.hidden, work.outputs.hidden, observe)
    return module, samples, total.value


def _validated(
    work: BlockWork, pruned: PrunedBlock, shard: Checkpoint, module: nn.Module, samples: Mapping[str, InputSample]
) -> Iterator[LayerRecord]:
    """The records of a written block's layers. Raises KernelFault where a bit or a product is not what it must be."""
    job, block = work.run.job, work.block
    for group in block.groups:
        for name in group.names if group.name in samples else ():
            written = module.get_submodule(block.local(name))
            assert isinstance(written, PackedLinear)
            layer, bias, x = pruned.layers[name], pruned.others.get(f"{name}.bias"), samples[group.name].tokens
            errors = layer_errors(name, written, layer, bias, x, job.arithmetic)
            yield layer_record(job, block, name, layer, errors)
            check_packed_bits(name, layer, layer_from_tensors(name, shard.read(tensor_names(shard, name))))
    for parameter, tensor in pruned.others.items():
        check_bits(parameter, tensor, shard.read([parameter])[parameter])


def _kept_dense(work: BlockWork) -> StagedBlock:
    """Write the block as the source has it, and make pass 1's outputs the next block's inputs."""
    run = work.run
    with work.timed("write"):
        tensors = parameters_of(run.job, read_block(run.job, work.block), run.residual)
        staged = stage_block(run, work.block, PrunedBlock({}, tensors, ()))
    for sequence in range(len(work.dense)):
        work.outputs.hidden.write(sequence, work.dense.read(sequence))
    return staged
