"""Folds are found by trial: which of a family's, that only what holds is believed, and what happens where none can be
tried. That a believed fold leaves the whole model's logits is shown in test_model_families.py.
"""

import re
from typing import Any

import families
import odd_model
import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from streamprune.model import folding
from streamprune.model.folding import Fold, with_folds
from streamprune.model.skeleton import Block, Skeleton, skeleton_of

Folds = dict[str, Fold]


def gated(path: str) -> Folds:
    return {f"{path}.down_proj": Fold((f"{path}.gate_proj", f"{path}.up_proj"))}


def experts(path: str, interleaved: bool = False) -> Folds:
    """Of every expert, N."""
    of_one = f"{path}.experts.N"
    return {f"{of_one}.down_proj": Fold((f"{of_one}.gate_up_proj",), times=2, interleaved=interleaved)}


VALUES = {"self_attn.o_proj": Fold(("self_attn.v_proj",), per_head=True)}
GATED: Folds = VALUES | gated("mlp")
UNGATED: Folds = {**VALUES, "mlp.down_proj": Fold(("mlp.up_proj",))}
FUSED: Folds = {"mlp.down_proj": Fold(("mlp.gate_up_proj",), times=2)}
BESIDE_FUSED: Folds = {"mlp.dense_4h_to_h": Fold(("mlp.dense_h_to_4h",))}
OF_FAMILIES: dict[str, Folds] = {
    **dict.fromkeys([*families.FAMILIES, *families.WRAPPED], GATED),
    **dict.fromkeys(("apertus", "nemotron"), UNGATED),
    **dict.fromkeys(("bamba", "jamba"), VALUES | gated("feed_forward")),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), BESIDE_FUSED),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "qwen3_5", "qwen3_5_text"), gated("mlp")
    ),  # heads differ; gated attention
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), gated("mlp") | gated("mlp.shared_experts") | experts("mlp")),
    **dict.fromkeys(("glm", "glm4"), VALUES | FUSED),
    "glm4_moe": GATED | gated("mlp.shared_experts") | experts("mlp"),
    "gpt2": {"mlp.c_proj": Fold(("mlp.c_fc",))},
    "gptj": {"attn.out_proj": Fold(("attn.v_proj",), per_head=True), "mlp.fc_out": Fold(("mlp.fc_in",))},
    "gpt_oss": VALUES | experts("mlp", interleaved=True),
    "granitemoe": VALUES | experts("block_sparse_moe"),
    "granitemoehybrid": {**VALUES, "shared_mlp.output_linear": Fold(("shared_mlp.input_linear",), times=2)},
    "lfm2": {
        "self_attn.out_proj": VALUES["self_attn.o_proj"],
        "feed_forward.w2": Fold(("feed_forward.w1", "feed_forward.w3")),
    },
    "llama4_text": VALUES | gated("feed_forward") | gated("feed_forward.shared_expert") | experts("feed_forward"),
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral", "olmoe"), VALUES | experts("mlp")),
    "mpt": {"ffn.down_proj": Fold(("ffn.up_proj",))},
    "nemotron_h": {
        "mixer.o_proj": Fold(("mixer.v_proj",), per_head=True),
        "mixer.down_proj": Fold(("mixer.up_proj",)),
    },
    "opt": {"self_attn.out_proj": VALUES["self_attn.o_proj"], "fc2": Fold(("fc1",))},
    "phi": {"self_attn.dense": VALUES["self_attn.o_proj"], "mlp.fc2": Fold(("mlp.fc1",))},
    "phi3": FUSED,
    "qwen2_moe": VALUES | gated("mlp.shared_expert") | experts("mlp"),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_next"), gated("mlp.shared_expert") | experts("mlp")),
    "qwen3_moe": GATED | experts("mlp"),
    "starcoder2": {**VALUES, "mlp.c_proj": Fold(("mlp.c_fc",))},
}
# Of classes beside: heads are mixed in pairs; norms lie before o_proj and down_proj.
ALL = {**families.FAMILIES, **families.WRAPPED, "diffllama": families.PLAIN, "bitnet": families.GROUPED}
OF_ALL = {**OF_FAMILIES, "diffllama": gated("mlp"), "bitnet": {}}
# As published.
LATENT = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 128, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_chunk_size": 256}
JOIN = Fold(("spread", "side"))


def folds_of(block: Block) -> Folds:
    """Of each input group, by its first layer's name; Fold(()) where its permutation is stored."""
    return {
        block.local(group.name): Fold(
            tuple(map(block.local, group.producers)), group.per_head, group.times, group.interleaved
        )
        for group in block.groups
    }


def skeleton(config: PretrainedConfig) -> Skeleton:
    """Of a checkpoint that has all experts of a block in one tensor."""
    return skeleton_of(config, lambda model: dict(model.named_parameters()))


def found(config: PretrainedConfig) -> list[Folds]:
    """Of each block."""
    return [
        {reader: fold for reader, fold in folds_of(block).items() if fold.producers}
        for block in with_folds(skeleton(config)).blocks
    ]


def found_in_all(config: PretrainedConfig) -> Folds:
    """Of whichever block and expert has such a layer: all must agree."""
    together: dict[str, set[Fold]] = {}
    for block in with_folds(skeleton(config)).blocks:
        for reader, fold in folds_of(block).items():
            producers = tuple(map(of_any, fold.producers))
            together.setdefault(of_any(reader), set()).add(fold._replace(producers=producers))
    assert {name: folds for name, folds in together.items() if len(folds) > 1} == {}
    return {name: fold for name, (fold,) in together.items() if fold.producers}


def of_any(layer: str) -> str:
    return re.sub(r"(?<=experts\.)\d+", "N", layer)


def family(name: str, **changes: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[name](**{**ALL[name], **changes})


@pytest.mark.parametrize("name", list(ALL))
def test_folds_of_a_family(name: str) -> None:
    assert found_in_all(family(name)) == OF_ALL[name]


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
        ("deepseek_v3", {**LATENT, "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}),
        ("gpt_oss", {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "head_dim": 64}),
        ("gemma4_text", {"hidden_size": 5376, "intermediate_size": 21504, "head_dim": 256, "global_head_dim": 512}),
        ("bamba", {**MAMBA, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_folds_at_the_sizes_of_published_models(name: str, sizes: dict[str, int]) -> None:
    assert found_in_all(family(name, **sizes)) == OF_ALL[name]


@pytest.mark.parametrize(
    ("step", "fold"),
    [
        ("", JOIN),
        ("halves", Fold(("spread",), times=2)),
        ("interleaved", Fold(("spread",), times=2, interleaved=True)),
        ("softmax", JOIN),  # what is done to all channels alike may be done in any order
        ("bare norm", JOIN),
        ("norm", None),
        ("softmax of parts", None),
        ("sums", None),
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
    with_folds(own := skeleton(family("llama")))
    drawn, again = torch.rand(3), with_folds(own)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    assert torch.equal(drawn, torch.rand(3))
    assert with_folds(own).blocks == again.blocks
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, threads)
    assert all(parameter.is_meta for parameter in again.model.parameters())
    assert again.model is own.model


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
    caplog.clear()
    monkeypatch.setattr(folding, "_candidates", lambda *_: {})
    assert found(family("llama")) == [{}, {}]
    assert caplog.messages == []  # nothing of it could fold
