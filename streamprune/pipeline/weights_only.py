"""Blocks pruned by their weights alone: no text passes them, and nothing is known of their errors.

Reading, pruning, writing and waiting for the disk are the work of a thread each, so that every block takes a step while
its neighbours take theirs:

read -> scores, masks -> pack, write -> sync, rename -> journal
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

from streamprune.checkpoint.manifest import BlockRecord, BlockTimings, JournalEntry, LayerRecord
from streamprune.model.skeleton import Block
from streamprune.pipeline.ahead import ahead
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.reading import BlockTensors, parameters_of, read_ahead
from streamprune.pipeline.run import Run
from streamprune.pipeline.writing.entries import (
    StagedBlock,
    digests_of,
    layer_record,
    moments_record,
    stage_block,
    write_part,
)
from streamprune.process import peak_memory_bytes, threads_left
from streamprune.pruning.statistics import ChannelStatistics

OTHERS = 2  # threads that compute beside the one that prunes: checksums on both sides, packing


@dataclass(frozen=True)
class _Pruned:
    part: Block
    pruned: PrunedBlock
    digests: dict[str, str]  # of the source's tensors
    timed: StageTimes


@dataclass(frozen=True)
class _Written:
    record: BlockRecord
    digests: dict[str, str]
    files: dict[str, str]
    staged: StagedBlock
    timed: StageTimes


def blocks_by_weights(run: Run, blocks: Sequence[Block]) -> Generator[JournalEntry, None, None]:
    """The entries of blocks, in order, each once the disk has its files."""
    behind = min(run.job.plan.memory.blocks_ahead, 1)

    with threads_left(OTHERS if behind else 0), ExitStack() as open_stages:
        sources = open_stages.enter_context(closing(read_ahead(run.job, blocks)))
        pruned = open_stages.enter_context(closing(ahead(map(partial(_prune, run), sources), behind, "prune")))
        written = open_stages.enter_context(closing(ahead(_write(run, blocks, pruned), behind, "write")))
        entries = open_stages.enter_context(closing(ahead(map(_publish, written), behind, "sync")))
        for entry in entries:
            yield entry
            run.watch.check()


def _prune(run: Run, read: BlockTensors) -> _Pruned:
    job, part = run.job, read.block
    timed = StageTimes(job.arithmetic.device)
    timed.seconds["read"] = read.seconds
    with timed("read"):
        tensors = parameters_of(job, read, run.residual)
    plans, heads = job.plan.of(part), job.source.skeleton.heads
    device = job.arithmetic.device
    statistics = {layer: ChannelStatistics.unseen(plan.shape[1], device) for layer, plan in plans.items()}
    pruned = prune_block(part, tensors, statistics, plans, heads, job.config, timed)
    return _Pruned(part, pruned, read.digests, timed)


def _write(run: Run, blocks: Iterable[Block], pruned: Iterator[_Pruned]) -> Iterator[_Written]:
    """Blocks written from their parts, of which experts go to files of their own until the last is there."""
    for block in blocks:
        first = next(pruned)
        timed, digests, records, parts = first.timed, dict(first.digests), list(_records(run, first)), []
        for work in islice(pruned, len(block.parts) - 1):
            with timed("write"):
                parts.append(write_part(run, work.part, work.pruned))
            records += _records(run, work)
            digests |= work.digests
            timed.add(work.timed)
        with timed("write"):
            staged = stage_block(run, block, first.pruned, parts)
        record = BlockRecord(block.name, "pruned", None, moments_record({}), tuple(records))
        yield _Written(record, digests, digests_of(run, staged), staged, timed)
        del first


def _records(run: Run, work: _Pruned) -> Iterator[LayerRecord]:
    for name, layer in work.pruned.layers.items():
        yield layer_record(run.job, name, layer, None)


def _publish(written: _Written) -> JournalEntry:
    with written.timed("sync"):
        for file in written.staged:
            file.sync()
            file.publish()
    timings = BlockTimings(written.timed.seconds, peak_memory_bytes())
    return JournalEntry(written.record, written.digests, written.files, None, None, timings)
