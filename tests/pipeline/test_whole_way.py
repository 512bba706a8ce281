"""Every family, pattern, metric and shuffle goes the whole way: compress, verify, evaluate, export, inspect."""

import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import packed_reader
import pytest
import tiny
import torch

from streamprune.errors import SettingsError
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.inspect import inspect
from streamprune.runtime.verify import verify


@dataclass(frozen=True)
class Way:
    """A job, and what is known of its output before it runs."""

    source: str
    pattern: str
    metric: str = "esparse"
    shuffle: str = "global+local"
    pruned: tuple[str, ...] = ()  # layers of a block that the pattern fits; empty: all
    gathered: tuple[str, ...] = ("q", "k", "v", "gate", "up", "fc1")  # whose permutation is stored, not folded
    folded: tuple[str, ...] = ("o", "out", "down", "fc2")
    settings: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = "".join(f"-{name}={value}" for name, value in self.settings.items())
        return f"{self.source}-{self.pattern}-{self.metric}-{self.shuffle}{settings}"


WAYS = [
    Way("llama", "2:4"),
    Way("llama", "4:8", "wanda", "global", settings={"refine": False}),
    Way("llama", "1:4", "ria", "none"),
    Way("llama", "2:8", "magnitude"),
    Way("llama", "1:2", settings={"amplitude": "rms", "alpha": 2.0, "entropy_bins": 16}),
    Way("llama-plain", "2:4", settings={"shuffle_block": 16}),
    Way("llama-plain", "4:8", "ria"),
    Way("llama-sharded", "2:4"),
    Way("opt", "2:4"),
    Way("opt", "4:8", "wanda", pruned=("q", "k", "v", "out", "fc1")),
    Way("opt", "1:4", "wanda", "global"),
    Way("opt", "2:8", "ria", pruned=("q", "k", "v", "out", "fc1")),
    Way("opt", "1:2", "magnitude", "none"),
    Way("opt-bin", "2:4"),
    # the defaults and their neighbours
    Way("llama", "2:4", shuffle="assignment"),
    Way("opt", "2:4", shuffle="stride+assignment", settings={"objective": "energy", "relative": True}),
    Way("llama", "4:8", shuffle="assignment", settings={"shrinkage": 0.5, "correction": 1.0, "correction_stride": 1}),
    # a head of 16 is one group: nothing to shuffle inside it; 12,870 patterns are not tried one by one
    Way("llama", "8:16", shuffle="global", folded=("down",), settings={"entropy_range": "layer"}),
    Way("opt", "2:4", "wanda", "none", settings={"correction": 0.0}),
    # across heads: a stored permutation
    Way(
        "llama",
        "2:4",
        shuffle="assignment",
        gathered=("q", "k", "v", "o", "gate", "up"),
        folded=("down",),
        settings={"fold": "across-heads"},
    ),
    Way(
        "opt",
        "2:4",
        shuffle="global",
        gathered=("q", "k", "v", "out", "fc1"),
        folded=("fc2",),
        settings={"fold": "across-heads"},
    ),
    # one permutation of the residual stream: nothing is stored
    Way("llama", "2:4", shuffle="residual+assignment", gathered=(), folded=("q", "k", "v", "gate", "up", "o", "down")),
    Way(
        "llama-plain",
        "4:8",
        shuffle="residual+global+assignment",
        gathered=(),
        folded=("q", "k", "v", "gate", "up", "o", "down"),
    ),
    Way("opt", "2:4", shuffle="residual+assignment", gathered=(), folded=("q", "k", "v", "out", "fc1", "fc2")),
    Way("opt-bin", "1:4", "ria", "residual+assignment", gathered=(), folded=("q", "k", "v", "out", "fc1", "fc2")),
    Way(
        "llama",
        "2:4",
        shuffle="residual+assignment",
        gathered=("o",),
        folded=("q", "k", "v", "gate", "up", "down"),
        settings={"fold": "across-heads"},
    ),
    # second moments in blocks
    Way("llama", "2:4", shuffle="assignment", settings={"moments_width": 64}),
    Way(
        "opt",
        "2:4",
        shuffle="residual+local",
        gathered=(),
        folded=("q", "k", "v", "out", "fc1", "fc2"),
        settings={"moments_width": 100},
    ),
    # 32 does not divide a head of 16: the permutation of o_proj's input crosses heads and is stored
    Way("llama", "8:32", gathered=("q", "k", "v", "o", "gate", "up"), folded=("down",)),
    # 64 inputs are no multiple of 5: only down_proj is pruned, and its permutation reorders dense gate and up
    Way("llama", "3:5", pruned=("down",)),
    # one group holds all 64 inputs: nothing to shuffle; down_proj's 160 are no multiple of 64
    Way(
        "llama",
        "1:64",
        pruned=("q", "k", "v", "o", "gate", "up"),
        gathered=(),
        folded=(),
        settings={"shuffle_block": 128},
    ),
]


def short(layer: str) -> str:
    """ "q" for model.layers.0.self_attn.q_proj."""
    return layer.rpartition(".")[2].removesuffix("_proj")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_whole_way(
    way: Way, sources: Callable[..., Path], outputs: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    source = sources(way.source)
    tensors = tiny.read_tensors(sources(way.source.removesuffix("-bin").removesuffix("-sharded")))
    out = outputs(way.source, pattern=way.pattern, metric=way.metric, shuffle=way.shuffle, **way.settings)

    # the bytes, by a reader of our own
    packed = packed_reader.PackedFolder(out)
    kept = packed.check_against(tensors)
    linear = {name.removesuffix(".weight") for name in tensors if "layers." in name and tensors[name].ndim == 2}
    expected = {name for name in linear if not way.pruned or short(name) in way.pruned}
    assert set(packed.patterns) == expected
    n, m = map(int, way.pattern.split(":"))
    assert kept == sum(tensors[f"{name}.weight"].numel() for name in expected) * n // m
    assert packed.config["dense_layers"].keys() == linear - expected
    assert all(f"not a multiple of {m}" in reason for reason in packed.config["dense_layers"].values())

    # shuffles: stored where the input is the residual stream, folded elsewhere, absent without a shuffle
    gathered = {name for name in packed.patterns if packed.layer(name).gather is not None}
    if way.shuffle == "none":
        assert not gathered
        assert not packed.folded
    else:
        assert gathered == {name for name in expected if short(name) in way.gathered}
        folded = {name.removesuffix(".weight") for name, order in packed.orders.items() if 1 in order} & expected
        assert folded == {name for name in expected if short(name) in way.folded}

    verification = verify(out, source=source)
    assert verification.faults == []
    assert verification.ok
    assert verification.against_source
    assert {layer.name for layer in verification.layers} == expected
    assert max(layer.relative_error for layer in verification.layers) < 3e-6

    inspection = inspect(out)
    for row in inspection.layers:
        weight = tensors[f"{row.name}.weight"]
        assert (row.pattern, row.shape) == (way.pattern, tuple(weight.shape))
        parts = [packed.tensors[f"{row.name}.{part}"] for part in ("weight_values", "weight_mask")]
        assert row.packed_bytes == sum(part.numel() * part.itemsize for part in parts)
        assert row.dense_bytes == weight.numel() * 2
        assert row.permutation_bytes == (4 * weight.shape[1] if row.name in gathered else 0)
        assert row.kernel_error <= 1e-6
        assert 0 < row.layer_error < 1.5
        assert 0 < row.block_error < 2
    assert inspection.dense_layers == packed.config["dense_layers"]
    assert inspection.packed_bytes == sum(row.packed_bytes for row in inspection.layers)

    dense = export(out, out=tmp_path / "dense")
    assert set(dense.regathered) == gathered
    assert set(dense.in_memory_order) == expected - gathered
    loaded = packed_reader.open_folder(tmp_path / "dense")
    assert loaded.keys() == tensors.keys()
    for name in dense.in_memory_order:
        zeros = (packed_reader.bits(loaded[f"{name}.weight"]) == 0).reshape(len(loaded[f"{name}.weight"]), -1, m)
        assert (zeros.sum(axis=2) >= m - n).all(), name
    figures = [
        evaluate(folder, text=held_out, sequence_length=300, dtype="float32")
        for folder in (out, tmp_path / "dense", source)
    ]
    assert figures[0].packed
    assert not figures[1].packed
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=1e-5)
    assert figures[0].perplexity != pytest.approx(figures[2].perplexity, rel=1e-5)


def test_a_pattern_that_fits_no_layer_is_refused(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"pattern 1:7: no layer .* .64 inputs are not a multiple of 7"):
        prune("llama", tmp_path / "out", pattern="1:7")
    assert not (tmp_path / "out").exists()


def test_result_counts_bytes_as_they_are(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prune("opt", out)
    packed = packed_reader.PackedFolder(out)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in packed.tensors.items()}
    assert (result.status, result.out, result.blocks, result.kept_dense) == ("finished", str(out), 3, ())
    assert result.packed_bytes == sum(size for name, size in sizes.items() if name.endswith(("_values", "_mask")))
    assert result.permutation_bytes == sum(size for name, size in sizes.items() if name.endswith("_permutation"))
    manifest = tiny.read_json(out / tiny.MANIFEST)
    assert result.output_bytes == sum(path.stat().st_size for path in out.glob("streamprune-*.safetensors"))
    assert result.manifest_sha256 == tiny.sha256(out / tiny.MANIFEST)
    worst = max((layer for block in manifest["blocks"] for layer in block["layers"]), key=lambda x: x["layer_error"])
    assert result.worst_layers[0] == (worst["name"], worst["layer_error"])
    assert not (out / ".work").exists()
    assert math.isfinite(result.seconds)


def test_no_file_tells_where_or_when_it_was_made(outputs: Callable[..., Path], sources: Callable[..., Path]) -> None:
    """timings.json alone holds paths, hosts, dates, versions of libraries and threads."""
    out = outputs("llama")
    assert {path.name for path in out.iterdir()} >= {"timings.json", "streamprune_manifest.sha256", "tokenizer.json"}
    forbidden = [str(sources("llama")), str(out), socket.gethostname() + '"', torch.__version__, os.uname().release]
    for path in out.iterdir():
        if path.name != "timings.json":
            content = path.read_bytes()
            assert not [word for word in forbidden if word.encode() in content], path.name
