"""What is found by running a model once: its blocks, which of their layers share an input, what cannot go through."""

from pathlib import Path

import families
import odd_model
import pytest
import tiny
import torch
from pieces import TOKENS, logits_in_pieces
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.discovery import CALLED_ONCE, discover
from streamprune.model.library import empty_model
from streamprune.model.source import open_dense

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
BESIDE = (("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",))
# model_type: the blocks' list in the base model, groups of a block, how many values it returns, sequences together
FOUND: dict[str, tuple[str, tuple[tuple[str, ...], ...], int | None, bool]] = {
    **dict.fromkeys(("llama", "ministral", "mistral", "qwen2", "qwen3"), ("layers", LLAMA, None, True)),
    "opt": ("decoder.layers", (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)), None, True),
    # parallel residuals: attention and the MLP share an input
    "cohere": ("layers", ((*QKV, *LLAMA[2]), *LLAMA[1::2]), None, True),
    "phi": ("layers", ((*QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)), None, True),
    "gptj": ("h", (("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)), 2,
             True),
    "falcon": ("h", (("self_attention.query_key_value", "mlp.dense_h_to_4h"), ("self_attention.dense",), BESIDE[1]), 2,
               True),
    # fused projections
    "phi3": ("layers", (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
             None, True),
    "gpt_neox": ("layers", (("attention.query_key_value",), ("attention.dense",), *BESIDE), None, True),
    # its mask is made for as many sequences as there are
    "bloom": ("h", (("self_attention.query_key_value",), ("self_attention.dense",), *BESIDE), 2, False),
    "mpt": ("blocks", (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)), 2, True),
}  # fmt: skip


def write_odd(folder: Path, odd: str) -> Path:
    tiny.write_model(folder, odd_model.OddForCausalLM(odd_model.OddConfig()), torch.float32)
    tiny.write_json(folder / "config.json", {**tiny.read_json(folder / "config.json"), "odd": odd})
    return folder


@pytest.mark.parametrize("name", list(FOUND))
def test_blocks_and_groups_are_found(name: str) -> None:
    path, groups, returns, batched = FOUND[name]
    model = empty_model(CONFIG_MAPPING[name](**families.FAMILIES[name])).eval()
    before = {key: id(module) for key, module in model.named_modules()}
    found = discover(model)
    assert (found.path, found.width, found.batched, len(found.blocks)) == (path, 32, batched, 2)
    for block in found.blocks:
        assert (block.groups, block.dense, block.returns) == (groups, {}, returns)
    assert {key: id(module) for key, module in model.named_modules()} == before
    assert all(
        type(tensor) in (torch.nn.Parameter, torch.Tensor) for tensor in model.state_dict(keep_vars=True).values()
    )


def test_a_model_of_no_table_is_found_and_computed_as_it_is(tmp_path: Path) -> None:
    """What is not called once, or is more than a linear layer, or used beside its call, stays dense and says why."""
    source = open_dense(write_odd(tmp_path, ""))
    block = source.blocks[1]
    assert (source.skeleton.path, block.returns, source.skeleton.batched) == ("trunk.cells", 2, False)
    groups = [tuple(map(block.local, group.names)) for group in block.groups]
    assert groups == [("mix",), ("gather",), ("spread", "side"), ("join",)]
    assert {block.local(name): reason for name, reason in block.ungrouped.items()} == {
        "idle": CALLED_ONCE,
        "read": "its weight is used beside its being called",
        "scaled": "its class, Scaled, computes something else than a linear layer",
        "twice": CALLED_ONCE,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits_in_pieces(tmp_path, TOKENS), model(TOKENS).logits[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("order", r"runs its blocks in another order than their list's: \[1, 0\]"),
        ("between", "changes hidden states between its blocks"),
        ("hands on", "is given more of the one before it than hidden states"),
        ("changes its arguments", "changes what it is called with"),
        ("leaves", "leaves something else than keys and values in left"),
        (
            "masked by words",
            "is called with something that depends on the text and is no row for each token: argument 1",
        ),
        ("shared", r"trunk\.cells\.0\.join\.weight: a block's weight has a second place in the model"),
    ],
)
def test_what_the_streamed_passes_cannot_run_is_refused_by_name(odd: str, message: str, tmp_path: Path) -> None:
    write_odd(tmp_path, odd)
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: model type 'odd' is not supported: .*{message}"):
        open_dense(tmp_path)


def test_what_comes_of_the_text_is_carried_beside_hidden_states(tmp_path: Path) -> None:
    """Gemma 4: a part of an embedding for each block, and keys and values that two blocks leave to the last two."""
    source = open_dense(families.write_family(tmp_path, "gemma4_text"))
    skeleton = source.skeleton
    assert skeleton.tables == ("model.embed_tokens_per_layer",)
    assert (skeleton.hidden_size, skeleton.stream_width) == (32, 32 + 4 * 16 + 2 * (2 * 8 + 2 * 16))
    channels = [block.channels for block in source.blocks]
    assert [[*one.given] for one in channels] == [[0]] * 4
    assert [[*one.left] for one in channels] == [["sliding_attention"], ["full_attention"], [], []]
    assert [[*one.shared] for one in channels[1:3]] == [["sliding_attention"], ["sliding_attention", "full_attention"]]
    wide = [part for one in channels for part in [*one.given.values(), *(p for kv in one.left.values() for p, _ in kv)]]
    assert sorted(range(32, skeleton.stream_width)) == sorted(n for part in wide for n in range(part.start, part.stop))


def test_a_forward_that_depends_on_numbers_is_refused(tmp_path: Path) -> None:
    write_odd(tmp_path, "data")
    with pytest.raises(CheckpointError, match=r"config\.json: makes no model \("):
        open_dense(tmp_path)
