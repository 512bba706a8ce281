"""The model without its weights, and what its blocks are called with.

The modules are transformers' own, on the meta device (real buffers: rotary frequencies are computed, not loaded). What
each block receives beside the hidden states is recorded by running the model's own forward with recorders in the
blocks' places, so nothing about masks or position embeddings is spelled here.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from streamprune.checkpoint.reader import Checkpoint, TensorSource
from streamprune.checkpoint.safetensors_header import QUANTISED
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import Architecture, InputGroup
from streamprune.model.configuration import model_config, one_line
from streamprune.model.library import empty_model, pass_on, tied_parameters, tree_flatten, warnings_heard

logger = logging.getLogger("streamprune")

# Buffers that old checkpoints carry and current modules compute for themselves.
OBSOLETE_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
UNKNOWN_LISTED = 10  # tensors that belong to no parameter
# What lies beside a quantised weight, under the names that published checkpoints use.
QUANTISED_PART = re.compile(
    r"(?P<layer>.+?)\.((weight_)?scales?(_inv|_2)?|input_scale|(weight_)?zero_point|qweight|qzeros|g_idx|SCB"
    r"|weight_(packed|shape|format)|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..+)"
)


@dataclass(frozen=True)
class Skeleton:
    """A causal LM on the meta device, in evaluation mode. Block i is the module `blocks[i]`."""

    model: PreTrainedModel
    architecture: Architecture
    blocks: tuple[str, ...]

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def embedding(self) -> str:
        """Name of the matrix of input embeddings. Raises UnsupportedModelError where they are more than a lookup."""
        module = self.model.get_input_embeddings()
        if type(module) is not nn.Embedding:
            raise UnsupportedModelError(f"embeddings of {type(module).__name__} are more than rows of a matrix")
        weight = module.get_parameter("weight")
        return next(name for name, parameter in self.model.named_parameters() if parameter is weight)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Vocabulary and width of the input embeddings."""
        vocabulary, width = self.model.get_input_embeddings().get_parameter("weight").shape
        return vocabulary, width

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that the model is made for; None where its config does not say."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        return None if longest is None else int(longest)

    def block(self, index: int) -> nn.Module:
        """The meta module of a block."""
        return self.model.get_submodule(self.blocks[index])

    def block_parameters(self, index: int) -> list[str]:
        """Full names of a block's parameters."""
        return [f"{self.blocks[index]}.{name}" for name, _ in self.block(index).named_parameters()]

    def outer_parameters(self) -> list[str]:
        """Full names of the parameters outside all blocks, tied ones once."""
        inside = tuple(f"{block}." for block in self.blocks)
        tied = tied_parameters(self.model)
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return [name for name in names if not name.startswith(inside) and name not in tied]

    def group_layers(self, index: int) -> list[tuple[InputGroup, list[str]]]:
        """Each input group of the table with the full names of its layers in a block."""
        prefix = self.blocks[index]
        return [(group, [f"{prefix}.{layer}" for layer in group.layers]) for group in self.architecture.groups]

    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and the size of a head."""
        config = self.model.config
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return heads, kv_heads, head_dim


def build_skeleton(folder: Path, checkpoint: Checkpoint) -> Skeleton:
    """Build a model's modules from its config.json, without weights and without remote code.

    Raises CheckpointError for a config that makes no model or one that the checkpoint's headers contradict,
    UnsupportedModelError for one that is not in the table.
    """
    with warnings_heard() as warnings:
        config, architecture = model_config(folder, checkpoint)
        config.use_cache = False
        try:
            model = empty_model(config)
        except Exception as error:
            raise CheckpointError(f"{folder}/config.json: makes no model ({one_line(error)})") from error
    pass_on(f"{folder}/config.json", warnings)
    model.eval()
    try:
        count = len(list(model.get_submodule(architecture.blocks).children()))
    except AttributeError as error:
        raise UnsupportedModelError(f"{folder}: has no blocks at {architecture.blocks}") from error
    return Skeleton(model, architecture, tuple(f"{architecture.blocks}.{index}" for index in range(count)))


def match_names(skeleton: Skeleton, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name to the checkpoint's name for it, by the rules of from_pretrained.

    A checkpoint of the base model lacks the prefix ("decoder.layers..." for "model.decoder.layers..."). Raises
    CheckpointError for a parameter without tensor or with one of another shape; tensors without parameter are logged.
    """
    shapes = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters(remove_duplicate=False)}
    prefix = f"{skeleton.model.base_model_prefix}."
    tied = tied_parameters(skeleton.model)
    names: dict[str, str] = {}
    unknown = []
    for name in checkpoint.tensors:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        parameter = next((candidate for candidate in candidates if candidate in shapes), None)
        if parameter is None:
            unknown.append(name)
        else:
            names[parameter] = name
    for parameter, stored in tied.items():
        other = names.pop(parameter, None)
        if other is not None and names.setdefault(stored, other) != other:
            _check_shape(checkpoint, other, checkpoint.tensors[other], shapes[stored])
    if part := next((name for name in unknown if _is_quantised(skeleton, name, shapes)), None):
        raise CheckpointError(f"{checkpoint.folder}: tensor {part} is a part of a quantised weight: {QUANTISED}")
    missing = sorted(set(shapes) - set(names) - set(tied))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    for parameter, name in names.items():
        _check_shape(checkpoint, name, checkpoint.tensors[name], shapes[parameter])
    strange = [name for name in unknown if not name.endswith(OBSOLETE_SUFFIXES)]
    strange = _without_predicting_blocks(skeleton, checkpoint, strange)
    for name in strange[:UNKNOWN_LISTED]:
        logger.warning("%s: tensor %s belongs to no parameter of the model and is left out", checkpoint.folder, name)
    if len(strange) > UNKNOWN_LISTED:
        logger.warning("%s: so do %d more tensors", checkpoint.folder, len(strange) - UNKNOWN_LISTED)
    return names


def _without_predicting_blocks(skeleton: Skeleton, checkpoint: Checkpoint, unknown: list[str]) -> list[str]:
    """Unknown tensors without those of blocks for multi-token prediction, which follow the model's own in their list.

    They are no part of a causal LM's forward: from_pretrained drops them, and so does this, in a line. Raises
    CheckpointError for a block that config.json does not know of.
    """
    count = len(skeleton.blocks)
    predicting = getattr(skeleton.model.config, "num_nextn_predict_layers", None)
    last = count + (predicting if type(predicting) is int else 0)
    later = {name: number for name in unknown if (number := _number_of_block(skeleton, name)) >= count}
    if beyond := next((name for name, number in later.items() if number >= last), None):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {beyond} is of a block beyond the {last} of config.json; "
            "give a config.json that belongs to the weights"
        )
    if later:
        logger.warning(
            "%s: %d tensors of blocks for multi-token prediction (first %s) are left out; the causal LM does without",
            *(checkpoint.folder, len(later), next(iter(later))),
        )
    return [name for name in unknown if name not in later]


def _number_of_block(skeleton: Skeleton, name: str) -> int:
    """The number in a tensor's name that it would have in the list of blocks; -1 where it has none."""
    path = skeleton.architecture.blocks
    for start in (f"{path}.", f"{path}.".removeprefix(f"{skeleton.model.base_model_prefix}.")):
        number = name.removeprefix(start).partition(".")[0]
        if name.startswith(start) and number.isdecimal():
            return int(number[:10])  # a longer one is beyond all blocks as well
    return -1


def _is_quantised(skeleton: Skeleton, name: str, shapes: Mapping[str, Any]) -> bool:
    """Whether a tensor that belongs to no parameter is a part of a quantised weight."""
    part, prefix = QUANTISED_PART.fullmatch(name), f"{skeleton.model.base_model_prefix}."
    return part is not None and not shapes.keys().isdisjoint(f"{start}{part['layer']}.weight" for start in ("", prefix))


def _check_shape(checkpoint: Checkpoint, name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name} has shape {list(source.shape)}, config.json makes it {list(shape)}"
        )
    if not source.dtype.is_floating_point:
        raise CheckpointError(f"{checkpoint.folder}: tensor {name} is {source.dtype}; the source must be unquantized")


class _StopForward(Exception):
    """Raised by the last recorder: what comes after the blocks is not run."""


class _StandIn(nn.Module):
    """Takes a block's place; attributes that the model looks up there are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Keeps what a block is called with and passes the hidden states on; the last one ends the forward."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__(block)
        self.last = last
        self.states: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, *extra: Any, **arguments: Any) -> torch.Tensor:
        if extra:
            raise UnsupportedModelError(
                "a block of this model is called with positional arguments; that is not supported"
            )
        self.states, self.arguments = hidden_states, arguments
        if self.last:
            raise _StopForward
        return hidden_states


class _Substitute(_StandIn):
    """Returns the given hidden states in place of the first block's output; without them passes its input on."""

    def __init__(self, block: nn.Module, states: torch.Tensor | None) -> None:
        super().__init__(block)
        self.states = states

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states if self.states is None else self.states


@dataclass(frozen=True)
class BlockInputs:
    """Hidden states that enter block 0, [1, tokens, hidden], and the keyword arguments of every block."""

    hidden_states: torch.Tensor
    arguments: tuple[dict[str, Any], ...]


def record_block_inputs(skeleton: Skeleton, outer: Mapping[str, torch.Tensor], embeddings: torch.Tensor) -> BlockInputs:
    """Run what lies between `embeddings` [1, tokens, width] and the blocks; `outer` are parameters outside them."""
    blocks = [skeleton.block(index) for index in range(len(skeleton.blocks))]
    recorders = [_Recorder(block, index == len(blocks) - 1) for index, block in enumerate(blocks)]
    base = skeleton.model.base_model
    prefix = f"{skeleton.model.base_model_prefix}."
    parameters = {name.removeprefix(prefix): tensor for name, tensor in outer.items() if name.startswith(prefix)}
    with _blocks_replaced(skeleton, recorders), torch.inference_mode(), suppress(_StopForward):
        functional_call(base, parameters, (), {"inputs_embeds": embeddings, "use_cache": False})
    first = recorders[0].states
    if first is None:
        raise UnsupportedModelError(f"the forward of {type(skeleton.model).__name__} did not call its blocks")
    return BlockInputs(first, tuple(recorder.arguments for recorder in recorders))


def run_tail(
    skeleton: Skeleton, outer: Mapping[str, torch.Tensor], states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits [len(positions), vocabulary] from the last block's hidden states [1, tokens, hidden]."""
    blocks = [skeleton.block(index) for index in range(len(skeleton.blocks))]
    substitutes = [_Substitute(block, states if index == 0 else None) for index, block in enumerate(blocks)]
    tied = {name: outer[stored] for name, stored in tied_parameters(skeleton.model).items() if stored in outer}
    buffers = {name: buffer.to(states.device) for name, buffer in skeleton.model.named_buffers()}
    # The first substitute ignores what it is given, so embeddings of zeros spare the embedding matrix.
    zeros = states.new_zeros(1, states.shape[1], skeleton.embedding_shape[1])
    inputs = {"inputs_embeds": zeros, "use_cache": False, "logits_to_keep": positions}
    with _blocks_replaced(skeleton, substitutes), torch.inference_mode():
        return functional_call(skeleton.model, {**buffers, **outer, **tied}, (), inputs).logits[0]


def arguments_equal(one: Any, other: Any) -> bool:
    """Whether two recorded arguments are the same, tensors by value, floating-point ones up to rounding."""
    (leaves, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    # blocks share most of what they are called with: each pair is looked at once
    pairs = {(id(leaf), id(other)): (leaf, other) for leaf, other in zip(leaves, others, strict=False)}
    return structure == other_structure and all(_leaves_equal(*pair) for pair in pairs.values())


def _leaves_equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6) if one.is_floating_point() else torch.equal(one, other)


@contextmanager
def _blocks_replaced(skeleton: Skeleton, substitutes: Sequence[nn.Module]) -> Iterator[None]:
    """Put other modules in the blocks' places for a while."""
    originals = [skeleton.block(index) for index in range(len(substitutes))]
    try:
        for name, module in zip(skeleton.blocks, substitutes, strict=True):
            skeleton.model.set_submodule(name, module)
        yield
    finally:
        for name, module in zip(skeleton.blocks, originals, strict=True):
            skeleton.model.set_submodule(name, module)
