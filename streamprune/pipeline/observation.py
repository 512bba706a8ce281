"""Pass 1's observers: what a block's layers are given, counted into statistics while it is still in the caches."""

import functools
from collections import deque
from collections.abc import Callable

import torch

from streamprune.errors import numerics_named
from streamprune.model.blocks import Observer
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import moment_unit
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.progress import StageTimes
from streamprune.pruning.statistics import ChannelStatistics, LayerTokens, StatisticsAccumulator


class BlockObservation:
    """Statistics of every input of a block's layers that are pruned, one sequence at a time.

    State that must live somewhere: the accumulators, and what sequences that have a reference were at each layer, from
    the pass behind pruned blocks until the same sequence has passed behind dense ones.

    `sequence` is the number of the one that passes, where not all do; None: they pass one after the other.
    """

    def __init__(self, job: Job, block: Block, timed: StageTimes) -> None:
        self.job, self.block, self.timed = job, block, timed
        self.accumulators: dict[str, StatisticsAccumulator] = {}  # by the name of each input group
        self._awaiting: dict[str, deque[LayerTokens]] = {}
        self._behind_dense: dict[str, LayerTokens] | None = None
        self.sequence: int | None = None
        heads = job.source.skeleton.heads
        for group in block.groups:
            if group.name in job.plan.layers:
                out_features, channels = group.layers[0].shape
                unit = moment_unit(group, heads, job.config)
                outputs = out_features if len(group.layers) == 1 else None
                self.accumulators[group.name] = StatisticsAccumulator(
                    channels, job.config, job.arithmetic.device, unit, outputs
                )
                self._awaiting[group.name] = deque()

    @property
    def observers(self) -> dict[str, Observer]:
        """One for each input, by the name that a layer which takes it has inside the block."""
        return {self.block.local(name): functools.partial(self._see, name) for name in self.accumulators}

    def compare(
        self, run_dense: Callable[[], torch.Tensor], shared: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Run the next sequence that has a reference behind dense blocks, and note how its layers differ.

        `shared`: where its tokens are not the same ones, the places int64 [n] of those that are, behind pruned blocks
        and behind dense ones.
        """
        self._behind_dense = {}
        try:
            output = run_dense()
            with self.timed("statistics"):
                for name, accumulator in self.accumulators.items():
                    dense, pruned = self._behind_dense[name], self._awaiting[name].popleft()
                    if shared is not None:
                        pruned, dense = pruned.at(shared[0]), dense.at(shared[1])
                    accumulator.add_reference(dense, pruned)
        finally:
            self._behind_dense = None
        return output

    def without_reference(self) -> None:
        """Go on where the last sequence has no tokens to be compared with."""
        for awaiting in self._awaiting.values():
            awaiting.clear()

    def result(self) -> dict[str, ChannelStatistics]:
        """Statistics by the full name of each layer that takes the input; each accumulator is freed as it is read."""
        found: dict[str, ChannelStatistics] = {}
        with self.timed("statistics"):
            for group in self.block.groups:
                if group.name in self.accumulators:
                    found.update(dict.fromkeys(group.names, self.accumulators.pop(group.name).result()))
        return found

    def _see(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        accumulator, config = self.accumulators[name], self.job.config
        if self._behind_dense is not None:
            self._behind_dense[name] = accumulator.to_compare(x, y)
            return
        number = accumulator.sequences if self.sequence is None else self.sequence
        if config.correction and number % config.correction_stride == 0:
            self._awaiting[name].append(accumulator.to_compare(x, y))
        with self.timed("statistics"), numerics_named(name):
            accumulator.add(x)
