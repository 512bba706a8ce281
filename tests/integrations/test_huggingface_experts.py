"""Mixtures of experts in transformers: a packed layer for each expert and matrix, or a dense one; saved, exported."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from streamprune import PackedLinear
from streamprune.checkpoint.writer import Pieces
from streamprune.errors import CheckpointError
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime import export as exporting
from streamprune.runtime.export import export
from streamprune_kernels import expand

TOKENS = torch.tensor([[ord(character) for character in "Twenty-nine letters and more."]])
EXPERTS = {"mixtral": ("w1", "w2", "w3"), "gpt_oss": ("gate_up_proj", "down_proj")}
KEPT_DENSE = {"starved": "dense", "min_expert_tokens": 90}  # some of the experts, in one of the blocks at least


@pytest.fixture(scope="module")
def packed(prune: Callable[..., CompressResult], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An output of a family, with some of its experts dense; made once, never changed."""
    folder = tmp_path_factory.mktemp("experts")

    def made(name: str) -> Path:
        out = folder / name
        if not out.exists():
            prune(families.write_family(folder / f"{name}-source", name), out, shuffle="assignment", **KEPT_DENSE)
        return out

    return made


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(TOKENS, use_cache=False).logits[0]
    return result


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", list(EXPERTS))
def test_loaded_saved_and_made_dense(name: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    model, dense = families.load(packed(name)), tmp_path / "dense"
    layers = [model.get_submodule(f"model.layers.{block}.mlp.experts.{number}.{part}")
              for block in (0, 1) for number in range(4) for part in EXPERTS[name]]  # fmt: skip
    assert {isinstance(layer, PackedLinear) for layer in layers} == {True, False}
    export(packed(name), out=dense)
    masked = families.load(dense)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-4)
    assert not model.hf_quantizer.is_compileable  # how many tokens an expert takes is not known before
    model.save_pretrained(tmp_path / "again")
    assert_same(tiny.read_tensors(tmp_path / "again"), tiny.read_tensors(packed(name)))
    torch.testing.assert_close(logits(families.load(tmp_path / "again")), logits(model), rtol=0, atol=0)
    model.dequantize().save_pretrained(tmp_path / "plain")  # after it was saved, which changes its config
    assert_same(tiny.read_tensors(tmp_path / "plain"), tiny.read_tensors(dense))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(EXPERTS))
def test_an_export_holds_one_weight_at_a_time(
    name: str, packed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all experts' are one tensor."""
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(*arguments: Any) -> torch.Tensor:
        assert all(weight() is None for weight in made)
        weight = expand(*arguments)
        made.append(weakref.ref(weight))
        return weight

    written: list[set[type]] = []

    def write(path: Path, tensors: dict[str, Pieces], temporary: Path) -> str:
        written.append({type(tensor) for tensor in tensors.values()})
        return write_safetensors(path, tensors, temporary)

    write_safetensors = exporting.write_safetensors
    monkeypatch.setattr(exporting, "expand", watched)
    monkeypatch.setattr(exporting, "write_safetensors", write)
    export(packed(name), out=tmp_path / "dense")
    assert set().union(*written) == {Pieces}
    assert len(made) == len(tiny.read_json(packed(name) / "config.json")["quantization_config"]["layers"])


def test_experts_that_are_not_in_the_files_are_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    out = families.load(packed("mixtral"))
    out.config.num_local_experts = 40
    out.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts: 40 experts, and the checkpoint has \d\d "):
        families.load(tmp_path)
