"""A tiny checkpoint of every family that goes through, from transformers' own config and model classes.

Hidden size 32, four heads of 8, two blocks, 48 inner channels; beside the sizes what makes a family differ from others.
"""

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "ministral": {**WITH_HEADS, **WINDOW},
    "ministral3": {**WITH_HEADS, "rope_parameters": LLAMA4},
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "qwen3": {**GROUPED, "head_dim": 16},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "apertus": {**GROUPED, "rope_parameters": ROPE},
    "bloom": {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 2, **NO_TOKENS},
    "cohere": {**GROUPED, "use_qk_norm": True},
    "cohere2": {**GROUPED, **WINDOW},
    "exaone4": {**GROUPED, **WINDOW},
    "falcon": {**PLAIN, "ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True, "alibi": False},
    "gemma": WITH_HEADS,
    "gemma2": {**WITH_HEADS, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WITH_HEADS, **WINDOW, "query_pre_attn_scalar": 8},
    "glm": {**WITH_HEADS, "attention_bias": True},
    "glm4": WITH_HEADS,
    "gpt_neox": PLAIN,
    "gpt2": {**GPT, "n_inner": 48},
    "gptj": {**GPT, "n_inner": 48, "rotary_dim": 4},
    "granite": {**GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "hunyuan_v1_dense": {**WITH_HEADS},
    "mpt": {
        "vocab_size": tiny.VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "expansion_ratio": 2, **NO_TOKENS,
    },
    "nemotron": GROUPED,
    "olmo": {**GROUPED, "clip_qkv": 1.0},
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, **WINDOW},
    "phi": {**PLAIN, "partial_rotary_factor": 0.5},
    "phi3": {**GROUPED, "sliding_window": 8},
    "seed_oss": WITH_HEADS,
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "starcoder2": {**GROUPED, "sliding_window": 8},
}  # fmt: skip


def write_family(folder: Path, model_type: str, **changes: Any) -> Path:
    """A checkpoint of a family in float32, its weights random, as transformers saves it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**FAMILIES[model_type], **changes})
    return tiny.write_model(folder, AutoModelForCausalLM.from_config(config), torch.float32)


HEAD = (
    "| model type | of the blocks' matrices | permutation folded | permutation stored | notes |\n|---|---|---|---|---|"
)


def row_of(source: Source, coverage: float) -> str:
    """A family's row of docs/models.md: what of its blocks is pruned, and where permutations go."""
    block, skeleton = source.blocks[0], source.skeleton
    groups = [(", ".join(map(block.local, group.names)), bool(group.producers)) for group in block.groups]
    folded, stored = ("; ".join(names for names, folds in groups if folds is wanted) for wanted in (True, False))
    notes = ["`--shuffle residual`"] * (skeleton.residual is not None)
    notes += ["one sequence at a time"] * (not skeleton.batched)
    notes += [f"dense: {', '.join(map(block.local, block.ungrouped))}"] * bool(block.ungrouped)
    cells = f"`{skeleton.model.config.model_type}`", f"{coverage:.1%}", folded, stored, "; ".join(notes)
    return f"| {' | '.join(cells)} |"
