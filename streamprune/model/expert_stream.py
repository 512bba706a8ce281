"""A model's experts, read from disk when tokens are routed to them.

What the next block will ask for is guessed by its router from the states that this one's experts are given, and read
meanwhile, as long as guesses are mostly right. They decide when something is read, never what is computed.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from streamprune.checkpoint.spans import Reader
from streamprune.model.expert_cache import ExpertCache, Key
from streamprune.model.experts import ExpertLayers, Routing, add_weighted
from streamprune.model.residency import StoredBlock
from streamprune.model.source import Source

MOSTLY = 0.5  # guesses that are right, for others to be read
LEARNING = 32  # guesses that the share is taken over
FEW_ROWS = 32  # of which all experts' outputs are kept, so that those that are there need not wait for others


@dataclass
class Guess:
    """Of a block: experts that it may ask for and that were not there, and the share that it did of earlier ones."""

    keys: frozenset[Key] = frozenset()
    right: float = 1.0

    def check(self, wanted: Collection[Key]) -> None:
        """Learn what the block asked for."""
        for key in self.keys:
            self.right += ((key in wanted) - self.right) / LEARNING


@dataclass
class Asked:
    """Experts that blocks asked for, and of those the ones that were there, in `passes` passes."""

    passes: int = 0
    experts: int = 0
    there: int = 0


class ExpertStream:
    """Computes in the place of the experts of all blocks, at most `slots` of them in memory, until `end`."""

    def __init__(self, source: Source, blocks: Sequence[StoredBlock], slots: int, reader: Reader, device: torch.device):
        self.blocks = [block for block in blocks if block.experts]
        keyed = {(b, e): expert for b, block in enumerate(self.blocks) for e, expert in enumerate(block.experts)}
        self.cache = ExpertCache(source, keyed, slots, reader, device)
        self.asked = Asked()
        self._routers = [_router_of(block) for block in self.blocks]
        self._guesses = [Guess() for _ in self.blocks]
        self._passes, self._bytes_before = 0, 0
        self._layers = [_layers_of(block) for block in self.blocks]
        for number, layers in enumerate(self._layers):
            layers.function = partial(self._outputs, number)

    @property
    def pass_bytes(self) -> int:
        """Read from disk for a pass: the mean of those after the first one, unless that was all."""
        return (self.cache.read_bytes - self._bytes_before) // max(1, self.asked.passes)

    @property
    def hit_rate(self) -> float:
        """Of the experts that blocks asked for in these passes, the share that was there."""
        return self.asked.there / max(1, self.asked.experts)

    def bytes_per_second(self) -> float:
        """The pace of the same reading where nothing computes meanwhile."""
        return self.cache.bytes_per_second()

    def end(self) -> None:
        """Read no more, and leave the experts without weights."""
        self.cache.end()
        for layers in self._layers:
            layers.function = None

    def _outputs(self, number: int, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        """What the experts of a block make of rows [tokens, hidden]: as ExpertLayers.of_all, bit for bit."""
        wanted = self._note(number, routing)
        there = {key for key in wanted if self.cache.is_there(key)}
        order = [*sorted(there), *sorted(set(wanted) - there)] if len(rows) <= FEW_ROWS else wanted
        self._guesses[number].check(wanted)
        self.cache.forget(self._guesses[number].keys.difference(wanted))
        guessed = self._guess(number + 1, rows, routing.index.shape[-1])
        coming = {key: place for place, key in enumerate(dict.fromkeys([*order, *guessed]))}
        total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        made: dict[Key, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        waiting = iter([*wanted, None])
        next_one = next(waiting)
        for key in order:
            all(self.cache.begin(other, coming) for other in coming)
            taken, weights = routing.of(key[1])
            made[key] = taken, self._layers[number].compute(self.cache.ready(key), rows[taken]), weights
            del coming[key]
            while next_one in made:
                add_weighted(total, *made.pop(next_one))
                next_one = next(waiting)
        return total.to(rows.dtype)

    def _note(self, number: int, routing: Routing) -> list[Key]:
        """The experts that a block asks for, ascending; counts them."""
        if number == 0:
            self._passes += 1
            if self._passes == 2:
                self.asked, self._bytes_before = Asked(), self.cache.read_bytes
            self.asked.passes += 1
        count = len(self.blocks[number].experts)
        uses = dict(zip(*(found.tolist() for found in routing.index.unique(return_counts=True)), strict=True))
        wanted = [(number, expert) for expert in uses if 0 <= expert < count]
        for key in wanted:
            self.asked.experts += 1
            self.asked.there += self.cache.is_there(key)
            self.cache.note(key, uses[key[1]], self._passes)
        return wanted

    def _guess(self, number: int, rows: torch.Tensor, each: int) -> list[Key]:
        """Experts to read for a block, the likeliest half by its router; none where that is not in memory, or where
        guesses were mostly wrong.
        """
        router = self._routers[number] if number < len(self._routers) else None
        if router is None:
            return []
        module, (name, name_of_bias) = self.blocks[number].module, router
        weight = module.get_parameter(name)
        bias = None if name_of_bias is None else module.get_parameter(name_of_bias)
        if weight.is_meta:
            return []
        logits = nn.functional.linear(rows.to(weight.dtype), weight, bias)
        likeliest_first = logits.topk(max(1, each // 2)).indices.T.flatten().tolist()
        keys = [(number, expert) for expert in dict.fromkeys(likeliest_first)]
        guess = self._guesses[number]
        guess.keys = frozenset(key for key in keys if not self.cache.is_there(key))
        return keys if guess.right > MOSTLY else []


def _layers_of(block: StoredBlock) -> ExpertLayers:
    assert block.block.experts is not None
    layers = block.module.get_submodule(block.block.local(block.block.experts))
    assert isinstance(layers, ExpertLayers)
    return layers


def _router_of(block: StoredBlock) -> tuple[str, str | None] | None:
    """Names of the weight beside a block's experts that has a row for each, and of its bias; None where not just one
    has.
    """
    path = block.block.local(str(block.block.experts))
    beside = path.removesuffix(path.rpartition(".")[2])
    shapes = {local: block.layout.tensors[name].shape for local, name in block.stored.items()}
    found = [
        local
        for local, shape in shapes.items()
        if local.startswith(beside) and len(shape) == 2 and shape[0] == len(block.experts)
    ]
    bias = f"{found[0].removesuffix('weight')}bias" if found else ""
    return (found[0], bias if bias in shapes else None) if len(found) == 1 else None
