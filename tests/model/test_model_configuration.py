"""config.json: the model that is run is the one that from_pretrained makes, whatever field says what.

Every field of every config class is set to another valid value, and so is what published configs say in other ways;
logits must be transformers' own. Whether a field reaches the logits at all is part of the table, so that no row passes
because nothing came of it.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from pieces import TOKENS, logits_in_pieces
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from streamprune.checkpoint.reader import open_checkpoint
from streamprune.errors import CheckpointError
from streamprune.model.configuration import config_of, forward_settings
from streamprune.model.skeleton import build_skeleton
from streamprune.model.source import open_dense
from streamprune.text.tokenizers import load_tokenizer

SIZES: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
DECODER: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "num_hidden_layers": 2}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
BASES: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, **NO_TOKENS, "max_position_embeddings": 64},
    "ministral": {**DECODER, **NO_TOKENS, "max_position_embeddings": 64, "sliding_window": 8, "head_dim": 8},
    "mistral": {**DECODER, **NO_TOKENS, "max_position_embeddings": 64, "sliding_window": 8},
    "qwen2": {**DECODER, **NO_TOKENS, **WINDOW, "max_position_embeddings": 64},
    "qwen3": {**DECODER, **NO_TOKENS, **WINDOW, "max_position_embeddings": 64, "head_dim": 8},
    "opt": {
        **SIZES, **NO_TOKENS, "num_hidden_layers": 2, "ffn_dim": 48, "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
}  # fmt: skip

# Another valid value of each field: (value, does it reach the logits). None: it changes parameters' shapes or number.
COMMON: dict[str, tuple[Any, bool | None]] = {
    "architectures": (["Other"], False),
    "chunk_size_feed_forward": (4, False),
    "dtype": ("float16", False),
    "id2label": ({"0": "a", "1": "b", "2": "c"}, False),
    "is_encoder_decoder": (True, False),
    "label2id": ({"a": 0, "b": 1}, False),
    "output_hidden_states": (True, False),
    "problem_type": ("regression", False),
    "return_dict": (False, False),
    "transformers_version": ("4.31.0", False),
    "vocab_size": (96, None),
    "hidden_size": (64, None),
    "num_hidden_layers": (3, None),
    "num_attention_heads": (2, None),
    "max_position_embeddings": (48, False),
    "use_cache": (False, False),
    "pad_token_id": (3, False),
    "bos_token_id": (1, False),
    "eos_token_id": ([2, 3], False),
    "tie_word_embeddings": (True, None),
    "attention_dropout": (0.5, False),
}
WITH_ROTARY: dict[str, tuple[Any, bool | None]] = {
    **COMMON,
    "intermediate_size": (64, None),
    "num_key_value_heads": (4, None),
    "head_dim": (12, None),
    "hidden_act": ("gelu", True),
    "initializer_range": (0.5, False),
    "rms_norm_eps": (0.5, True),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 10.0}, True),
}
WITH_WINDOW: dict[str, tuple[Any, bool | None]] = {
    **WITH_ROTARY,
    "sliding_window": (4, True),
    "use_sliding_window": (False, True),
    "max_window_layers": (0, True),
    "layer_types": (["sliding_attention", "full_attention"], True),
}
FIELDS: dict[str, dict[str, tuple[Any, bool | None]]] = {
    "llama": {**WITH_ROTARY, "pretraining_tp": (2, False), "attention_bias": (True, None), "mlp_bias": (True, None)},
    "ministral": {**WITH_ROTARY, "sliding_window": (4, True), "layer_types": WITH_WINDOW["layer_types"]},
    "mistral": {**WITH_ROTARY, "sliding_window": (4, True)},
    "qwen2": WITH_WINDOW,
    "qwen3": {**WITH_WINDOW, "attention_bias": (True, None)},
    "opt": {
        **COMMON,
        "tie_word_embeddings": (False, None),
        "max_position_embeddings": (48, None),
        "_remove_final_layer_norm": (True, None),
        "activation_function": ("gelu", True),
        "do_layer_norm_before": (False, None),
        "dropout": (0.5, False),
        "enable_bias": (False, None),
        "ffn_dim": (64, None),
        "init_std": (0.5, False),
        "layer_norm_elementwise_affine": (False, None),
        "layerdrop": (0.5, False),
        "word_embed_proj_dim": (16, None),
    },
}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with all": {
        "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8, "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "longrope": {**LONG, "original_max_position_embeddings": 16},
    "llama3": LLAMA3,
}  # fmt: skip
# What configs say outside the fields of their classes, in old and new ways: (entries, do they reach the logits).
SPELLINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "rope_theta": ({"rope_theta": 10.0, "rope_parameters": None}, True),
    "no rope": ({"rope_parameters": None}, False),
    "rope_scaling of nothing": ({"rope_scaling": None}, False),
    "partial_rotary_factor": ({"partial_rotary_factor": 0.5}, False),
    "not causal": ({"is_causal": False}, True),
    "decoder": ({"is_decoder": True, "add_cross_attention": False, "use_bfloat16": True, "torchscript": True}, False),
    "generation": ({"temperature": 0.3, "num_beams": 4, "max_length": 7, "do_sample": True}, False),
    "old notes": ({"_name_or_path": "a/b", "torch_dtype": "float16", "_commit_hash": "0" * 40}, False),
    "plans": (
        {
            "base_model_tp_plan": {"layers.*.mlp.up_proj": "rowwise"},
            "base_model_pp_plan": {"norm": [[], []]},
            "keys_to_ignore_at_inference": ["logits"],
            "_auto_class": "AutoConfig",
        },
        False,
    ),
    "eager": ({"attn_implementation": "eager", "_attn_implementation": "eager"}, False),
    "attentions": ({"output_attentions": True}, False),
    "pruned": ({"pruned_heads": {}, "tie_encoder_decoder": False, "num_nextn_predict_layers": 1}, False),
}
for name, scaling in SCALINGS.items():
    kind = name.split()[0]
    new = {"rope_type": kind, "rope_theta": 100.0, **scaling}
    SPELLINGS[f"{name}, new"] = ({"rope_parameters": new}, True)
    for key in ("type", "rope_type"):
        old = {"rope_theta": 100.0, "rope_scaling": {key: kind, **scaling}, "rope_parameters": None}
        SPELLINGS[f"{name}, rope_scaling with {key}"] = (old, True)
SPELLINGS["original positions beside"] = (
    {"original_max_position_embeddings": 16, "rope_theta": 100.0, "rope_parameters": None,
     "rope_scaling": {"type": "longrope", **LONG}}, True,
)  # fmt: skip
ROTARY = [name for name in BASES if name != "opt"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def made(model_type: str) -> Path:
        path = folder / model_type
        if not path.exists():
            write(path, model_type, {})
            config = tiny.read_json(path / "config.json")
            if model_type.startswith("qwen"):  # published ones leave the blocks' types to other fields
                del config["layer_types"]
            tiny.write_json(path / "config.json", config)
        return path

    return made


def write(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**BASES[model_type], **changes})
    return tiny.write_model(folder, AutoModelForCausalLM.from_config(config), torch.float32)


def respell(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The same checkpoint with other entries in its config.json; None removes one."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = {**tiny.read_json(folder / "config.json"), **changes}
    kept = {name: value for name, value in config.items() if value is not None or name not in changes}
    tiny.write_json(folder / "config.json", kept)
    return folder


def transformers_logits(folder: Path) -> torch.Tensor:
    config = AutoConfig.from_pretrained(folder)
    config.return_dict = True  # False in a config.json breaks its own forward
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(TOKENS % 96, use_cache=False).logits[0]


def settings_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return forward_settings(config_of(path, tiny.read_json(path)))


def assert_same_model(folder: Path, reference: Path, reaches: bool | None) -> None:
    """`reaches`: whether the logits are others than the reference's, which has the same weights; None: it has not."""
    expected = transformers_logits(folder)
    torch.testing.assert_close(logits_in_pieces(folder, TOKENS % 96), expected, rtol=1e-5, atol=1e-5)
    if reaches is not None:
        difference = float((expected - transformers_logits(reference)).abs().max())
        assert (difference > 1e-3) == reaches, f"differs by {difference}"
    if reaches is not False:
        assert settings_of(folder) != settings_of(reference)


@pytest.mark.parametrize(
    ("model_type", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields], ids=str
)
def test_another_value_of_a_field(model_type: str, field: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    value, reaches = FIELDS[model_type][field]
    if reaches is None:
        assert_same_model(write(tmp_path / "model", model_type, {field: value}), base(model_type), None)
    else:
        assert_same_model(respell(base(model_type), tmp_path / "model", {field: value}), base(model_type), reaches)


@pytest.mark.parametrize("model_type", list(FIELDS))
def test_every_field_has_another_value(model_type: str) -> None:
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    assert fields <= FIELDS[model_type].keys()


@pytest.mark.parametrize("spelling", list(SPELLINGS))
@pytest.mark.parametrize("model_type", ROTARY)
def test_other_spellings(model_type: str, spelling: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    changes, reaches = SPELLINGS[spelling]
    assert_same_model(respell(base(model_type), tmp_path / "model", changes), base(model_type), reaches)


def test_a_mistral_that_lists_its_blocks_types_is_another_model(base: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 8}
    assert_same_model(respell(base("mistral"), tmp_path / "model", kinds), base("mistral"), True)


def test_null_is_no_part(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = respell(base("llama"), tmp_path / "model", {})
    tiny.write_json(folder / "config.json", {**tiny.read_json(folder / "config.json"), "per_layer_config": None})
    assert_same_model(folder, base("llama"), False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method": ({"get_text_config": 5}, "get_text_config is not a setting but a name of transformers' own"),
    "an attribute of the class": ({"attribute_map": {"hidden_size": "x"}}, "attribute_map is not a setting"),
    "a default of the class": ({"default_theta": 5.0}, "default_theta is not a setting"),
    "blocks of different shapes": ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config gives blocks"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights names other files"),
    "fused modules": ({"fusion_config": {"mlp": True}}, "fusion_config has modules fused"),
    "another configuration": (
        {"configuration_files": ["config.json", "config.4.0.0.json"]},
        "read 'config.4.0.0.json' instead",
    ),
    "configurations of no version": ({"configuration_files": ["config.x.json"]}, "configuration_files cannot be read"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8': the source is quantised"),
    "bitsandbytes of old": (
        {"quantization_config": {"load_in_8bit": True}},
        "quantization_config is {'load_in_8bit': Tr",
    ),
    "a quantisation of text": ({"quantization_config": "x"}, "quantization_config is 'x': the source is quantised"),
    "compressed-tensors": ({"compression_config": {"format": "pack-quantized"}}, "compression_config says that the"),
}


@pytest.mark.parametrize(("changes", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_would_be_another_model_is_refused(
    changes: dict[str, Any], message: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = respell(base("llama"), tmp_path / "model", changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{re.escape(message)}"):
        build_skeleton(folder, open_checkpoint(folder))


INSIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "blocks": ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "a tower's blocks": ("vision_config", {"num_hidden_layers": 900}, "num_hidden_layers is 900"),
    "a dimension": ("text_config", {"hidden_size": 10**6}, "hidden_size is 1000000, beyond the largest dimension"),
    "no number": ("text_config", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, no positive finite number"),
    "a method": ("text_config", {"get_text_config": 5}, "makes no model"),
    "fp8": ("text_config", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is 'fp8'"),
}


@pytest.mark.parametrize(("part", "changes", "message"), list(INSIDE.values()), ids=list(INSIDE))
def test_a_config_inside_a_config_is_checked_alike(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = families.write_family(tmp_path, "mistral3")
    config = tiny.read_json(folder / "config.json")
    tiny.write_json(folder / "config.json", {**config, part: {**config[part], **changes}})
    with pytest.raises(CheckpointError, match=rf"config\.json: ({part}: )?{re.escape(message)}"):
        open_dense(folder)


def test_code_of_its_own_is_named_once(
    base: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = respell(base("llama"), tmp_path / "model", {"auto_map": {"AutoConfig": "code.Config"}})
    build_skeleton(folder, open_checkpoint(folder))
    load_tokenizer(folder)
    code = "names Python code of its own (auto_map); it is not run, transformers' own is"
    assert caplog.messages == [f"{folder}/config.json: {code}"]


def test_an_adapter_beside_the_weights_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = respell(base("llama"), tmp_path / "model", {})
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter lies beside it"):
        build_skeleton(folder, open_checkpoint(folder))


def with_tensors(source: Path, folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    respell(source, folder, changes)
    save_file({**tiny.read_tensors(source), **tensors}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "part",
    [
        *("weight_scale", "weight_scale_inv", "scale", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"),
        *("qweight", "weight_global_scale", "pre_quant_scale", "smoothing_factor", "lora_A.weight"),
    ],
)
def test_what_lies_beside_a_weight_and_changes_it_is_refused(
    part: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    folder = with_tensors(base("llama"), tmp_path / "model", {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)} is a part of a weight that is quantised"):
        open_dense(folder)


def test_blocks_for_multi_token_prediction_are_left_out_in_a_line(
    base: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    later = {f"model.layers.2.{name}": torch.ones(2) for name in ("eh_proj.weight", "mlp.up_proj.weight")}
    folder = with_tensors(base("llama"), tmp_path / "one", later, num_nextn_predict_layers=1)
    assert_same_model(folder, base("llama"), False)
    said = {record.getMessage() for record in caplog.records if record.name == "streamprune"}
    first = "2 tensors of blocks for multi-token prediction (first model.layers.2.eh_proj.weight)"
    assert said == {f"{folder}: {first} are left out; the causal LM does without"}
    beyond = {**later, "model.layers.3.mlp.up_proj.weight": torch.ones(2)}
    folder = with_tensors(base("llama"), tmp_path / "two", beyond, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight is of a block beyond the 3 of config"):
        logits_in_pieces(folder, TOKENS)


def test_what_transformers_warns_of_a_config_is_passed_on(
    base: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the command line's setting, errors alone, and of what was said before of another model."""
    for name, key in (("one", "facter"), ("two", "facter"), ("three", "beta")):
        rope = {"rope_type": "default", "rope_theta": 100.0, key: 2.0}
        folder = respell(base("llama"), tmp_path / name, {"rope_parameters": rope})
        build_skeleton(folder, open_checkpoint(folder))
        assert f"{folder}/config.json: transformers warns: Unrecognized keys in `rope_parameters`" in caplog.text
        assert f"{{'{key}'}}" in caplog.records[-1].getMessage()
