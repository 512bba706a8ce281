"""One run of a job: where it writes, who watches, and blocks run over all sequences."""

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from streamprune.checkpoint.scratch import HiddenStates
from streamprune.errors import Interrupted
from streamprune.model.folding import FoldedPermutation
from streamprune.model.streaming import Runnable, advance
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.writing.journal import Journal


@dataclass(frozen=True)
class Watch:
    """Who watches a job: the journal's lease, progress for people, and whoever may stop it."""

    journal: Journal
    progress: Progress
    should_stop: Callable[[], bool]
    blocks: int  # of the model

    def tick(self) -> None:
        """A safe point: one sequence is done. Raises Interrupted when asked to stop."""
        self.progress.sample_done()
        self.check()

    def check(self) -> None:
        """Raise Interrupted when asked to stop, OutputError where the output is another's by now."""
        self.journal.lease.check()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raise Interrupted when asked to stop. Any thread may call it."""
        if self.should_stop():
            done = self.journal.finished_blocks()
            raise Interrupted(
                f"{self.journal.out}: stopped after {done} of {self.blocks} blocks; the same command goes on"
            )


@dataclass(frozen=True)
class Run:
    """One run of a job. `scratch` is where hidden states lie.

    open_files  closes them, however the job ends
    background  waits for disks while the processor works
    residual    the permutation of the residual stream, for the whole model
    """

    job: Job
    watch: Watch
    scratch: Path
    open_files: ExitStack
    background: Executor
    residual: FoldedPermutation | None

    @property
    def journal(self) -> Journal:
        return self.watch.journal

    def advance(
        self,
        block: Runnable,
        states: HiddenStates,
        target: HiddenStates,
        observe: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda index, x, y: None,
    ) -> None:
        """Run a block on every sequence."""
        job = self.job
        advance(block, states, target, job.arithmetic, self.watch.tick, observe, job.plan.micro_batch)

    def inputs_of(self, index: int, kind: str, samples: int) -> HiddenStates:
        """The inputs of a block. Two files of a kind take turns: a block's outputs go where its predecessor's inputs
        were, into pages that are there already.
        """
        return self.hidden_states(f"{kind}-{index % 2}", samples)

    def hidden_states(self, name: str, samples: int) -> HiddenStates:
        length = self.job.tokens.shape[1]
        width, dtype = self.job.source.skeleton.stream_width, self.job.arithmetic.dtype
        on_gpu = self.job.arithmetic.device.type == "cuda"
        states = HiddenStates(self.scratch / f"{name}.bin", samples, length, width, dtype, for_gpu=on_gpu)
        self.open_files.callback(states.close)
        return states
