"""A model's modules without their weights, and its blocks: what each holds, and which of its layers share an input.

The modules are transformers' own, on the meta device (real buffers: rotary frequencies are computed, not loaded).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from streamprune.checkpoint.reader import Checkpoint, TensorSource
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import RESIDUAL_STREAMS, TOGETHER, ResidualStream
from streamprune.model.carried import Channels, lay_out_channels
from streamprune.model.configuration import model_config, one_line, unsupported
from streamprune.model.discovery import ROUTES, FoundBlock, discover, is_router, shared_weight
from streamprune.model.experts import EXPERTS, ExpertLayers, FusedTensor, fused_tensors, replace_experts
from streamprune.model.library import (
    Conv1D,
    PretrainedConfig,
    bare_model,
    empty_model,
    layer_configs,
    linear_shape,
    name_while_loading,
    pass_on,
    tied_parameters,
    warnings_heard,
)
from streamprune.model.weights import WeightView

MAX_BUFFER_BYTES = 1 << 30  # such as rotary frequencies; a config may ask for any number
Stored = Callable[[PreTrainedModel], Mapping[str, Any]]  # what a checkpoint has of experts, by names in the model


class Heads(NamedTuple):
    """Query heads, KV heads, and the channels of a head."""

    queries: int
    key_values: int
    size: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that read one and the same input, and where a permutation of it folds (folding.py).

    producers    layers whose output rows (and bias) are this input, channel by channel, up to what is done to all
                 alike; none: a permutation is stored
    per_head     the input is attention's output: a permutation must stay inside heads, and is one for all the query
                 heads that share a KV head, whose value rows are the producer's
    times        how often the producer's rows hold the channels, one range after the other (2: gate and up fused)
    interleaved  or all rows of the first channel, then those of the second
    """

    layers: tuple[WeightView, ...]
    producers: tuple[str, ...] = ()
    per_head: bool = False
    times: int = 1
    interleaved: bool = False

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
    hidden states alone; `experts` the full name of the module that holds its experts, or None.
    """

    index: int
    name: str
    parameters: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    ungrouped: dict[str, str]
    returns: int | None = None
    experts: str | None = None
    channels: Channels | None = None

    @cached_property
    def parts(self) -> tuple["Block", ...]:
        """What of the block is worked on by itself: all but its experts, called as the block, and then each expert,
        called by its module. The block alone where it has none.
        """
        if self.experts is None:
            return (self,)
        parameters: dict[str, list[str]] = {"": []}
        groups: dict[str, list[LayerGroup]] = {}
        for name in self.parameters:
            parameters.setdefault(self._expert_of(name), []).append(name)
        for group in self.groups:
            groups.setdefault(self._expert_of(group.name), []).append(group)
        return tuple(
            replace(self, name=f"{self.experts}.{part}" if part else self.name, parameters=tuple(names),
                    groups=tuple(groups.get(part, ())), experts=None if part else self.experts)
            for part, names in parameters.items()
        )  # fmt: skip

    def _expert_of(self, name: str) -> str:
        """The number of the expert that something with a full name is of; "" if it is of none."""
        inside = f"{self.experts}."
        return name.removeprefix(inside).partition(".")[0] if name.startswith(inside) else ""

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

    path is the module of its blocks' list, hidden_size the width of the states that go through them, stream_width that
    of all that does (streamprune/model/carried.py), residual what lies along these where that is known; `tables` are
    further embeddings than the first, by their modules.
    `batched`: several sequences may go through a block at once, and become what each would alone. `fused`: tensors that
    hold all experts of a block in the checkpoint, by what they are called while they are loaded.
    """

    model: PreTrainedModel
    residual: ResidualStream | None
    path: str
    hidden_size: int
    stream_width: int
    tables: tuple[str, ...]
    batched: bool
    blocks: tuple[Block, ...]
    fused: dict[str, FusedTensor] = field(default_factory=dict)

    @property
    def text_config(self) -> PretrainedConfig:
        """The config of what text passes through: the model's own, or that of the language model that it wraps."""
        config: PretrainedConfig = self.model.config.get_text_config()
        return config

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
        longest = getattr(self.text_config, "max_position_embeddings", None)
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

    @property
    def read_by_rows(self) -> frozenset[str]:
        """Parameters of which a text needs a few rows: those that embed tokens."""
        return frozenset({self.embedding, *(f"{table}.weight" for table in self.tables)})

    @cached_property
    def aside(self) -> frozenset[str]:
        """Of `outer_parameters` those that no text passes through: all of a wrapped model but its language model."""
        if self.text_config is self.model.config:
            return frozenset()
        text = f"{self.path.rpartition('.')[0]}."
        return frozenset(n for n in self.outer_parameters if n.startswith(self.base_prefix) and not n.startswith(text))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that is stored, tied parameters too: parameters, and buffers that are no constants of the class."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Parameters that share another's tensor: name to the name that is stored."""
        return tied_parameters(self.model)

    @cached_property
    def expert_counts(self) -> dict[str, int]:
        """How many experts each module holds that holds those of a block, by its full name."""
        paths = [block.experts for block in self.blocks if block.experts is not None]
        return {path: len([*self.model.get_submodule(path).children()]) for path in paths}

    @cached_property
    def heads(self) -> Heads:
        """Of attention in every block, the largest where they differ; one where the config does not say."""
        return max(
            map(self._heads_by, layer_configs(self.text_config)), key=lambda heads: heads.key_values * heads.size
        )

    def _heads_by(self, config: PretrainedConfig) -> Heads:
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
        """The meta module of a block, or of a part of one."""
        return self.model.get_submodule(block.name)

    def without_weights(self, block: Block) -> nn.Module:
        """A copy of a block's module, on the meta device; of a part that leaves out the experts, without them."""
        module = copy.deepcopy(self.module(block))
        for name, experts in [*module.named_modules()]:
            if isinstance(experts, ExpertLayers) and not any(
                parameter.startswith(f"{block.name}.{name}.") for parameter in block.parameters
            ):
                experts.leave_out()
        return module


def build_skeleton(folder: Path, checkpoint: Checkpoint) -> Skeleton:
    """Build a model's modules from its config.json, without weights and without remote code.

    Raises CheckpointError for a config that makes no model, or one that cannot run, or that the checkpoint's headers
    contradict; UnsupportedModelError for a model that the streamed passes cannot run.
    """
    where = f"{folder}/config.json"
    with warnings_heard() as warnings:
        config = model_config(folder, checkpoint)
        try:
            skeleton = skeleton_of(config, lambda model: _while_loading(model, checkpoint))
        except UnsupportedModelError as error:
            raise unsupported(where, config.model_type, str(error)) from error
        except Exception as error:
            raise CheckpointError(f"{where}: makes no model ({one_line(error)})") from error
    pass_on(where, warnings)
    return skeleton


def skeleton_of(config: PretrainedConfig, stored: Stored) -> Skeleton:
    """The skeleton of a config, whose cache is switched off. Raises UnsupportedModelError, and whatever transformers
    raises for sizes that do not fit each other.
    """
    config.use_cache = False
    bare = bare_model(config)
    if (needed := sum(buffer.numel() * buffer.itemsize for buffer in bare.buffers())) > MAX_BUFFER_BYTES:
        raise UnsupportedModelError(f"its model has {needed} bytes of buffers")
    if name := shared_weight(bare):
        raise UnsupportedModelError(f"{name}: a block's weight has a second place in the model")
    model, experts = modules_of(config, stored)
    found = discover(model)
    path = f"{model.base_model_prefix}.{found.path}"
    modules = [*model.get_submodule(path).children()]
    blocks = tuple(_block(f"{path}.{i}", i, modules[i], one) for i, one in enumerate(found.blocks))
    channels, width = lay_out_channels(found.width, [one.beside for one in found.blocks])
    if width > found.width:
        blocks = tuple(replace(block, channels=part) for block, part in zip(blocks, channels, strict=True))
    tables = tuple(f"{model.base_model_prefix}.{name}" for name in found.tables)
    text = config.get_text_config()
    residual = RESIDUAL_STREAMS.get(text.model_type) if text is config else None  # what comes of pictures joins it
    batched = found.batched and not experts and text.model_type in TOGETHER
    fused = fused_tensors(experts)
    return Skeleton(model, residual, path, found.width, width, tables, batched, blocks, fused)


def modules_of(config: PretrainedConfig, stored: Stored) -> tuple[PreTrainedModel, dict[str, ExpertLayers]]:
    """The modules of a config as they are run here, parameters on the meta device, in evaluation mode; and those of
    them that hold experts, by their paths.
    """
    model = empty_model(config).eval()
    return model, replace_experts(model, stored(model))


def _while_loading(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """A checkpoint's tensors of experts by all that they may be called in the model."""
    renamed, prefix = name_while_loading(model), f"{model.base_model_prefix}."
    names = {renamed(name): tensor for name, tensor in checkpoint.tensors.items()}
    return {
        candidate: tensor
        for name, tensor in names.items()
        if EXPERTS in name.split(".")
        for candidate in (name, prefix + name, name.removeprefix(prefix))
    }


def _block(name: str, index: int, module: nn.Module, found: FoundBlock) -> Block:
    parameters = tuple(f"{name}.{parameter}" for parameter in module.state_dict(keep_vars=True))
    found_groups = found.groups + _groups_of_experts(module, found.experts)
    grouped = {layer for group in found_groups for layer in group}
    groups = tuple(
        LayerGroup(tuple(_view(name, layer, module.get_submodule(layer)) for layer in layers))
        for layers in found_groups
    )
    dense = {**found.dense, **_other_matrices(module, grouped | found.dense.keys(), found.experts is not None)}
    ungrouped = {f"{name}.{layer}": reason for layer, reason in dense.items()}
    experts = None if found.experts is None else f"{name}.{found.experts}"
    return Block(index, name, parameters, groups, ungrouped, found.returns, experts)


def _groups_of_experts(block: nn.Module, path: str | None) -> tuple[tuple[str, ...], ...]:
    """The input groups of every expert of a block, by names inside the block; none where it has no such module."""
    if path is None:
        return ()
    experts = block.get_submodule(path)
    assert isinstance(experts, ExpertLayers)
    each = (experts.layer_names(number) for number in range(experts.count))
    return tuple(tuple(f"{path}.{name}" for name in names) for sides in each for names in sides)


def _other_matrices(module: nn.Module, linears: set[str], routed: bool) -> dict[str, str]:
    """Matrices of a block that are no linear layers' weights, by their layers' or their own names, with the reason."""
    others = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        layer = name.removesuffix(".weight")
        if tensor.ndim > 1 and layer not in linears:
            kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
            others[layer] = ROUTES if routed and is_router(layer) else f"{kind} is no linear layer"
    return others


def _view(block: str, layer: str, module: nn.Module) -> WeightView:
    name, shape = f"{block}.{layer}", linear_shape(module)
    assert shape is not None
    return WeightView(name, f"{name}.weight", shape, transposed=isinstance(module, Conv1D))
