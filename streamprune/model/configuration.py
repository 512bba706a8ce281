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
from streamprune.model.architectures import Architecture, architecture_of
from streamprune.model.library import CONFIG_MAPPING, PretrainedConfig, config_fields, get_configuration_file

logger = logging.getLogger("streamprune")

MAX_BLOCKS = 1000  # the deepest models have fewer than 200
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
DIMENSIONS = ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "head_dim", "word_embed_proj_dim")
LENGTHS = ("max_position_embeddings", "sliding_window")  # that need not be a tensor's
POSITIVE = ("rms_norm_eps", "rope_theta", "factor")
SHARES = ("partial_rotary_factor",)  # more than 1 would make rotary frequencies of any number
# Fields that do not reach the logits of a causal LM: labels of other tasks, what else a forward returns, the dtype of
# loading, how attention is computed, how devices share the work, notes. Some are dangerous to build (ten billion
# labels). tests/model/test_model_configuration.py sets them to other values and compares the logits with transformers'.
NOT_OF_THE_FORWARD = frozenset(
    {
        *("id2label", "label2id", "num_labels", "problem_type", "architectures", "auto_map", "model_type"),
        *("output_attentions", "output_hidden_states", "tie_last_hidden_states", "return_dict", "use_return_dict"),
        *("dtype", "torch_dtype", "transformers_version", "name_or_path", "_name_or_path", "_commit_hash"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "_auto_class"),
        *("ignore_keys_at_rope_validation", "keys_to_ignore_at_inference"),
        *("quantization_config", "configuration_files"),  # looked at by _other_model
    }
)
OLD_SPELLINGS = frozenset({"rope_scaling"})  # properties of the class that published configs set
# Beside these fields and tensors from_pretrained would take something else too.
OTHER_PARTS = {
    "compression_config": f"says that {QUANTISED}",
    "fusion_config": "has modules fused, which is not supported; remove the entry and merge nothing",
    "per_layer_config": "gives blocks different shapes, which is not supported",
    "transformers_weights": "names other files of weights; remove the entry, or rename those files",
}


def model_config(folder: Path, checkpoint: Checkpoint) -> tuple[PretrainedConfig, Architecture]:
    """A model's config object and its row of the table of architectures.

    Raises CheckpointError for a config.json that is malformed, that the checkpoint's headers contradict, or of which
    transformers would make another model than of these fields and tensors; UnsupportedModelError for a model that is
    not in the table. No code of the checkpoint's own is run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
    values = read_json(path)
    architecture = architecture_in(path, values)
    if fault := next(_other_model(folder, values), None):
        raise CheckpointError(f"{path}: {fault}")
    if fault := next(_faults(values, checkpoint, architecture), None):
        raise CheckpointError(f"{path}: {fault}; give a config.json that belongs to the weights")
    if values.get("auto_map"):
        logger.warning("%s: names Python code of its own (auto_map); it is not run, transformers' own is", path)
    return config_of(path, values), architecture


def config_of(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of a config.json of a known model_type, as far as it reaches the forward.

    Raises CheckpointError where that is nothing, and for a field with the name of something else of the class and
    another value: it would change what the class does.
    """
    config_class = CONFIG_MAPPING[model_type_in(values)]
    unused = {*NOT_OF_THE_FORWARD, *(name for name in OTHER_PARTS if values.get(name) is None)}
    for name in sorted(values.keys() - config_fields(config_class) - unused - OLD_SPELLINGS):
        if hasattr(config_class, name) and getattr(config_class, name) != values[name]:
            raise CheckpointError(f"{path}: {name} is not a setting but a name of transformers' own; remove it")
    try:
        return config_class.from_dict({k: v for k, v in values.items() if k not in unused})
    except Exception as error:  # transformers raises many kinds for a bad config
        raise CheckpointError(f"{path}: makes no model ({one_line(error)})") from error


def forward_settings(config: PretrainedConfig) -> dict[str, Any]:
    """All of a config that reaches the forward, as plain data for JSON: two equal ones make the same model."""
    unimportant = NOT_OF_THE_FORWARD | {"use_cache"}  # the skeleton switches it off
    settings = {name: value for name, value in config.to_dict().items() if name not in unimportant}
    return {"model_type": config.model_type, **settings}


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


def architecture_in(path: Path, values: Mapping[str, Any]) -> Architecture:
    """The row of the table for a config.json's model_type. Raises UnsupportedModelError where there is none."""
    name = model_type_in(values)
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has no model_type; give the folder of a transformers checkpoint")
    try:
        return architecture_of(name)
    except UnsupportedModelError as error:
        if not values.get("auto_map"):
            raise UnsupportedModelError(f"{path}: {error}") from error
        raise UnsupportedModelError(
            f"{path}: {error}; it names Python code of its own (auto_map), which is never run"
        ) from error


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


def _faults(values: Mapping[str, Any], checkpoint: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """What in a config cannot be, or cannot be of these weights; the first is enough."""
    for name in (*COUNTS, *DIMENSIONS, *LENGTHS):
        value = values.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            yield f"{name} is {value!r:.40}, no whole number from 1 to 2^31"
    yield from _number_faults(values)
    blocks = values.get("num_hidden_layers")
    tensors = checkpoint.tensors
    if blocks is not None:
        least = blocks * sum(len(group.layers) for group in architecture.groups)
        if blocks > MAX_BLOCKS or least > len(tensors):
            yield f"num_hidden_layers is {blocks}, for which the checkpoint's {len(tensors)} tensors are too few"
    largest = max((length for source in tensors.values() for length in source.shape), default=0)
    for name in (*DIMENSIONS, *COUNTS[1:]):
        if (value := values.get(name) or 0) > largest:
            yield f"{name} is {value}, beyond the largest dimension of any tensor, {largest}"
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and hidden and hidden % heads and not values.get("head_dim"):
        yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
    kv_heads = values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"


def _number_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Of numbers that are no sizes, in the config and in the entries inside it."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from _number_faults({f"{name}[{place}]": item for place, item in enumerate(value)})
        elif isinstance(value, dict):
            yield from _number_faults(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or (name in POSITIVE and value <= 0):
                yield f"{name} is {value!r:.40}, no {'positive ' if name in POSITIVE else ''}finite number"
            if name in SHARES and not 0 < value <= 1:
                yield f"{name} is {value!r:.40}, no share from 0 to 1"
