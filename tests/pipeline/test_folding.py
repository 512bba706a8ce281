"""A folded permutation changes nothing: with nothing dropped, the reordered model computes the dense model's logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from streamprune.config import NMPattern, PruneConfig
from streamprune.model.source import open_dense
from streamprune.pipeline.block_pruning import PrunedBlock, prune_block
from streamprune.pipeline.progress import StageTimes
from streamprune.pruning.statistics import ChannelStatistics, StatisticsAccumulator

TOKENS = torch.tensor([[ord(character) for character in tiny.text(200, seed=5)]])


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def statistics_of(model: Any, layers: list[str], config: PruneConfig) -> dict[str, ChannelStatistics]:
    """Statistics of the layers' inputs, by plain hooks on the plain model."""
    accumulators, handles = {}, []
    for name in layers:
        module = model.get_submodule(name)
        accumulators[name] = StatisticsAccumulator(module.in_features, config, torch.device("cpu"))

        def hook(module: Any, inputs: Any, name: str = name) -> None:
            accumulators[name].add(inputs[0].reshape(-1, inputs[0].shape[-1]).float())

        handles.append(module.register_forward_pre_hook(hook))
    logits(model)
    for handle in handles:
        handle.remove()
    return {name: accumulator.result() for name, accumulator in accumulators.items()}


def prune_all(folder: Path, config: PruneConfig) -> list[PrunedBlock]:
    skeleton, tensors = open_dense(folder).skeleton, tiny.read_tensors(folder)
    statistics = statistics_of(load(folder), [name for block in skeleton.blocks for name in block.layers], config)
    m, timed = config.pattern.group_size, StageTimes(torch.device("cpu"))
    return [
        prune_block(
            block, tensors, statistics, {name for name, view in block.layers.items() if view.shape[1] % m == 0},
            skeleton.heads, config, timed,
        )
        for block in skeleton.blocks
    ]  # fmt: skip


def reordered_model(folder: Path, blocks: list[PrunedBlock], *, gather: bool = True) -> Any:
    """The plain model with the blocks' tensors before dropping; stored permutations by hooks."""
    model = load(folder)
    for block in blocks:
        state = {**block.others, **{f"{name}.weight": layer.weight for name, layer in block.layers.items()}}
        missing = model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
        assert missing.unexpected_keys == []
        for name, layer in block.layers.items():
            if layer.gather is not None and gather:
                order = layer.gather
                model.get_submodule(name).register_forward_pre_hook(lambda _, x, order=order: (x[0][..., order],))
    return model


@pytest.mark.parametrize(
    ("source", "pattern"),
    [("llama", "2:4"), ("llama", "3:5"), ("llama", "8:32"), ("llama-plain", "4:8"), ("opt", "2:4"), ("opt", "2:8")],
)
def test_logits_are_the_dense_models(source: str, pattern: str, sources: Callable[[str], Path]) -> None:
    folder = sources(source)
    blocks = prune_all(folder, PruneConfig(pattern=NMPattern.parse(pattern)))
    assert all(block.folded or pattern == "2:8" for block in blocks)
    for block in blocks:
        for fold in block.folded:
            assert not torch.equal(fold.permutation, torch.arange(len(fold.permutation))), fold.name
    expected = logits(load(folder))
    assert expected.std() > 1
    assert (logits(reordered_model(folder, blocks)) - expected).abs().max() <= 1e-5


def test_a_forgotten_bias_or_gather_would_be_seen(sources: Callable[[str], Path]) -> None:
    """The test above has teeth: without one reordered bias, or without the gathers, the logits are others."""
    folder = sources("opt")
    blocks = prune_all(folder, PruneConfig())
    expected = logits(load(folder))
    assert (logits(reordered_model(folder, blocks, gather=False)) - expected).abs().max() > 0.1
    name = "model.decoder.layers.1.fc1.bias"
    blocks[1].others[name] = tiny.read_tensors(folder)[name]
    assert (logits(reordered_model(folder, blocks)) - expected).abs().max() > 0.01


def test_grouped_heads_share_one_permutation(sources: Callable[[str], Path]) -> None:
    """Both query heads of a KV head are permuted alike, inside the head, and v_proj's rows and bias as they are."""
    blocks = prune_all(sources("llama"), PruneConfig())
    by_name = {fold.name: fold for fold in blocks[0].folded}
    prefix = "model.layers.0.self_attn"
    columns = by_name[f"{prefix}.o_proj.input_permutation"]
    rows = by_name[f"{prefix}.v_proj.output_permutation"]
    assert columns.reorders == ((f"{prefix}.o_proj.weight", 1),)
    assert set(rows.reorders) == {(f"{prefix}.v_proj.weight", 0), (f"{prefix}.v_proj.bias", 0)}
    heads = columns.permutation.view(4, 16)
    assert torch.equal(heads // 16, torch.arange(4)[:, None].expand(4, 16))
    assert torch.equal(heads[0] % 16, heads[1] % 16)
    assert torch.equal(heads[2] % 16, heads[3] % 16)
    assert torch.equal(rows.permutation, torch.cat([heads[0], 16 + heads[2] % 16]))
