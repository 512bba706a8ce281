"""What passes through a model's blocks beside hidden states: further channels of the same stream.

Some blocks are called with a tensor that is made of the text (a part of an embedding for each block), or leave keys and
values to later ones. Both lie behind the channels of the hidden states, so that they are kept, checked and made again
with them, sequence by sequence.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Place = int | str  # of an argument beside hidden states: its number among the positional ones, or its name
Heads = tuple[int, int]  # of keys or values [sequences, heads, tokens, size]


@dataclass(frozen=True)
class Beside:
    """What one block is given and leaves beside hidden states.

    given    channels of each argument [sequences, tokens, channels] that is made of the text
    mapping  the name of the argument in which blocks leave keys and values to others, if there is one, and its class
    left     what this block leaves there: the heads of each tensor, by keys
    """

    given: dict[Place, int] = field(default_factory=dict)
    mapping: tuple[str, Callable[[], MutableMapping[Any, Any]]] | None = None
    left: dict[Any, tuple[Heads, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Channels:
    """Where all that lies in a stream, for one block; the first `hidden` channels are hidden states.

    shared  what blocks before this one have left; left: what it leaves. The range and the heads of each tensor, by keys
    """

    hidden: int
    given: dict[Place, slice]
    mapping: tuple[str, Callable[[], MutableMapping[Any, Any]]] | None
    shared: dict[Any, tuple[tuple[slice, int], ...]]
    left: dict[Any, tuple[tuple[slice, int], ...]]

    def arguments(
        self, states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block is called with beside hidden states, parts of a stream [sequences, tokens, width] put in."""
        given = {place: states[..., part] for place, part in self.given.items()}
        args = tuple(given.get(place, value) for place, value in enumerate(args))
        kwargs = {name: given.get(name, value) for name, value in kwargs.items()}
        if self.mapping is not None:
            name, kind = self.mapping
            kwargs[name] = kind()
            for key, parts in self.shared.items():
                kwargs[name][key] = tuple(_with_heads(states[..., part], heads) for part, heads in parts)
        return args, kwargs

    def following(self, states: torch.Tensor, output: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The stream behind the block, which has returned `output` and left something in its arguments."""
        stream = states.clone()
        stream[..., : self.hidden] = output
        for key, parts in self.left.items():
            assert self.mapping is not None
            for (part, _), tensor in zip(parts, kwargs[self.mapping[0]][key], strict=True):
                stream[..., part] = tensor.transpose(1, 2).flatten(2)
        return stream


def _with_heads(channels: torch.Tensor, heads: int) -> torch.Tensor:
    return channels.unflatten(-1, (heads, -1)).transpose(1, 2)


def lay_out_channels(hidden: int, blocks: Sequence[Beside]) -> tuple[list[Channels], int]:
    """Where each block finds its part of the stream, and the stream's width. A key's tensors have one place, whichever
    blocks leave them.
    """
    width, given, places = hidden, [], dict[Any, tuple[tuple[slice, int], ...]]()

    def room(channels: int) -> slice:
        nonlocal width
        width += channels
        return slice(width - channels, width)

    for block in blocks:
        given.append({place: room(channels) for place, channels in block.given.items()})
        for key, tensors in block.left.items():
            if key not in places:
                places[key] = tuple((room(heads * size), heads) for heads, size in tensors)
    found, so_far = [], set[Any]()
    for block, own in zip(blocks, given, strict=True):
        shared = {key: places[key] for key in places if key in so_far}
        found.append(Channels(hidden, own, block.mapping, shared, {key: places[key] for key in block.left}))
        so_far |= block.left.keys()
    return found, width
