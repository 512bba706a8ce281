"""The packed format: names and layout of a pruned layer's tensors. docs/format.md is its specification."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from streamprune.checkpoint.layout import LAYOUT, Layout, layout_of
from streamprune.checkpoint.reader import Checkpoint, open_index
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import Pieces
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError, SettingsError
from streamprune_kernels import pack_mask, pack_values

QUANT_METHOD = "streamprune"
MANIFEST_FILE = "streamprune_manifest.json"
MANIFEST_DIGEST_FILE = "streamprune_manifest.sha256"
TIMINGS_FILE = "timings.json"
PACKED_AT_ONCE = 1 << 22  # bytes of a weight: what comes of them is still in the caches when it is written
MASK_BITS_AT_ONCE = 1 << 24  # unpacked, a byte each


@dataclass(frozen=True)
class PackedLayer:
    """One pruned linear layer as it lies on disk.

    values [out, in*N/M] in the source's dtype; mask uint8 [out, ceil(in/8)]; permutation int32 [in] or None.
    """

    values: torch.Tensor
    mask: torch.Tensor
    permutation: torch.Tensor | None

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in (self.values, self.mask, self.permutation) if t is not None)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The layer's tensors under their names in a shard."""
        tensors = {f"{name}.weight_values": self.values, f"{name}.weight_mask": self.mask}
        if self.permutation is not None:
            tensors[f"{name}.input_permutation"] = self.permutation
        return tensors


def pack_layer(weight: torch.Tensor, keep: torch.Tensor, permutation: torch.Tensor | None) -> PackedLayer:
    """Pack a weight [out, in] in permuted channel order by its mask; `permutation` only where it is not folded."""
    stored = permutation.to(torch.int32) if permutation is not None else None
    return PackedLayer(pack_values(weight, keep), pack_mask(keep), stored)


def packed_tensors(
    name: str, weight: torch.Tensor, keep: torch.Tensor, permutation: torch.Tensor | None, pattern: NMPattern
) -> dict[str, Pieces | torch.Tensor]:
    """The tensors of `pack_layer` under their names in a shard, packed some rows at a time while they are written."""
    rows, channels = weight.shape
    kept = channels // pattern.group_size * pattern.kept
    at_once = max(1, PACKED_AT_ONCE // (weight.itemsize * channels))

    def values() -> Iterator[torch.Tensor]:
        for some, keeps in zip(weight.split(at_once), keep.split(at_once), strict=True):
            yield pack_values(some, keeps).cpu()

    def mask() -> Iterator[torch.Tensor]:
        for keeps in keep.split(at_once):
            yield pack_mask(keeps).cpu()

    tensors: dict[str, Pieces | torch.Tensor] = {
        f"{name}.weight_values": Pieces(weight.dtype, (rows, kept), values),
        f"{name}.weight_mask": Pieces(torch.uint8, (rows, -(-channels // 8)), mask),
    }
    if permutation is not None:
        tensors[f"{name}.input_permutation"] = permutation.to(torch.int32)
    return tensors


def layer_from_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> PackedLayer:
    """The inverse of `PackedLayer.tensors`."""
    return PackedLayer(
        tensors[f"{name}.weight_values"], tensors[f"{name}.weight_mask"], tensors.get(f"{name}.input_permutation")
    )


def tensor_names(checkpoint: Checkpoint, layer: str) -> list[str]:
    """Names of the tensors that hold a pruned layer in an opened packed checkpoint."""
    names = [f"{layer}.weight_values", f"{layer}.weight_mask"]
    stored = f"{layer}.input_permutation"
    return [*names, stored] if stored in checkpoint.tensors else names


def quantization_config(
    layers: Mapping[str, NMPattern], permuted: Collection[str], dense: Mapping[str, str]
) -> dict[str, Any]:
    """The entry of config.json: each pruned layer's pattern, whether it is among the `permuted`, whose permutation is
    stored, and the reason for each linear layer left dense.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": LAYOUT.version,
        "layers": {name: {"pattern": str(pattern), "permuted": name in permuted} for name, pattern in layers.items()},
        "dense_layers": dict(dense),
    }


def is_packed(folder: Path) -> bool:
    """Whether a folder says that it is a packed checkpoint."""
    if not (folder / "config.json").exists():
        return False
    entry = read_json(folder / "config.json").get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def packed_layout(folder: Path) -> Layout:
    """What the files of a packed folder are called. Raises CheckpointError for a folder or a version that is none."""
    if not is_packed(folder):
        raise CheckpointError(f"{folder}: is not a finished streamprune output (no quantization_config in config.json)")
    return layout_of(read_json(folder / "config.json")["quantization_config"].get("format_version"), folder)


def scaling_dropped(folder: Path, version: int) -> bool:
    """Whether an output was computed without the rope_scaling of its config.json: what made version 1 dropped it."""
    return version == 1 and bool(read_json(folder / "config.json").get("rope_scaling"))


def open_packed(folder: Path) -> tuple[Checkpoint, dict[str, NMPattern], dict[str, str]]:
    """An opened packed folder, its pruned layers' patterns, and its dense layers' reasons.

    Raises CheckpointError for another format, a version this code does not know, or layers without their tensors.
    """
    checkpoint = open_index(folder / packed_layout(folder).index)
    layers, dense = check_entry(checkpoint, read_json(folder / "config.json")["quantization_config"])
    return checkpoint, layers, dense


def check_entry(checkpoint: Checkpoint, entry: Mapping[str, Any]) -> tuple[dict[str, NMPattern], dict[str, str]]:
    """The pruned layers' patterns and the dense layers' reasons that an entry of config.json gives.

    Raises CheckpointError where it is malformed, or the tensors of a layer in the opened checkpoint are not as it says.
    """
    layers, dense, permuted = parse_entry(checkpoint.folder / "config.json", entry)
    for name, pattern in layers.items():
        check_layer(checkpoint, name, pattern, permuted[name])
    return layers, dense


def parse_entry(
    where: Any, entry: Mapping[str, Any]
) -> tuple[dict[str, NMPattern], dict[str, str], dict[str, bool | None]]:
    """What an entry says: patterns, reasons, and whether layers' permutations are stored; None where it does not say.

    Raises CheckpointError, which says `where` it stands, for a malformed one.
    """
    try:
        layers = {str(name): NMPattern.parse(value["pattern"]) for name, value in entry["layers"].items()}
        permuted = {str(name): value.get("permuted") for name, value in entry["layers"].items()}
        dense = {str(name): str(reason) for name, reason in entry["dense_layers"].items()}
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise CheckpointError(f"{where}: quantization_config is malformed ({error})") from error
    if wrong := next((name for name, said in permuted.items() if not isinstance(said, bool | None)), None):
        raise CheckpointError(f"{where}: quantization_config is malformed (permuted of {wrong} is no truth value)")
    return layers, dense, permuted


def check_layer(checkpoint: Checkpoint, name: str, pattern: NMPattern, permuted: bool | None = None) -> None:
    """Raise CheckpointError unless the headers give the layer the dtypes and shapes of its pattern, and a permutation
    where it is `permuted` (None: it is not known).
    """
    tensors = checkpoint.tensors
    for part in ("weight_values", "weight_mask"):
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{checkpoint.folder}: layer {name} has no {part}")
    values, mask = tensors[f"{name}.weight_values"], tensors[f"{name}.weight_mask"]
    fits = len(values.shape) == 2 and len(mask.shape) == 2 and values.shape[0] == mask.shape[0]
    if not fits or values.shape[1] % pattern.kept or mask.dtype != torch.uint8 or not values.dtype.is_floating_point:
        raise CheckpointError(f"{checkpoint.folder}: layer {name}: values and mask do not fit the pattern {pattern}")
    in_features = values.shape[1] // pattern.kept * pattern.group_size
    if mask.shape[1] != -(-in_features // 8):
        raise CheckpointError(f"{checkpoint.folder}: layer {name}: the mask does not have {in_features} channels")
    permutation = tensors.get(f"{name}.input_permutation")
    if permuted is not None and permuted != (permutation is not None):
        raise CheckpointError(
            f"{checkpoint.folder}: layer {name}: config.json says that its input_permutation is "
            f"{'stored, and it is not there' if permuted else 'not stored, and it is there'}"
        )
    if permutation is not None and (permutation.dtype != torch.int32 or permutation.shape != (in_features,)):
        raise CheckpointError(f"{checkpoint.folder}: layer {name}: input_permutation is not int32 [{in_features}]")


def check_contents(name: str, layer: PackedLayer, pattern: NMPattern) -> None:
    """Raise CheckpointError, naming the layer, if its mask or permutation breaks the format."""
    if fault := next(structure_faults(layer, pattern), None):
        raise CheckpointError(f"layer {name}: {fault}; the output is damaged, streamprune verify says more")


def structure_faults(layer: PackedLayer, pattern: NMPattern) -> Iterator[str]:
    """Faults in a layer's mask and permutation; its dtypes and shapes must be right (`check_layer`).

    Written in numpy, independently of the code that packs; works on some rows at a time.
    """
    in_features = layer.values.shape[1] // pattern.kept * pattern.group_size
    mask = layer.mask.cpu().numpy()
    at_once = max(1, MASK_BITS_AT_ONCE // (8 * mask.shape[1]))
    padded = False
    for first in range(0, 0 if _whole_bytes_right(mask, in_features, pattern) else len(mask), at_once):
        keep = numpy.unpackbits(mask[first : first + at_once], axis=1, bitorder="little")
        if not padded and keep[:, in_features:].any():
            padded = True
            yield "padding bits of its mask are set"
        groups = keep[:, :in_features].reshape(len(keep), -1, pattern.group_size)
        counts = groups.sum(axis=2, dtype=numpy.uint8)
        wrong = numpy.argwhere(counts != pattern.kept)
        if len(wrong):
            row, group = (int(number) for number in wrong[0])
            kept = int(counts[row, group])
            yield f"row {first + row}, group {group} keeps {kept} of {pattern.group_size}, not {pattern.kept}"
            break
    if layer.permutation is not None:
        identity = torch.arange(in_features, dtype=torch.int32)
        if not torch.equal(layer.permutation.sort().values, identity):
            yield "its input_permutation is not a permutation"


def _whole_bytes_right(mask: Any, in_features: int, pattern: NMPattern) -> bool:
    """Whether a mask is plainly right: no group and no padding goes beyond a byte, and each byte is one of the right
    ones. It takes a twentieth of the time that counting takes.
    """
    if in_features % 8 or 8 % pattern.group_size:
        return False
    bits = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1, bitorder="little")
    right = (bits.reshape(256, -1, pattern.group_size).sum(axis=2) == pattern.kept).all(axis=1)
    return bool(right[mask].all())


def packed_shape(checkpoint: Checkpoint, name: str, pattern: NMPattern) -> tuple[int, int]:
    """Output and input features of a pruned layer, from its header."""
    out_features, kept = checkpoint.tensors[f"{name}.weight_values"].shape
    return out_features, kept // pattern.kept * pattern.group_size
