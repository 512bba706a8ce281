"""`export`: a packed output as a dense checkpoint that plain transformers loads."""

import shutil
from dataclasses import dataclass

import torch
from tqdm import tqdm

from streamprune.checkpoint.beside import README, copy_beside, list_beside
from streamprune.checkpoint.card import model_card, source_licence
from streamprune.checkpoint.layout import LAYOUTS
from streamprune.checkpoint.manifest import read_manifest
from streamprune.checkpoint.packed import (
    MANIFEST_DIGEST_FILE,
    MANIFEST_FILE,
    TIMINGS_FILE,
    check_contents,
    layer_from_tensors,
    packed_layout,
    packed_shape,
    tensor_names,
)
from streamprune.checkpoint.reader import Checkpoint
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import write_json, write_safetensors, write_text
from streamprune.config import ExportFormat, PathLike, check_settings, path_of
from streamprune.errors import OutputError
from streamprune.model.hub import folder_of
from streamprune.model.source import Source, open_output
from streamprune_kernels import expand

PLAIN = LAYOUTS[1]  # which had the names of plain checkpoints
OWN_FILES = ("config.json", MANIFEST_FILE, MANIFEST_DIGEST_FILE, TIMINGS_FILE)


@dataclass(frozen=True)
class ExportResult:
    """What was written. The layers in `in_memory_order` are N:M as they lie in the file; those in `regathered`
    had their permutation undone: the model computes the same, but their rows are N:M only through that permutation.
    """

    out: str
    output_bytes: int
    in_memory_order: list[str]
    regathered: list[str]
    left_out: dict[str, str]  # files that lie in the output's folder and were not copied, with reasons


def export(folder: PathLike, *, out: PathLike, to: ExportFormat = "dense", progress: bool = False) -> ExportResult:
    """Write a packed output as a dense checkpoint with zeros in the dropped places.

    The function of the model is unchanged and needs nothing of streamprune. `out` must not exist; it appears whole.

    >>> streamprune.export(pruned, out=out).out == str(out)
    True
    """
    check_settings(to=to, progress=progress)
    out = path_of("out", out)
    partial = out.parent / f".{out.name}.partial"
    path_of("folder", folder)
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out}: exists already; choose another --out")
    if partial.is_symlink():
        raise OutputError(f"{partial}: is a symbolic link where the export is made; remove it and run again")
    folder = folder_of("folder", folder, progress)
    opened = open_output(folder)
    checkpoint, layers = opened.checkpoint, opened.packed
    manifest, layout, shards = read_manifest(folder / MANIFEST_FILE), packed_layout(folder), _shards(checkpoint)
    card = (README,) if layout.version > 1 else ()  # in version 1 it is the source's
    beside = list_beside(folder, {*OWN_FILES, *layout.files, *shards, *card})
    temporary = partial / ".temporary"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        temporary.mkdir(parents=True)
        total, weight_map = 0, {}
        bar = tqdm(shards.values(), unit="shard", desc="export", disable=None if progress else True)
        for number, names in enumerate(bar, 1):
            shard = PLAIN.shard(number, len(shards))
            tensors = _dense_tensors(opened, names)
            write_safetensors(partial / shard, tensors, temporary)
            total += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
            weight_map.update(dict.fromkeys(tensors, shard))
        write_json(partial / PLAIN.index, {"metadata": {"total_size": total}, "weight_map": weight_map}, temporary)
        config = {
            key: value for key, value in read_json(folder / "config.json").items() if key != "quantization_config"
        }
        write_json(partial / "config.json", config, temporary)
        copy_beside(folder, beside.placed, partial, temporary)
        text = model_card(manifest, layers, source_licence(folder, beside), beside, total)
        write_text(partial / README, text, temporary)
        temporary.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"{out}: cannot be written ({error.strerror or error}); mend that and run again") from error
    stored = {name for name in layers if f"{name}.input_permutation" in checkpoint.tensors}
    in_order = [name for name in layers if name not in stored]
    return ExportResult(str(out), total, in_order, [name for name in layers if name in stored], beside.left_out)


def _shards(checkpoint: Checkpoint) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name, source in sorted(checkpoint.tensors.items()):
        shards.setdefault(source.path.name, []).append(name)
    return dict(sorted(shards.items()))


def _dense_tensors(opened: Source, names: list[str]) -> dict[str, torch.Tensor]:
    """A shard's tensors with every packed layer unpacked to a dense weight, its stored permutation undone."""
    checkpoint, layers, views = opened.checkpoint, opened.packed, opened.skeleton.views
    packed = [name for name in layers if f"{name}.weight_values" in names]
    parts = {part for name in packed for part in tensor_names(checkpoint, name)}
    tensors = checkpoint.read(name for name in names if name not in parts)
    for name in packed:
        layer = layer_from_tensors(name, checkpoint.read(tensor_names(checkpoint, name)))
        check_contents(name, layer, layers[name])
        _, in_features = packed_shape(checkpoint, name, layers[name])
        weight = expand(layer.values, layer.mask, in_features, layer.permutation)
        tensors[views[name].parameter] = weight.T.contiguous() if views[name].transposed else weight
    return tensors
