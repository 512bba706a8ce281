"""Progress for people: a bar over blocks, one over a block's samples; a line a block where there is no terminal.

And where the time went: seconds of each stage.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from streamprune.checkpoint.manifest import JournalEntry


class Progress:
    """Bars on standard error; nothing at all when not `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.on_terminal = enabled and sys.stderr.isatty()
        self._blocks: Any = None
        self._samples: Any = None
        self._sample_count = 0

    def note(self, text: str) -> None:
        """A line about the job."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def start(self, blocks: int, finished: int, samples: int) -> None:
        """Open the bar over blocks, of which some are finished already."""
        self._sample_count = samples
        off = not (self.enabled and self.on_terminal)
        self._blocks = tqdm(total=blocks, initial=finished, unit="block", desc="blocks", disable=off, smoothing=0)
        if finished:
            self.note(f"going on after block {finished} of {blocks}")

    def stage(self, name: str) -> None:
        """A new pass over the samples begins."""
        if self._samples is not None:
            self._samples.close()
        off = not (self.enabled and self.on_terminal)
        self._samples = tqdm(total=self._sample_count, unit="sample", desc=name, disable=off, leave=False)

    def sample_done(self) -> None:
        if self._samples is not None:
            self._samples.update()

    def block_done(self, entry: JournalEntry) -> None:
        """A block is finished and journalled."""
        if self._blocks is None:
            return
        self._blocks.update()
        if self.enabled and not self.on_terminal:
            seconds, block = sum(entry.timings.seconds.values()), entry.record
            known = "not validated" if block.block_error is None else f"block error {block.block_error:.4g}"
            print(f"{block.name}: {block.outcome}, {known}, {seconds:.1f} s", file=sys.stderr)

    def close(self) -> None:
        for bar in (self._samples, self._blocks):
            if bar is not None:
                bar.close()


class StageTimes:
    """Seconds spent in named stages; a stage inside another counts for itself alone.

    What a stage gave a GPU to do is waited for at its end, so that no later one is charged for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._now() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def add(self, other: "StageTimes") -> None:
        """Count what was spent elsewhere."""
        for stage, spent in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
