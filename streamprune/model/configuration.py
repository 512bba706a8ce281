"""config.json, read and held against the checkpoint's headers before anything is built by it.

What a config says decides how many modules are built and how large their buffers are, so no number is taken from it
that no tensor bears out. Fields are transformers' own; what a field may be beyond that is checked by its config class.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from streamprune.checkpoint.reader import Checkpoint
from streamprune.checkpoint.untrusted import read_json
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import Architecture, architecture_of

logger = logging.getLogger("streamprune")

MOST_BLOCKS = 1000  # the deepest models have fewer than 200
COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
DIMENSIONS = ("vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "head_dim", "word_embed_proj_dim")
LENGTHS = ("max_position_embeddings", "sliding_window")  # that need not be a tensor's
POSITIVE = ("rms_norm_eps", "rope_theta", "factor")
SHARES = ("partial_rotary_factor",)  # more than 1 would make rotary frequencies of any number
FOREIGN = ("auto_map", "quantization_config")


def model_config(folder: Path, checkpoint: Checkpoint) -> tuple[PretrainedConfig, Architecture]:
    """A model's config object and its row of the table of architectures.

    Raises CheckpointError for a config.json that is malformed or that the checkpoint's headers contradict,
    UnsupportedModelError for a model that is not in the table. No code of the checkpoint's own is run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no config.json; give the folder of a transformers checkpoint")
    values = read_json(path)
    architecture = architecture_in(path, values)
    if fault := next(_faults(values, checkpoint, architecture), None):
        raise CheckpointError(f"{path}: {fault}; give a config.json that belongs to the weights")
    return config_of(path, values), architecture


def config_of(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """What transformers makes of the fields of a config.json of a known model_type that concern its forward.

    Raises CheckpointError where that is nothing.
    """
    config_class = CONFIG_MAPPING[values["model_type"]]
    general = {field.name for field in dataclasses.fields(PretrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)} - general

    def wanted(name: str) -> bool:
        """Not what concerns other tasks than a causal LM's forward, nor a name of the class that is no field."""
        return name in own or not (name in general or name in FOREIGN or name[:1] == "_" or hasattr(config_class, name))

    try:
        return config_class.from_dict({name: value for name, value in values.items() if wanted(name)})
    except Exception as error:  # transformers raises many kinds for a bad config
        raise CheckpointError(f"{path}: makes no model ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """An error of another library's, shortened to a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # which says the key alone
        text = f"there is no {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."


def architecture_in(path: Path, values: Mapping[str, Any]) -> Architecture:
    """The row of the table for a config.json's model_type. Raises UnsupportedModelError where there is none."""
    name = values.get("model_type")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has no model_type; give the folder of a transformers checkpoint")
    try:
        architecture = architecture_of(name)
    except UnsupportedModelError as error:
        if "auto_map" not in values:
            raise UnsupportedModelError(f"{path}: {error}") from error
        raise UnsupportedModelError(
            f"{path}: {error}; it names Python code of its own (auto_map), which is never run"
        ) from error
    if "auto_map" in values:
        logger.warning("%s: names Python code of its own (auto_map); it is not run, transformers' own is", path)
    return architecture


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
        if blocks > MOST_BLOCKS or least > len(tensors):
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
    if "per_layer_config" in values:
        yield "per_layer_config gives blocks different shapes, which is not supported"


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
