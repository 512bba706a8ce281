"""What streamprune needs of transformers, torch and accelerate beyond their documented interfaces, all in one place.

tests/model/test_model_library.py names each of it and says what is relied on: where a new release of theirs breaks
something, it is found there first, and mended here.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import get_configuration_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import warning_once

__all__ = [
    "CONFIG_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "Conv1D",
    "Memory",
    "PretrainedConfig",
    "auto_class",
    "bare_model",
    "config_fields",
    "empty_model",
    "expert_parts",
    "experts_without_router",
    "get_configuration_file",
    "goes_on_with_text",
    "is_experts",
    "layer_configs",
    "linear_shape",
    "memory_of",
    "merged_while_loading",
    "modules_uninitialised",
    "name_when_saved",
    "name_while_loading",
    "pass_on",
    "read_for_all_layers",
    "special_floats",
    "tensors_without_numbers",
    "tied_parameters",
    "tree_flatten",
    "tree_map",
    "warnings_heard",
    "without_special_floats",
    "wraps_text",
]
logger = logging.getLogger("streamprune")
LARGE = 1 << 28  # numbers of a tensor; buffers hold fewer
Memory = tuple[int, int, tuple[int, ...], tuple[int, ...], int]


def config_fields(config_class: type) -> set[str]:
    """Names of the settings of a config class, its bases' among them; transformers' own are dataclasses."""
    return {field.name for field in dataclasses.fields(config_class)}


def special_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config.json with the numbers that JSON lacks: transformers writes {"__float__": "Infinity"}."""
    decoded: dict[str, Any] = PretrainedConfig._decode_special_floats(dict(values))
    return decoded


def without_special_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse: entries that JSON has room for."""
    encoded: dict[str, Any] = PretrainedConfig._encode_special_floats(dict(values))
    return encoded


def wraps_text(config_class: type[PretrainedConfig]) -> bool:
    """Whether its models hold a language model among other parts, which a config inside the config describes."""
    return "text_config" in config_class.sub_configs


def auto_class(config_class: type[PretrainedConfig]) -> Any:
    """What makes a model that goes on with text, and loads it: with its other parts where it has any."""
    wrapped = wraps_text(config_class) and config_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if wrapped else AutoModelForCausalLM


def goes_on_with_text(config_class: type[PretrainedConfig]) -> bool:
    """Whether transformers has a model of this config that is made for it."""
    return config_class in auto_class(config_class)._model_mapping


def layer_configs(config: Any) -> list[Any]:
    """A config for each block where they differ in shape, else the config itself."""
    return [*config.per_layer_config] if getattr(config, "is_heterogeneous", False) else [config]


def read_for_all_layers(config: Any) -> None:
    """Let a config whose blocks differ say what it says of those that are not named apart, where it would refuse."""
    config.allow_global_per_layer_attribute_access = True


def bare_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM of which nothing takes memory, buffers neither: to see what it would take."""
    with torch.device("meta"), no_init_weights():
        return _with_base_named(auto_class(type(config)).from_config(config, dtype=torch.float32))


class _LargeOnMeta(TorchFunctionMode):
    """While open, tensors beyond any buffer's size are made without memory: a system may refuse that of all experts of
    a block, which accelerate would let go of a moment later.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones):
            shape = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(length, int) for length in shape) and math.prod(shape) > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM with parameters on the meta device and buffers as they are computed. What shared a parameter may not.

    While it is made, modules that other threads make are not initialised either: both libraries switch that for the
    whole process.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), no_init_weights(), _LargeOnMeta():
        model: PreTrainedModel = auto_class(type(config)).from_config(config, dtype=torch.float32)
    model.tie_weights()
    return _with_base_named(model)


def _with_base_named(model: PreTrainedModel) -> PreTrainedModel:
    """A causal LM that finds its base model: Llama 4's class has it under another name than it says."""
    inner = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if not hasattr(model, model.base_model_prefix) and len(inner) == 1:
        model.base_model_prefix = inner[0]
    return model


def name_while_loading(model: Any) -> Callable[[str], str]:
    """What from_pretrained makes of a checkpoint's name of a tensor: old ones are new ones."""
    renamings, _ = _transforms(model)
    return lambda name: str(rename_source_key(name, renamings, [])[0])


def name_when_saved(model: Any) -> Callable[[str], str]:
    """What save_pretrained calls the tensor of a parameter, where from_pretrained makes that parameter of it again."""
    transforms = reversed(get_model_conversion_mapping(model, add_legacy=False))
    renamings: list[Any] = [
        transform.reverse_transform()
        for transform in transforms
        if isinstance(transform, WeightRenaming) and not isinstance(transform, PrefixChange)
    ]
    loaded = name_while_loading(model)

    def saved(name: str) -> str:
        renamed = str(rename_source_key(name, renamings, [])[0])
        return renamed if loaded(renamed) == name else name

    return saved


def merged_while_loading(model: Any) -> Callable[[str], bool]:
    """Whether from_pretrained makes the tensor of such a name in a checkpoint into another tensor."""
    renamings, converters = _transforms(model)
    return lambda name: rename_source_key(name, renamings, converters)[1] is not None


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """What from_pretrained does with a checkpoint's names and tensors: renamings, and what makes tensors of others."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def expert_parts(model: Any, parameter: str) -> tuple[str, ...]:
    """Layers of one expert, by their names in a checkpoint, of whose weights from_pretrained makes a 3-D parameter of
    all experts: stacked, and one after the other along the outputs. None where it does not know of any.
    """
    renamings, converters = _transforms(model)
    path = parameter.rpartition(".")[0]
    for converter in converters:
        patterns = [pattern.replace("\\", "") for pattern in converter._original_source_patterns]
        parts = tuple(pattern.rpartition("*.")[2].removesuffix(".weight") for pattern in patterns)
        made = {rename_source_key(f"{path}.0.{part}.weight", renamings, converters)[0] for part in parts}
        kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
        stacked = kinds == [(MergeModulelist, 0), (Concatenate, 1)][: 2 if len(parts) > 1 else 1]
        if made == {parameter} and stacked and len(kinds) == len(converter.operations):
            return parts
    return ()


def is_experts(module: object) -> bool:
    """Whether a module holds all experts of a block in 3-D parameters, as transformers' own do."""
    return isinstance(module, nn.Module) and (hasattr(module, "has_gate") or experts_without_router(module))


def experts_without_router(module: object) -> bool:
    """Llama 4's, which are given the rows of each expert one after the other, and whose weights are [in, out]."""
    return type(module).__name__ == "Llama4TextExperts"


def modules_uninitialised() -> AbstractContextManager[Any]:
    """While open, modules that are made do not draw numbers for their weights."""
    context: AbstractContextManager[Any] = no_init_weights()
    return context


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share another's tensor: name to the name that is stored."""
    tied: dict[str, Any] = model.all_tied_weights_keys
    return dict(tied)


def linear_shape(module: object) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, GPT-2's Conv1D among them; None: it is none."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


@contextmanager
def tensors_without_numbers() -> Iterator[None]:
    """While open, tensors that are made have a shape, a dtype and a device, but no numbers and no memory."""
    log = logging.getLogger(FakeTensorMode.__module__)
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints where shapes do not fit; the exception says so too
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.setLevel(level)


def memory_of(tensor: torch.Tensor) -> Memory:
    """What two tensors that are alive have in common where they hold the same numbers at the same place, now."""
    storage = tensor.untyped_storage()._cdata
    version = 0 if tensor.is_inference() else tensor._version
    return storage, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), version


# What transformers warns of is heard whatever its verbosity is, and passed on through our own logger, in one line each.
# The command line sets it to errors alone, since most of its warnings concern other uses than ours. What it warns of
# while it builds something for us may be about our results.


class _Kept(logging.Handler):
    """Keeps each message once, as one line that a terminal may print."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        self.messages["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)] = None


@contextmanager
def warnings_heard() -> Iterator[Iterable[str]]:
    """What transformers warns of inside, in place of printing it; to be read afterwards."""
    library, kept = logging.getLogger("transformers"), _Kept()
    level, handlers, propagate = library.level, library.handlers, library.propagate
    warning_once.cache_clear()  # or what was said of another model would not be said of this one
    library.handlers, library.propagate = [kept], False
    library.setLevel(logging.WARNING)
    try:
        yield kept.messages
    finally:
        library.handlers, library.propagate = handlers, propagate
        library.setLevel(level)


def pass_on(where: object, messages: Iterable[str]) -> None:
    """Warn of each in one line that says of what it was said."""
    for message in messages:
        logger.warning("%s: transformers warns: %s", where, message)
