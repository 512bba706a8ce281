"""Blocks pruned by their weights alone: no text passes them, and nothing is known of their errors.

Reading, pruning, writing and waiting for the disk are the work of a thread each, so that every block takes a step while
its neighbours take theirs:

read -> scores, masks -> pack, write -> sync, rename -> journal
"""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from streamprune.checkpoint.writer import Staged
from streamprune.model.arithmetic import peak_memory_bytes, threads_left
from streamprune.pipeline.ahead import ahead
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.entries import about_layer, about_moments, digests_of, stage_block
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.run import Run
from streamprune.pipeline.source import SourceBlock, parameters_of, source_blocks
from streamprune.pruning.statistics import ChannelStatistics

OTHERS = 2  # threads that compute beside the one that prunes: checksums on both sides, packing


@dataclass(frozen=True)
class _Pruned:
    index: int
    block: PrunedBlock
    digests: dict[str, str]  # of the source's tensors
    timed: StageTimes


@dataclass(frozen=True)
class _Written:
    entry: dict[str, Any]
    staged: tuple[Staged, ...]
    timed: StageTimes


def unseen_blocks(run: Run, left: Iterable[int]) -> Generator[dict[str, Any], None, None]:
    """The entries of the blocks `left`, in order, each once the disk has its files."""
    blocks_ahead = run.job.plan.memory.blocks_ahead
    behind = min(blocks_ahead, 1)

    with threads_left(OTHERS if behind else 0), ExitStack() as open_stages:
        sources = open_stages.enter_context(closing(source_blocks(run.job, left)))
        pruned = open_stages.enter_context(closing(ahead(map(partial(_prune, run), sources), behind, "prune")))
        written = open_stages.enter_context(closing(ahead(map(partial(_write, run), pruned), behind, "write")))
        entries = open_stages.enter_context(closing(ahead(map(_publish, written), behind, "sync")))
        for entry in entries:
            yield entry
            run.check()


def _prune(run: Run, source: SourceBlock) -> _Pruned:
    job = run.job
    timed = StageTimes(job.arithmetic.device)
    timed.seconds["read"] = source.seconds
    with timed("read"):
        tensors = parameters_of(job, source, run.residual)
    plans = job.plan.blocks[source.index]
    device = job.arithmetic.device
    statistics = {layer: ChannelStatistics.unseen(plan.shape[1], device) for layer, plan in plans.items()}
    block = prune_block(job.skeleton, source.index, tensors, statistics, set(plans), job.config, timed)
    return _Pruned(source.index, block, source.digests, timed)


def _write(run: Run, pruned: _Pruned) -> _Written:
    with pruned.timed("write"):
        staged = stage_block(run, pruned.index, pruned.block)
    layers = pruned.block.layers.items()
    entry = {
        "name": run.job.skeleton.blocks[pruned.index],
        "outcome": "pruned",
        "block_error": None,
        "layers": [about_layer(run.job, pruned.index, name, layer, None) for name, layer in layers],
        "source_tensors": pruned.digests,
        "files": digests_of(run, staged),
        "moments": about_moments({}),
    }
    return _Written(entry, staged, pruned.timed)


def _publish(written: _Written) -> dict[str, Any]:
    with written.timed("sync"):
        for file in written.staged:
            file.sync()
            file.publish()
    timings = {"seconds": written.timed.seconds, "peak_memory_bytes": peak_memory_bytes()}
    return {**written.entry, "timings": timings}
