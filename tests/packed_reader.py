"""A reader of the packed format in numpy, written from its specification and sharing no code with streamprune.

Tensors are compared by their bits: `bits` gives a tensor of 2-byte or 4-byte numbers as unsigned integers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open

UNSIGNED = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.contiguous().view(SIGNED[tensor.itemsize]).numpy().view(UNSIGNED[tensor.itemsize])


def open_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of weights, packed or dense, by the names in its files."""
    tensors: dict[str, torch.Tensor] = {}
    index = next(folder.glob("*.safetensors.index.json"), None)
    indexed = json.loads(index.read_text())["weight_map"].values() if index else []
    for path in sorted({folder / name for name in indexed} or folder.glob("*.safetensors")):  # a job may be unfinished
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    return tensors


@dataclass(frozen=True)
class Layer:
    """A packed layer in the channel order of the file: the weight's bits with zeros in place, and which are kept."""

    kept: int
    group: int
    weight: numpy.ndarray
    keep: numpy.ndarray
    gather: numpy.ndarray | None


class PackedFolder:
    """An output folder, read whole."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())["quantization_config"]
        self.tensors = open_folder(folder)
        self.patterns = {
            name: tuple(map(int, entry["pattern"].split(":"))) for name, entry in self.config["layers"].items()
        }
        self.orders: dict[str, dict[int, numpy.ndarray]] = {}  # of a tensor: dimension to folded permutation
        with safe_open(next(folder.glob("streamprune_permutations.*")), "pt") as file:
            self.folded = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            about: Any = json.loads((file.metadata() or {}).get("streamprune", "[]"))
        for item in about:
            for tensor, dimension in item["reorders"]:
                assert dimension not in self.orders.get(tensor, {}), f"{tensor} is reordered twice along {dimension}"
                self.orders.setdefault(tensor, {})[dimension] = self.folded[item["permutation"]]

    def layer(self, name: str) -> Layer:
        kept, group = self.patterns[name]
        values, mask = bits(self.tensors[f"{name}.weight_values"]), self.tensors[f"{name}.weight_mask"].numpy()
        channels = values.shape[1] // kept * group
        assert values.shape == (len(mask), channels // group * kept)
        assert mask.shape[1] == (channels + 7) // 8
        unpacked = numpy.unpackbits(mask, axis=1, bitorder="little").astype(bool)
        assert not unpacked[:, channels:].any(), "padding bits are set"
        keep = unpacked[:, :channels]
        weight = numpy.zeros(keep.shape, values.dtype)
        weight[keep] = values.reshape(-1)
        gather = self.tensors.get(f"{name}.input_permutation")
        return Layer(kept, group, weight, keep, gather.numpy() if gather is not None else None)

    def order(self, name: str, dimension: int, length: int) -> numpy.ndarray:
        """Place j of a parameter holds source index order[j]."""
        order = self.orders.get(name, {}).get(dimension, numpy.arange(length))
        assert sorted(order) == list(range(length))
        return order

    def source_order(self, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """A packed layer's weight (bits) and mask in the source's order of rows and columns."""
        layer = self.layer(name)
        rows = self.order(f"{name}.weight", 0, len(layer.keep))
        columns = self.order(f"{name}.weight", 1, layer.keep.shape[1])
        if layer.gather is not None:
            assert f"{name}.weight" not in self.orders or 1 not in self.orders[f"{name}.weight"]
            columns = layer.gather
        weight, keep = numpy.zeros_like(layer.weight), numpy.zeros_like(layer.keep)
        weight[numpy.ix_(rows, columns)] = layer.weight
        keep[numpy.ix_(rows, columns)] = layer.keep
        return weight, keep

    def unpacked_state(self, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The pruned model in the source's own order: its tensors with +0 in the dropped places."""
        state = {name: tensor.clone() for name, tensor in source.items()}
        for name in self.patterns:
            weight, _ = self.source_order(name)
            target = state[f"{name}.weight"]
            state[f"{name}.weight"] = torch.from_numpy(weight.view(numpy.int16)).view(target.dtype)
        return state

    def check_against(self, source: dict[str, torch.Tensor], *, reconstructed: bool = False) -> int:
        """Assert exactly N of M, and every stored number's bits, over the whole model; returns the kept weights.

        Of a reconstructed model the kept weights are others.
        """
        count = 0
        expected = {f"{name}.{part}" for name in self.patterns for part in ("weight_values", "weight_mask")}
        expected |= {f"{name}.input_permutation" for name in self.patterns} & set(self.tensors)
        for name in self.patterns:
            layer, original = self.layer(name), source[f"{name}.weight"]
            in_group = layer.keep.reshape(len(layer.keep), -1, layer.group).sum(axis=2)
            assert (in_group == layer.kept).all(), name
            assert self.tensors[f"{name}.weight_values"].dtype == original.dtype
            weight, keep = self.source_order(name)
            assert reconstructed or (weight[keep] == bits(original)[keep]).all(), name
            count += int(keep.sum())
        dense = set(source) - {f"{name}.weight" for name in self.patterns}
        for name in dense:
            stored, original = self.tensors[name], source[name]
            assert stored.dtype == original.dtype
            expected_bits = bits(original)
            for dimension in self.orders.get(name, {}):
                order = self.order(name, dimension, original.shape[dimension])
                expected_bits = expected_bits.take(order, axis=dimension)
            assert (bits(stored) == expected_bits).all(), name
        assert set(self.tensors) == expected | dense
        return count
