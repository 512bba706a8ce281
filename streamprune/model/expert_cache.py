"""Memory for some of a model's experts: which are there, which are on their way, and which make room for others.

Those stay that were used most, what is long ago counting less (docs/benchmarks.md has what other rules are worth).
"""

import math
import time
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import wait
from dataclasses import dataclass

import torch
from torch import nn

from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.spans import Reader, Reading, aligned_memory
from streamprune.model.residency import RATE_SECONDS, READINGS, StoredBlock, check_block, computed
from streamprune.model.source import Source

RISE = 0.02  # of the logarithm of what a use counts, for each pass that it is later
Key = tuple[int, int]  # block, among those with experts, and expert
Coming = Mapping[Key, int]  # experts that are to compute, and their places in that order


@dataclass
class Held:
    """An expert that is in memory, or on its way there: `reading` until it is checked and its module has it."""

    memory: torch.Tensor | None
    reading: Reading | None


class ExpertCache:
    """At most `slots` experts in memory, as the weights of their modules; each is checked when it is first there."""

    def __init__(
        self, source: Source, experts: Mapping[Key, StoredBlock], slots: int, reader: Reader, device: torch.device
    ) -> None:
        self.experts, self.slots, self.read_bytes = experts, slots, 0
        self._source, self._reader, self._device, self._buffers = source, reader, device, Buffers()
        self._stays = device.type == "cpu" and any(expert.as_it_is for expert in experts.values())
        size = max(expert.layout.size_bytes for expert in experts.values())
        self._memory = [aligned_memory(size) for _ in range(slots if self._stays else min(slots, READINGS))]
        self._held: dict[Key, Held] = {}
        self._worth: dict[Key, float] = {}  # logarithms
        self._unchecked = set(experts)

    def is_there(self, key: Key) -> bool:
        """Whether an expert can compute without waiting for the disk."""
        held = self._held.get(key)
        return held is not None and (held.reading is None or all(piece.done() for piece in held.reading.pieces))

    def note(self, key: Key, uses: int, now: int) -> None:
        """Count an expert's uses in pass number `now`."""
        one, other = self._worth.get(key, -math.inf), math.log(uses) + RISE * now
        self._worth[key] = max(one, other) + math.log1p(math.exp(-abs(one - other)))

    def begin(self, key: Key, coming: Coming) -> bool:
        """Have an expert read, if it is not there; False where those that compute earlier leave no room for it."""
        if key in self._held:
            return True
        if len(self._held) == self.slots and not self._make_room(key, coming, list(self._held)):
            return False
        reading = [other for other, held in self._held.items() if held.memory is not None]
        if not self._memory and not self._make_room(key, coming, reading):
            return False
        memory, layout = self._memory.pop(), self.experts[key].layout
        self._held[key] = Held(memory, self._reader.start(layout, memory))
        self.read_bytes += layout.read_bytes
        return True

    def forget(self, keys: Collection[Key]) -> None:
        """Stop reading experts that are on their way, in favour of others."""
        for key in keys:
            if key in self._held and not self.is_there(key):
                self._drop(key)

    def ready(self, key: Key) -> nn.Module:
        """An expert that has begun, with its weights. Raises the errors of `Reading.finish` and `check_block`."""
        held, expert = self._held[key], self.experts[key]
        if held.reading is not None:
            tensors = held.reading.finish()
            if key in self._unchecked:
                check_block(self._source, expert, tensors)
                self._unchecked.remove(key)
            state = computed(expert, tensors, self._device, self._buffers)
            expert.module.load_state_dict(state, assign=True)
            held.reading = None
            if not self._stays:
                self._give_back(held)
        return expert.module

    def end(self) -> None:
        """Read no more, and leave the modules without weights."""
        for key in list(self._held):
            self._drop(key)

    def bytes_per_second(self) -> float:
        """The pace of the same reading where nothing computes meanwhile, measured over at most all experts once."""
        self.end()
        coming: deque[tuple[StoredBlock, Reading]] = deque()
        at_once, begin, count = min(READINGS, len(self._memory)), time.perf_counter(), 0
        for expert in self.experts.values():
            if len(coming) == at_once:
                first, reading = coming.popleft()
                reading.finish()
                count += first.layout.read_bytes
                self._memory.append(reading.memory)
            if time.perf_counter() - begin > RATE_SECONDS:
                break
            memory = self._memory.pop()
            coming.append((expert, self._reader.start(expert.layout, memory)))
        seconds = time.perf_counter() - begin
        for _, reading in coming:
            _stop(reading)
        return count / seconds

    def _make_room(self, key: Key, coming: Coming, others: list[Key]) -> bool:
        """Drop the least worth of those that are not to compute, else the one that computes last, but later."""
        if not others:
            return False
        last = max(others, key=lambda other: (coming.get(other, math.inf), -self._worth.get(other, -math.inf)))
        if coming.get(last, math.inf) <= coming[key]:
            return False
        self._drop(last)
        return True

    def _drop(self, key: Key) -> None:
        held = self._held.pop(key)
        if held.reading is not None:
            stopped = _stop(held.reading)
            self.read_bytes -= held.reading.layout.read_bytes * stopped // len(held.reading.pieces)
        else:
            self.experts[key].module.to("meta")
        if held.memory is not None:
            self._give_back(held)

    def _give_back(self, held: Held) -> None:
        assert held.memory is not None
        self._memory.append(held.memory)
        held.memory = None


def _stop(reading: Reading) -> int:
    """Wait for those pieces that have begun; the number of the others, which are not read."""
    begun = [piece for piece in reading.pieces if not piece.cancel()]
    wait(begun)
    return len(reading.pieces) - len(begun)
