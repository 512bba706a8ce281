"""What blocks are called with, and what comes before and after them.

What each block receives beside the hidden states is recorded by running the model's own forward with recorders in the
blocks' places, so nothing about masks or position embeddings is spelled here.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from streamprune.errors import UnsupportedModelError
from streamprune.model.carried import Channels, Place
from streamprune.model.library import tree_flatten
from streamprune.model.skeleton import Skeleton
from streamprune.model.stand_in import StandIn


class _StopForward(Exception):
    """Raised by the last recorder: what comes after the blocks is not run."""


class _Recorder(StandIn):
    """Keeps what a block is called with and passes the hidden states on; the last one ends the forward."""

    def __init__(self, block: nn.Module, returns: int | None, last: bool) -> None:
        super().__init__(block)
        self.returns, self.last = returns, last
        self.states: torch.Tensor | None = None
        self.arguments = Arguments((), {})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.states, self.arguments = hidden_states, Arguments(args, kwargs)
        if self.last:
            raise _StopForward
        return returned(hidden_states, self.returns)


class _Substitute(StandIn):
    """Returns the given hidden states in place of the first block's output; without them passes its input on."""

    def __init__(self, block: nn.Module, returns: int | None, states: torch.Tensor | None) -> None:
        super().__init__(block)
        self.returns, self.states = returns, states

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return returned(hidden_states if self.states is None else self.states, self.returns)


class _Looked(StandIn):
    """An embedding's place: returns what was looked up for a text before, [1, tokens, channels]."""

    def __init__(self, table: nn.Module, found: torch.Tensor) -> None:
        super().__init__(table)
        self.found = found
        # rows of tokens that are not of the text, such as padding; they are computed with, and not used
        self.__dict__["weight"] = torch.zeros((), dtype=found.dtype).expand(table.get_parameter("weight").shape)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.found


class Arguments(NamedTuple):
    """What a block is called with beside hidden states; where `channels` say so, it comes with them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    channels: Channels | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Each by its name, or its number among the positional ones."""
        return {**{f"argument {place}": value for place, value in enumerate(self.args, 1)}, **self.kwargs}


@dataclass(frozen=True)
class BlockInputs:
    """What enters block 0, [1, tokens, stream width], hidden states first, and the other arguments of every block."""

    hidden_states: torch.Tensor
    arguments: tuple[Arguments, ...]


def returned(states: torch.Tensor, count: int | None) -> Any:
    """Hidden states as a block returns them: alone, or first of `count` values, of which no other is used."""
    return states if count is None else (states, *(None,) * (count - 1))


def embedded(skeleton: Skeleton, rows: torch.Tensor, table: str | None = None) -> torch.Tensor:
    """What a model makes of rows [tokens, width] of its embedding matrix: some classes multiply them by a number.

    Of a further `table` than the first, by its module's name.
    """
    module = skeleton.model.get_submodule(table) if table else skeleton.model.get_input_embeddings()
    if type(module) is nn.Embedding:
        return rows
    lookup = copy.copy(module)
    lookup.__dict__["padding_idx"] = None  # which need not be among the rows
    with torch.inference_mode():
        return functional_call(lookup, {"weight": rows}, (torch.arange(len(rows)),))


def record_block_inputs(
    skeleton: Skeleton,
    outer: Mapping[str, torch.Tensor],
    embeddings: torch.Tensor,
    further: Mapping[str, torch.Tensor] | None = None,
) -> BlockInputs:
    """Run what lies between `embeddings` [1, tokens, width] and the blocks; `outer` are parameters outside them,
    `further` what was looked up in further tables.
    """
    blocks = [skeleton.module(block) for block in skeleton.blocks]
    last = len(blocks) - 1
    recorders = [_Recorder(blocks[index], block.returns, index == last) for index, block in enumerate(skeleton.blocks)]
    base = skeleton.model.base_model
    prefix = skeleton.base_prefix
    parameters = {name.removeprefix(prefix): tensor for name, tensor in outer.items() if name.startswith(prefix)}
    replaced, inputs = _lookups(skeleton, embeddings, further or {})
    replaced |= _in_places(skeleton, recorders)
    with _replaced(skeleton, replaced), torch.inference_mode(), suppress(_StopForward):
        functional_call(base, parameters, (), {**inputs, "use_cache": False})
    first = recorders[0].states
    if first is None:
        raise UnsupportedModelError(f"the forward of {type(skeleton.model).__name__} did not call its blocks")
    return _with_stream(skeleton, first, [recorder.arguments for recorder in recorders])


def _with_stream(skeleton: Skeleton, states: torch.Tensor, arguments: Sequence[Arguments]) -> BlockInputs:
    """Hidden states and what else is of the text in one stream, and arguments without the latter."""
    if skeleton.stream_width == skeleton.hidden_size:
        return BlockInputs(states, tuple(arguments))
    stream = states.new_zeros(*states.shape[:-1], skeleton.stream_width)
    stream[..., : skeleton.hidden_size] = states
    left = []
    for block, (args, kwargs, _) in zip(skeleton.blocks, arguments, strict=True):
        channels = block.channels
        assert channels is not None
        places: dict[Place, Any] = dict(enumerate(args)) | kwargs
        for place, part in channels.given.items():
            stream[..., part] = places[place]
        mapping = channels.mapping[0] if channels.mapping else None
        args = tuple(None if place in channels.given else value for place, value in enumerate(args))
        elsewhere = {mapping, *channels.given}
        left.append(Arguments(args, {n: None if n in elsewhere else v for n, v in kwargs.items()}, channels))
    return BlockInputs(stream, tuple(left))


def _lookups(
    skeleton: Skeleton, embeddings: torch.Tensor, further: Mapping[str, torch.Tensor]
) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """How a model is given what was looked up: as its embeddings, or in its tables' places where it has several."""
    if not skeleton.tables:
        return {}, {"inputs_embeds": embeddings}
    found = {skeleton.embedding.removesuffix(".weight"): embeddings, **further}
    places = {name: _Looked(skeleton.model.get_submodule(name), values) for name, values in found.items()}
    return {**places}, {"input_ids": torch.zeros(embeddings.shape[:2], dtype=torch.int64)}


def run_tail(
    skeleton: Skeleton, outer: Mapping[str, torch.Tensor], states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits [len(positions), vocabulary] from what left the last block, [1, tokens, stream width]."""
    states = states[..., : skeleton.hidden_size]
    blocks = [skeleton.module(block) for block in skeleton.blocks]
    returns = [block.returns for block in skeleton.blocks]
    substitutes = [_Substitute(block, returns[i], None if i else states) for i, block in enumerate(blocks)]
    tied = {name: outer[stored] for name, stored in skeleton.tied.items() if stored in outer}
    # The first substitute ignores what it is given, so embeddings that are none spare the embedding matrix; a model
    # that used them behind its blocks would give losses that are no numbers.
    none = states.new_full((1, states.shape[1], skeleton.embedding_shape[1]), math.nan)
    nothing = {
        table: none.new_full((1, states.shape[1], _width(skeleton, table)), math.nan) for table in skeleton.tables
    }
    replaced, embeddings = _lookups(skeleton, none, nothing)
    inputs = {**embeddings, "use_cache": False, "return_dict": True}
    picks = "logits_to_keep" in inspect.signature(type(skeleton.model).forward).parameters
    inputs |= {"logits_to_keep": positions} if picks else {}
    with _replaced(skeleton, replaced | _in_places(skeleton, substitutes)), torch.inference_mode():
        buffers = {name: buffer.to(states.device) for name, buffer in skeleton.model.named_buffers()}
        logits = functional_call(skeleton.model, {**buffers, **outer, **tied}, (), inputs).logits[0]
    return logits if picks else logits[positions]


def arguments_equal(one: Any, other: Any) -> bool:
    """Whether two recorded arguments are the same, tensors bit by bit."""
    (leaves, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    # blocks share most of what they are called with: each pair is looked at once
    pairs = {(id(leaf), id(other)): (leaf, other) for leaf, other in zip(leaves, others, strict=False)}
    return structure == other_structure and all(_leaves_equal(*pair) for pair in pairs.values())


def _leaves_equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*bits)


def largest_difference(one: Any, other: Any) -> float:
    """Of two numbers at the same place of recorded arguments; infinity where they cannot be told apart by one."""
    (leaves, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    if structure != other_structure:
        return math.inf
    unequal = [pair for pair in zip(leaves, others, strict=True) if not _leaves_equal(*pair)]
    if not all(isinstance(leaf, torch.Tensor) and leaf.shape == mate.shape for leaf, mate in unequal):
        return math.inf
    return max((float((leaf.double() - mate.double()).abs().max()) for leaf, mate in unequal), default=0.0)


def _width(skeleton: Skeleton, table: str) -> int:
    return int(skeleton.model.get_submodule(table).get_parameter("weight").shape[1])


def _in_places(skeleton: Skeleton, substitutes: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Modules for the blocks' places."""
    return {block.name: module for block, module in zip(skeleton.blocks, substitutes, strict=True)}


@contextmanager
def _replaced(skeleton: Skeleton, substitutes: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of these names for a while."""
    originals = {name: skeleton.model.get_submodule(name) for name in substitutes}
    try:
        for name, module in substitutes.items():
            skeleton.model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            skeleton.model.set_submodule(name, module)
