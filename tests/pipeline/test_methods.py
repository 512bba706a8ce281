"""What refinement, correction, reconstruction, folds and moments in blocks leave in an output and in its manifest."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import packed_reader
import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from streamprune.cli import cli
from streamprune.model.skeleton import Block
from streamprune.pipeline import two_passes
from streamprune.pipeline.block_pruning import prune_block
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
TOKENS = torch.tensor([[ord(character) for character in tiny.text(200, seed=5)]])


def layers_of(out: Path) -> dict[str, dict[str, Any]]:
    blocks = tiny.read_json(out / tiny.MANIFEST)["blocks"]
    return {layer["name"]: layer for block in blocks for layer in block["layers"]}


def groups_of(layers: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Layers that share an input, which are searched and refined as one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, layer in layers.items():
        prefix, _, last = name.rpartition(".")
        shared = (
            "qkv" if last in ("q_proj", "k_proj", "v_proj") else "gate-up" if last in ("gate_proj", "up_proj") else last
        )
        groups.setdefault(f"{prefix}.{shared}", []).append(layer)
    return groups


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_kept_weights_are_the_sources_to_the_bit(
    source: str, sources: Callable[[str], Path], outputs: Callable[..., Path]
) -> None:
    """With refinement and correction, which the defaults are: masks change, weights do not."""
    out = outputs(source)
    settings = tiny.read_json(out / tiny.MANIFEST)["identity"]["settings"]
    assert settings["refine"] is True
    assert settings["correction"] > 0
    assert settings["reconstruct"] is False
    verification = verify(out, source=sources(source))
    assert (verification.ok, verification.against_source, verification.reconstructed) == (True, True, False)
    packed_reader.PackedFolder(out).check_against(tiny.read_tensors(sources(source)))
    plain = packed_reader.PackedFolder(outputs(source, refine=False))
    refined = packed_reader.PackedFolder(out)
    different = [n for n in plain.patterns if (plain.source_order(n)[1] != refined.source_order(n)[1]).any()]
    assert different == list(plain.patterns)


@pytest.mark.parametrize("correction", [0.2, 1.0])
@pytest.mark.parametrize("source", ["llama", "opt"])
def test_each_step_keeps_its_promise(source: str, correction: float, outputs: Callable[..., Path]) -> None:
    """A shuffle never retains less; refinement never raises the error that it lowers. Of layers that share an input."""
    out = outputs(source, shuffle="global+assignment", correction=correction, correction_stride=1, shrinkage=0.0)
    layers = layers_of(out)
    for name, members in groups_of(layers).items():
        names = [step["name"] for step in members[0]["steps"]]
        assert names in (["selection", "shuffle", "refinement"], ["selection", "refinement"]), name
        retained = [sum(layer["steps"][i]["retained_score"] for layer in members) for i in range(len(names))]
        assert retained[-2] >= retained[0] * (1 - 1e-9)
    for name, layer in layers.items():
        before, after = layer["steps"][-2:]
        assert after["corrected_error"] <= before["corrected_error"] + 1e-6, name
        assert layer["shrinkage"] == [0.0]
    fallen = [
        layer["steps"][-1]["corrected_error"] < layer["steps"][-2]["corrected_error"] for layer in layers.values()
    ]
    assert all(fallen)


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_without_correction_the_outputs_error_falls(source: str, outputs: Callable[..., Path]) -> None:
    for layer in layers_of(outputs(source, correction=0.0, shrinkage=0.0)).values():
        before, after = layer["steps"][-2:]
        assert after["output_error"] < before["output_error"]
        assert [step["corrected_error"] for step in layer["steps"]] == [None] * len(layer["steps"])


def test_the_default_lowers_the_corrected_error(outputs: Callable[..., Path]) -> None:
    """Shrunk moments are not those that errors are measured by: on the whole, not layer by layer."""
    for source in ("llama", "opt"):
        layers = layers_of(outputs(source)).values()
        before, after = (sum(layer["steps"][i]["corrected_error"] for layer in layers) for i in (-2, -1))
        assert after < before
        assert all(0 < layer["shrinkage"][0] < 1 for layer in layers)


def test_without_refinement_a_layer_has_no_error_of_outputs(outputs: Callable[..., Path]) -> None:
    for layer in layers_of(outputs("llama", refine=False, shuffle="none")).values():
        (step,) = layer["steps"]
        assert (step["name"], step["output_error"], step["corrected_error"]) == ("selection", None, None)
        assert layer["shrinkage"] == []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """The statistics that each block was pruned by."""
    statistics: dict[int, Any] = {}

    def prune(block: Block, tensors: Any, found: Any, *rest: Any) -> Any:
        statistics[block.index] = copy.deepcopy(found)
        return prune_block(block, tensors, found, *rest)

    monkeypatch.setattr(two_passes, "prune_block", prune)
    return statistics


def inputs_of(folder: Path, layer: str, tokens: torch.Tensor) -> numpy.ndarray:
    """What enters a layer of the plain model, [sequences, tokens, in] in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, -2).double()))
    with torch.inference_mode():
        for row in tokens:
            model(row[None])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("source", ["llama", "opt"])
@pytest.mark.parametrize("stride", [1, 2])
def test_moments_and_cross_moments_are_numpys(
    source: str,
    stride: int,
    prune: Prune,
    sources: Callable[[str], Path],
    calibration: Path,
    seen: dict[int, Any],
    tmp_path: Path,
) -> None:
    """Block 1's, whose inputs lie behind a pruned block and, for the reference, behind the dense one."""
    from streamprune.text.calibration import Calibration, calibration_tokens

    prefix = {"llama": "model.layers", "opt": "model.decoder.layers"}[source]
    prune(source, tmp_path / "out", shuffle="none", correction_stride=stride)
    tokens = calibration_tokens(sources(source), Calibration(str(calibration), samples=4, sequence_length=48))
    # the plain model with block 0 as it was written; nothing is permuted
    export(tmp_path / "out", out=tmp_path / "dense")
    for name in ("self_attn.q_proj", {"llama": "mlp.down_proj", "opt": "fc2"}[source]):
        layer = f"{prefix}.1.{name}"
        half = AutoModelForCausalLM.from_pretrained(sources(source), dtype=torch.float32)
        state = {k: v.float() for k, v in tiny.read_tensors(tmp_path / "dense").items() if ".layers.0." in k}
        assert half.load_state_dict(state, strict=False).unexpected_keys == []
        half.save_pretrained(tmp_path / f"half-{name}")
        x, dense = inputs_of(tmp_path / f"half-{name}", layer, tokens), inputs_of(sources(source), layer, tokens)
        moments = seen[1][layer].moments
        expected = numpy.einsum("sti,stj->ij", x, x)
        numpy.testing.assert_allclose(
            moments.take_whole()[0], expected, rtol=1e-3, atol=1e-4 * numpy.abs(expected).max()
        )
        cross = stride * numpy.einsum("sti,stj->ij", (dense - x)[::stride], x[::stride])
        assert numpy.abs(cross).max() > 0.01 * numpy.abs(expected).max()
        if name == "self_attn.q_proj":
            found = moments.cross[0]
        else:  # fewer outputs than inputs: the same, seen from the outputs
            found, cross = (
                seen[1][layer].output_cross,
                half.get_submodule(layer).weight.double().detach().numpy() @ cross,
            )
        numpy.testing.assert_allclose(found, cross, rtol=1e-3, atol=1e-3 * numpy.abs(cross).max())
        assert numpy.count_nonzero(seen[0][f"{prefix}.0.self_attn.q_proj"].moments.cross[0]) == 0


def test_correction_leaves_the_first_block_alone(outputs: Callable[..., Path]) -> None:
    """Its inputs are the dense model's: the first thing that correction may change is block 1."""
    with_it, without = (
        packed_reader.PackedFolder(outputs("llama", **settings))
        for settings in ({"correction": 1.0, "correction_stride": 1}, {"correction": 0.0})
    )
    differ = {
        name: bool((with_it.source_order(name)[1] != without.source_order(name)[1]).any()) for name in with_it.patterns
    }
    assert not any(differs for name, differs in differ.items() if ".layers.0." in name)
    assert any(differs for name, differs in differ.items() if ".layers.1." in name)


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_reconstruction(
    source: str, sources: Callable[[str], Path], outputs: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    """The kept weights are others, verify and its text say so, and each layer's error falls."""
    out = outputs(source, reconstruct=True, correction=0.0)
    verification = verify(out, source=sources(source))
    assert verification.faults == []
    assert verification.reconstructed
    assert dataclasses.asdict(verification)["reconstructed"] is True
    shown = CliRunner().invoke(cli, ["verify", str(out), "--source", str(sources(source)), "--quiet"])
    assert shown.exit_code == 0
    assert "weights were reconstructed: kept values are not the source's" in shown.stdout
    tensors = tiny.read_tensors(sources(source))
    packed = packed_reader.PackedFolder(out)
    packed.check_against(tensors, reconstructed=True)
    for name, layer in layers_of(out).items():
        weight, keep = packed.source_order(name)
        assert (weight[keep] != packed_reader.bits(tensors[f"{name}.weight"])[keep]).mean() > 0.3, name
        before, after = layer["steps"][-2:]
        assert (before["name"], after["name"]) == ("refinement", "reconstruction")
        assert after["output_error"] < before["output_error"]
        assert after["retained_score"] == before["retained_score"]
    export(out, out=tmp_path / "dense")
    figures = [
        evaluate(folder, text=held_out, sequence_length=100, dtype="float32") for folder in (out, tmp_path / "dense")
    ]
    assert figures[0].loss == pytest.approx(figures[1].loss, rel=1e-5)


def test_reconstruction_without_refinement_keeps_the_plain_masks(outputs: Callable[..., Path]) -> None:
    plain, fitted = (
        packed_reader.PackedFolder(outputs("llama", refine=False, shuffle="none", metric="magnitude", **settings))
        for settings in ({}, {"reconstruct": True})
    )
    for name in plain.patterns:
        assert (plain.source_order(name)[1] == fitted.source_order(name)[1]).all()


def swap_mask_bits(mask: torch.Tensor) -> None:
    """In the first group of row 2, drop a kept channel and keep a dropped one: still exactly N of M."""
    bits = [int(mask[2, 0]) >> bit & 1 for bit in range(4)]
    mask[2, 0] ^= (1 << bits.index(0)) | (1 << bits.index(1))


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_forged_mask_of_a_reconstructed_model_is_found(
    layer: str, copy_of: Callable[..., Path], sources: Callable[[str], Path]
) -> None:
    out, name = copy_of("llama", reconstruct=True, correction=0.0), f"model.layers.1.{layer}"
    tiny.edit_tensor(tiny.shard_of(out, f"{name}.weight_mask"), f"{name}.weight_mask", swap_mask_bits)
    tiny.reseal(out)
    assert verify(out).ok
    verification = verify(out, source=sources("llama"))
    assert [check.name for check in verification.layers if not check.ok] == [name]
    assert "weighted error" in verification.faults[0]


def test_a_reconstructed_models_dense_tensors_are_compared(
    copy_of: Callable[..., Path], sources: Callable[[str], Path]
) -> None:
    out, name = copy_of("llama", reconstruct=True, correction=0.0), "model.layers.1.mlp.gate_proj.bias"
    tiny.edit_tensor(tiny.shard_of(out, name), name, lambda bias: bias[5:6].mul_(-1))
    tiny.reseal(out)
    assert [fault.split(":")[0] for fault in verify(out, source=sources("llama")).faults] == [name]


def test_a_model_cannot_be_passed_off_as_reconstructed_unseen(
    copy_of: Callable[..., Path], sources: Callable[[str], Path]
) -> None:
    """Whoever says "reconstructed" in the manifest is shown as such: the result is not that of a plain output."""
    out = copy_of("llama")

    def claim(manifest: Any) -> None:
        manifest["identity"]["settings"]["reconstruct"] = True

    tiny.reseal(out, claim)
    assert verify(out, source=sources("llama")).reconstructed


@pytest.mark.parametrize(("source", "attention"), [("llama", "o_proj"), ("llama-plain", "o_proj"), ("opt", "out_proj")])
@pytest.mark.parametrize("fold", ["heads", "across-heads"])
def test_folds_compute_what_the_masked_model_does(
    fold: str,
    source: str,
    attention: str,
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    held_out: Path,
    tmp_path: Path,
) -> None:
    """ "across-heads" stores the permutation of attention's output and crosses heads, "heads" folds it."""
    out = outputs(source, fold=fold, shuffle="assignment")
    assert verify(out, source=sources(source)).faults == []
    packed = packed_reader.PackedFolder(out)
    names = [name for name in packed.patterns if name.endswith(attention)]
    assert len(names) == 3
    for name in names:
        gather = packed.layer(name).gather
        assert (gather is not None) is (fold == "across-heads")
        order = gather if gather is not None else packed.order(f"{name}.weight", 1, 64)
        crosses = bool((order // 16 != numpy.arange(64) // 16).any())
        assert crosses is (fold == "across-heads")
    export(out, out=tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(sources(source), dtype=torch.float64).eval()
    state = packed.unpacked_state(tiny.read_tensors(sources(source)))
    plain.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64).eval()
    with torch.inference_mode():
        assert (exported(TOKENS).logits - plain(TOKENS).logits).abs().max() <= 1e-5
        text = torch.tensor([[ord(c) for c in held_out.read_text()[:300]]])
        loss = float(plain(text, labels=text).loss)
    assert evaluate(out, text=held_out, sequence_length=300, max_tokens=300, dtype="float32").loss == pytest.approx(
        loss, rel=1e-5
    )


@pytest.mark.parametrize("shuffle", ["assignment", "global+local"])
def test_second_moments_in_blocks(
    shuffle: str, sources: Callable[[str], Path], outputs: Callable[..., Path], seen: dict[int, Any]
) -> None:
    """down_proj's 160 inputs in blocks of 56, 56 and 48: neither its permutation nor its masks' search crosses them."""
    out = outputs("llama", moments_width=64, shuffle=shuffle)
    assert verify(out, source=sources("llama")).faults == []
    packed = packed_reader.PackedFolder(out)
    blocks = tiny.read_json(out / tiny.MANIFEST)["blocks"]
    for index, block in enumerate(blocks):
        down = f"model.layers.{index}.mlp.down_proj"
        assert block["moments"]["layers_in_blocks"] == [down]
        assert block["moments"]["bytes"] == 4 * (9 * 64**2 + 2 * (56**2 + 56**2 + 48**2) + 64 * 160)
        order = packed.order(f"{down}.weight", 1, 160)
        assert list(order) != list(range(160))
        for begin, end in ((0, 56), (56, 112), (112, 160)):
            assert sorted(order[begin:end]) == list(range(begin, end))
        assert len(next(layer for layer in block["layers"] if layer["name"] == down)["shrinkage"]) == 3
    whole = tiny.read_json(outputs("llama", shuffle=shuffle) / tiny.MANIFEST)["blocks"]
    assert all(block["moments"]["layers_in_blocks"] == [] for block in whole)
    assert all(block["moments"]["bytes"] == 4 * (9 * 64**2 + 2 * 160**2 + 64 * 160) for block in whole)
