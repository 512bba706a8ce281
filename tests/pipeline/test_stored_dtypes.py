"""Weights in float64 and in several dtypes at once: what is stored keeps its bits, and products are in float32."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reader
import pytest
import tiny
import torch
from safetensors.torch import save_file

import streamprune
from streamprune.errors import Interrupted, NumericsError
from streamprune.pipeline.compress import CompressResult

Prune = Callable[..., CompressResult]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNSEEN: dict[str, Any] = {"metric": "magnitude", "shuffle": "none", "validate": False}


def stored_as(source: Path, folder: Path, dtypes: tuple[torch.dtype, ...]) -> Path:
    """A copy whose tensors, in the order of their names, have the dtypes in turn."""
    shutil.copytree(source, folder)
    tensors = sorted(tiny.read_tensors(source).items())
    turned = {name: tensor.to(dtypes[place % len(dtypes)]) for place, (name, tensor) in enumerate(tensors)}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("settings", [{}, UNSEEN, {"reconstruct": True}], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float64,), FLOATS, (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("source", ["llama", "opt"])
def test_the_whole_way(
    source: str, dtypes: tuple[torch.dtype, ...], settings: dict[str, Any], sources: Callable[[str], Path],
    prune: Prune, held_out: Path, tmp_path: Path,
) -> None:  # fmt: skip
    model, out = stored_as(sources(source), tmp_path / "model", dtypes), tmp_path / "out"
    foretold = streamprune.plan(model, **tiny.CALIBRATION, **settings)
    first = out / ".work" / "block-00000.json"
    with pytest.raises(Interrupted):
        prune(model, out, should_stop=first.exists, **settings)
    done = prune(model, out, **settings)
    assert foretold.written_bytes == done.source_bytes - done.dense_bytes + done.packed_bytes
    assert streamprune.verify(out, source=model).faults == []
    streamprune.export(out, out=tmp_path / "dense")
    dense, original = tiny.read_tensors(tmp_path / "dense"), tiny.read_tensors(model)
    assert {name: tensor.dtype for name, tensor in dense.items()} == {
        name: tensor.dtype for name, tensor in original.items()
    }
    packed = packed_reader.open_folder(out)
    for name in (layer.name for layer in streamprune.inspect(out).layers):
        assert packed[f"{name}.weight_values"].dtype == original[f"{name}.weight"].dtype
    losses = [
        streamprune.evaluate(folder, text=held_out, sequence_length=100, dtype="float32").loss
        for folder in (out, tmp_path / "dense")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_float64_is_pruned_as_float32_is(sources: Callable[[str], Path], prune: Prune, tmp_path: Path) -> None:
    """Of the same numbers the same masks and errors."""
    manifests = []
    for dtype in (torch.float32, torch.float64):
        out = tmp_path / f"out-{dtype}"
        prune(stored_as(sources("llama"), tmp_path / str(dtype), (dtype,)), out)
        manifests.append(tiny.read_json(out / tiny.MANIFEST)["blocks"])
    for one, other in zip(*manifests, strict=True):
        assert one["block_error"] == other["block_error"]
        for layer, wide in zip(one["layers"], other["layers"], strict=True):
            assert layer["layer_error"] == wide["layer_error"]
            assert layer["weighted_error"] == pytest.approx(wide["weighted_error"], rel=1e-12)


@pytest.mark.parametrize("settings", [{}, UNSEEN], ids=str)
def test_a_weight_beyond_float32_is_refused(
    settings: dict[str, Any], sources: Callable[[str], Path], prune: Prune, tmp_path: Path
) -> None:
    model, name = stored_as(sources("llama"), tmp_path / "model", (torch.float64,)), "model.layers.1.mlp.up_proj.weight"
    tiny.edit_tensor(model / "model.safetensors", name, lambda weight: weight.view(-1)[7:8].fill_(1e300))
    with pytest.raises(NumericsError, match=r"^model\.layers\.1.* NaN or infinity"):
        prune(model, tmp_path / "out", **settings)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused_by_all(
    dtype: torch.dtype, sources: Callable[[str], Path], prune: Prune, held_out: Path, tmp_path: Path
) -> None:
    model = stored_as(sources("llama"), tmp_path / "model", (dtype,))
    for work in (
        lambda: streamprune.plan(model),
        lambda: prune(model, tmp_path / "out"),
        lambda: streamprune.evaluate(model, text=held_out),
    ):
        with pytest.raises(streamprune.StreampruneError, match="the source must be unquantized") as error:
            work()
        assert error.value.exit_code == 3
