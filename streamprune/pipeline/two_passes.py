"""The two-pass loop: one transformer block at a time, from disk to disk.

read -> pass 1, dense: statistics -> scores, shuffles, masks -> pack, write -> pass 2, from the written bytes: errors
     -> gate -> journal -> next block, whose inputs are pass 2's outputs

Where refinement corrects for the error of earlier blocks, pass 1 also carries some of the sequences through the dense
blocks alone (the reference), and compares each layer's inputs there with those that it will have.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from streamprune.checkpoint.manifest import BlockRecord, BlockTimings, JournalEntry
from streamprune.checkpoint.reader import Checkpoint, open_file
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.model.blocks import Observer, RunnableBlock, dense_block, layers_observed, load_block
from streamprune.model.expert_streaming import ExpertStage, passage
from streamprune.model.forward import Arguments
from streamprune.model.skeleton import Block
from streamprune.model.streaming import Runnable
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.expert_pruning import ExpertStreams, PrunedExpert, name_starved, pruned_experts
from streamprune.pipeline.gate import gate
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.reading import BlockTensors, parameters_of, read_ahead, read_part
from streamprune.pipeline.run import Run
from streamprune.pipeline.streams import Streams, inputs_of_next_block, written_source
from streamprune.pipeline.validation import BlockErrorSum, InputSample, validated
from streamprune.pipeline.writing.entries import StagedBlock, digests_of, moments_record, stage_block, write_part
from streamprune.process import peak_memory_bytes
from streamprune.pruning.statistics import ChannelStatistics
from streamprune.stopping import safe_point


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
    statistics, experts = _dense_pass(work, tensors, sources)
    for expert in experts:
        digests |= expert.source_tensors
    moments, starved = (
        moments_record(statistics, [e.moments for e in experts]),
        name_starved(block, experts, job.config),
    )
    layers, heads = job.plan.of(block.parts[0]), job.source.skeleton.heads
    pruned = prune_block(block.parts[0], tensors, statistics, layers, heads, job.config, timed)
    del tensors, statistics
    with timed("write"):
        staged = stage_block(run, block, pruned, [expert.part for expert in experts])
    synced: list[Future[None]] = [run.background.submit(file.sync) for file in staged]
    if work.outputs.reference is not None:
        synced.append(run.background.submit(work.outputs.reference.sync))
    shard, records = open_file(staged.shard.temporary), tuple(r for expert in experts for r in expert.records)
    packed = [*pruned.layers, *(record.name for record in records)]
    module, samples, error = _sparse_pass(work, packed, shard)
    synced.append(run.background.submit(work.outputs.hidden.sync))
    with timed("validate"):
        records = (*validated(job, block.parts[0], pruned, shard, module, samples), *records)
    del pruned, module, samples
    outcome = gate(block.name, error, job.config)
    if outcome == "kept dense":
        staged, records, starved = _kept_dense(work), (), {}
        synced += [run.background.submit(file.sync) for file in (*staged, work.outputs.hidden)]
    work.dense.close()
    with timed("write"):
        for done in synced:
            done.result()
        for file in staged:
            file.publish()
    reference = work.outputs.reference
    return JournalEntry(
        record=BlockRecord(block.name, outcome, error, moments, records, starved),
        source_tensors=digests,
        files=digests_of(run, staged),
        hidden_states=tuple(work.outputs.hidden.checksums),
        reference_states=None if reference is None else tuple(reference.checksums),
        timings=BlockTimings(timed.seconds, peak_memory_bytes()),
    )


def _dense_pass(
    work: BlockWork, tensors: dict[str, torch.Tensor], sources: Iterator[BlockTensors]
) -> tuple[dict[str, ChannelStatistics], list[PrunedExpert]]:
    """Pass 1: the dense block's outputs, and the statistics of every layer's input, by the layer's full name; its
    experts, which are pruned already.

    Every `correction_stride`-th sequence also goes through the block behind dense blocks alone.
    """
    run, job, block, timed = work.run, work.run.job, work.block, work.timed
    run.watch.progress.stage(f"{block.name} dense")
    module = dense_block(job.source.skeleton, block.parts[0], tensors, job.arithmetic)
    runnable = RunnableBlock(block.name, module, work.arguments)
    observation = BlockObservation(job, block.parts[0], timed)
    behind_dense, reference = work.inputs.reference, work.outputs.reference
    experts: list[PrunedExpert] = []
    with ExitStack() as passages, timed("dense pass"):
        compared: Runnable | None = None
        if behind_dense is not None:
            compared = passages.enter_context(_passage(work, runnable, behind_dense, lambda stage: None))

        def experts_work(stage: ExpertStage) -> None:
            streams = ExpertStreams(stage, compared if isinstance(compared, ExpertStage) else None)
            experts.extend(pruned_experts(run, block, sources, streams, timed))

        passing = passages.enter_context(_passage(work, runnable, work.inputs.hidden, experts_work))

        def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
            position, skipped = divmod(sequence, job.config.correction_stride)
            if behind_dense is None or reference is None or compared is None or skipped:
                return
            with timed("reference pass"):
                states = behind_dense.read(position).to(job.arithmetic.device)
                reference.write(position, observation.compare(lambda: compared.run(states)))

        with layers_observed(module, observation.observers, job.tokens.shape[1]):
            run.advance(passing, work.inputs.hidden, work.dense, observe)
    return observation.result(), experts


def _passage(
    work: BlockWork, block: RunnableBlock, states: HiddenStates, experts_work: Callable[[ExpertStage], None]
) -> AbstractContextManager[Runnable]:
    run = work.run
    return passage(block, states, run.job.arithmetic, run.scratch, experts_work, run.watch.check)


def _sparse_pass(
    work: BlockWork, packed: Iterable[str], shard: Checkpoint
) -> tuple[nn.Module, dict[str, InputSample], float]:
    """Pass 2, from the shard as read back, whose layers `packed` are pruned: the module without its experts, a sample
    of each input by its group's name, the block's error.
    """
    run, job, block, timed = work.run, work.run.job, work.block, work.timed
    run.watch.progress.stage(f"{block.name} sparse")
    written, resident = written_source(job, block, shard, packed), block.parts[0]
    with timed("read"):
        module = load_block(written, resident, job.arithmetic)
    groups = [group.name for group in resident.groups if group.name in written.packed]
    samples = {name: InputSample(len(job.tokens)) for name in groups}
    observers: dict[str, Observer] = {block.local(name): sample.observe for name, sample in samples.items()}
    total, hidden = BlockErrorSum(), job.source.skeleton.hidden_size

    def experts_work(stage: ExpertStage) -> None:
        for number, part in enumerate(block.parts[1:]):
            run.watch.check()
            stage.work(number, load_block(written, part, job.arithmetic))

    def observe(sequence: int, x: torch.Tensor, y: torch.Tensor) -> None:
        dense = work.dense.read(sequence).to(x.device)
        total.add(*(states[..., :hidden] for states in (x, dense, y)))

    runnable = RunnableBlock(block.name, module, work.arguments)
    observed = layers_observed(module, observers, job.tokens.shape[1])
    with timed("sparse pass"), _passage(work, runnable, work.inputs.hidden, experts_work) as passing, observed:
        run.advance(passing, work.inputs.hidden, work.outputs.hidden, observe)
    return module, samples, total.value


def _kept_dense(work: BlockWork) -> StagedBlock:
    """Write the block as the source has it, and make pass 1's outputs the next block's inputs."""
    run = work.run
    with work.timed("write"):
        parts = []
        for part in work.block.parts[1:]:
            tensors = parameters_of(run.job, read_part(run.job, part), None)
            parts.append(write_part(run, part, PrunedBlock({}, tensors, ())))
        tensors = parameters_of(run.job, read_part(run.job, work.block.parts[0]), run.residual)
        staged = stage_block(run, work.block, PrunedBlock({}, tensors, ()), parts)
    for sequence in range(len(work.dense)):
        safe_point()
        work.outputs.hidden.write(sequence, work.dense.read(sequence))
    return staged
