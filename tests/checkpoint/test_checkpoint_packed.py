"""The packed format: exact bytes, round trips through a file, refusals."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamprune.checkpoint.layout import LAYOUT, LAYOUTS, Layout
from streamprune.checkpoint.packed import (
    check_layer,
    is_packed,
    layer_from_tensors,
    open_packed,
    pack_layer,
    packed_shape,
    quantization_config,
    tensor_names,
)
from streamprune.checkpoint.reader import open_file
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError
from streamprune_kernels import expand

LAYER = "model.layers.0.mlp.up_proj"
WEIGHT = [
    [1.0, -2.0, 0.0, -0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
    [0.5, 0.25, -1.0, 2.0, 0.0, -0.0, 1.5, -6.0, 65504.0, 1.0, 2**-24, 0.0],
]
KEPT_CHANNELS = [[1, 3, 4, 7, 8, 9], [2, 3, 5, 7, 8, 10]]


def hand_made() -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.zeros(2, 12, dtype=torch.bool)
    for row, channels in enumerate(KEPT_CHANNELS):
        keep[row, channels] = True
    return torch.tensor(WEIGHT, dtype=torch.float16), keep


def test_exact_bytes_of_a_hand_made_layer() -> None:
    weight, keep = hand_made()
    layer = pack_layer(weight, keep, torch.arange(11, -1, -1))
    assert layer.values.numpy().tobytes().hex(" ", 2) == (
        "00c0 0080 0042 0046 0047 0048 00bc 0040 0080 00c6 ff7b 0100"  # -2 -0 3 6 7 8, -1 2 -0 -6 65504 2^-24
    )
    assert layer.mask.dtype == torch.uint8
    # Channels 1 3 4 7 | 8 9 and 2 3 5 7 | 8 10, little end first; padding bits 4 to 7 of the second byte are 0.
    assert layer.mask.tolist() == [[0b10011010, 0b0011], [0b10101100, 0b0101]]
    assert layer.permutation is not None
    assert layer.permutation.numpy().tobytes() == bytes(b for i in range(11, -1, -1) for b in (i, 0, 0, 0))
    assert layer.size_bytes == 24 + 4 + 48


def test_exact_bytes_in_a_file(tmp_path: Path) -> None:
    weight, keep = hand_made()
    save_file(pack_layer(weight, keep, None).tensors(LAYER), tmp_path / "one.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {name: (e["dtype"], e["shape"]) for name, e in header.items()} == {
        f"{LAYER}.weight_values": ("F16", [2, 6]),
        f"{LAYER}.weight_mask": ("U8", [2, 2]),
    }
    assert content[-28:].hex(" ", 2) == ("00c0 0080 0042 0046 0047 0048 00bc 0040 0080 00c6 ff7b 0100 9a03 ac05")


@pytest.mark.parametrize("permuted", [False, True])
def test_layer_survives_its_tensors_and_a_file(permuted: bool, tmp_path: Path) -> None:
    weight, keep = hand_made()
    layer = pack_layer(weight, keep, torch.randperm(12) if permuted else None)
    save_file(layer.tensors(LAYER), tmp_path / "one.safetensors")
    checkpoint = open_file(tmp_path / "one.safetensors")
    names = tensor_names(checkpoint, LAYER)
    assert (
        names == [f"{LAYER}.{part}" for part in ("weight_values", "weight_mask", "input_permutation")][: 2 + permuted]
    )
    read = layer_from_tensors(LAYER, checkpoint.read(names))
    assert torch.equal(read.values.view(torch.int16), layer.values.view(torch.int16))
    assert torch.equal(read.mask, layer.mask)
    if permuted:
        assert read.permutation is not None
        assert read.permutation.dtype == torch.int32
        assert layer.permutation is not None
        assert torch.equal(read.permutation, layer.permutation)
    else:
        assert read.permutation is None
    assert packed_shape(checkpoint, LAYER, NMPattern(2, 4))[1] == 12
    dense = expand(read.values, read.mask, 12)
    expected = torch.where(keep, weight, torch.zeros((), dtype=torch.float16))
    assert torch.equal(dense.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5625), ("4:8", 0.5625), ("1:4", 0.3125), ("2:8", 0.3125)])
def test_bytes_of_a_packed_layer_in_16_bits(pattern: str, share: float) -> None:
    parsed = NMPattern.parse(pattern)
    keep = torch.arange(64).remainder(parsed.group_size).lt(parsed.kept).expand(16, 64)
    weight = torch.ones(16, 64, dtype=torch.bfloat16)
    assert pack_layer(weight, keep, None).size_bytes == weight.nbytes * share
    assert pack_layer(weight, keep, torch.arange(64)).size_bytes == weight.nbytes * share + 4 * 64


def packed_tensors() -> dict[str, torch.Tensor]:
    weight, keep = hand_made()
    dense = {"norm.weight": torch.ones(12)}
    return {**pack_layer(weight, keep, torch.arange(12).flip(0)).tensors(LAYER), **dense}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], entry: Any, layout: Layout = LAYOUT) -> Path:
    save_file(tensors, folder / layout.shard(1, 1))
    (folder / layout.index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, layout.shard(1, 1))}))
    config = {"model_type": "llama"} if entry is None else {"model_type": "llama", "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def good_entry() -> dict[str, Any]:
    return quantization_config({LAYER: NMPattern(2, 4)}, {LAYER}, {"lm_head": "outside the blocks"})


@pytest.mark.parametrize("version", [1, 2])
def test_open_packed_returns_patterns_and_reasons(version: int, tmp_path: Path) -> None:
    assert good_entry() == {
        "quant_method": "streamprune",
        "format_version": 2,
        "layers": {LAYER: {"pattern": "2:4", "permuted": True}},
        "dense_layers": {"lm_head": "outside the blocks"},
    }
    write_folder(tmp_path, packed_tensors(), {**good_entry(), "format_version": version}, LAYOUTS[version])
    assert is_packed(tmp_path)
    checkpoint, layers, dense = open_packed(tmp_path)
    assert layers == {LAYER: NMPattern(2, 4)}
    assert dense == {"lm_head": "outside the blocks"}
    assert set(checkpoint.tensors) == set(packed_tensors())


@pytest.mark.parametrize(
    "entry", [None, {"quant_method": "gptq"}, "streamprune", {}], ids=["none", "other", "text", "{}"]
)
def test_other_folders_are_not_packed(entry: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, packed_tensors(), entry)
    assert not is_packed(tmp_path)
    with pytest.raises(CheckpointError, match="is not a finished streamprune output"):
        open_packed(tmp_path)


def test_folder_without_config_is_not_packed(tmp_path: Path) -> None:
    assert not is_packed(tmp_path)
    assert not is_packed(tmp_path / "absent")


@pytest.mark.parametrize("version", [0, 3, 2.0, True, "2", None, [2]], ids=repr)
def test_unknown_version_is_refused(version: Any, tmp_path: Path) -> None:
    write_folder(tmp_path, packed_tensors(), {**good_entry(), "format_version": version})
    with pytest.raises(CheckpointError, match=rf"has packed format.* {re.escape(str(version))}; .* reads 1 and 2$"):
        open_packed(tmp_path)


@pytest.mark.parametrize(("version", "other"), [(1, 2), (2, 1)])
def test_a_folder_is_opened_by_its_own_index(version: int, other: int, tmp_path: Path) -> None:
    """Weights under another version's names, or a plain checkpoint's, are none of it."""
    write_folder(tmp_path, packed_tensors(), {**good_entry(), "format_version": version}, LAYOUTS[other])
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"/{re.escape(LAYOUTS[version].index)}: cannot be read"):
        open_packed(tmp_path)


def test_a_former_version_has_the_names_of_plain_checkpoints_and_this_one_none(tmp_path: Path) -> None:
    assert [layout.shard(2, 31) for layout in LAYOUTS.values()] == [
        "model-00002-of-00031.safetensors",
        "streamprune-00002-of-00031.safetensors",
    ]
    assert LAYOUT.files == (
        "streamprune.safetensors.index.json",
        "streamprune_permutations.st",
        "streamprune_statistics.st",
    )
    names = [LAYOUT.shard(1, 12), LAYOUT.shard(12, 12), *LAYOUT.files]
    assert [fnmatchcase(name, LAYOUT.shards) for name in names] == [True, True, False, False, False]


MALFORMED_ENTRIES: dict[str, dict[str, Any]] = {
    "no layers": {"layers": None},
    "layers of a list": {"layers": [LAYER]},
    "layer of a string": {"layers": {LAYER: "2:4"}},
    "layer without pattern": {"layers": {LAYER: {}}},
    "pattern of a number": {"layers": {LAYER: {"pattern": 2}}},
    "pattern that keeps all": {"layers": {LAYER: {"pattern": "4:4"}}},
    "pattern that is none": {"layers": {LAYER: {"pattern": "half"}}},
    "permuted of a number": {"layers": {LAYER: {"pattern": "2:4", "permuted": 1}}},
    "dense layers of a list": {"dense_layers": []},
}


@pytest.mark.parametrize("fault", MALFORMED_ENTRIES)
def test_malformed_entry_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    write_folder(tmp_path, packed_tensors(), {**good_entry(), **MALFORMED_ENTRIES[fault]})
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config is malformed") as caught:
        open_packed(tmp_path)
    assert "\n" not in str(caught.value)


def test_entry_without_dense_layers_is_refused(tmp_path: Path) -> None:
    entry = good_entry()
    del entry["dense_layers"]
    write_folder(tmp_path, packed_tensors(), entry)
    with pytest.raises(CheckpointError, match="quantization_config is malformed"):
        open_packed(tmp_path)


def _with(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    def changed() -> dict[str, torch.Tensor]:
        tensors = packed_tensors()
        tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"]).contiguous()
        return tensors

    return changed


def _without(part: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: tensor for name, tensor in packed_tensors().items() if name != f"{LAYER}.{part}"}


BAD_LAYERS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], str]] = {
    "no values": (_without("weight_values"), "has no weight_values"),
    "no mask": (_without("weight_mask"), "has no weight_mask"),
    "mask of int8": (_with("weight_mask", lambda t: t.to(torch.int8)), "do not fit the pattern 2:4"),
    "mask with a row less": (_with("weight_mask", lambda t: t[:1]), "do not fit the pattern 2:4"),
    "mask in one dimension": (_with("weight_mask", torch.flatten), "do not fit the pattern 2:4"),
    "values in one dimension": (_with("weight_values", torch.flatten), "do not fit the pattern 2:4"),
    "values with half a group": (_with("weight_values", lambda t: t[:, :5]), "do not fit the pattern 2:4"),
    "values with a group too few": (_with("weight_values", lambda t: t[:, :4]), "mask does not have 8 channels"),
    "mask with a byte too many": (_with("weight_mask", lambda t: t.repeat(1, 2)), "mask does not have 12 channels"),
    "no permutation": (_without("input_permutation"), "says that its input_permutation is stored, and it is not there"),
    "permutation of int64": (_with("input_permutation", torch.Tensor.long), r"input_permutation is not int32 \[12\]"),
    "permutation too short": (_with("input_permutation", lambda t: t[:8]), r"input_permutation is not int32 \[12\]"),
    "permutation of two rows": (
        _with("input_permutation", lambda t: t.view(2, 6)),
        r"input_permutation is not int32 \[12\]",
    ),
}


@pytest.mark.parametrize("fault", BAD_LAYERS)
def test_layer_whose_tensors_do_not_fit_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    make, message = BAD_LAYERS[fault]
    write_folder(tmp_path, make(), good_entry())
    with pytest.raises(CheckpointError, match=message) as caught:
        open_packed(tmp_path)
    assert LAYER in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_layer_wants_the_pattern_that_the_mask_was_made_for(tmp_path: Path) -> None:
    save_file(packed_tensors(), tmp_path / "one.safetensors")
    checkpoint = open_file(tmp_path / "one.safetensors")
    check_layer(checkpoint, LAYER, NMPattern(2, 4))
    for pattern in (NMPattern(1, 4), NMPattern(4, 8)):
        with pytest.raises(CheckpointError, match=LAYER):
            check_layer(checkpoint, LAYER, pattern)
