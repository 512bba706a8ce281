"""A tiny checkpoint of every family that goes through, from transformers' own config and model classes.

Hidden size 32, four heads of 8, two blocks, 48 inner channels; beside the sizes what makes a family differ from others.
"""

import re
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from streamprune.model.library import auto_class
from streamprune.model.skeleton import Block
from streamprune.model.source import Source

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, **NO_TOKENS}
PLAIN = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **NO_TOKENS,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2}
WITH_HEADS = {**GROUPED, "head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA4 = {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "ministral": {**WITH_HEADS, **WINDOW},
    "ministral3": {**WITH_HEADS, "rope_parameters": LLAMA4},
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "qwen3": {**GROUPED, "head_dim": 16},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "apertus": {**GROUPED, "rope_parameters": ROPE},
    "bamba": {**GROUPED, **MAMBA2, "attn_layer_indices": [1]},
    "bloom": {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 2, **NO_TOKENS},
    "cohere": {**GROUPED, "use_qk_norm": True},
    "cohere2": {**GROUPED, **WINDOW},
    "exaone4": {**GROUPED, **WINDOW},
    "falcon": {**PLAIN, "ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True, "alibi": False},
    "gemma": WITH_HEADS,
    "gemma2": {**WITH_HEADS, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WITH_HEADS, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **WITH_HEADS, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
    },
    "glm": {**WITH_HEADS, "attention_bias": True},
    "glm4": WITH_HEADS,
    "gpt_neox": PLAIN,
    "gpt2": {**GPT, "n_inner": 48},
    "gptj": {**GPT, "n_inner": 48, "rotary_dim": 4},
    "granite": {**GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoehybrid": {
        **GROUPED, **MAMBA2, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
    "hunyuan_v1_dense": {**WITH_HEADS},
    "jamba": {
        **GROUPED, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mpt": {
        "vocab_size": tiny.VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "expansion_ratio": 2, **NO_TOKENS,
    },
    "nemotron": GROUPED,
    "nemotron_h": {
        **WITH_HEADS, "num_hidden_layers": None, "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16,
        "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    },
    "olmo": {**GROUPED, "clip_qkv": 1.0},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, **WINDOW},
    "phi": {**PLAIN, "partial_rotary_factor": 0.5},
    "phi3": {**GROUPED, "sliding_window": 8},
    "qwen3_5_text": {**WITH_HEADS, **DELTA},
    "seed_oss": WITH_HEADS,
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "starcoder2": {**GROUPED, "sliding_window": 8},
}  # fmt: skip
LATENT = {
    **PLAIN, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
TOP_2 = {"num_experts_per_tok": 2}
LOCAL, PLAIN_EXPERTS = {"num_local_experts": 4, **TOP_2}, {"num_experts": 4, **TOP_2}
INNER = {"moe_intermediate_size": 24}
SHARED = {**INNER, "shared_expert_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **INNER, **TOP_2}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **LATENT, **ROUTED, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**LATENT, **ROUTED, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**WITH_HEADS, **ROUTED, "use_qk_norm": True},
    "gpt_oss": {**WITH_HEADS, **LOCAL, "sliding_window": 8, "rope_parameters": ROPE},
    "granitemoe": {**GROUPED, **LOCAL, "residual_multiplier": 0.5},
    "llama4_text": {
        **WITH_HEADS, **LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
        "floor_scale": 8, "attention_chunk_size": 8, "no_rope_layers": [1, 0],
    },
    "minimax": {
        **WITH_HEADS, **LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 8,
        "mlp_alpha_factor": 2.0,
    },
    "minimax_m2": {**WITH_HEADS, **LOCAL},
    "mixtral": {**GROUPED, **LOCAL, "sliding_window": 8},
    "olmoe": {**GROUPED, **PLAIN_EXPERTS, "clip_qkv": 1.0},
    "qwen2_moe": {**GROUPED, **PLAIN_EXPERTS, **SHARED, "use_sliding_window": True, "sliding_window": 8},
    "qwen3_5_moe_text": {**WITH_HEADS, **DELTA, **PLAIN_EXPERTS, **SHARED},
    "qwen3_moe": {**WITH_HEADS, **PLAIN_EXPERTS, **INNER, "mlp_only_layers": [1]},
    "qwen3_next": {**WITH_HEADS, **DELTA, **PLAIN_EXPERTS, **SHARED},
}  # fmt: skip
FAMILIES.update(MIXTURES)


# Models that hold one of those among other parts, most of them with pictures.
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
VISUAL = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
SPECIAL = {"image_token_id": 125, "video_token_id": 126, "vision_start_token_id": 123, "vision_end_token_id": 124}
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": FAMILIES["gemma3_text"], "vision_config": {**TOWER, "vision_use_head": False}, **NO_TOKENS,
        "mm_tokens_per_image": 4, "image_token_index": 126, "boi_token_index": 125, "eoi_token_index": 124,
    },
    "gemma4": {
        "text_config": {**FAMILIES["gemma4_text"], "pad_token_id": 0}, **NO_TOKENS, "image_token_id": 126,
        "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64},
        "boi_token_id": 125, "eoi_token_id": 124, "video_token_id": 123, "audio_token_id": 122, "boa_token_id": 121,
        "eoa_token_index": 120, "audio_config": None,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **FAMILIES["mistral"]}, "image_token_index": 126,
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
    },
    "qwen2_5_vl": {
        "text_config": {**GROUPED, "rope_parameters": MROPE},
        "vision_config": {**VISUAL, "fullatt_block_indexes": [1], "window_size": 8}, **SPECIAL,
    },
    "qwen3_5": {
        "text_config": {**FAMILIES["qwen3_5_text"], "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0}},
        "vision_config": {**VISUAL, "num_position_embeddings": 16}, **SPECIAL,
    },
    "qwen3_vl": {
        "text_config": {**WITH_HEADS, "rope_parameters": INTERLEAVED},
        "vision_config": {**VISUAL, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **SPECIAL,
    },
}  # fmt: skip
# Of a family's models such as are built otherwise: model_type, and what of its config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "gemma4_text, plain": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True},
    ),
    "qwen3_next, dense": ("qwen3_next", {"num_experts": 0, "intermediate_size": 48}),
    "opt, post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}


def write_family(folder: Path, name: str, **changes: Any) -> Path:
    """A checkpoint of a family or a variant in float32, its weights random, as transformers saves it."""
    torch.manual_seed(0)
    model_type, own = VARIANTS.get(name, (name, {}))
    config = CONFIG_MAPPING[model_type](**{**{**FAMILIES, **WRAPPED}[model_type], **own, **changes})
    return tiny.write_model(folder, auto_class(type(config)).from_config(config), torch.float32)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As transformers loads it, with all its parts."""
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = auto_class(type(config)).from_pretrained(folder, dtype=dtype)
    return model.eval()


HEAD = (
    "| model type | of the blocks' matrices | permutation folded | permutation stored | notes |\n|---|---|---|---|---|"
)


def row_of(source: Source, coverage: float) -> str:
    """A family's row of docs/models.md: what of its blocks is pruned, and where permutations go.

    Of blocks that differ each layer is named once, and so is the same one of several experts, N.
    """
    skeleton = source.skeleton
    groups = {
        (", ".join(_named(block, name) for name in group.names), bool(group.producers)): None
        for block in source.blocks
        for group in block.groups
    }
    folded, stored = ("; ".join(names for names, folds in groups if folds is wanted) for wanted in (True, False))
    dense = {_named(block, name): None for block in source.blocks for name in block.ungrouped}
    notes = ["`--shuffle residual`"] * (skeleton.residual is not None)
    notes += ["one sequence at a time"] * (not skeleton.batched)
    notes += [f"dense: {', '.join(dense)}"] * bool(dense)
    cells = f"`{skeleton.model.config.model_type}`", f"{coverage:.1%}", folded, stored, "; ".join(notes)
    return f"| {' | '.join(cells)} |"


def _named(block: Block, name: str) -> str:
    """A layer's name inside its block, of whichever expert it is."""
    return re.sub(r"(?<=experts\.)\d+", "N", block.local(name))
