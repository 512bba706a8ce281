"""What streamprune.model.library relies on beyond documented interfaces; a new release of theirs is held to it here."""

import ast
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils.logging import get_logger

import streamprune
from streamprune.model.architectures import ARCHITECTURES
from streamprune.model.library import (
    CONFIG_MAPPING,
    PretrainedConfig,
    config_fields,
    empty_model,
    get_configuration_file,
    tied_parameters,
    tree_flatten,
    tree_map,
    warnings_heard,
)

REGISTER = {
    "huggingface.py": {
        "transformers.quantizers.auto.register_quantization_config",
        "transformers.quantizers.auto.register_quantizer",
        "transformers.quantizers.base.HfQuantizer",
        "transformers.utils.quantization_config.QuantizationConfigMixin",
    }
}
# Of transformers, imported from its top.
DOCUMENTED = {"AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "PreTrainedModel"}
SMALL: dict[str, Any] = {"vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def model_of(name: str, **settings: Any) -> Any:
    return empty_model(CONFIG_MAPPING[name](**{**SMALL, "word_embed_proj_dim": 16, "head_dim": 8, **settings}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_classes_are_dataclasses_of_their_settings(name: str) -> None:
    config_class = CONFIG_MAPPING[name]
    assert issubclass(config_class, PretrainedConfig)
    assert dataclasses.is_dataclass(config_class)
    assert config_fields(config_class) >= config_fields(PretrainedConfig)
    assert config_fields(config_class) >= {*SMALL, "max_position_embeddings", "tie_word_embeddings"}
    made = config_class.from_dict({**SMALL, "hidden_size": 32})
    assert (made.hidden_size, made.to_dict()["hidden_size"], made.model_type) == (32, 32, name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_model_has_buffers_and_no_weights(name: str) -> None:
    model = model_of(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model, model.base_model_prefix) is model.base_model
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings()
    assert list(nn.Linear(2, 2, bias=False).weight.shape) == [2, 2]  # the switches are back
    assert nn.init.ones_(torch.zeros(1)).item() == 1


def test_tied_parameters() -> None:
    embedding = {"opt": "model.decoder.embed_tokens.weight"}
    for name in ARCHITECTURES:
        tied = {"lm_head.weight": embedding.get(name, "model.embed_tokens.weight")}
        assert tied_parameters(model_of(name, tie_word_embeddings=True)) == tied
        assert tied_parameters(model_of(name, tie_word_embeddings=False)) == {}


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
