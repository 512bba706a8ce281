"""Folds are found by trial: which of a family's, that only what holds is believed, and what happens where none can be
tried. That a believed fold leaves the whole model's logits is shown in test_model_families.py.
"""

from typing import Any

import families
import odd_model
import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from streamprune.model import folding
from streamprune.model.folding import Fold, with_folds
from streamprune.model.skeleton import Block, skeleton_of

Folds = dict[str, Fold]
VALUES = {"self_attn.o_proj": Fold(("self_attn.v_proj",), per_head=True)}
GATED: Folds = {**VALUES, "mlp.down_proj": Fold(("mlp.gate_proj", "mlp.up_proj"))}
UNGATED: Folds = {**VALUES, "mlp.down_proj": Fold(("mlp.up_proj",))}
FUSED: Folds = {"mlp.down_proj": Fold(("mlp.gate_up_proj",), times=2)}
BESIDE_FUSED: Folds = {"mlp.dense_4h_to_h": Fold(("mlp.dense_h_to_4h",))}
OF_FAMILIES: dict[str, Folds] = {
    **dict.fromkeys(families.FAMILIES, GATED),
    **dict.fromkeys(("apertus", "nemotron"), UNGATED),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), BESIDE_FUSED),
    **dict.fromkeys(("glm", "glm4"), VALUES | FUSED),
    "gpt2": {"mlp.c_proj": Fold(("mlp.c_fc",))},
    "gptj": {"attn.out_proj": Fold(("attn.v_proj",), per_head=True), "mlp.fc_out": Fold(("mlp.fc_in",))},
    "mpt": {"ffn.down_proj": Fold(("ffn.up_proj",))},
    "opt": {"self_attn.out_proj": VALUES["self_attn.o_proj"], "fc2": Fold(("fc1",))},
    "phi": {"self_attn.dense": VALUES["self_attn.o_proj"], "mlp.fc2": Fold(("mlp.fc1",))},
    "phi3": FUSED,
    "starcoder2": {**VALUES, "mlp.c_proj": Fold(("mlp.c_fc",))},
}
# Of classes beside: heads are mixed in pairs; norms lie before o_proj and down_proj.
ALL = {**families.FAMILIES, "diffllama": families.PLAIN, "bitnet": families.GROUPED}
OF_ALL = {**OF_FAMILIES, "diffllama": {"mlp.down_proj": GATED["mlp.down_proj"]}, "bitnet": {}}
JOIN = Fold(("spread", "side"))


def folds_of(block: Block) -> Folds:
    return {
        block.local(group.name): Fold(tuple(map(block.local, group.producers)), group.per_head, group.times)
        for group in block.groups
        if group.producers
    }


def found(config: PretrainedConfig) -> list[Folds]:
    """Of each block."""
    return [folds_of(block) for block in with_folds(skeleton_of(config)).blocks]


def family(name: str, **changes: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[name](**{**ALL[name], **changes})


@pytest.mark.parametrize("name", list(ALL))
def test_folds_of_a_family(name: str) -> None:
    assert found(family(name)) == [OF_ALL[name]] * 2


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "llama",
            {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
        ),
        ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}),
        ("opt", {"hidden_size": 9216, "ffn_dim": 36864, "num_attention_heads": 72, "word_embed_proj_dim": 9216}),
        ("opt", {"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "word_embed_proj_dim": 512}),
        ("gemma3_text", {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "head_dim": 128}),
        ("falcon", {"hidden_size": 4544, "ffn_hidden_size": 18176, "num_attention_heads": 71}),
        ("gptj", {"n_embd": 4096, "n_inner": None, "n_head": 16, "rotary_dim": 64}),
        ("nemotron", {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_folds_at_the_sizes_of_published_models(name: str, sizes: dict[str, int]) -> None:
    assert found(family(name, **sizes)) == [OF_ALL[name]] * sizes.get("num_hidden_layers", 2)


@pytest.mark.parametrize(
    ("step", "fold"),
    [
        ("", JOIN),
        ("halves", Fold(("spread",), times=2)),
        ("softmax", JOIN),  # what is done to all channels alike may be done in any order
        ("bare norm", JOIN),
        ("norm", None),
        ("softmax of parts", None),
        ("sums", None),
        ("interleaved", None),
        ("nearly nothing", None),
        ("nothing comes through", None),
    ],
)
def test_what_lies_between_producers_and_reader_decides(step: str, fold: Fold | None) -> None:
    """Of a class that nobody knows; one flag of its config changes what is believed."""
    assert found(odd_model.OddConfig(step=step)) == [{} if fold is None else {"join": fold}] * 2


def test_a_candidate_that_is_none_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever proposes it: with keys for values, one producer too many, one too few, or heads forgotten."""
    lies = [
        ("self_attn.o_proj", Fold(("self_attn.k_proj",), per_head=True)),
        ("self_attn.o_proj", Fold(("self_attn.v_proj", "self_attn.k_proj"), per_head=True)),
        ("self_attn.o_proj", Fold(("self_attn.v_proj",))),
        ("mlp.down_proj", Fold(("mlp.gate_proj",))),
        ("mlp.down_proj", Fold(("mlp.up_proj",))),
    ]
    config = family("llama", num_key_value_heads=4)
    for reader, lie in lies:
        monkeypatch.setattr(folding, "_candidates", lambda *_, only={reader: [lie]}: only)
        assert found(config) == [{}, {}], lie
    monkeypatch.setattr(folding, "_candidates", lambda *_: {"self_attn.o_proj": [VALUES["self_attn.o_proj"]]})
    assert found(config) == [VALUES, VALUES]


@pytest.mark.parametrize("count", [3, 40], ids=["all in the trial", "more than in the trial"])
def test_one_expert_that_sees_tokens_tells_of_all(count: int) -> None:
    of_experts = {f"team.{n}.join": Fold((f"team.{n}.spread", f"team.{n}.side")) for n in range(count)}
    assert found(odd_model.OddConfig(n_experts=count)) == [{"join": JOIN, **of_experts}] * 2


def test_nothing_of_the_process_changes() -> None:
    torch.manual_seed(1)
    with_folds(skeleton := skeleton_of(family("llama")))
    drawn, again = torch.rand(3), with_folds(skeleton)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    assert torch.equal(drawn, torch.rand(3))
    assert with_folds(skeleton).blocks == again.blocks
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)
    assert all(parameter.is_meta for parameter in again.model.parameters())
    assert again.model is skeleton.model


def refuse(*_: Any) -> Any:
    raise ValueError("no such\nsizes")


def test_where_no_small_instance_is_made_the_models_own_blocks_are_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folding, "_small_config", refuse)
    assert found(family("llama")) == [GATED, GATED]
    assert caplog.messages == []
    monkeypatch.setattr(folding, "MAX_PARAMETERS", 7000)
    assert found(family("llama")) == [{}, {}]
    faults = "no such sizes; no such sizes; a block has 7744 parameters, more than 7000"
    assert caplog.messages == [f"llama: no fold could be tried, all permutations are stored ({faults})"]
