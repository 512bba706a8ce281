"""What of a model's blocks cannot be seen by running them: where a permutation folds, and along what the stream lies.

A table of data, by model_type. Blocks, and which layers share an input, are found (streamprune/model/discovery.py). A
type that is not in the table works too, with its permutations stored. tests/model/test_model_folds.py proves each row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """A layer's input into whose producers a permutation folds, by the layers' names inside a block.

    producers: layers whose output rows (and bias) are this input, channel by channel, up to elementwise functions
    per_head:  the input is attention's output: a permutation must stay inside heads, and is one for all the query
               heads that share a KV head, whose value rows are the producer's
    times:     how often the producer's rows hold the channels, one range after the other (2: gate and up fused)
    interleaved: or all rows of the first channel, then those of the second
    """

    layer: str
    producers: tuple[str, ...]
    per_head: bool = False
    times: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class ResidualStream:
    """Parameters with a residual-stream dimension, and which dimension it is; absent ones are skipped.

    block: inside every block; outer: outside, full names.
    """

    block: tuple[tuple[str, int], ...]
    outer: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Architecture:
    """The folds of a block, and the residual stream where it is known; without it that is never permuted.

    together: whether sequences that go through a block at once become, bit by bit, what each would alone
    """

    folds: tuple[Fold, ...] = ()
    residual: ResidualStream | None = None
    together: bool = True


_ATTENTION = Fold("self_attn.o_proj", ("self_attn.v_proj",), per_head=True)
_GATED = (_ATTENTION, Fold("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")))
_UNGATED = (_ATTENTION, Fold("mlp.down_proj", ("mlp.up_proj",)))
_FUSED_GATE = Fold("mlp.down_proj", ("mlp.gate_up_proj",), times=2)
_FEED_FORWARD = (_ATTENTION, Fold("feed_forward.down_proj", ("feed_forward.gate_proj", "feed_forward.up_proj")))
_BESIDE_FUSED = (Fold("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),)

_LLAMA = Architecture(
    folds=_GATED,
    residual=ResidualStream(
        block=(
            ("input_layernorm.weight", 0),
            ("self_attn.q_proj.weight", 1),
            ("self_attn.k_proj.weight", 1),
            ("self_attn.v_proj.weight", 1),
            ("self_attn.o_proj.weight", 0),
            ("self_attn.o_proj.bias", 0),
            ("post_attention_layernorm.weight", 0),
            ("mlp.gate_proj.weight", 1),
            ("mlp.up_proj.weight", 1),
            ("mlp.down_proj.weight", 0),
            ("mlp.down_proj.bias", 0),
        ),
        outer=(("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("lm_head.weight", 1)),
    ),
)

_OPT = Architecture(
    folds=(
        Fold("self_attn.out_proj", ("self_attn.v_proj",), per_head=True),
        Fold("fc2", ("fc1",)),
    ),
    residual=ResidualStream(
        block=(
            ("self_attn_layer_norm.weight", 0),
            ("self_attn_layer_norm.bias", 0),
            ("self_attn.q_proj.weight", 1),
            ("self_attn.k_proj.weight", 1),
            ("self_attn.v_proj.weight", 1),
            ("self_attn.out_proj.weight", 0),
            ("self_attn.out_proj.bias", 0),
            ("final_layer_norm.weight", 0),
            ("final_layer_norm.bias", 0),
            ("fc1.weight", 1),
            ("fc2.weight", 0),
            ("fc2.bias", 0),
        ),
        outer=(
            ("model.decoder.embed_tokens.weight", 1),
            ("model.decoder.embed_positions.weight", 1),
            ("model.decoder.project_in.weight", 0),
            ("model.decoder.project_out.weight", 1),
            ("model.decoder.final_layer_norm.weight", 0),
            ("model.decoder.final_layer_norm.bias", 0),
            ("lm_head.weight", 1),
        ),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "opt": _OPT,
    **dict.fromkeys(("llama", "ministral", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(
        (
            *("cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "hunyuan_v1_dense"),
            *("ministral3", "olmo", "olmo2", "olmo3", "seed_oss", "smollm3", "stablelm"),
        ),
        Architecture(_GATED),
    ),
    **dict.fromkeys(("qwen2_5_vl_text", "qwen3_vl_text"), Architecture(_GATED)),
    "gemma4_text": Architecture(_GATED[1:], together=False),  # heads of its blocks differ in size
    **dict.fromkeys(("apertus", "nemotron"), Architecture(_UNGATED)),
    **dict.fromkeys(("glm", "glm4"), Architecture((_ATTENTION, _FUSED_GATE))),
    "phi3": Architecture((_FUSED_GATE,)),
    "phi": Architecture((Fold("self_attn.dense", ("self_attn.v_proj",), per_head=True), Fold("mlp.fc2", ("mlp.fc1",)))),
    "starcoder2": Architecture((_ATTENTION, Fold("mlp.c_proj", ("mlp.c_fc",)))),
    "gptj": Architecture((Fold("attn.out_proj", ("attn.v_proj",), per_head=True), Fold("mlp.fc_out", ("mlp.fc_in",)))),
    "gpt2": Architecture((Fold("mlp.c_proj", ("mlp.c_fc",)),)),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), Architecture(_BESIDE_FUSED)),
    # hybrids: Qwen's attention has a gate, which no value row holds
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), Architecture(_GATED[1:])),
    "bamba": Architecture(_FEED_FORWARD),
    "jamba": Architecture(_FEED_FORWARD, together=False),
    "granitemoehybrid": Architecture(
        (_ATTENTION, Fold("shared_mlp.output_linear", ("shared_mlp.input_linear",), times=2))
    ),
    "lfm2": Architecture(
        (
            Fold("self_attn.out_proj", ("self_attn.v_proj",), per_head=True),
            Fold("feed_forward.w2", ("feed_forward.w1", "feed_forward.w3")),
        )
    ),
    "nemotron_h": Architecture(
        (
            Fold("mixer.o_proj", ("mixer.v_proj",), per_head=True),
            Fold("mixer.down_proj", ("mixer.up_proj",)),
        )
    ),
    "mpt": Architecture((Fold("ffn.down_proj", ("ffn.up_proj",)),)),
}


def architecture_of(model_type: str) -> Architecture:
    """The row of a model_type; one without folds where there is none."""
    return ARCHITECTURES.get(model_type, Architecture(together=False))
