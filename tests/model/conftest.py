"""Tiny models of the architectures that only these tests need, beside those of `sources`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import (
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=8))


def ministral() -> PreTrainedModel:
    """Its blocks attend to a window and to everything in turn."""
    kinds = ["sliding_attention", "full_attention"]
    windows = {"sliding_window": 8, "layer_types": kinds}
    return MinistralForCausalLM(MinistralConfig(**SIZES, num_hidden_layers=2, head_dim=8, **windows))


def qwen2() -> PreTrainedModel:
    """Blocks 0 and 1 attend to everything, 2 and 3 to a window: their masks differ."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=4, tie_word_embeddings=True, **window))


def qwen3() -> PreTrainedModel:
    """Heads of 16, so that their outputs are twice as many as the hidden size, and norms inside attention."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2, head_dim=16))


@pytest.fixture(scope="session")
def models(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny source checkpoints by name; never changed."""
    folder = tmp_path_factory.mktemp("models")
    makers = {"mistral": mistral, "ministral": ministral, "qwen2": qwen2, "qwen3": qwen3}

    def model(name: str) -> Path:
        if name not in makers:
            return sources(name)
        path = folder / name
        return path if path.exists() else tiny.write_model(path, makers[name](), torch.float32)

    return model
