"""Families: a fold of the table changes no logit, and whatever field of a config says what, nothing else is run.

Both are tried on transformers' own model of a tiny config of the family (tests/families.py), and again with each field
of its config class set to another value: where transformers makes a model of that, our logits are its logits and the
folds still hold, or the config is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from pieces import TOKENS
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from streamprune.model.architectures import ARCHITECTURES
from streamprune.model.skeleton import Heads
from streamprune.model.source import Source, open_dense
from streamprune.pipeline.block_pruning import FoldedPermutation, folded_permutations

IDS = TOKENS[:, :12] % 96


def logits(model: PreTrainedModel, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.inference_mode():
        inputs = {"input_ids": IDS, "use_cache": False, "return_dict": True}
        return torch.func.functional_call(model, tensors or {}, (), inputs).logits[0]


def any_folds(source: Source) -> Iterator[FoldedPermutation]:
    """A random permutation folded wherever the table says that one folds."""
    generator = torch.Generator().manual_seed(5)
    for block in source.blocks:
        for group in block.groups:
            if group.producers:
                heads = source.skeleton.heads if group.per_head else None
                width = group.layers[0].shape[1]
                order = inside_heads(heads, generator) if heads else torch.randperm(width, generator=generator)
                yield from folded_permutations(block, group, order, heads)


def inside_heads(heads: Heads, generator: torch.Generator) -> torch.Tensor:
    """Random orders of the channels of each KV head, the same for all of its query heads."""
    each = [torch.randperm(heads.size, generator=generator) for _ in range(heads.key_values)]
    shared = heads.queries // heads.key_values
    return torch.cat([head * heads.size + each[head // shared] for head in range(heads.queries)])


def reordered(model: PreTrainedModel, folds: list[FoldedPermutation]) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for fold in folds:
        for name, dim in fold.reorders:
            if name in tensors:
                tensors[name] = tensors[name].index_select(dim, fold.permutation)
    return tensors


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_fold_of_the_table_leaves_the_logits(name: str, tmp_path: Path) -> None:
    source = open_dense(families.write_family(tmp_path, name))
    folding = {source.blocks[0].local(group.name) for group in source.blocks[0].groups if group.producers}
    assert folding == {fold.layer for fold in ARCHITECTURES[name].folds}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    folds = list(any_folds(source))
    expected = logits(model)
    torch.testing.assert_close(logits(model, reordered(model, folds)), expected, rtol=1e-9, atol=1e-9)
    for fold in folds:  # each of them is needed
        without = reordered(model, [other for other in folds if other is not fold])
        other = logits(model, without)
        assert (len(fold.reorders) == 2 and "output" not in fold.name) or float((other - expected).abs().max()) > 1e-4


def other_values(config: PretrainedConfig, field: str) -> Iterator[Any]:
    """Values of a field that may be others than a config's; not all make a model."""
    value = getattr(config, field)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value // 2) if value else (1,)
    elif isinstance(value, float):
        yield value / 2 + 0.25
    elif isinstance(value, str):
        yield "relu"
    elif isinstance(value, list):
        yield value[::-1]
    elif isinstance(value, dict):
        yield {**value, "rope_theta": 10.0}
    else:
        yield from (True, 2, 0.5)
