"""`verify`: is a packed output whole and consistent, and, with its source at hand, is it the source's?"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from streamprune.checkpoint.beside import file_inside
from streamprune.checkpoint.manifest import FileRecord, LayerRecord, Manifest, differences, read_manifest
from streamprune.checkpoint.packed import (
    MANIFEST_DIGEST_FILE,
    MANIFEST_FILE,
    PackedLayer,
    is_packed,
    layer_from_tensors,
    packed_layout,
    scaling_dropped,
    structure_faults,
    tensor_names,
)
from streamprune.checkpoint.reader import (
    Checkpoint,
    open_checkpoint,
    open_file,
    read_about,
    tensor_digest,
)
from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, read_bounded
from streamprune.checkpoint.writer import file_digest
from streamprune.config import Device, PathLike, check_settings, path_of
from streamprune.errors import CheckpointError, NumericsError, SettingsError
from streamprune.model.arithmetic import resolve_arithmetic
from streamprune.model.configuration import forward_settings, model_config
from streamprune.model.names import match_names, with_experts_apart
from streamprune.model.source import Source, open_output
from streamprune.pruning.selection import weighted_error
from streamprune.runtime.products import Product, products, unpacked_mask
from streamprune.text.tokenizers import tokenizer_digests

RECOMPUTED_TOLERANCE = 1e-9  # float64 sums on another machine
LOADED = ("*.safetensors", "*.bin", "*.index.json")  # what loaders take, whether it is the output's or not
OTHER_BYTES = "its sha256 is not the recorded one"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerCheck:
    """`relative_error` is the largest of the layer's float32 products on seeded inputs, against unpack + plain linear.

    None where the layer's structure allows no product, or where it is no number.
    """

    name: str
    relative_error: float | None
    ok: bool


@dataclass(frozen=True)
class VerifyResult:
    """`against_source` says which of the two checks was done; every fault is one line with the layer or file.

    `quick`: sizes and headers alone were looked at, and `layers` is empty.
    `reconstructed`: the kept weights were fitted, so that they are not compared with the source's; masks are.
    `validated`: text passed the model when it was compressed, so that the manifest's error figures were measured.
    """

    ok: bool
    against_source: bool
    quick: bool
    reconstructed: bool
    validated: bool
    layers: list[LayerCheck]
    faults: list[str]
    manifest_sha256: str | None


@dataclass
class _Findings:
    layers: list[LayerCheck] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Output:
    """An opened output and what its manifest says of it; `recorded` are the pruned layers by name."""

    opened: Source
    manifest: Manifest
    recorded: dict[str, LayerRecord]

    @property
    def folder(self) -> Path:
        return self.opened.folder

    @property
    def checkpoint(self) -> Checkpoint:
        return self.opened.checkpoint


def verify(
    folder: PathLike,
    *,
    source: PathLike | None = None,
    quick: bool = False,
    device: Device = "auto",
    progress: bool = False,
) -> VerifyResult:
    """Check every byte of an output folder.

    Always: checksums of all files, structure, exactly N of M, and each layer's products by the kernels that run it on
    `device` (auto, cpu or cuda) against unpack + plain linear. With `source`: also that every kept value and every
    dense tensor equals the source's bits, position by position through the stored permutations, and that the weighted
    error recomputed from the bytes is the recorded one.
    `quick` looks at the manifest's digest, sizes and headers alone: it sees what is missing, not what is damaged.

    >>> streamprune.verify(pruned, source=model).ok
    True
    """
    check_settings(quick=quick, device=device, progress=progress)
    if quick and source is not None:
        raise SettingsError("--quick reads no weights that --source could be compared with; give one of the two")
    folder = path_of("folder", folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    where = resolve_arithmetic(device, "float32", torch.float32).device
    original = _open_source(path_of("source", source)) if source is not None else None
    findings = _Findings()
    compared = reconstructed = validated = False
    try:
        manifest = _check_files(folder, findings, quick)
        output = _open_output(folder, manifest)
        reconstructed, validated = manifest.reconstructed, manifest.validated
        if scaling_dropped(folder, manifest.format_version):
            findings.faults.append(
                "config.json: its rope_scaling was dropped by the streamprune that made this output, so that masks and "
                "errors are of another model; compress it again"
            )
        if not quick:
            _check_layers(output, findings, where, progress)
        if original is not None:
            _check_against_source(output, original, findings, progress)
            compared = True
    except (CheckpointError, NumericsError) as error:
        findings.faults.append(str(error))
    except (KeyError, TypeError, AttributeError) as error:
        findings.faults.append(f"{MANIFEST_FILE}: is malformed ({type(error).__name__}: {error})")
    about = compared, quick, reconstructed, validated
    return VerifyResult(not findings.faults, *about, findings.layers, findings.faults, _digest(folder))


def _open_source(source: Path) -> Checkpoint:
    if is_packed(source):
        raise CheckpointError(f"{source}: is itself an output of streamprune; give --source the dense model")
    return open_checkpoint(source)


def _digest(folder: Path) -> str | None:
    """sha256 of the manifest, where it is one that can be read."""
    try:
        return hashlib.sha256(read_bounded(folder / MANIFEST_FILE, MAX_JSON_BYTES)).hexdigest()
    except CheckpointError:
        return None


def _check_files(folder: Path, findings: _Findings, quick: bool) -> Manifest:
    """Compare the manifest with its digest file, and every file (`quick`: its size) with it; returns the manifest."""
    if not (folder / MANIFEST_DIGEST_FILE).is_file():
        raise CheckpointError(f"{folder}: is not a finished output of streamprune ({MANIFEST_DIGEST_FILE} is missing)")
    digest_line = read_bounded(folder / MANIFEST_DIGEST_FILE, 1000)
    manifest = read_manifest(folder / MANIFEST_FILE)
    if digest_line != f"{file_digest(folder / MANIFEST_FILE)}  {MANIFEST_FILE}\n".encode():
        raise CheckpointError(
            f"{MANIFEST_FILE}: its sha256 is not the one in {MANIFEST_DIGEST_FILE}; nothing else is checked"
        )
    needed = {"config.json", *manifest.layout.files}
    needed.update(path.name for pattern in LOADED for path in folder.glob(pattern))
    findings.faults += [f"{name}: is not in {MANIFEST_FILE}" for name in sorted(needed - manifest.files.keys())]
    for name, recorded in sorted(manifest.files.items()):
        if fault := _file_fault(folder, name, recorded, quick):
            holds = f"; {_contents(manifest, name)}" if fault == OTHER_BYTES else ""
            findings.faults.append(f"{name}: {fault}{holds}")
    return manifest


def _file_fault(folder: Path, name: str, recorded: FileRecord, quick: bool) -> str | None:
    """What is wrong with a file of the manifest. One that lies elsewhere, or behind a link to another folder, is
    missing: the folder does not have it.
    """
    try:
        path = file_inside(folder, name)
        if path is None:
            return "is missing"
        if (size_bytes := path.stat().st_size) != recorded.bytes:
            return f"has {size_bytes} bytes, not the recorded {recorded.bytes}"
        return OTHER_BYTES if not quick and file_digest(path) != recorded.sha256 else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _contents(manifest: Manifest, name: str) -> str:
    number = name.removeprefix(f"{manifest.layout.stem}-").partition("-of-")[0]
    if number.isdecimal() and 2 <= int(number) < len(manifest.blocks) + 2:
        return f"it holds block {manifest.blocks[int(number) - 2].name}"
    return "it holds no pruned layer"


def _open_output(folder: Path, manifest: Manifest) -> _Output:
    layout = packed_layout(folder)
    if layout.version != manifest.format_version:
        versions = f"format {layout.version}, the manifest {manifest.format_version}"
        raise CheckpointError(f"{folder}: config.json says {versions}")
    opened = open_output(folder)
    recorded = {layer.name: layer for layer in manifest.layers}
    different = sorted(set(recorded) ^ set(opened.packed))
    if different:
        raise CheckpointError(f"{different[0]}: config.json and the manifest disagree on whether it is pruned")
    for name, pattern in opened.packed.items():
        if recorded[name].pattern != str(pattern):
            raise CheckpointError(f"{name}: config.json says {pattern}, the manifest {recorded[name].pattern}")
    return _Output(opened, manifest, recorded)


def _check_layers(output: _Output, findings: _Findings, device: torch.device, progress: bool) -> None:
    shared: dict[str, torch.Tensor | None] = {}
    leaders = _group_leaders(output.opened)
    bar = tqdm(output.opened.packed.items(), unit="layer", desc="verify", disable=None if progress else True)
    for number, (name, pattern) in enumerate(bar):
        layer = layer_from_tensors(name, output.checkpoint.read(tensor_names(output.checkpoint, name)))
        faults = list(structure_faults(layer, pattern))
        leader = leaders.get(name, name)
        if not _same(shared.setdefault(leader, layer.permutation), layer.permutation):
            faults.append(f"its input_permutation differs from that of {leader}, whose input it shares")
        done = [] if faults else list(products(layer, pattern, device, seed=number))
        faults += [product.fault for product in done if product.fault is not None]
        findings.layers.append(LayerCheck(name, _float32_error(done), not faults))
        findings.faults += [f"{name}: {fault}" for fault in faults]


def _float32_error(done: list[Product]) -> float | None:
    errors = [product.error for product in done if product.dtype == torch.float32]
    return max(errors) if errors and all(map(math.isfinite, errors)) else None


def _group_leaders(opened: Source) -> dict[str, str]:
    """Each layer's first fellow of those that share its input."""
    return {name: group.name for block in opened.blocks for group in block.groups for name in group.names}


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _check_against_source(output: _Output, checkpoint: Checkpoint, findings: _Findings, progress: bool) -> None:
    findings.faults += _other_settings(output, checkpoint)
    checkpoint = with_experts_apart(output.opened.skeleton, checkpoint)
    names = match_names(output.opened.skeleton, checkpoint)
    views = {view.parameter: view for view in output.opened.skeleton.views.values()}
    orders = _orders(output)
    rms = open_file(output.folder / output.manifest.layout.statistics)
    faulty: set[str] = set()
    bar = tqdm(sorted(names.items()), unit="tensor", desc="against source", disable=None if progress else True)
    for parameter, original in bar:
        tensor = checkpoint.read([original])[original]
        if tensor_digest(tensor) != output.manifest.source_tensors.get(original):
            findings.faults.append(f"{original}: the source is not the one that was compressed")
        tensor = _in_output_order(parameter, tensor, orders.get(parameter, []))
        view = views.get(parameter)
        layer_name = view.name if view is not None else parameter
        if view is not None and layer_name in output.opened.packed:
            columns = [order for dim, order in orders.get(parameter, ()) if dim == view.input_dim]
            faults = _layer_faults(output, layer_name, view.read(tensor), columns, rms)
        else:
            stored = output.checkpoint.read([parameter])[parameter]
            layer_name, faults = parameter, [] if _bits_equal(stored, tensor) else ["differs from the source's"]
        findings.faults += [f"{layer_name}: {fault}" for fault in faults]
        if faults:
            faulty.add(layer_name)
    findings.layers = [LayerCheck(c.name, c.relative_error, c.ok and c.name not in faulty) for c in findings.layers]


def _other_settings(output: _Output, checkpoint: Checkpoint) -> Iterator[str]:
    """What of the source's config.json and tokenizer is not what lies in the output."""
    config = model_config(checkpoint.folder, checkpoint)
    settings = forward_settings(config), forward_settings(output.opened.skeleton.model.config)
    for name, theirs, ours in differences(*settings):
        yield f"config.json: {name} is {theirs} in the source, {ours} here"
    for name, _, _ in differences(tokenizer_digests(checkpoint.folder), tokenizer_digests(output.folder)):
        yield f"{name}: is not the source's"


def _in_output_order(name: str, tensor: torch.Tensor, orders: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """A source tensor with its rows and columns in the output's order."""
    for dim, permutation in orders:
        if dim not in range(tensor.ndim) or len(permutation) != tensor.shape[dim]:
            raise CheckpointError(
                f"{name}: a permutation of {len(permutation)} places along dimension {dim} does not fit its shape "
                f"{list(tensor.shape)}"
            )
        tensor = tensor.index_select(dim, permutation)
    return tensor


def _orders(output: _Output) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Of each reordered tensor: the dimensions and their permutations (place j holds source index p[j])."""
    path = output.folder / output.manifest.layout.permutations
    file = open_file(path)
    folded = file.read(file.tensors)
    orders: dict[str, list[tuple[int, torch.Tensor]]] = {}
    try:
        for item in read_about(path) or []:
            for tensor, dim in item["reorders"]:
                orders.setdefault(tensor, []).append((dim, folded[item["permutation"]].long()))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: its list of reordered tensors is malformed ({error})") from error
    for layer in output.opened.packed:
        name, view = f"{layer}.input_permutation", output.opened.skeleton.views[layer]
        if name in output.checkpoint.tensors:
            stored = output.checkpoint.read([name])[name].long()
            orders.setdefault(view.parameter, []).append((view.input_dim, stored))
    for tensor, permutations in orders.items():
        for _, permutation in permutations:
            if not torch.equal(permutation.sort().values, torch.arange(len(permutation))):
                raise CheckpointError(f"{tensor}: a permutation that reorders it is not a permutation")
    return orders


def _layer_faults(
    output: _Output, name: str, weight: torch.Tensor, columns: list[torch.Tensor], statistics: Checkpoint
) -> list[str]:
    """Compare a packed layer with its source weight, already in the output's order of rows and columns."""
    layer = layer_from_tensors(name, output.checkpoint.read(tensor_names(output.checkpoint, name)))
    keep = torch.from_numpy(unpacked_mask(layer))[:, : weight.shape[1]]
    if keep.shape != weight.shape or int(keep.sum()) != layer.values.numel() or layer.values.dtype != weight.dtype:
        return ["its mask or values do not fit the source's weight"]
    expected = weight[keep].view(layer.values.shape) if _rows_even(keep, layer) else None
    if expected is None:
        return ["its rows keep different numbers of weights"]
    different = (_bits(expected) != _bits(layer.values)).nonzero()
    if len(different) and not output.manifest.reconstructed:
        row, place = different[0].tolist()
        return [f"{len(different)} kept values differ from the source's, first in row {row} at kept place {place}"]
    rms_name = f"{name}.input_rms"
    rms = statistics.read([rms_name])[rms_name]
    if rms.shape != (weight.shape[1],):
        return [f"its stored input RMS does not have {weight.shape[1]} channels"]
    for permutation in columns:
        rms = rms[permutation]
    recomputed, recorded = weighted_error(weight, keep, rms), output.recorded[name].weighted_error
    if not abs(recomputed - recorded) <= RECOMPUTED_TOLERANCE * max(recorded, RECOMPUTED_TOLERANCE):
        return [f"its weighted error recomputed from the bytes is {recomputed:.9g}, recorded is {recorded:.9g}"]
    return []


def _rows_even(keep: torch.Tensor, layer: PackedLayer) -> bool:
    return bool((keep.sum(dim=1) == layer.values.shape[1]).all())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.itemsize])


def _bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))
