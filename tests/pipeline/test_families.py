"""Every family goes the whole way: compress, verify, evaluate, export, loading in transformers.

A family is a row of tests/families.py; docs/models.md is the table of what is asserted here.
"""

from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.verify import verify

TOKENS = torch.tensor([[ord(character) for character in "Twenty-nine letters and more."]])


def logits_of(folder: Path) -> torch.Tensor:
    """As transformers computes them from a folder, dense or packed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits[0]


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_the_whole_way(name: str, prune: Callable[..., CompressResult], held_out: Path, tmp_path: Path) -> None:
    source = families.write_family(tmp_path / "source", name)
    out, dense = tmp_path / "out", tmp_path / "dense"
    prune(source, out)
    assert verify(out, source=source).faults == []
    export(out, out=dense)
    packed, masked, original = logits_of(out), logits_of(dense), logits_of(source)
    torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-4)
    assert float((packed - original).abs().max()) > 1e-2
    losses = [evaluate(folder, text=held_out, sequence_length=32, dtype="float32").loss for folder in (out, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
