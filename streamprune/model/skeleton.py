"""A model's modules without their weights, and its blocks: what each holds, and which of its layers share an input.

The modules are transformers' own, on the meta device (real buffers: rotary frequencies are computed, not loaded).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from streamprune.checkpoint.reader import Checkpoint
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import Architecture
from streamprune.model.configuration import model_config, one_line
from streamprune.model.library import empty_model, pass_on, tied_parameters, warnings_heard
from streamprune.model.weights import WeightView


class Heads(NamedTuple):
    """Query heads, KV heads, and the channels of a head."""

    queries: int
    key_values: int
    size: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that read one and the same input. The other fields are InputGroup's, by full names."""

    layers: tuple[WeightView, ...]
    producers: tuple[str, ...]
    per_head: bool

    @property
    def name(self) -> str:
        """The first layer's, by which the input is called."""
        return self.layers[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


@dataclass(frozen=True)
class Block:
    """A transformer block: its module's name, its parameters by full name, its input groups, and other linear layers.

    No weight that is pruned lies outside `groups`; the table of architectures names none of the `ungrouped`.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    ungrouped: tuple[str, ...]

    @property
    def layers(self) -> dict[str, WeightView]:
        """The weights of all groups, by their layers' full names."""
        return {layer.name: layer for group in self.groups for layer in group.layers}

    def local(self, name: str) -> str:
        """The name inside the block of something called by its full name."""
        return name.removeprefix(f"{self.name}.")


@dataclass(frozen=True)
class Skeleton:
    """A causal LM on the meta device, in evaluation mode."""

    model: PreTrainedModel
    architecture: Architecture
    blocks: tuple[Block, ...]

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @cached_property
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

    @property
    def base_prefix(self) -> str:
        """How names of the base model's parameters begin in the causal LM: "model."."""
        return f"{self.model.base_model_prefix}."

    @cached_property
    def outer_parameters(self) -> tuple[str, ...]:
        """Full names of the parameters outside all blocks, tied ones once."""
        inside = {name for block in self.blocks for name in block.parameters}
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return tuple(name for name in names if name not in inside and name not in self.tied)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that share another's tensor: name to the name that is stored."""
        return tied_parameters(self.model)

    @cached_property
    def heads(self) -> Heads:
        """Of attention in every block."""
        config = self.model.config
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return Heads(heads, kv_heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads))

    def module(self, block: Block) -> nn.Module:
        """The meta module of a block."""
        return self.model.get_submodule(block.name)


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
        modules = [*model.get_submodule(architecture.blocks).children()]
    except AttributeError as error:
        raise UnsupportedModelError(f"{folder}: has no blocks at {architecture.blocks}") from error
    names = (f"{architecture.blocks}.{index}" for index in range(len(modules)))
    blocks = (_block(*numbered, architecture) for numbered in zip(range(len(modules)), names, modules, strict=True))
    return Skeleton(model, architecture, tuple(blocks))


def _block(index: int, name: str, module: nn.Module, architecture: Architecture) -> Block:
    parameters = tuple(f"{name}.{parameter}" for parameter, _ in module.named_parameters())
    linears = {f"{name}.{local}": inner for local, inner in module.named_modules() if isinstance(inner, nn.Linear)}
    groups = tuple(_groups(name, linears, architecture))
    grouped = {layer.name for group in groups for layer in group.layers}
    return Block(index, name, parameters, groups, tuple(linear for linear in linears if linear not in grouped))


def _groups(block: str, linears: dict[str, nn.Linear], architecture: Architecture) -> Iterator[LayerGroup]:
    """The table's groups in a block. Raises UnsupportedModelError where one names what is no linear layer there."""
    for group in architecture.groups:
        names = [f"{block}.{layer}" for layer in group.layers]
        if missing := [name for name in names if name not in linears]:
            raise UnsupportedModelError(
                f"{missing[0]}: is not a linear layer of this model, though its architecture names it"
            )
        shapes = {name: (linears[name].out_features, linears[name].in_features) for name in names}
        layers = tuple(WeightView(name, f"{name}.weight", shapes[name]) for name in names)
        yield LayerGroup(layers, tuple(f"{block}.{producer}" for producer in group.producers), group.per_head)
