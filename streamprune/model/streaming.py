"""A model's forward pass in pieces: embeddings, one block after another over all sequences, and the tail.

Hidden states wait in scratch files between blocks; only one block is in memory.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from streamprune.checkpoint.scratch import HiddenStates
from streamprune.errors import UnsupportedModelError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.forward import (
    Arguments,
    BlockInputs,
    arguments_equal,
    embedded,
    largest_difference,
    record_block_inputs,
)
from streamprune.model.library import tree_map
from streamprune.model.skeleton import Skeleton
from streamprune.model.source import Source
from streamprune_kernels import FEW_ROWS, MAX_SHARED_TOKENS

BlockArguments = tuple[Arguments, ...]
logger = logging.getLogger("streamprune")


@dataclass(frozen=True)
class TextInputs:
    """What turns tokens into the first block's inputs.

    parameters  of the base model outside the blocks, but the embedding matrix
    rows        of the embedding matrix by token ids int64 [tokens], read from disk when asked for
    further     the same of further tables, by their modules
    """

    parameters: dict[str, torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]
    further: dict[str, Callable[[torch.Tensor], torch.Tensor]]


def text_inputs(
    source: Source, ordered: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict
) -> TextInputs:
    """Open what embeds a text; `ordered` puts tensors by name in the job's order of the residual stream."""
    embedding, names, reader = source.skeleton.embedding, source.names, source.checkpoint.row_reader
    read = reader(names[embedding])
    return TextInputs(
        ordered(source.read(source.small_parameters)),
        lambda ids: ordered({embedding: read(ids)})[embedding],
        {table: reader(names[f"{table}.weight"]) for table in source.skeleton.tables},
    )


def block_inputs(skeleton: Skeleton, inputs: TextInputs, ids: torch.Tensor, arithmetic: Arithmetic) -> BlockInputs:
    """What the blocks are called with for the token ids int64 [tokens] of one sequence."""
    parameters = {name: tensor.to(arithmetic.dtype) for name, tensor in inputs.parameters.items()}
    embeddings = embedded(skeleton, inputs.rows(ids).to(arithmetic.dtype))
    further = {
        table: embedded(skeleton, rows(ids).to(arithmetic.dtype), table)[None] for table, rows in inputs.further.items()
    }
    return record_block_inputs(skeleton, parameters, embeddings[None], further)


def embed(
    skeleton: Skeleton,
    inputs: TextInputs,
    tokens: torch.Tensor,
    arithmetic: Arithmetic,
    states: HiddenStates | None,
    tick: Callable[[], object],
) -> BlockArguments:
    """Run what comes before the blocks on tokens [sequences, length] and keep the results in `states`.

    Returns what each block is called with beside hidden states, which is the same for every sequence. Without `states`
    nothing is kept. Raises UnsupportedModelError where it depends on the text.
    """
    arguments = _block_arguments(skeleton, inputs, tokens[0], arithmetic)
    if states is not None:
        for index, ids in enumerate(tokens):
            states.write(index, block_inputs(skeleton, inputs, ids, arithmetic).hidden_states)
            tick()
    moved: BlockArguments = tree_map(
        lambda value: value.to(arithmetic.device) if isinstance(value, torch.Tensor) else value, arguments
    )
    return moved


def _block_arguments(
    skeleton: Skeleton, inputs: TextInputs, ids: torch.Tensor, arithmetic: Arithmetic
) -> BlockArguments:
    """Recorded of two texts that differ at every place, and bit by bit the same of both.

    So they neither depend on the text nor hold what a computation got wrong once: where the two differ, both are
    recorded once more.
    """
    vocabulary, _ = skeleton.embedding_shape
    texts = ids, (ids + 1) % vocabulary
    for attempt in (1, 2):
        one, other = (block_inputs(skeleton, inputs, text, arithmetic).arguments for text in texts)
        if arguments_equal(one, other):
            return one
        pairs = zip(one, other, strict=True)
        both = ((mine.named, theirs.named) for mine, theirs in pairs)
        unequal = {key: (mine[key], theirs.get(key)) for mine, theirs in both for key in mine
                   if not arguments_equal(mine[key], theirs.get(key))}  # fmt: skip
        found = ", ".join(f"{key} (by {largest_difference(*values):.3g})" for key, values in sorted(unequal.items()))
        if attempt == 1:
            logger.warning("blocks are called with something that differs between two texts: %s; asking again", found)
    raise UnsupportedModelError(f"blocks of this model are called with something that depends on the text: {found}")


def sequences_at_once(micro_batch: int, tokens: int, device: torch.device) -> int:
    """How many sequences of so many tokens go through a block together, so that what one becomes does not depend on it:
    those so short that several make many rows of a product go one by one, as products of few rows round differently."""
    few = MAX_SHARED_TOKENS if device.type == "cuda" else FEW_ROWS
    return 1 if tokens <= few else micro_batch


class Runnable(Protocol):
    """What runs a block, with weights and with what it is called with beside hidden states."""

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Outputs [sequences, tokens, hidden] of hidden states of that shape."""


def advance(
    block: Runnable,
    states: HiddenStates,
    target: HiddenStates,
    arithmetic: Arithmetic,
    tick: Callable[[], object],
    observe: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda index, x, y: None,
    micro_batch: int = 1,
) -> None:
    """Run a block on every sequence of `states`, keep its outputs in `target`, and show each (index, input, output).

    `micro_batch` sequences go through the block at once, short ones fewer (`sequences_at_once`).
    """
    at_once = sequences_at_once(micro_batch, states.shape[1], arithmetic.device)
    for first in range(0, len(states), at_once):
        indices = range(first, min(first + at_once, len(states)))
        chunks = [states.read(index).to(arithmetic.device) for index in indices]
        x = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
        del chunks
        outputs = block.run(x)
        for place, index in enumerate(indices):
            one = slice(place, place + 1)
            target.write(index, outputs[one])
            observe(index, x[one], outputs[one])
            tick()
