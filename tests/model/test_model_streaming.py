"""How many sequences go through a block at once; what they become, whole jobs test (pipeline/test_same_bytes.py)."""

import pytest
import torch

from streamprune.model.streaming import sequences_at_once
from streamprune_kernels import FEW_ROWS, MAX_SHARED_TOKENS


@pytest.mark.parametrize(("device", "few"), [("cpu", FEW_ROWS), ("cuda", MAX_SHARED_TOKENS)])
def test_sequences_of_few_tokens_go_one_by_one(device: str, few: int) -> None:
    """Products of so few rows round differently: by another kernel, or in another number of parts."""
    assert [sequences_at_once(4, tokens, torch.device(device)) for tokens in (1, few, few + 1)] == [1, 1, 4]
