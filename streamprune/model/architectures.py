"""What of a model cannot be seen by running it once, by model_type: what lies along the residual stream.

Blocks, and which layers share an input, are found (discovery.py), and where a permutation folds is tried (folding.py);
a type that is in no table goes through all the same.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ResidualStream:
    """Parameters with a residual-stream dimension, and which dimension it is; absent ones are skipped.

    block: inside every block; outer: outside, full names.
    """

    block: tuple[tuple[str, int], ...]
    outer: tuple[tuple[str, int], ...]


_LLAMA = ResidualStream(
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
)

_OPT = ResidualStream(
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
)

RESIDUAL_STREAMS: dict[str, ResidualStream] = {
    "opt": _OPT,
    **dict.fromkeys(("llama", "ministral", "mistral", "qwen2", "qwen3"), _LLAMA),
}

# In transformers padding changes what these go on with (MiniMax's linear attention, tried with 5.23).
UNPADDED = {"minimax"}

# Of these tests show that several sequences that go through a block at once become, bit by bit, what each would alone.
TOGETHER = {
    *RESIDUAL_STREAMS,
    *("apertus", "bamba", "bloom", "cohere", "cohere2", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm"),
    *("glm4", "gpt2", "gpt_neox", "gptj", "granite", "granitemoehybrid", "hunyuan_v1_dense", "lfm2", "ministral3"),
    *("mpt", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2_5_vl_text", "qwen3_5_text"),
    *("qwen3_next", "qwen3_vl_text", "seed_oss", "smollm3", "stablelm", "starcoder2"),
}
