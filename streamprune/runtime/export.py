"""`export`: a packed output as a dense checkpoint that plain transformers loads."""

import itertools
import math
import shutil
from collections.abc import Iterator
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
from streamprune.checkpoint.writer import Pieces, write_json, write_safetensors, write_text
from streamprune.config import ExportFormat, PathLike, check_settings, path_of
from streamprune.errors import CheckpointError, OutputError
from streamprune.model.hub import folder_of
from streamprune.model.library import name_when_saved
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
    manifest, layout, shards = read_manifest(folder / MANIFEST_FILE), packed_layout(folder), _dense_shards(opened)
    files = {tensor.path.name for tensor in checkpoint.tensors.values()}
    card = (README,) if layout.version > 1 else ()  # in version 1 it is the source's
    beside = list_beside(folder, {*OWN_FILES, *layout.files, *files, *card})
    temporary = partial / ".temporary"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        temporary.mkdir(parents=True)
        total, weight_map = 0, {}
        bar = tqdm(shards.values(), unit="shard", desc="export", disable=None if progress else True)
        for number, tensors in enumerate(bar, 1):
            shard = PLAIN.shard(number, len(shards))
            write_safetensors(partial / shard, tensors, temporary)
            total += sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in tensors.values())
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


def _dense_shards(opened: Source) -> dict[str, dict[str, Pieces]]:
    """The dense tensors that the shards of an output become, by the shards' names; each is made while it is written."""
    skeleton, tensors = opened.skeleton, opened.checkpoint.tensors
    layers = {opened.skeleton.parameter_of(name): name for name in opened.packed}
    parts = {part for name in opened.packed for part in tensor_names(opened.checkpoint, name)}
    made = {name: _copied(opened.checkpoint, name) for name in tensors if name not in parts}
    made |= {parameter: _unpacked(opened, name) for parameter, name in layers.items()}
    files = {name: tensors[f"{layers[name]}.weight_values" if name in layers else name].path.name for name in made}
    for whole, fused in skeleton.fused.items():
        slices = [fused.slices.format(number) for number in range(fused.count)]
        files[whole] = files[slices[0]]
        made[whole] = _stacked(whole, [made.pop(name) for name in slices])
    saved = name_when_saved(skeleton.model)
    shards: dict[str, dict[str, Pieces]] = {}
    for name in sorted(made):
        shards.setdefault(files[name], {})[saved(name)] = made[name]
    return dict(sorted(shards.items()))


def _copied(checkpoint: Checkpoint, name: str) -> Pieces:
    source = checkpoint.tensors[name]
    return Pieces(source.dtype, source.shape, lambda: checkpoint.pieces(name))


def _unpacked(opened: Source, name: str) -> Pieces:
    """A packed layer's weight, its stored permutation undone."""
    checkpoint, pattern, transposed = opened.checkpoint, opened.packed[name], opened.skeleton.views[name].transposed
    rows, channels = packed_shape(checkpoint, name, pattern)

    def weight() -> Iterator[torch.Tensor]:
        layer = layer_from_tensors(name, checkpoint.read(tensor_names(checkpoint, name)))
        check_contents(name, layer, pattern)
        expanded = expand(layer.values, layer.mask, channels, layer.permutation)
        yield expanded.T.contiguous() if transposed else expanded

    shape = (channels, rows) if transposed else (rows, channels)
    return Pieces(checkpoint.tensors[f"{name}.weight_values"].dtype, shape, weight)


def _stacked(name: str, slices: list[Pieces]) -> Pieces:
    """A tensor that holds all experts of a block, of what each has of it."""
    first = slices[0]
    if any(one.dtype != first.dtype for one in slices):
        raise CheckpointError(f"{name}: its experts are stored in different dtypes; the output is damaged")
    return Pieces(
        first.dtype, (len(slices), *first.shape), lambda: itertools.chain.from_iterable(one.make() for one in slices)
    )
