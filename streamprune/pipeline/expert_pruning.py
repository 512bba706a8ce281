"""Pass 1 of a block's experts, one at a time: each is pruned and written as soon as its tokens have passed it.

Its tensors lie in a file of their own until the block's shard is written. Its layers' errors are measured on tokens
that pass 1 routes to it, through its own written layers: pass 2 need not have the source's weights once more.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from streamprune.checkpoint.manifest import LayerRecord, MomentsRecord
from streamprune.checkpoint.reader import open_file
from streamprune.config import PruneConfig
from streamprune.model.blocks import dense_block, layers_observed, load_block
from streamprune.model.expert_streaming import ExpertStage
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.observation import BlockObservation
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.progress import StageTimes
from streamprune.pipeline.reading import BlockTensors, parameters_of
from streamprune.pipeline.run import Run
from streamprune.pipeline.streams import written_source
from streamprune.pipeline.validation import InputSample, validated
from streamprune.pipeline.writing.entries import WrittenPart, moments_record, write_part
from streamprune.process import return_free_memory
from streamprune.pruning.statistics import ChannelStatistics

ALL = 1 << 31  # tokens: an expert is given those of one sequence at a time
logger = logging.getLogger("streamprune")


@dataclass(frozen=True)
class PrunedExpert:
    """A written expert: its file, its layers' records, what was read, and the memory of its second moments.

    `starved` are the tokens that it saw, where they were too few.
    """

    part: WrittenPart
    records: tuple[LayerRecord, ...]
    source_tensors: dict[str, str]
    moments: MomentsRecord
    starved: int | None


class ExpertStreams(NamedTuple):
    """A block's experts behind pruned blocks, and behind dense ones where some sequences have a reference."""

    hidden: ExpertStage
    reference: ExpertStage | None


def pruned_experts(
    run: Run, block: Block, sources: Iterator[BlockTensors], streams: ExpertStreams, timed: StageTimes
) -> Iterator[PrunedExpert]:
    """Every expert of a block in order; when all are done, the streams have their outputs."""
    for number, part in enumerate(block.parts[1:]):
        run.watch.check()
        with timed("read"):
            read = next(sources)
            tensors = parameters_of(run.job, read, None)
        yield _ExpertWork(run, part, number, streams, timed).prune(tensors, read.digests)
        del read, tensors
        return_free_memory()


@dataclass(frozen=True)
class _ExpertWork:
    run: Run
    part: Block
    number: int
    streams: ExpertStreams
    timed: StageTimes

    @property
    def job(self) -> Job:
        return self.run.job

    def prune(self, tensors: dict[str, torch.Tensor], digests: dict[str, str]) -> PrunedExpert:
        job, part = self.job, self.part
        seen = self.streams.hidden.tokens_of(self.number)
        starved = job.config.starved if seen < max(job.config.min_expert_tokens, 1) else None
        module = dense_block(job.source.skeleton, part, tensors, job.arithmetic)
        observation, sample = BlockObservation(job, part, self.timed), InputSample(len(job.tokens))
        with self.timed("dense pass"):
            for sequence in range(len(job.tokens)):
                self._pass(module, sequence, starved, observation, sample)
                self.run.watch.check()
        del module
        plans = {} if starved == "dense" else job.plan.of(part)
        known = starved in (None, "pool")
        statistics = observation.result() if known else {}
        moments = moments_record(statistics)
        if not known:
            device = job.arithmetic.device
            statistics = {name: ChannelStatistics.unseen(plan.shape[1], device) for name, plan in plans.items()}
        config = job.config if known else job.config.of_weights_alone()
        pruned = prune_block(part, tensors, statistics, plans, job.source.skeleton.heads, config, self.timed)
        with self.timed("write"):
            written = write_part(self.run, part, pruned)
        with self.timed("validate"):
            records = tuple(self._records(pruned, written, sample))
        return PrunedExpert(written, records, digests, moments, None if starved is None else seen)

    def _pass(
        self, module: nn.Module, sequence: int, starved: str | None, observation: BlockObservation, sample: InputSample
    ) -> None:
        """One sequence's rows through the dense expert; what of them decides about its weights is observed."""
        stage, (rows, weights) = self.streams.hidden, self.streams.hidden.rows_of(sequence, self.number)
        observed = rows if starved is None else self._pooled(stage, sequence)
        x = stage.inputs(sequence, observed)
        sample.observe(x, x)
        observation.sequence = sequence
        observers = observation.observers if starved in (None, "pool") else {}
        with layers_observed(module, observers, ALL):
            made = stage.compute(module, x) if len(observed) and (observers or starved is None) else x
        if starved is not None and len(rows):
            made = stage.compute(module, stage.inputs(sequence, rows))
        if len(rows):
            stage.add(sequence, rows, weights, made)
        position, skipped = divmod(sequence, self.job.config.correction_stride)
        if self.streams.reference is not None and not skipped:
            with self.timed("reference pass"):
                self._reference(module, position, (sequence, observed), starved, observation)

    def _reference(
        self,
        module: nn.Module,
        position: int,
        observed: tuple[int, torch.Tensor],
        starved: str | None,
        observation: BlockObservation,
    ) -> None:
        """The same sequence behind dense blocks. Compared are the tokens that are at this expert in both."""
        stage = self.streams.reference
        assert stage is not None
        rows, weights = stage.rows_of(position, self.number)
        here, there = (s.tokens_at(n, r) for s, n, r in ((self.streams.hidden, *observed), (stage, position, rows)))
        shared = torch.isin(here, there).nonzero().flatten(), torch.isin(there, here).nonzero().flatten()
        compared = starved is None and len(shared[0]) > 0
        with layers_observed(module, observation.observers if compared else {}, ALL):
            if compared:
                x = stage.inputs(position, rows)
                made = observation.compare(lambda: stage.compute(module, x), shared)
            elif len(rows):
                made = stage.compute(module, stage.inputs(position, rows))
        observation.without_reference()
        if len(rows):
            stage.add(position, rows, weights, made)

    def _pooled(self, stage: ExpertStage, sequence: int) -> torch.Tensor:
        """Evenly spaced rows of a sequence, whichever experts take them: as many as an expert takes on average."""
        index = stage.routings[sequence].index
        share = min(len(index), max(1, -(-index.numel() // stage.layers.count)))
        return torch.arange(share) * (len(index) // share)

    def _records(self, pruned: PrunedBlock, written: WrittenPart, sample: InputSample) -> Iterator[LayerRecord]:
        """Records of the layers, whose inputs are those of the written expert. Raises KernelFault."""
        job, part, layers = self.job, self.part, self.streams.hidden.layers
        shard = open_file(written.file.temporary)
        module = load_block(written_source(job, part, shard, pruned.layers), part, job.arithmetic)
        samples = {group.name: InputSample(1) for group in part.groups if group.name in pruned.layers}
        observers = {part.local(name): inputs.observe for name, inputs in samples.items()}
        with layers_observed(module, observers, ALL), torch.inference_mode():
            layers.compute(module, sample.tokens)
        yield from validated(job, part, pruned, shard, module, samples)


def name_starved(block: Block, experts: list[PrunedExpert], config: PruneConfig) -> dict[str, int]:
    """The starved experts of a block with the tokens that they saw; a line for people says so."""
    starved = {expert.part.name: expert.starved for expert in experts if expert.starved is not None}
    if starved:
        inside = f"{block.experts}."
        some = ", ".join(f"{name.removeprefix(inside)} ({seen})" for name, seen in [*starved.items()][:10])
        more = f" and {len(starved) - 10} more" if len(starved) > 10 else ""
        logger.warning(
            "%s: %d of %d experts saw fewer than %d tokens: %s%s; starved %s is used for them",
            *(block.experts, len(starved), len(experts), config.min_expert_tokens, some, more, config.starved),
        )
    return starved
