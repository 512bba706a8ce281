"""config.json that makes no model, or not the model of the weights."""

import functools
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from attacks.catalogue import Catalogue, config_with

CATALOGUE = Catalogue()

SIZES = {
    "llama": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ),
    "opt": ("ffn_dim", "word_embed_proj_dim", "num_hidden_layers", "hidden_size"),
}
NO_SIZES: tuple[Any, ...] = (0, -1, 10**12, 10**400, True, "64", 64.0, [64], {"of": 64})
for base, names in SIZES.items():
    for name in names:
        for value in NO_SIZES:
            shown = f"10^{len(str(value)) - 1}" if isinstance(value, int) and value > 10**9 else repr(value)
            CATALOGUE.put(
                f"{base}: {name} is {shown}", base, "plan", 3, f"config.json: {name} is ", config_with(**{name: value}),
                "a size that is none",
            )  # fmt: skip

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "more blocks than tensors": ({"num_hidden_layers": 999}, "are too few"),
    "two thousand blocks": ({"num_hidden_layers": 2000}, "are too few"),
    "a block more": ({"num_hidden_layers": 4}, "tensors are missing, first model.layers.3."),
    "a block less": ({"num_hidden_layers": 2}, "is of a block beyond the 2 of config.json"),
    "heads that do not divide": ({"num_attention_heads": 6, "head_dim": None}, "is not a multiple of"),
    "heads that do not divide, a head size given": (
        {"num_attention_heads": 6, "num_key_value_heads": 6},
        "config.json",
    ),
    "more KV heads than heads": ({"num_key_value_heads": 8}, "is not a multiple of num_key_value_heads 8"),
    "KV heads that do not divide": ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
    "other KV heads": ({"num_key_value_heads": 4}, "has shape"),
    "another hidden size": ({"hidden_size": 128}, "config.json makes it"),
    "another intermediate size": ({"intermediate_size": 128}, "config.json makes it"),
    "another vocabulary": ({"vocab_size": 100}, "config.json makes it"),
    "a hidden size beyond every tensor": ({"hidden_size": 4096}, "hidden_size is 4096, beyond the largest dimension"),
    "a vocabulary beyond every tensor": ({"vocab_size": 10**8}, "vocab_size is 100000000, beyond"),
    "a head size beyond every tensor": ({"head_dim": 10**9}, "head_dim is 1000000000, beyond"),
    "another head size": ({"head_dim": 32}, "config.json makes it"),
    "no hidden size": ({"hidden_size": None}, "config.json"),
    "no heads": ({"num_attention_heads": None, "head_dim": None}, "config.json"),
    "no blocks": ({"num_hidden_layers": None}, "tensors are missing"),
    "no model type": ({"model_type": None}, "has no model_type"),
    "a model type of a number": ({"model_type": 7}, "has no model_type"),
    "a model type of a list": ({"model_type": ["llama"]}, "has no model_type"),
    "an unknown model type": ({"model_type": "mamba9"}, "'mamba9' is not supported: this transformers has no"),
    "a model type of a path": ({"model_type": "../llama"}, "is not supported: this transformers has no"),
    "a model type of control characters": ({"model_type": "\x1b[2J\n"}, "is not supported: this transformers has no"),
    "a model that is no causal LM": ({"model_type": "bert"}, "'bert' is not supported: it is made for masked"),
    "a mixture of experts": ({"model_type": "mixtral"}, "8 experts, and the checkpoint has"),
    "an encoder and a decoder": ({"model_type": "bart"}, "'bart' is not supported: it is made for masked"),
    "a model with a picture tower": ({"model_type": "gemma3"}, "tensors are missing"),
    "many experts": (
        {"model_type": "mixtral", "num_local_experts": 10**9},
        "num_local_experts is 1000000000, beyond",
    ),
    "buffers beyond memory": (
        {"model_type": "gptj", "max_position_embeddings": 1 << 24, "rotary_dim": 16},
        "bytes of buffers",
    ),
    "another architecture's name": ({"model_type": "opt"}, "tensors are missing"),
    "code of its own": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
        "names Python code of its own (auto_map), which is never run",
    ),
    "code of another repository": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "someone/model--code.Config"}},
        "names Python code of its own (auto_map), which is never run",
    ),
    "an activation that is none": ({"hidden_act": "none such"}, "makes no model"),
    "an activation of a number": ({"hidden_act": 5}, "makes no model"),
    "biases that the weights lack": ({"attention_bias": "yes"}, "makes no model"),
    "no biases, which the weights have": ({"attention_bias": 3}, "makes no model"),
    "a tie flag of text": ({"tie_word_embeddings": "yes"}, "makes no model"),
    "an untied head that is not there": ({"tie_word_embeddings": False}, "1 tensors are missing, first lm_head.weight"),
    "an epsilon of text": ({"rms_norm_eps": "small"}, "makes no model"),
    "an epsilon below zero": ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, no positive finite number"),
    "an epsilon of NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    "infinity in a list": ({"limits": [0.0, [float("inf")]]}, "limits[1][0] is inf"),
    "a rotary base of zero": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
    "a rotary base of text": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "config.json"),
    "a rotary base of NaN": ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
    "rotary parameters of text": ({"rope_parameters": "default"}, "makes no model"),
    "rotary parameters of a list": ({"rope_parameters": [1]}, "makes no model"),
    "a rotary type that is none": (
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 1e4}},
        "makes no model",
    ),
    "a linear scaling without factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json"),
    "a scaling of zero": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        "factor is 0, no positive",
    ),
    "a scaling of text": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}},
        "config.json",
    ),
    "a yarn scaling with nothing": ({"rope_parameters": {"rope_type": "yarn"}}, "config.json"),
    "a llama3 scaling with nothing": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "config.json"),
    "rotary frequencies without end": ({"partial_rotary_factor": 1e9}, "partial_rotary_factor is 1000000000.0"),
    "rotary frequencies without end, inside": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
        "partial_rotary_factor is 1000000000.0",
    ),
    "blocks of different shapes": ({"per_layer_config": [{"hidden_size": 1}]}, "per_layer_config gives blocks"),
    "positions beyond 2^31": ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648"),
    "a quantisation that is none": (
        {"quantization_config": {"quant_method": "none such", "bits": "x"}},
        "quantization_config is 'none such': the source is quantised",
    ),
    "a quantisation of text": ({"quantization_config": "x"}, "quantization_config is 'x': the source is quantised"),
    "a quantisation of nothing": ({"quantization_config": {}}, "quantization_config is {}: the source is quantised"),
    "a method's name": ({"validate": 1}, "validate is not a setting but a name of transformers' own"),
    "names of methods": ({"to_dict": "x", "get_text_config": 5, "from_dict": 1}, "from_dict is not a setting"),
    "a name of every class": ({"__class__": "int"}, "__class__ is not a setting"),
    "names of other fields": ({"attribute_map": {"hidden_size": "num_labels"}}, "attribute_map is not a setting"),
    "another configuration file": (
        {"configuration_files": ["config.json", "config.1.0.0.json"]},
        "configuration_files has transformers read 'config.1.0.0.json' instead",
    ),
    "configuration files of numbers": ({"configuration_files": [1, 2]}, "configuration_files cannot be read"),
    "weights of another name": ({"transformers_weights": "/etc/passwd"}, "transformers_weights names other files"),
    "an initialiser of text": ({"initializer_range": "x"}, "makes no model"),
    "padding outside the vocabulary": ({"pad_token_id": 10**6}, "makes no model"),
    "padding of text": ({"pad_token_id": "x"}, "makes no model"),
    "its own generation of text": ({"max_length": "x", "temperature": "y", "hidden_act": "z"}, "makes no model"),
}
for fault, (changes, message) in WRONG.items():
    CATALOGUE.put(f"config: {fault}", "llama", "plan", 3, message, config_with(**changes), "a field or two")

HARMLESS: dict[str, dict[str, Any]] = {
    "ten billion labels": {"num_labels": 10**10},
    "private fields": {
        "_attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "x",
        "_name_or_path": 3,
    },
    "outputs as tuples": {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    "a dtype that is none": {"dtype": "float0", "torch_dtype": 7},
    "labels that are none": {"id2label": {"x": 1}, "label2id": [1], "problem_type": 5},
    "architectures that are none": {"architectures": [1, "../x"], "transformers_version": 9},
    "other configuration files": {"configuration_files": ["config.9.0.0.json", "/etc/passwd"]},
}
for fault, changes in HARMLESS.items():
    make = config_with(**changes)
    CATALOGUE.put(f"config: {fault}", "llama", "evaluate", 0, "", make, "fields that concern no causal LM's forward")


@CATALOGUE.entry("llama", "plan", 3, "has no config.json")
def no_config(case: Path) -> None:
    """Weights alone."""
    (case / "model" / "config.json").unlink()


def other_head(case: Path, shape: tuple[int, ...]) -> None:
    path = case / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": torch.ones(shape, dtype=torch.bfloat16)}, path)


for command in ("compress", "evaluate"):
    CATALOGUE.put(
        "a tied head of other values", "llama", command, 3, "lm_head.weight differs from model.embed_tokens.weight",
        functools.partial(other_head, shape=(tiny.VOCABULARY, 64)), "transformers would not tie it",
    )  # fmt: skip
CATALOGUE.put(
    "a tied head of another shape", "llama", "plan", 3, "has shape [128, 32]",
    functools.partial(other_head, shape=(tiny.VOCABULARY, 32)), "and neither is the other's",
)  # fmt: skip
