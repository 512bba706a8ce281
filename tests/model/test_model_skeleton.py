"""The skeleton: names as from_pretrained takes them, and a forward in pieces that equals transformers' own."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pieces import TOKENS, block_of, outer_tensors, recorded
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from streamprune.checkpoint.reader import open_checkpoint
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.architectures import ARCHITECTURES
from streamprune.model.blocks import run_block
from streamprune.model.library import tied_parameters
from streamprune.model.skeleton import arguments_equal, build_skeleton, match_names, record_block_inputs, run_tail

NAMES = ["llama", "llama-plain", "opt", "mistral", "qwen2", "qwen3"]

Models = Callable[[str], Path]


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def copy_with(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint with the source's config and other tensors."""
    tiny.copy_without_weights(source, folder)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def names_in(folder: Path) -> dict[str, str]:
    return match_names(build_skeleton(folder, open_checkpoint(folder)), open_checkpoint(folder))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_called_as_recorded_give_transformers_hidden_states_and_logits(name: str, models: Models) -> None:
    folder = models(name)
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    inputs = recorded(skeleton, folder)
    with torch.inference_mode():
        expected = plain_model(folder)(TOKENS, output_hidden_states=True, use_cache=False)
    states = inputs.hidden_states
    assert len(inputs.arguments) == len(skeleton.blocks) == len(expected.hidden_states) - 1
    for index in range(len(skeleton.blocks)):
        torch.testing.assert_close(states, expected.hidden_states[index], rtol=1e-6, atol=1e-6)
        states = run_block(block_of(skeleton, folder, index), states, inputs.arguments[index], "block")
        assert states.shape == (1, TOKENS.shape[1], skeleton.hidden_size)
    logits = run_tail(skeleton, outer_tensors(skeleton, folder), states, torch.arange(TOKENS.shape[1]))
    torch.testing.assert_close(logits, expected.logits[0], rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1  # nothing degenerate was compared


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tail_computes_the_positions_asked_for(name: str, models: Models) -> None:
    folder = models(name)
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    outer = outer_tensors(skeleton, folder)
    states = torch.randn(1, 12, skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    every = run_tail(skeleton, outer, states, torch.arange(12))
    some = run_tail(skeleton, outer, states, torch.tensor([2, 3, 11]))
    assert some.shape == (3, tiny.VOCABULARY)
    torch.testing.assert_close(some, every[[2, 3, 11]], rtol=1e-5, atol=1e-5)


def test_blocks_of_mixed_layer_types_are_called_with_their_own_masks(models: Models) -> None:
    folder = models("qwen2")
    arguments = recorded(build_skeleton(folder, open_checkpoint(folder)), folder).arguments
    assert arguments_equal(arguments[0], arguments[1])
    assert arguments_equal(arguments[2], arguments[3])
    assert not arguments_equal(arguments[1], arguments[2])


def test_sliding_window_reaches_the_blocks(models: Models) -> None:
    """Changing a token more than two windows back leaves a two-block model's last state as it was."""
    folder = models("mistral")
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    changed = TOKENS.clone()
    changed[0, 3] = 7
    lasts = []
    for tokens in (TOKENS, changed):
        inputs = recorded(skeleton, folder, tokens)
        states = inputs.hidden_states
        for index in range(2):
            states = run_block(block_of(skeleton, folder, index), states, inputs.arguments[index], "block")
        lasts.append(states[0])
    assert torch.equal(lasts[0][-1], lasts[1][-1])
    assert not torch.equal(lasts[0][3 + 6], lasts[1][3 + 6])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_cache_reaches_a_block(name: str, models: Models) -> None:
    folder = models(name)
    for arguments in recorded(build_skeleton(folder, open_checkpoint(folder)), folder).arguments:
        assert not arguments.get("use_cache")
        assert all(arguments.get(key) is None for key in ("past_key_values", "past_key_value"))


def test_recording_leaves_the_skeleton_as_it_was(models: Models) -> None:
    folder = models("llama")
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    before = {name: id(module) for name, module in skeleton.model.named_modules()}
    one, other = recorded(skeleton, folder), recorded(skeleton, folder)
    assert {name: id(module) for name, module in skeleton.model.named_modules()} == before
    assert torch.equal(one.hidden_states, other.hidden_states)
    assert arguments_equal(one.arguments, other.arguments)


def test_skeleton_is_put_back_when_the_forward_fails(models: Models) -> None:
    folder = models("llama")
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    before = {name: id(module) for name, module in skeleton.model.named_modules()}
    outer = outer_tensors(skeleton, folder)
    with pytest.raises(IndexError):
        record_block_inputs(skeleton, outer, torch.zeros(3))
    assert {name: id(module) for name, module in skeleton.model.named_modules()} == before


@pytest.mark.parametrize("name", NAMES)
def test_skeleton_holds_no_weights_but_real_buffers_and_is_in_evaluation_mode(name: str, models: Models) -> None:
    skeleton = build_skeleton(models(name), open_checkpoint(models(name)))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())
    assert not any(module.training for module in skeleton.model.modules())
    assert skeleton.model.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_blocks_and_the_outer_ones(name: str, models: Models) -> None:
    skeleton = build_skeleton(models(name), open_checkpoint(models(name)))
    inside = [p for index in range(len(skeleton.blocks)) for p in skeleton.block_parameters(index)]
    outer, tied = skeleton.outer_parameters(), tied_parameters(skeleton.model)
    every = [parameter for parameter, _ in skeleton.model.named_parameters(remove_duplicate=False)]
    assert sorted([*inside, *outer, *tied]) == sorted(every)
    assert set(tied) == (set() if name in ("llama-plain", "mistral", "qwen3") else {"lm_head.weight"})


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", (4, 2, 16)), ("llama-plain", (4, 4, 16)), ("opt", (4, 4, 16)), ("qwen3", (4, 2, 16))]
)
def test_heads(name: str, heads: tuple[int, int, int], models: Models) -> None:
    skeleton = build_skeleton(models(name), open_checkpoint(models(name)))
    assert skeleton.heads() == heads
    query_heads, kv_heads, head_dim = heads
    attention = dict(skeleton.block(0).named_parameters())
    assert attention["self_attn.q_proj.weight"].shape[0] == query_heads * head_dim
    assert attention["self_attn.v_proj.weight"].shape[0] == kv_heads * head_dim


@pytest.mark.parametrize("name", NAMES)
def test_input_groups_name_every_linear_layer_of_a_block_once(name: str, models: Models) -> None:
    skeleton = build_skeleton(models(name), open_checkpoint(models(name)))
    linears = [n for n, m in skeleton.block(1).named_modules() if isinstance(m, torch.nn.Linear)]
    grouped = [layer for _, layers in skeleton.group_layers(1) for layer in layers]
    assert sorted(grouped) == sorted(f"{skeleton.blocks[1]}.{linear}" for linear in linears)
    for group, _ in skeleton.group_layers(1):
        assert set(group.producers) <= set(linears)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_saved_checkpoint_match_themselves(name: str, models: Models) -> None:
    folder = models(name)
    names = names_in(folder)
    assert all(parameter == stored for parameter, stored in names.items())
    assert set(names.values()) == set(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("head", ["absent", "present"])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["without prefix", "with prefix"])
def test_opt_with_and_without_prefix_and_tied_head(prefix: str, head: str, models: Models, tmp_path: Path) -> None:
    tensors = {prefix + n.removeprefix("model."): t for n, t in tiny.read_tensors(models("opt")).items()}
    if head == "present":
        tensors["lm_head.weight"] = tensors[f"{prefix}decoder.embed_tokens.weight"]
    folder = copy_with(models("opt"), tmp_path / "opt", tensors)
    names = names_in(folder)
    expected = {"model." + n.removeprefix("model."): n for n in tensors if n != "lm_head.weight"}
    assert names == expected
    assert names["model.decoder.layers.2.fc2.bias"] == f"{prefix}decoder.layers.2.fc2.bias"


def test_tied_embeddings_stored_as_the_head_alone(models: Models, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(models("llama"))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    names = names_in(copy_with(models("llama"), tmp_path / "llama", tensors))
    assert names["model.embed_tokens.weight"] == "lm_head.weight"
    assert "lm_head.weight" not in names


def test_untied_head_is_needed(models: Models, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(models("llama-plain"))
    assert names_in(models("llama-plain"))["lm_head.weight"] == "lm_head.weight"
    del tensors["lm_head.weight"]
    folder = copy_with(models("llama-plain"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first lm_head\.weight"):
        names_in(folder)


def test_missing_tensors_are_counted_and_the_first_is_named(models: Models, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(models("llama"))
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.bias"]
    folder = copy_with(models("llama"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"2 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight$"):
        names_in(folder)


def test_wrong_shape_is_refused_with_both_shapes(models: Models, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(models("llama"))
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 96)
    folder = copy_with(models("llama"), tmp_path / "llama", tensors)
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight has shape \[64, 96\], config\.json makes it \[64, 160\]"
    ):
        names_in(folder)


def test_quantized_weight_is_refused(models: Models, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(models("llama"))
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 160, dtype=torch.int8)
    folder = copy_with(models("llama"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is torch\.int8; the source must be unquantized"):
        names_in(folder)


def test_old_rotary_buffers_are_dropped_silently_and_unknown_tensors_are_logged(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny.read_tensors(models("llama"))
    for block in range(3):
        tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder = copy_with(models("llama"), tmp_path / "old", tensors)
    with caplog.at_level(logging.DEBUG, logger="streamprune"):
        assert names_in(folder) == names_in(models("llama"))
    assert caplog.records == []
    tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(1)
    folder = copy_with(models("llama"), tmp_path / "more", tensors)
    with caplog.at_level(logging.DEBUG, logger="streamprune"):
        assert names_in(folder) == names_in(models("llama"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensor model.layers.0.self_attn.extra.weight belongs to no parameter" in caplog.text


def write_config(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = tiny.read_json(source / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_model_type_outside_the_table_is_refused_naming_the_supported_ones(models: Models, tmp_path: Path) -> None:
    folder = write_config(tmp_path, models("llama"), model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModelError) as caught:
        build_skeleton(folder, open_checkpoint(models("llama")))
    assert "'gpt2' is not supported" in str(caught.value)
    assert all(name in str(caught.value) for name in ARCHITECTURES)
    assert set(ARCHITECTURES) >= {"llama", "mistral", "qwen2", "qwen3", "opt"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no such model"}, "'no such model' is not supported"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', no whole number"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 is not a multiple of num_key_value_heads 2"),
        (
            {"num_attention_heads": 6, "head_dim": None},
            "hidden_size 64 is not a multiple of num_attention_heads 6",
        ),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, no whole number from 1 to 2"),
        ({"num_hidden_layers": 900}, "num_hidden_layers is 900, for which the checkpoint's .* tensors are too few"),
        ({"head_dim": 10**8}, "head_dim is 100000000, beyond the largest dimension of any tensor, 160"),
        ({"partial_rotary_factor": 1e9}, "partial_rotary_factor is 1000000000.0, no share"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"hidden_act": "none such"}, "makes no model"),
        ({"attention_bias": "yes"}, "makes no model"),
    ],
    ids=str,
)
def test_configs_that_make_no_model_are_refused_in_one_line(
    changes: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, models("llama"), **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as caught:
        build_skeleton(folder, open_checkpoint(models("llama")))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_missing_or_no_json(models: Models, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(models("llama"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build_skeleton(tmp_path, checkpoint)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        build_skeleton(tmp_path, checkpoint)


@pytest.mark.parametrize("name", ["llama", "llama-plain", "opt", "mistral", "qwen2", "qwen3"])
def test_a_config_is_what_transformers_makes_of_it(name: str, models: Models) -> None:
    ours = build_skeleton(models(name), open_checkpoint(models(name))).model.config.to_dict()
    theirs = AutoConfig.from_pretrained(models(name)).to_dict()
    general = {"architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in general} == {k: v for k, v in theirs.items() if k not in general}


def test_code_that_comes_with_a_checkpoint_is_not_run(models: Models, tmp_path: Path) -> None:
    folder = write_config(
        tmp_path,
        models("llama"),
        model_type="mine",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"},
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(UnsupportedModelError, match=r"code of its own \(auto_map\), which is never run"):
        build_skeleton(folder, open_checkpoint(models("llama")))
    assert not (tmp_path / "ran").exists()


def test_quantization_entry_of_an_output_does_not_reach_transformers(models: Models, tmp_path: Path) -> None:
    folder = write_config(tmp_path, models("llama"), quantization_config={"quant_method": "streamprune"})
    assert build_skeleton(folder, open_checkpoint(models("llama"))).blocks == (
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
    )


def test_arguments_equal_compares_tensors_by_value() -> None:
    one = {"mask": torch.ones(2), "pair": (torch.zeros(1), torch.arange(3)), "flag": False, "none": None}
    same = {"mask": torch.ones(2), "pair": (torch.zeros(1), torch.arange(3)), "flag": False, "none": None}
    assert arguments_equal(one, same)
    for key, value in (("mask", torch.zeros(2)), ("pair", (torch.zeros(1),)), ("flag", True), ("none", torch.ones(1))):
        assert not arguments_equal(one, {**same, key: value}), key
    assert not arguments_equal(one, {**same, "more": 1})
    assert not arguments_equal([torch.ones(1)], [torch.ones(2)])


def test_outer_tensors_alone_run_what_comes_before_the_blocks(models: Models) -> None:
    """The embeddings of OPT are tokens plus learned positions, two places further on."""
    folder = models("opt")
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    outer = outer_tensors(skeleton, folder)
    positions = torch.arange(TOKENS.shape[1]) + 2
    expected = functional_call(
        torch.nn.Embedding(tiny.VOCABULARY, 64), {"weight": outer["model.decoder.embed_tokens.weight"]}, (TOKENS,)
    )
    expected = expected + outer["model.decoder.embed_positions.weight"][positions]
    torch.testing.assert_close(recorded(skeleton, folder).hidden_states, expected, rtol=0, atol=0)
