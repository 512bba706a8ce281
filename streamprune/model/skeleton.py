"""A model's modules without their weights, and its blocks: what each holds, and which of its layers share an input.

The modules are transformers' own, on the meta device (real buffers: rotary frequencies are computed, not loaded).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from streamprune.checkpoint.reader import Checkpoint
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import RESIDUAL_STREAMS, TOGETHER, ResidualStream
from streamprune.model.configuration import model_config, one_line, unsupported
from streamprune.model.discovery import FoundBlock, discover, shared_weight
from streamprune.model.library import (
    Conv1D,
    PretrainedConfig,
    bare_model,
    empty_model,
    linear_shape,
    pass_on,
    tied_parameters,
    warnings_heard,
)
from streamprune.model.weights import WeightView

MAX_BUFFER_BYTES = 1 << 30  # such as rotary frequencies; a config may ask for any number


class Heads(NamedTuple):
    """Query heads, KV heads, and the channels of a head."""

    queries: int
    key_values: int
    size: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that read one and the same input, and where a permutation of it folds (folding.py).

    producers  layers whose output rows (and bias) are this input, channel by channel, up to what is done to all alike;
               none: a permutation is stored
    per_head   the input is attention's output: a permutation must stay inside heads, and is one for all the query
               heads that share a KV head, whose value rows are the producer's
    times      how often the producer's rows hold the channels, one range after the other (2: gate and up fused)
    """

    layers: tuple[WeightView, ...]
    producers: tuple[str, ...] = ()
    per_head: bool = False
    times: int = 1

    @property
    def name(self) -> str:
        """The first layer's, by which the input is called."""
        return self.layers[0].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)


@dataclass(frozen=True)
class Block:
    """A transformer block: its module's name, its parameters by full name, and its input groups.

    No weight that is pruned lies outside `groups`. `ungrouped` are its other matrices, by their layers' names, with the
    reasons why no packed layer can replace them; `returns` how many values the block returns in a tuple, or None:
    hidden states alone.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    ungrouped: dict[str, str]
    returns: int | None = None

    @property
    def layers(self) -> dict[str, WeightView]:
        """The weights of all groups, by their layers' full names."""
        return {layer.name: layer for group in self.groups for layer in group.layers}

    def local(self, name: str) -> str:
        """The name inside the block of something called by its full name."""
        return name.removeprefix(f"{self.name}.")


@dataclass(frozen=True)
class Skeleton:
    """A causal LM on the meta device, in evaluation mode.

    path is the module of its blocks' list, hidden_size the width of the states that go through them, residual what
    lies along these where that is known. `batched`: several sequences may go through a block at once, and become what
    each would alone.
    """

    model: PreTrainedModel
    residual: ResidualStream | None
    path: str
    hidden_size: int
    batched: bool
    blocks: tuple[Block, ...]

    @cached_property
    def embedding(self) -> str:
        """Name of the matrix of input embeddings. Raises UnsupportedModelError where they have more parameters."""
        module = self.model.get_input_embeddings()
        if not isinstance(module, nn.Embedding) or len([*module.parameters()]) != 1:
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
        return tuple(name for name in self.shapes if name not in inside and name not in self.tied)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that is stored, tied parameters too: parameters, and buffers that are no constants of the class."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that share another's tensor: name to the name that is stored."""
        return tied_parameters(self.model)

    @cached_property
    def heads(self) -> Heads:
        """Of attention in every block; one where the config does not say."""
        config = self.model.config
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return Heads(heads, kv_heads, int(getattr(config, "head_dim", None) or self.hidden_size // heads))

    @cached_property
    def views(self) -> dict[str, WeightView]:
        """The weights of all groups of all blocks, by their layers' full names."""
        return {name: view for block in self.blocks for name, view in block.layers.items()}

    def parameter_of(self, name: str) -> str:
        """The parameter that a block's layer, or what else it leaves dense, has its weight in."""
        return self.views[name].parameter if name in self.views else name if name in self.shapes else f"{name}.weight"

    def module(self, block: Block) -> nn.Module:
        """The meta module of a block."""
        return self.model.get_submodule(block.name)


def build_skeleton(folder: Path, checkpoint: Checkpoint) -> Skeleton:
    """Build a model's modules from its config.json, without weights and without remote code.

    Raises CheckpointError for a config that makes no model, or one that cannot run, or that the checkpoint's headers
    contradict; UnsupportedModelError for a model that the streamed passes cannot run.
    """
    where = f"{folder}/config.json"
    with warnings_heard() as warnings:
        config = model_config(folder, checkpoint)
        try:
            skeleton = skeleton_of(config)
        except UnsupportedModelError as error:
            raise unsupported(where, config.model_type, str(error)) from error
        except Exception as error:
            raise CheckpointError(f"{where}: makes no model ({one_line(error)})") from error
    pass_on(where, warnings)
    return skeleton


def skeleton_of(config: PretrainedConfig) -> Skeleton:
    """The skeleton of a config, whose cache is switched off. Raises UnsupportedModelError, and whatever transformers
    raises for sizes that do not fit each other.
    """
    config.use_cache = False
    bare = bare_model(config)
    if (needed := sum(buffer.numel() * buffer.itemsize for buffer in bare.buffers())) > MAX_BUFFER_BYTES:
        raise UnsupportedModelError(f"its model has {needed} bytes of buffers")
    if name := shared_weight(bare):
        raise UnsupportedModelError(f"{name}: a block's weight has a second place in the model")
    model = modules_of(config)
    found = discover(model)
    path = f"{model.base_model_prefix}.{found.path}"
    modules = [*model.get_submodule(path).children()]
    blocks = tuple(_block(f"{path}.{i}", i, modules[i], one) for i, one in enumerate(found.blocks))
    batched = found.batched and config.model_type in TOGETHER
    return Skeleton(model, RESIDUAL_STREAMS.get(config.model_type), path, found.width, batched, blocks)


def modules_of(config: PretrainedConfig) -> PreTrainedModel:
    """The modules of a config as they are run here, parameters on the meta device, in evaluation mode."""
    return empty_model(config).eval()


def _block(name: str, index: int, module: nn.Module, found: FoundBlock) -> Block:
    parameters = tuple(f"{name}.{parameter}" for parameter in module.state_dict(keep_vars=True))
    grouped = {layer for group in found.groups for layer in group}
    groups = tuple(
        LayerGroup(tuple(_view(name, layer, module.get_submodule(layer)) for layer in layers))
        for layers in found.groups
    )
    dense = {**found.dense, **_other_matrices(module, grouped | found.dense.keys())}
    ungrouped = {f"{name}.{layer}": reason for layer, reason in dense.items()}
    return Block(index, name, parameters, groups, ungrouped, found.returns)


def _other_matrices(module: nn.Module, linears: set[str]) -> dict[str, str]:
    """Matrices of a block that are no linear layers' weights, by their layers' or their own names, with the reason."""
    others = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        layer = name.removesuffix(".weight")
        if tensor.ndim > 1 and layer not in linears:
            kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
            others[layer] = f"{kind} is no linear layer"
    return others


def _view(block: str, layer: str, module: nn.Module) -> WeightView:
    name, shape = f"{block}.{layer}", linear_shape(module)
    assert shape is not None
    return WeightView(name, f"{name}.weight", shape, transposed=isinstance(module, Conv1D))
