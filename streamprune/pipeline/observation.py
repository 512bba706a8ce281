"""Pass 1's observers: what a block's layers are given, counted into statistics while it is still in the caches."""

import functools
from collections import deque
from collections.abc import Callable

import torch

from streamprune.errors import numerics_named
from streamprune.model.blocks import Observer
from streamprune.pipeline.block_pruning import moment_unit
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import StageTimes
from streamprune.pruning.statistics import ChannelStatistics, LayerTokens, StatisticsAccumulator


class BlockObservation:
    """Statistics of every input of a block's layers that are pruned, one sequence at a time.

    State that must live somewhere: the accumulators, and what sequences that have a reference were at each layer, from
    the pass behind pruned blocks until the same sequence has passed behind dense ones.
    """

    def __init__(self, job: Job, index: int, timed: StageTimes) -> None:
        self.job, self.index, self.timed = job, index, timed
        self.accumulators: dict[str, StatisticsAccumulator] = {}  # by the first layer of each input group
        self._awaiting: dict[str, deque[LayerTokens]] = {}
        self._behind_dense: dict[str, LayerTokens] | None = None
        for group, names in job.skeleton.group_layers(index):
            if names[0] in job.plan.blocks[index]:
                out_features, channels = job.plan.blocks[index][names[0]].shape
                unit = moment_unit(job.skeleton, group, job.config)
                outputs = out_features if len(names) == 1 else None
                self.accumulators[names[0]] = StatisticsAccumulator(
                    channels, job.config, job.arithmetic.device, unit, outputs
                )
                self._awaiting[names[0]] = deque()

    @property
    def observers(self) -> dict[str, Observer]:
        """One for each input, by the name that a layer which takes it has inside the block."""
        prefix = f"{self.job.skeleton.blocks[self.index]}."
        return {name.removeprefix(prefix): functools.partial(self._see, name) for name in self.accumulators}

    def compare(self, run_dense: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the next sequence that has a reference behind dense blocks, and note how its layers differ."""
        self._behind_dense = {}
        try:
            output = run_dense()
            with self.timed("statistics"):
                for name, accumulator in self.accumulators.items():
                    accumulator.add_reference(self._behind_dense[name], self._awaiting[name].popleft())
        finally:
            self._behind_dense = None
        return output

    def result(self) -> dict[str, ChannelStatistics]:
        """Statistics by the full name of each layer that takes the input; each accumulator is freed as it is read."""
        found: dict[str, ChannelStatistics] = {}
        with self.timed("statistics"):
            for _, names in self.job.skeleton.group_layers(self.index):
                if names[0] in self.accumulators:
                    found.update(dict.fromkeys(names, self.accumulators.pop(names[0]).result()))
        return found

    def _see(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        accumulator, config = self.accumulators[name], self.job.config
        if self._behind_dense is not None:
            self._behind_dense[name] = accumulator.to_compare(x, y)
            return
        if config.correction and accumulator.sequences % config.correction_stride == 0:
            self._awaiting[name].append(accumulator.to_compare(x, y))
        with self.timed("statistics"), numerics_named(name):
            accumulator.add(x)
