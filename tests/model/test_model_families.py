"""Families: a fold changes no logit of the whole model, and whatever field of a config says what, nothing else is run.

Both are tried on transformers' own model of a tiny config (tests/families.py), and again with fields of its config
class set to other values: where transformers makes a model of that, our logits are its logits and the folds still hold,
or the config is refused.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from pieces import TOKENS, logits_of, recorded, runnable
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from streamprune.errors import CheckpointError
from streamprune.model.configuration import NOT_OF_THE_FORWARD
from streamprune.model.experts import replace_experts
from streamprune.model.folding import FoldedPermutation, folded_permutations
from streamprune.model.library import auto_class, is_experts
from streamprune.model.skeleton import Heads
from streamprune.model.source import Source, open_dense

IDS = TOKENS[:, :12] % 64
# Every field of these classes is tried in test_model_configuration.py, and what reaches the logits is known there.
BY_HAND = ("llama", "ministral", "mistral", "opt", "qwen2", "qwen3")
OTHERS = [name for name in families.FAMILIES if name not in BY_HAND]
# And those that are inside others, or mixtures by default.
ELSEWHERE = ("qwen2_5_vl", "qwen3_vl", "qwen3_next, dense")
DENSE = [*(name for name in families.FAMILIES if name not in families.MIXTURES), *ELSEWHERE]


def logits(model: PreTrainedModel, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    inputs = {"input_ids": IDS, "use_cache": False, "return_dict": True}
    with torch.inference_mode():
        result: torch.Tensor = torch.func.functional_call(model, tensors or {}, (), inputs).logits[0]
    return result


def any_folds(source: Source) -> Iterator[FoldedPermutation]:
    """A random permutation folded wherever one is believed to fold."""
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


def experts_apart(model: PreTrainedModel, source: Source) -> PreTrainedModel:
    """A model whose experts' layers are called as a source's, with the weights that they had."""
    owns = {path: model.get_submodule(path) for path, module in model.named_modules() if is_experts(module)}
    for path, layers in replace_experts(model, source.skeleton.shapes).items():
        fused = "gate_up_proj" if layers.gated else "up_proj"
        for name, tensor in owns[path].named_parameters():
            names = layers.names.up if name.startswith(fused) else (layers.names.down,)
            kind = "bias" if name.endswith("_bias") else "weight"
            for number, whole in enumerate(tensor.detach()):
                for part, piece in zip(names, whole.chunk(len(names)), strict=True):
                    layer = layers.expert(number).get_submodule(part)
                    setattr(layer, kind, torch.nn.Parameter(piece.clone()))
    return model


def reordered(model: PreTrainedModel, folds: list[FoldedPermutation]) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    reorders = [(name, dim, fold.permutation) for fold in folds for name, dim in fold.reorders if name in tensors]
    for name, dim, permutation in reorders:
        tensors[name] = tensors[name].index_select(dim, permutation)
    return {name: tensors[name] for name, _, _ in reorders}


@pytest.mark.parametrize("name", DENSE)
def test_every_fold_leaves_the_logits(name: str, tmp_path: Path) -> None:
    """And each tensor that it reorders has to be: with one left as it was the logits are others."""
    source = open_dense(families.write_family(tmp_path, name))
    model = families.load(tmp_path, torch.float64)
    expected, tensors = logits(model), reordered(model, list(any_folds(source)))
    torch.testing.assert_close(logits(model, tensors), expected, rtol=1e-9, atol=1e-9)
    for left in tensors:
        others = {name: tensor for name, tensor in tensors.items() if name != left}
        assert float((logits(model, others) - expected).abs().max()) > 1e-5, left


@pytest.mark.parametrize("name", list(families.MIXTURES))
def test_every_fold_of_experts_leaves_the_logits(name: str, tmp_path: Path) -> None:
    """In each expert of each block; and without what is reordered in front of the last layers they are others."""
    source = open_dense(families.write_family(tmp_path, name))
    paths = [block.experts for block in source.blocks if block.experts is not None]
    lasts = {group.name for block in source.blocks for group in block.groups if group.producers}
    assert {name.rpartition(".")[0] for name in lasts} >= {f"{path}.{number}" for path in paths for number in range(4)}
    settings = {"dtype": torch.float64, "experts_implementation": "eager"}  # the only one of float64
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()
    expected = logits(model)
    model = experts_apart(model, source)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    tensors = reordered(model, list(any_folds(source)))
    torch.testing.assert_close(logits(model, tensors), expected, rtol=1e-5, atol=1e-5)
    alone = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") in lasts}
    assert len(alone) == len(lasts)
    assert float((logits(model, alone) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", DENSE)
def test_sequences_become_the_same_together_and_alone(name: str, tmp_path: Path) -> None:
    """Bit by bit, or they go one by one."""
    source = open_dense(families.write_family(tmp_path, name))
    assert source.skeleton.batched == (name not in ("bloom", "gemma4_text", "jamba"))
    tokens = torch.arange(2 * 40).view(2, 40) % 64
    inputs = [recorded(source, row[None]) for row in tokens]
    states = torch.cat([one.hidden_states for one in inputs])
    for index in range(len(source.blocks) if source.skeleton.batched else 0):
        block = runnable(source, index, inputs[0])
        together = block.run(states)
        assert torch.equal(together, torch.cat([block.run(one[None]) for one in states]))
        states = together


def test_router_logits_that_are_asked_for_change_nothing(tmp_path: Path) -> None:
    source = open_dense(families.write_family(tmp_path, "mixtral", output_router_logits=True))
    torch.testing.assert_close(logits_of(source, IDS), logits(families.load(tmp_path)), rtol=1e-4, atol=1e-4)


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
        yield from ("relu", "greedy")  # of activations, and of ways to choose experts
    elif isinstance(value, list):
        yield value[::-1]
    elif isinstance(value, tuple):  # a range
        yield (0.01, 0.1)
    elif isinstance(value, dict):
        yield {**value, "rope_theta": 10.0}
    else:
        yield from (True, 2, 0.5, "relu", "all")


def settings_with(name: str, field: str, value: Any) -> dict[str, Any]:
    """A family's settings with another value of a field; "text_config.FIELD" is the text's in a wrapped model."""
    settings, (part, _, inner) = {**families.FAMILIES, **families.WRAPPED}[name], field.partition(".")
    return {**settings, part: {**settings[part], inner: value} if inner else value}


def made_by_transformers(folder: Path, name: str, field: str, value: Any) -> PreTrainedModel | None:
    """Its model of a family's config with another value of a field, written to `folder`; None where it makes none."""
    try:
        config = CONFIG_MAPPING[name](**settings_with(name, field, value))
        written = auto_class(type(config)).from_config(config)
        tiny.randomise(written)
        written.save_pretrained(folder)
        model = auto_class(type(config)).from_config(AutoConfig.from_pretrained(folder)).eval()
        model.load_state_dict(written.state_dict())
        logits(model)
    except Exception:  # of many kinds, for a value that is none
        return None
    return model


def check_field(folder: Path, name: str, field: str) -> int:
    """Try a field's other values; how many made a model that was run, by us too, with folds that hold."""
    run, config = 0, CONFIG_MAPPING[name](**{**families.FAMILIES, **families.WRAPPED}[name])
    part, _, inner = field.partition(".")
    values = other_values(getattr(config, part), inner) if inner else other_values(config, field)
    for number, value in enumerate(values):
        at = folder / f"{field}-{number}"
        model = made_by_transformers(at, name, field, value)
        if model is None:
            continue
        try:
            source = open_dense(at)
        except CheckpointError:
            continue
        expected = logits(model)
        torch.testing.assert_close(logits_of(source, IDS), expected, rtol=1e-4, atol=1e-4, msg=f"{field} is {value}")
        wide = experts_apart(model.double(), source)
        folded = logits(wide, reordered(wide, list(any_folds(source))))
        torch.testing.assert_close(folded, logits(wide), rtol=1e-6, atol=1e-6, msg=f"folds, {field} is {value}")
        run += 1
    return run


# Fields of which no other value of ours makes a model: others would have to change with them, none but one value; or it
# makes a mixture of experts.
ALONE = {
    *("num_hidden_layers", "num_ln_in_parallel_attn", "attn_config", "full_attn_idxs"),
    *(
        "mamba_d_head",
        "mamba_expand",
        "mamba_n_heads",
        "num_experts",
        "num_local_experts",
        "output_router_logits",
        "enable_moe_block",
    ),
    *("text_config.hidden_size", "text_config.num_attention_heads"),  # rotary sections are shares of a head
}


def sweep(folder: Path, name: str, fields: set[str]) -> None:
    assert {field for field in sorted(fields) if not check_field(folder, name, field)} <= ALONE


def fields_of(name: str) -> set[str]:
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[name])}
    return fields - NOT_OF_THE_FORWARD


@pytest.mark.parametrize("name", OTHERS)
def test_fields_of_its_own_with_other_values(name: str, tmp_path: Path) -> None:
    sweep(tmp_path, name, fields_of(name).difference(*map(fields_of, BY_HAND)))


@pytest.mark.parametrize("name", families.WRAPPED)
def test_fields_of_a_wrapper(name: str, tmp_path: Path) -> None:
    """And of its text, where that is no family of its own. Fields of the other parts reach no text's logits."""
    config = CONFIG_MAPPING[name](**families.WRAPPED[name])
    sweep(tmp_path, name, fields_of(name) - {*type(config).sub_configs})
    if config.text_config.model_type not in families.FAMILIES:
        own = {field.name for field in dataclasses.fields(config.text_config)} - NOT_OF_THE_FORWARD
        sweep(tmp_path, name, {f"text_config.{field}" for field in own})


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_field_with_other_values(name: str, tmp_path: Path) -> None:
    sweep(tmp_path, name, fields_of(name).intersection(set().union(*map(fields_of, BY_HAND))))
