"""The skeleton: names as from_pretrained takes them, and a forward in pieces that equals transformers' own."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pieces import TOKENS, outer_tensors, recorded, runnable
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from streamprune.checkpoint.reader import open_checkpoint
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.forward import arguments_equal, record_block_inputs, run_tail
from streamprune.model.names import match_names
from streamprune.model.skeleton import build_skeleton
from streamprune.model.source import open_dense

NAMES = ["llama", "llama-plain", "opt", "mistral", "qwen2", "qwen3"]

Sources = Callable[[str], Path]


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
def test_blocks_called_as_recorded_give_transformers_hidden_states_and_logits(name: str, sources: Sources) -> None:
    source = open_dense(sources(name))
    inputs = recorded(source)
    with torch.inference_mode():
        expected = plain_model(source.folder)(TOKENS, output_hidden_states=True, use_cache=False)
    states = inputs.hidden_states
    assert len(inputs.arguments) == len(source.blocks) == len(expected.hidden_states) - 1
    for index in range(len(source.blocks)):
        torch.testing.assert_close(states, expected.hidden_states[index], rtol=1e-6, atol=1e-6)
        states = runnable(source, index, inputs).run(states)
        assert states.shape == (1, TOKENS.shape[1], source.skeleton.hidden_size)
    logits = run_tail(source.skeleton, outer_tensors(source), states, torch.arange(TOKENS.shape[1]))
    torch.testing.assert_close(logits, expected.logits[0], rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1  # nothing degenerate was compared


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tail_computes_the_positions_asked_for(name: str, sources: Sources) -> None:
    source = open_dense(sources(name))
    skeleton, outer = source.skeleton, outer_tensors(source)
    states = torch.randn(1, 12, skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    every = run_tail(skeleton, outer, states, torch.arange(12))
    some = run_tail(skeleton, outer, states, torch.tensor([2, 3, 11]))
    assert some.shape == (3, tiny.VOCABULARY)
    torch.testing.assert_close(some, every[[2, 3, 11]], rtol=1e-5, atol=1e-5)


def test_blocks_of_mixed_layer_types_are_called_with_their_own_masks(sources: Sources) -> None:
    arguments = recorded(open_dense(sources("qwen2"))).arguments
    assert arguments_equal(arguments[0], arguments[1])
    assert arguments_equal(arguments[2], arguments[3])
    assert not arguments_equal(arguments[1], arguments[2])


def test_sliding_window_reaches_the_blocks(sources: Sources) -> None:
    """Changing a token more than two windows back leaves a two-block model's last state as it was."""
    source = open_dense(sources("mistral"))
    changed = TOKENS.clone()
    changed[0, 3] = 7
    lasts = []
    for tokens in (TOKENS, changed):
        inputs = recorded(source, tokens)
        states = inputs.hidden_states
        for index in range(2):
            states = runnable(source, index, inputs).run(states)
        lasts.append(states[0])
    assert torch.equal(lasts[0][-1], lasts[1][-1])
    assert not torch.equal(lasts[0][3 + 6], lasts[1][3 + 6])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_cache_reaches_a_block(name: str, sources: Sources) -> None:
    for arguments in recorded(open_dense(sources(name))).arguments:
        assert not arguments.named.get("use_cache")
        assert all(arguments.named.get(key) is None for key in ("past_key_values", "past_key_value"))


def test_recording_leaves_the_skeleton_as_it_was(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    skeleton = source.skeleton
    before = {name: id(module) for name, module in skeleton.model.named_modules()}
    one, other = recorded(source), recorded(source)
    assert {name: id(module) for name, module in skeleton.model.named_modules()} == before
    assert torch.equal(one.hidden_states, other.hidden_states)
    assert arguments_equal(one.arguments, other.arguments)


def test_skeleton_is_put_back_when_the_forward_fails(sources: Sources) -> None:
    source = open_dense(sources("llama"))
    skeleton = source.skeleton
    before = {name: id(module) for name, module in skeleton.model.named_modules()}
    outer = outer_tensors(source)
    with pytest.raises(IndexError):
        record_block_inputs(skeleton, outer, torch.zeros(3))
    assert {name: id(module) for name, module in skeleton.model.named_modules()} == before


@pytest.mark.parametrize("name", NAMES)
def test_skeleton_holds_no_weights_but_real_buffers_and_is_in_evaluation_mode(name: str, sources: Sources) -> None:
    skeleton = build_skeleton(sources(name), open_checkpoint(sources(name)))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())
    assert not any(module.training for module in skeleton.model.modules())
    assert skeleton.model.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_blocks_and_the_outer_ones(name: str, sources: Sources) -> None:
    skeleton = build_skeleton(sources(name), open_checkpoint(sources(name)))
    inside = [parameter for block in skeleton.blocks for parameter in block.parameters]
    outer, tied = skeleton.outer_parameters, skeleton.tied
    every = [parameter for parameter, _ in skeleton.model.named_parameters(remove_duplicate=False)]
    assert sorted([*inside, *outer, *tied]) == sorted(every)
    assert set(tied) == (set() if name in ("llama-plain", "mistral", "qwen3") else {"lm_head.weight"})


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", (4, 2, 16)), ("llama-plain", (4, 4, 16)), ("opt", (4, 4, 16)), ("qwen3", (4, 2, 16))]
)
def test_heads(name: str, heads: tuple[int, int, int], sources: Sources) -> None:
    skeleton = build_skeleton(sources(name), open_checkpoint(sources(name)))
    assert skeleton.heads == heads
    query_heads, kv_heads, head_dim = heads
    attention = dict(skeleton.module(skeleton.blocks[0]).named_parameters())
    assert attention["self_attn.q_proj.weight"].shape[0] == query_heads * head_dim
    assert attention["self_attn.v_proj.weight"].shape[0] == kv_heads * head_dim


@pytest.mark.parametrize("name", NAMES)
def test_input_groups_name_every_linear_layer_of_a_block_once(name: str, sources: Sources) -> None:
    skeleton = build_skeleton(sources(name), open_checkpoint(sources(name)))
    block = skeleton.blocks[1]
    modules = skeleton.module(block).named_modules()
    linears = {f"{block.name}.{n}": tuple(m.weight.shape) for n, m in modules if isinstance(m, torch.nn.Linear)}
    views = [layer for group in block.groups for layer in group.layers]
    assert sorted(view.name for view in views) == sorted(linears)
    assert {view.name: view.shape for view in views} == linears
    assert {view.parameter for view in views} == {f"{name}.weight" for name in linears}
    assert block.ungrouped == {}
    for group in block.groups:
        assert set(group.producers) <= set(linears)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_saved_checkpoint_match_themselves(name: str, sources: Sources) -> None:
    folder = sources(name)
    names = names_in(folder)
    assert all(parameter == stored for parameter, stored in names.items())
    assert set(names.values()) == set(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("head", ["absent", "present"])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["without prefix", "with prefix"])
def test_opt_with_and_without_prefix_and_tied_head(prefix: str, head: str, sources: Sources, tmp_path: Path) -> None:
    tensors = {prefix + n.removeprefix("model."): t for n, t in tiny.read_tensors(sources("opt")).items()}
    if head == "present":
        tensors["lm_head.weight"] = tensors[f"{prefix}decoder.embed_tokens.weight"]
    folder = copy_with(sources("opt"), tmp_path / "opt", tensors)
    names = names_in(folder)
    expected = {"model." + n.removeprefix("model."): n for n in tensors if n != "lm_head.weight"}
    assert names == expected
    assert names["model.decoder.layers.2.fc2.bias"] == f"{prefix}decoder.layers.2.fc2.bias"


def test_tied_embeddings_stored_as_the_head_alone(sources: Sources, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(sources("llama"))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    names = names_in(copy_with(sources("llama"), tmp_path / "llama", tensors))
    assert names["model.embed_tokens.weight"] == "lm_head.weight"
    assert "lm_head.weight" not in names


def test_untied_head_is_needed(sources: Sources, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(sources("llama-plain"))
    assert names_in(sources("llama-plain"))["lm_head.weight"] == "lm_head.weight"
    del tensors["lm_head.weight"]
    folder = copy_with(sources("llama-plain"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first lm_head\.weight"):
        names_in(folder)


def test_missing_tensors_are_counted_and_the_first_is_named(sources: Sources, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(sources("llama"))
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.bias"]
    folder = copy_with(sources("llama"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"2 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight$"):
        names_in(folder)


def test_wrong_shape_is_refused_with_both_shapes(sources: Sources, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(sources("llama"))
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 96)
    folder = copy_with(sources("llama"), tmp_path / "llama", tensors)
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight has shape \[64, 96\], config\.json makes it \[64, 160\]"
    ):
        names_in(folder)


def test_quantized_weight_is_refused(sources: Sources, tmp_path: Path) -> None:
    tensors = tiny.read_tensors(sources("llama"))
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 160, dtype=torch.int8)
    folder = copy_with(sources("llama"), tmp_path / "llama", tensors)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is torch\.int8; the source must be unquantized"):
        names_in(folder)


def test_old_rotary_buffers_are_dropped_silently_and_unknown_tensors_are_logged(
    sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tiny.read_tensors(sources("llama"))
    for block in range(3):
        tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    folder = copy_with(sources("llama"), tmp_path / "old", tensors)
    with caplog.at_level(logging.DEBUG, logger="streamprune"):
        assert names_in(folder) == names_in(sources("llama"))
    assert caplog.records == []
    tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(1)
    folder = copy_with(sources("llama"), tmp_path / "more", tensors)
    with caplog.at_level(logging.DEBUG, logger="streamprune"):
        assert names_in(folder) == names_in(sources("llama"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensor model.layers.0.self_attn.extra.weight belongs to no parameter" in caplog.text


def write_config(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = tiny.read_json(source / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no such model"}, "this transformers has no causal language model of that name"),
        ({"model_type": "../llama"}, "this transformers has no causal language model of that name"),
        ({"model_type": "clip"}, "this transformers has no causal language model of that name"),
        ({"model_type": "bert"}, "is made for masked or translated text"),
        ({"model_type": "marian"}, "is made for masked or translated text"),
    ],
    ids=str,
)
def test_what_cannot_go_through_is_refused_by_name(
    changes: dict[str, Any], message: str, sources: Sources, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, sources("llama"), **changes)
    named = f"model type '{changes['model_type']}' is not supported: "
    with pytest.raises(UnsupportedModelError, match=rf"{named}.*{message}"):
        build_skeleton(folder, open_checkpoint(sources("llama")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
    changes: dict[str, Any], message: str, sources: Sources, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, sources("llama"), **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as caught:
        build_skeleton(folder, open_checkpoint(sources("llama")))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_missing_or_no_json(sources: Sources, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sources("llama"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build_skeleton(tmp_path, checkpoint)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        build_skeleton(tmp_path, checkpoint)


@pytest.mark.parametrize("name", ["llama", "llama-plain", "opt", "mistral", "qwen2", "qwen3"])
def test_a_config_is_what_transformers_makes_of_it(name: str, sources: Sources) -> None:
    ours = build_skeleton(sources(name), open_checkpoint(sources(name))).model.config.to_dict()
    theirs = AutoConfig.from_pretrained(sources(name)).to_dict()
    general = {"architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in general} == {k: v for k, v in theirs.items() if k not in general}


def test_code_that_comes_with_a_checkpoint_is_not_run(sources: Sources, tmp_path: Path) -> None:
    folder = write_config(
        tmp_path,
        sources("llama"),
        model_type="mine",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"},
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(UnsupportedModelError, match=r"code of its own \(auto_map\), which is never run"):
        build_skeleton(folder, open_checkpoint(sources("llama")))
    assert not (tmp_path / "ran").exists()


def test_quantization_entry_of_an_output_does_not_reach_transformers(sources: Sources, tmp_path: Path) -> None:
    folder = write_config(tmp_path, sources("llama"), quantization_config={"quant_method": "streamprune"})
    blocks = build_skeleton(folder, open_checkpoint(sources("llama"))).blocks
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_arguments_equal_compares_tensors_by_value() -> None:
    one = {"mask": torch.ones(2), "pair": (torch.zeros(1), torch.arange(3)), "flag": False, "none": None}
    same = {"mask": torch.ones(2), "pair": (torch.zeros(1), torch.arange(3)), "flag": False, "none": None}
    assert arguments_equal(one, same)
    for key, value in (("mask", torch.zeros(2)), ("pair", (torch.zeros(1),)), ("flag", True), ("none", torch.ones(1))):
        assert not arguments_equal(one, {**same, key: value}), key
    assert not arguments_equal(one, {**same, "more": 1})
    assert not arguments_equal([torch.ones(1)], [torch.ones(2)])
    assert not arguments_equal(torch.ones(1), torch.ones(1).nextafter(torch.zeros(1)))
    assert not arguments_equal(torch.ones(1), torch.ones(1, dtype=torch.float64))


def test_outer_tensors_alone_run_what_comes_before_the_blocks(sources: Sources) -> None:
    """The embeddings of OPT are tokens plus learned positions, two places further on."""
    source = open_dense(sources("opt"))
    outer = outer_tensors(source)
    positions = torch.arange(TOKENS.shape[1]) + 2
    expected = functional_call(
        torch.nn.Embedding(tiny.VOCABULARY, 64), {"weight": outer["model.decoder.embed_tokens.weight"]}, (TOKENS,)
    )
    expected = expected + outer["model.decoder.embed_positions.weight"][positions]
    torch.testing.assert_close(recorded(source).hidden_states, expected, rtol=0, atol=0)
