"""A model's forward pass in pieces: embeddings, one block after another over all sequences, and the tail.

Hidden states wait in scratch files between blocks; only one block is in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import check_contents, layer_from_tensors, packed_shape, tensor_names
from streamprune.checkpoint.reader import Checkpoint
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.blocks import packed_block, run_block
from streamprune.model.library import tied_parameters, tree_map
from streamprune.model.skeleton import BlockInputs, Skeleton, arguments_equal, match_names, record_block_inputs
from streamprune_kernels import FEW_ROWS, MOST_SHARED_TOKENS

BlockArguments = tuple[dict[str, Any], ...]


def read_outer(
    skeleton: Skeleton, checkpoint: Checkpoint, names: Mapping[str, str], parameters: list[str]
) -> dict[str, torch.Tensor]:
    """The named parameters outside the blocks, in their stored dtypes."""
    tensors = checkpoint.read(names[name] for name in parameters)
    return {name: tensors[names[name]] for name in parameters}


@dataclass(frozen=True)
class TextInputs:
    """What turns tokens into the first block's inputs.

    parameters  of the base model outside the blocks, but the embedding matrix
    rows        of the embedding matrix by token ids int64 [tokens], read from disk when asked for
    """

    parameters: dict[str, torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]


def text_inputs(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    ordered: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> TextInputs:
    """Open what embeds a text; `ordered` puts tensors by name in the job's order of the residual stream."""
    embedding = skeleton.embedding
    prefix = f"{skeleton.model.base_model_prefix}."
    small = [name for name in skeleton.outer_parameters() if name.startswith(prefix) and name != embedding]
    read = checkpoint.row_reader(names[embedding])
    parameters = ordered(read_outer(skeleton, checkpoint, names, small))
    return TextInputs(parameters, lambda ids: ordered({embedding: read(ids)})[embedding])


def block_inputs(skeleton: Skeleton, inputs: TextInputs, ids: torch.Tensor, arithmetic: Arithmetic) -> BlockInputs:
    """What the blocks are called with for the token ids int64 [tokens] of one sequence."""
    parameters = {name: tensor.to(arithmetic.dtype) for name, tensor in inputs.parameters.items()}
    return record_block_inputs(skeleton, parameters, inputs.rows(ids).to(arithmetic.dtype)[None])


def embed(
    skeleton: Skeleton,
    inputs: TextInputs,
    tokens: torch.Tensor,
    arithmetic: Arithmetic,
    states: HiddenStates | None,
    tick: Callable[[], None],
) -> BlockArguments:
    """Run what comes before the blocks on tokens [sequences, length] and keep the results in `states`.

    Returns what each block is called with beside hidden states. Without `states` only the first sequence is run, to
    learn that. Raises UnsupportedModelError where it differs between sequences.
    """
    # Seen once in several hundred jobs and not reproduced: a later recording was not bit-equal to the first. In case a
    # process's first call of a vector routine may round differently, that call is made for nothing.
    block_inputs(skeleton, inputs, tokens[0], arithmetic)
    arguments: BlockArguments | None = None
    for index in range(len(tokens) if states is not None else 1):
        recorded = block_inputs(skeleton, inputs, tokens[index], arithmetic)
        if arguments is None:
            arguments = recorded.arguments
        elif not arguments_equal(arguments, recorded.arguments):
            pairs = zip(arguments, recorded.arguments, strict=True)
            names = {key for one, other in pairs for key in one if not arguments_equal(one[key], other.get(key))}
            raise UnsupportedModelError(
                f"blocks of this model are called with something that depends on the text: {', '.join(sorted(names))}"
            )
        if states is not None:
            states.write(index, recorded.hidden_states)
            tick()
    assert arguments is not None
    moved: BlockArguments = tree_map(
        lambda value: value.to(arithmetic.device) if isinstance(value, torch.Tensor) else value, arguments
    )
    return moved


def sequences_at_once(micro_batch: int, tokens: int, device: torch.device) -> int:
    """How many sequences of so many tokens go through a block together, so that what one becomes does not depend on it:
    those so short that several make many rows of a product go one by one, as products of few rows round differently."""
    few = MOST_SHARED_TOKENS if device.type == "cuda" else FEW_ROWS
    return 1 if tokens <= few else micro_batch


def advance(
    block: nn.Module,
    name: str,
    arguments: Mapping[str, Any],
    states: HiddenStates,
    target: HiddenStates,
    arithmetic: Arithmetic,
    tick: Callable[[], None],
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
        outputs = run_block(block, x, arguments, name)
        for place, index in enumerate(indices):
            one = slice(place, place + 1)
            target.write(index, outputs[one])
            observe(index, x[one], outputs[one])
            tick()


def load_block(
    skeleton: Skeleton,
    index: int,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    packed: Mapping[str, NMPattern],
    arithmetic: Arithmetic,
    untrusted: bool = False,
) -> nn.Module:
    """A block ready to run from a checkpoint: its layers in `packed` are sparse, everything else is dense.

    Of an `untrusted` checkpoint masks and permutations are checked, with CheckpointError for those that are none.
    """
    prefix = f"{skeleton.blocks[index]}."
    layers = {name: pattern for name, pattern in packed.items() if name.startswith(prefix)}
    pruned = {f"{name}.weight" for name in layers}
    dense = {name: names[name] for name in skeleton.block_parameters(index) if name not in pruned}
    stored = [name for layer in layers for name in tensor_names(checkpoint, layer)]
    tensors = checkpoint.read([*dense.values(), *stored])
    by_parameter = {**{name: tensors[source] for name, source in dense.items()}, **{n: tensors[n] for n in stored}}
    if untrusted:
        for name, pattern in layers.items():
            check_contents(name, layer_from_tensors(name, tensors), pattern)
    return packed_block(skeleton, index, by_parameter, layers, arithmetic.device, arithmetic.dtype)


def source_dtype(skeleton: Skeleton, checkpoint: Checkpoint, names: Mapping[str, str]) -> torch.dtype:
    """The dtype that the first block's weights are stored in, packed or not."""
    first = skeleton.block_parameters(0)[0]
    stored = names[first] if first in names else tensor_names(checkpoint, first.removesuffix(".weight"))[0]
    return checkpoint.tensors[stored].dtype


def check_tied(skeleton: Skeleton, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise CheckpointError where a tensor that config.json ties to another is there too, and is not the same."""
    for parameter, stored in tied_parameters(skeleton.model).items():
        if parameter not in checkpoint.tensors or names[stored] == parameter:
            continue
        pairs = zip(checkpoint.pieces(parameter), checkpoint.pieces(names[stored]), strict=False)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {parameter} differs from {names[stored]}, which config.json ties it to; "
                "set tie_word_embeddings to false where the weights are right"
            )


def output_names(skeleton: Skeleton, checkpoint: Checkpoint, packed: Mapping[str, NMPattern]) -> dict[str, str]:
    """As `match_names`, for a folder that may hold packed layers, whose weights have no tensor of their own."""
    if not packed:
        return match_names(skeleton, checkpoint)
    pruned = {f"{name}.weight" for name in packed}
    expected = {*skeleton.outer_parameters()}
    for index in range(len(skeleton.blocks)):
        expected.update(skeleton.block_parameters(index))
    unknown = sorted(name for name in packed if f"{name}.weight" not in expected)
    if unknown:
        raise CheckpointError(f"{checkpoint.folder}: layer {unknown[0]} is not in the model of config.json")
    missing = sorted(expected - pruned - set(checkpoint.tensors))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    for name in sorted(expected):
        shape = skeleton.model.get_parameter(name).shape
        layer = name.removesuffix(".weight")
        stored = packed_shape(checkpoint, layer, packed[layer]) if name in pruned else checkpoint.tensors[name].shape
        if tuple(shape) != tuple(stored):
            raise CheckpointError(f"{checkpoint.folder}: {name} is {list(stored)}, config.json makes it {list(shape)}")
    return {name: name for name in sorted(expected - pruned)}
