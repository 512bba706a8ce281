"""config.json, read and held against the checkpoint's headers before anything is built by it.

What a config says decides how many modules are built and how large their buffers are, so no number is taken from it
that no tensor bears out. Fields are transformers' own; what a field may be beyond that is checked by its config class.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamprune.checkpoint.packed import QUANT_METHOD
from streamprune.checkpoint.reader import Checkpoint
from streamprune.checkpoint.safetensors_header import QUANTISED
from streamprune.checkpoint.untrusted import read_json
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.library import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    config_fields,
    get_configuration_file,
    goes_on_with_text,
    special_floats,
    without_special_floats,
)

logger = logging.getLogger("streamprune")

MAX_BLOCKS = 1000  # the deepest models have fewer than 200
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
DIMENSIONS = ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "head_dim", "word_embed_proj_dim")
LENGTHS = ("max_position_embeddings", "sliding_window")  # that need not be a tensor's
TAKEN, EXPERTS = "num_experts_per_tok", ("num_experts", "num_local_experts", "n_routed_experts")
# In names of other numbers beyond tensors.
NO_DIMENSIONS = ("position", "window", "seq", "length", "token_id", "token_index", "chunk", "multiple")
MAX_LENGTH = 1 << 24  # of a sequence; some forwards make tensors of the longest
POSITIVE = ("rms_norm_eps", "rope_theta", "factor")
LIMITS = "time_step_limit"  # of a range that may be open
SHARES = ("partial_rotary_factor",)  # more than 1 would make rotary frequencies of any number
# Fields that do not reach the logits of a causal LM: labels of other tasks, what else a forward returns, the dtype of
# loading, how attention is computed, how devices share the work, notes. Some are dangerous to build (ten billion
# labels). tests/model/test_model_configuration.py sets them to other values and compares the logits with transformers'.
NOT_OF_THE_FORWARD = frozenset(
    {
        *("id2label", "label2id", "num_labels", "problem_type", "architectures", "auto_map", "model_type"),
        *(
            "output_attentions",
            "output_router_logits",
            "output_hidden_states",
            "tie_last_hidden_states",
            "return_dict",
            "use_return_dict",
        ),
        *("dtype", "torch_dtype", "transformers_version", "name_or_path", "_name_or_path", "_commit_hash"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "_auto_class"),
        *("ignore_keys_at_rope_validation", "keys_to_ignore_at_inference"),
        *("quantization_config", "configuration_files"),  # looked at by _other_model
    }
)
NAMES = frozenset({"model_type"})  # that choose the classes of a config inside a config
OLD_SPELLINGS = frozenset({"rope_scaling"})  # properties of the class that published configs set
SHAPED = ("gemma4_text",)  # whose own config class says blocks' different shapes in per_layer_config
# Beside these fields and tensors from_pretrained would take something else too.
OTHER_PARTS = {
    "compression_config": f"says that {QUANTISED}",
    "fusion_config": "has modules fused, which is not supported; remove the entry and merge nothing",
    "per_layer_config": "gives blocks different shapes, which is not supported",
    "transformers_weights": "names other files of weights; remove the entry, or rename those files",
}


def model_config(folder: Path, checkpoint: Checkpoint) -> PretrainedConfig:
    """A model's config object.

    Raises CheckpointError for a config.json that is malformed, that the checkpoint's headers contradict, or of which
    transformers would make another model than of these fields and tensors; UnsupportedModelError for a model that is
    no causal language model of transformers. No code of the checkpoint's own is run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
    values = special_floats(read_json(path))
    config_class = config_class_of(path, values)
    _check(path, values, checkpoint, config_class)
    if values.get("auto_map"):
        logger.warning("%s: names Python code of its own (auto_map); it is not run, transformers' own is", path)
    for name, inner in _inside(values, config_class).items():
        _check(path, inner, checkpoint, _class_inside(config_class, name, inner), f"{name}: ")
    config = config_of(path, values)
    blocks = config.get_text_config().num_hidden_layers
    if blocks > min(MAX_BLOCKS, len(checkpoint.tensors)):  # some classes count a list of kinds
        raise CheckpointError(f"{path}: makes {blocks} blocks, too many for {len(checkpoint.tensors)} tensors")
    return config


def _class_inside(config_class: type[PretrainedConfig], name: str, inner: Mapping[str, Any]) -> type[PretrainedConfig]:
    """The class of a config inside a config: one of its own, or the one that its model_type says."""
    own, kind = config_class.sub_configs[name], inner.get("model_type")
    if isinstance(own, type) and issubclass(own, PretrainedConfig):
        return own
    return CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else PretrainedConfig


def _check(
    path: Path, values: Mapping[str, Any], checkpoint: Checkpoint, config_class: type[PretrainedConfig], part: str = ""
) -> None:
    """Raise CheckpointError for what a config, or a `part` of it, cannot be, or cannot be of these weights."""
    if fault := next(_other_model(path.parent, {**values, **dict.fromkeys(_own_parts(values))}), None):
        raise CheckpointError(f"{path}: {part}{fault}")
    if fault := next(_faults(values, checkpoint, config_class), None):
        raise CheckpointError(f"{path}: {part}{fault}; give a config.json that belongs to the weights")


def _inside(values: Mapping[str, Any], config_class: type[PretrainedConfig]) -> dict[str, dict[str, Any]]:
    """The configs inside a config, of the parts of a model that holds a language model among them."""
    return {name: values[name] for name in config_class.sub_configs if isinstance(values.get(name), dict)}


def config_of(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of a config.json of a known model_type, as far as it reaches the forward.

    Raises CheckpointError where that is nothing, and for a field with the name of something else of the class and
    another value: it would change what the class does.
    """
    config_class, values = CONFIG_MAPPING[model_type_in(values)], special_floats(values)
    _check_names(path, values, config_class)
    inside = _inside(values, config_class)
    parts = {name: {k: v for k, v in part.items() if k in NAMES or k not in _unused(part)}
             for name, part in inside.items()}  # fmt: skip
    try:
        config = config_class.from_dict({k: v for k, v in {**values, **parts}.items() if k not in _unused(values)})
    except Exception as error:  # transformers raises many kinds for a bad config
        raise CheckpointError(f"{path}: makes no model ({one_line(error)})") from error
    for name, part in inside.items():
        _check_names(path, part, type(getattr(config, name)))
    return config


def _unused(values: Mapping[str, Any]) -> set[str]:
    """Names of entries that transformers need not be given."""
    return {*NOT_OF_THE_FORWARD, *(name for name in OTHER_PARTS if values.get(name) is None)}


def _check_names(path: Path, values: Mapping[str, Any], config_class: type[PretrainedConfig]) -> None:
    known = config_fields(config_class) | _unused(values) | OLD_SPELLINGS
    for name in sorted(values.keys() - known - _own_parts(values)):
        if hasattr(config_class, name) and getattr(config_class, name) != values[name]:
            raise CheckpointError(f"{path}: {name} is not a setting but a name of transformers' own; remove it")


def _own_parts(values: Mapping[str, Any]) -> set[str]:
    """Of OTHER_PARTS those that a config class makes itself."""
    return {"per_layer_config"} if values.get("model_type") in SHAPED else set()


def forward_settings(config: PretrainedConfig) -> dict[str, Any]:
    """All of a config that reaches the forward, as plain data for JSON: two equal ones make the same model."""
    return _of_forward(without_special_floats(config.to_dict()))


def _of_forward(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that reach the forward, those of configs inside the config too."""
    unimportant = NOT_OF_THE_FORWARD - NAMES | {"use_cache"}  # the skeleton switches it off
    important = {name: value for name, value in settings.items() if name not in unimportant}
    return {name: _of_forward(value) if isinstance(value, dict) else value for name, value in important.items()}


def model_type_in(values: Mapping[str, Any]) -> Any:
    """The model_type by which AutoConfig chooses a class: one of a mistral that lists its blocks' types is another."""
    name = values.get("model_type")
    return "ministral" if name == "mistral" and "layer_types" in values else name


def one_line(error: BaseException) -> str:
    """An error of another library's, shortened to a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # which says the key alone
        text = f"there is no {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."


def config_class_of(path: Path, values: Mapping[str, Any]) -> type[PretrainedConfig]:
    """The class of a config.json. Raises UnsupportedModelError for what is no causal LM of transformers that can go
    through, by its model_type.
    """
    name = model_type_in(values)
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has no model_type; give the folder of a transformers checkpoint")
    if reason := next(_unsupported(name, values), None):
        code = "; it names Python code of its own (auto_map), which is never run" if values.get("auto_map") else ""
        raise unsupported(path, name, f"{reason}{code}")
    return CONFIG_MAPPING[name]


def unsupported(path: object, model_type: str, reason: str) -> UnsupportedModelError:
    """What is said of a model that cannot go through, by its name."""
    return UnsupportedModelError(f"{path}: model type {model_type[:80]!r} is not supported: {reason}")


def _unsupported(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Why a model_type cannot go through; the first is enough."""
    if name not in CONFIG_MAPPING or not goes_on_with_text(CONFIG_MAPPING[name]):
        yield "this transformers has no causal language model of that name"
        return
    config_class = CONFIG_MAPPING[name]
    if config_class in MODEL_FOR_MASKED_LM_MAPPING or getattr(config_class, "is_encoder_decoder", False):
        yield "it is made for masked or translated text, not for going on with one"


def _other_model(folder: Path, values: Mapping[str, Any]) -> Iterator[str]:
    """Why from_pretrained would make another model of this folder than its config.json and its weights say."""
    quantised = values.get("quantization_config")
    if quantised is not None and not (isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD):
        method = quantised.get("quant_method", quantised) if isinstance(quantised, dict) else quantised
        yield f"quantization_config is {method!r:.40}: {QUANTISED}"
    for name, reason in OTHER_PARTS.items():
        if values.get(name) is not None:
            yield f"{name} {reason}"
    if (folder / "adapter_config.json").exists():
        yield "an adapter lies beside it (adapter_config.json); merge it into the weights first"
    if (others := values.get("configuration_files")) is not None:
        try:
            chosen = get_configuration_file(others)
        except Exception as error:  # of versions that are none
            yield f"configuration_files cannot be read ({one_line(error)}); remove the entry"
        else:
            if chosen != "config.json":
                yield f"configuration_files has transformers read {chosen!r:.80} instead; put that in this one's place"


def _faults(values: Mapping[str, Any], checkpoint: Checkpoint, config_class: type[PretrainedConfig]) -> Iterator[str]:
    """What in a config cannot be, or cannot be of these weights; the first is enough."""
    spelled = {name: config_class.attribute_map.get(name, name) for name in (*COUNTS, *DIMENSIONS, *LENGTHS)}
    given = {name: values[own] for name, own in spelled.items() if values.get(own) is not None}
    given.update({name: values[name] for name in spelled if values.get(name) is not None})  # which has the last word
    shown = {name: name if values.get(name) is not None else spelled[name] for name in given}
    for name, value in given.items():
        if type(value) is not int or not 0 < value < 2**31:
            yield f"{shown[name]} is {value!r:.40}, no whole number from 1 to 2^31"
    yield from _number_faults(values)
    tensors = checkpoint.tensors
    if (blocks := given.get("num_hidden_layers", 0)) > min(MAX_BLOCKS, len(tensors)):
        yield f"{shown['num_hidden_layers']} is {blocks}, for which the checkpoint's {len(tensors)} tensors are too few"
    largest = max((length for source in tensors.values() for length in source.shape), default=0)
    for name in (*DIMENSIONS, *COUNTS[1:]):
        if (value := given.get(name, 0)) > largest:
            yield f"{shown[name]} is {value}, beyond the largest dimension of any tensor, {largest}"
    sizes = config_fields(config_class) - NOT_OF_THE_FORWARD
    for name in sorted(name for name in sizes if type(values.get(name)) is int):
        if values[name] > largest and not any(part in name for part in NO_DIMENSIONS):
            yield f"{name} is {values[name]}, beyond the largest dimension of any tensor, {largest}"
        elif values[name] > MAX_LENGTH:
            yield f"{name} is {values[name]}, beyond all sequences"
    yield from _routing_faults(values, config_class)
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    if heads and hidden and hidden % heads and not values.get("head_dim"):
        yield f"{shown['hidden_size']} {hidden} is not a multiple of {shown['num_attention_heads']} {heads}"
    kv_heads = given.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield f"{shown['num_attention_heads']} {heads} is not a multiple of {shown['num_key_value_heads']} {kv_heads}"


def _routing_faults(values: Mapping[str, Any], config_class: type[PretrainedConfig]) -> Iterator[str]:
    """Of how many experts there are and how many of them a token takes, by the class where the config does not say."""
    fields = config_fields(config_class)
    given = {name: values.get(name, getattr(config_class, name, None)) for name in (TAKEN, *EXPERTS) if name in fields}
    taken = given.pop(TAKEN, None)
    for experts in given.values():
        if type(experts) is int and experts > 1 and type(taken) is int and not 1 <= taken <= experts:
            yield f"{TAKEN} is {taken}, and there are {experts} experts"


def _number_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Of numbers that are no sizes, in the config and in the entries inside it."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from _number_faults({f"{name}[{place}]": item for place, item in enumerate(value)})
        elif isinstance(value, dict):
            yield from _number_faults(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            open_range = value == math.inf and name.startswith(LIMITS)
            if not (math.isfinite(value) or open_range) or (name in POSITIVE and value <= 0):
                yield f"{name} is {value!r:.40}, no {'positive ' if name in POSITIVE else ''}finite number"
            if name in SHARES and not 0 < value <= 1:
                yield f"{name} is {value!r:.40}, no share from 0 to 1"
