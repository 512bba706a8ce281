"""What streamprune.model.library relies on beyond documented interfaces; a new release of theirs is held to it here."""

import ast
import dataclasses
import logging
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers.utils.logging import get_logger

import streamprune
from streamprune.model.library import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    bare_model,
    config_fields,
    empty_model,
    expert_parts,
    experts_without_router,
    get_configuration_file,
    goes_on_with_text,
    is_experts,
    memory_of,
    merged_while_loading,
    name_when_saved,
    name_while_loading,
    special_floats,
    tensors_without_numbers,
    tied_parameters,
    tree_flatten,
    tree_map,
    warnings_heard,
    without_special_floats,
    wraps_text,
)

WTE = "transformer.wte"
SIZES = {"vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"}
REGISTER = {
    "huggingface.py": {
        "transformers.quantizers.auto.register_quantization_config",
        "transformers.quantizers.auto.register_quantizer",
        "transformers.quantizers.base.HfQuantizer",
        "transformers.utils.quantization_config.QuantizationConfigMixin",
    }
}
# Of transformers, imported from its top.
DOCUMENTED = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "PreTrainedModel"}


def model_of(name: str, **settings: Any) -> Any:
    return empty_model(CONFIG_MAPPING[name](**{**families.FAMILIES[name], **settings}))


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_config_classes_are_dataclasses_of_their_settings(name: str) -> None:
    config_class = CONFIG_MAPPING[name]
    assert issubclass(config_class, PretrainedConfig)
    assert dataclasses.is_dataclass(config_class)
    assert config_fields(config_class) >= config_fields(PretrainedConfig)
    sizes = SIZES - {"num_hidden_layers"} if name == "nemotron_h" else SIZES  # it lists their kinds
    own = {config_class.attribute_map.get(size, size) for size in sizes}
    assert config_fields(config_class) >= {*own, "tie_word_embeddings"}
    made = config_class.from_dict(families.FAMILIES[name])
    assert (made.hidden_size, made.num_hidden_layers, made.model_type) == (
        32,
        {"gemma4_text": 4, "nemotron_h": 3}.get(name, 2),
        name,
    )


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_an_empty_model_has_buffers_and_no_weights(name: str) -> None:
    model = model_of(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}
    assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")
    assert getattr(model, model.base_model_prefix) is model.base_model
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings()
    assert list(nn.Linear(2, 2, bias=False).weight.shape) == [2, 2]  # the switches are back
    assert nn.init.ones_(torch.zeros(1)).item() == 1


def test_numbers_that_json_lacks() -> None:
    limits = {"inner": {"a": [0.0, float("inf")]}}
    written = {"inner": {"a": [0.0, {"__float__": "Infinity"}]}}
    assert (without_special_floats(limits), special_floats(written)) == (written, limits)


def test_tied_parameters() -> None:
    for name, embedding in (("llama", "model.embed_tokens"), ("opt", "model.decoder.embed_tokens"), ("mpt", WTE)):
        tied = {"lm_head.weight": f"{embedding}.weight"}
        assert tied_parameters(model_of(name, tie_word_embeddings=True)) == tied
        assert tied_parameters(model_of(name, tie_word_embeddings=False)) == {}


def test_a_bare_models_buffers_are_counted_without_being_made() -> None:
    config = CONFIG_MAPPING["gptj"](**{**families.FAMILIES["gptj"], "n_positions": 1 << 40})
    buffers = [*bare_model(config).buffers()]
    assert [buffer.numel() for buffer in buffers] == [4 << 40] * 2  # sines in 4 channels, in both blocks


def test_tensors_without_numbers_know_what_memory_they_share() -> None:
    with tensors_without_numbers():
        x = torch.empty(1 << 20, 1 << 20)
        same, part, other = x.view(x.shape), x[1:], x + 1
        assert memory_of(x) == memory_of(same)
        assert len({memory_of(tensor) for tensor in (x, part, other, x.T)}) == 4
        before = memory_of(x)
        x.add_(1)
        assert memory_of(x) == memory_of(same) != before
    assert torch.ones(1).item() == 1


def test_names_while_loading() -> None:
    neox = name_while_loading(model_of("gpt_neox"))
    assert neox("embed_out.weight") == "lm_head.weight"
    assert neox("gpt_neox.embed_in.weight") == "gpt_neox.embed_in.weight"


def test_experts_are_merged_while_loading_and_have_their_names_when_saved() -> None:
    mixtral = model_of("mixtral")
    loaded, merged, saved = (f(mixtral) for f in (name_while_loading, merged_while_loading, name_when_saved))
    inside, outside = "model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert (loaded(outside), merged(outside), saved(inside)) == (inside, True, outside)
    assert not merged("model.layers.0.mlp.gate.weight")
    assert saved("model.norm.weight") == loaded("model.norm.weight") == "model.norm.weight"
    granite = name_when_saved(model_of("granitemoe"))
    moe = "model.layers.0.block_sparse_moe"
    assert granite(f"{moe}.experts.down_proj") == f"{moe}.output_linear.weight"
    assert name_when_saved(model_of("gpt_neox"))("lm_head.weight") == "embed_out.weight"


def test_which_layers_of_an_expert_a_parameter_of_all_is_made_of() -> None:
    for name, expected in (
        ("mixtral", (("w1", "w3"), ("w2",))),
        ("deepseek_v3", (("gate_proj", "up_proj"), ("down_proj",))),
        ("gpt_oss", ((), ())),
    ):
        path = "model.layers.1.mlp.experts"
        model = model_of(name)
        assert is_experts(model.get_submodule(path))
        assert tuple(expert_parts(model, f"{path}.{part}") for part in ("gate_up_proj", "down_proj")) == expected
    llama4 = model_of("llama4_text").get_submodule("model.layers.1.feed_forward.experts")
    assert is_experts(llama4)
    assert experts_without_router(llama4)


def test_what_goes_on_with_text() -> None:
    for name, wraps, causal, masked in (
        *(("llama", False, True, False), ("bert", False, True, True), ("clip", True, False, False)),
        *(("gemma3", True, True, False), ("mistral3", True, True, False)),
    ):
        config_class = CONFIG_MAPPING[name]
        assert (wraps_text(config_class), goes_on_with_text(config_class)) == (wraps, causal)
        assert (config_class in MODEL_FOR_MASKED_LM_MAPPING) == masked


def test_configuration_file_is_the_newest_that_the_library_reads() -> None:
    assert get_configuration_file(["config.json", "config.4.0.0.json", "config.999.0.0.json"]) == "config.4.0.0.json"
    assert get_configuration_file(["config.json", "config.999.0.0.json"]) == "config.json"


def test_trees() -> None:
    tree = ({"a": torch.ones(1), "b": (2, None)}, [3])
    leaves, structure = tree_flatten(tree)
    assert leaves == [torch.ones(1), 2, None, 3]
    assert structure == tree_flatten(tree_map(lambda leaf: 0, tree))[1] != tree_flatten(tree[0])[1]
    assert tree_map(lambda leaf: 0, tree) == ({"a": 0, "b": (0, 0)}, [0])


def test_warnings_are_heard_each_time_and_verbosity_is_as_before() -> None:
    library = logging.getLogger("transformers")
    before = library.level, list(library.handlers), library.propagate
    for _ in range(2):
        with warnings_heard() as heard:
            get_logger("transformers.anything").warning_once("two\nlines")
        assert list(heard) == ["two lines"]
        assert (library.level, library.handlers, library.propagate) == before


def imports_of(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    found = {f"{node.module}.{name.name}" for node in tree if isinstance(node, ast.ImportFrom) for name in node.names}
    tree = ast.walk(ast.parse(path.read_text()))
    return found | {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}


def test_no_other_module_imports_such_names() -> None:
    """But for the module that transformers' register of quantisers is there for."""
    allowed = {f"transformers.{name}" for name in DOCUMENTED}
    for path in Path(streamprune.__file__ or "").parent.rglob("*.py"):
        names = {name for name in imports_of(path) if name.startswith(("transformers", "accelerate"))}
        private = {name for name in imports_of(path) if name.startswith("torch.") and "._" in name}
        if path.name != "library.py":
            assert names <= allowed | REGISTER.get(path.name, set()), path
            assert not private, path
