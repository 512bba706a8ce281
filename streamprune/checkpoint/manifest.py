"""Records of a job: what its journal says of each block, and the manifest of its output.

One schema, read and written by these classes; docs/format.md says what the fields mean. Of an unknown file every field
is checked when it is read: counts are from 0 to 2^63, numbers are finite.
"""

import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from streamprune.checkpoint.layout import Layout, layout_of
from streamprune.checkpoint.untrusted import read_json
from streamprune.errors import CheckpointError

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
T = TypeVar("T")


class StepRecord(Struct, frozen=True):
    """A layer after one step of pruning; the fields are streamprune.pruning.group.Step's."""

    name: str
    retained_score: Number
    output_error: Number | None
    corrected_error: Number | None


class LayerRecord(Struct, frozen=True):
    """A pruned layer. The two last errors are measured by running text: None where none was run."""

    name: str
    pattern: str
    shape: tuple[Count, Count]
    dense_bytes: Count
    packed_bytes: Count
    permutation_bytes: Count
    steps: Annotated[tuple[StepRecord, ...], Meta(min_length=1)]
    shrinkage: tuple[Number, ...]
    weighted_error: Number
    kernel_error: Number | None
    layer_error: Number | None


class MomentsRecord(Struct, frozen=True):
    """Memory of all second moments of a block, and the layers whose inputs were too wide for one matrix of them."""

    bytes: Count
    layers_in_blocks: tuple[str, ...]


class BlockRecord(Struct, frozen=True, omit_defaults=True):
    """A block in the manifest. `block_error` is None where no text was run.

    starved  experts that saw too few tokens, with how many; absent where there are none
    """

    name: str
    outcome: str
    block_error: Number | None
    moments: MomentsRecord
    layers: tuple[LayerRecord, ...]
    starved: dict[str, Count] = msgspec.field(default_factory=dict)


class BlockTimings(Struct, frozen=True):
    """Seconds of each stage, and the process's peak memory so far."""

    seconds: dict[str, Number]
    peak_memory_bytes: Count


class JournalEntry(Struct, frozen=True):
    """A finished block in the journal: its record, and what is needed to go on from it or to finish.

    source_tensors   sha256 of each of the source's tensors, by its name there
    files            sha256 of the block's files, by their paths in the output folder
    hidden_states    checksum of each sequence's output behind pruned blocks; None where no text was run
    reference_states the same behind dense blocks; None where none is kept
    """

    record: BlockRecord
    source_tensors: dict[str, str]
    files: dict[str, str]
    hidden_states: tuple[int | None, ...] | None
    reference_states: tuple[int | None, ...] | None
    timings: BlockTimings


class FileRecord(Struct, frozen=True):
    """A file of an output."""

    sha256: str
    bytes: Count


class Manifest(Struct, frozen=True):
    """What a finished output says of itself. `identity` is what determined its bytes, as nested plain data.

    Version 1 of the format has neither the source's name nor by which version it was made.
    """

    format_version: Count
    identity: dict[str, Any]
    blocks: Annotated[tuple[BlockRecord, ...], Meta(min_length=1)]
    dense_layers: dict[str, str]
    source_bytes: Count
    source_tensors: dict[str, str]
    files: dict[str, FileRecord]
    source_name: str | None = None
    made_by: str | None = None

    @property
    def layout(self) -> Layout:
        """Names of the files in its version of the format. Raises CheckpointError for one that is not known."""
        return layout_of(self.format_version, "the manifest")

    @property
    def layers(self) -> list[LayerRecord]:
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.bytes for name, file in self.files.items() if fnmatchcase(name, self.layout.shards))

    @property
    def validated(self) -> bool:
        """Whether text passed the model, so that errors were measured."""
        return bool(self.identity["settings"]["validate"])

    @property
    def reconstructed(self) -> bool:
        """Whether kept weights were fitted: they are then not the source's."""
        return bool(self.identity["settings"]["reconstruct"])


class Timings(Struct, frozen=True):
    """What is read again of a job's timings."""

    seconds: Number
    peak_memory_bytes: Count


def read_manifest(path: Path) -> Manifest:
    """A manifest whose fields are of their kinds. Raises CheckpointError naming the first that is not."""
    manifest = read_record(path, Manifest)
    since_2 = ("source_name", "made_by") if layout_of(manifest.format_version, path).version > 1 else ()
    if missing := next((name for name in since_2 if getattr(manifest, name) is None), None):
        raise CheckpointError(f"{path}: is malformed ({missing} is missing)")
    settings = manifest.identity.get("settings")
    for name in ("validate", "reconstruct"):
        if not isinstance(settings, dict) or not isinstance(settings.get(name), bool):
            raise CheckpointError(f"{path}: is malformed (identity.settings.{name} is not true or false)")
    for block in manifest.blocks if manifest.validated else ():
        measured = [block.block_error, *(e for layer in block.layers for e in (layer.kernel_error, layer.layer_error))]
        if None in measured:
            raise CheckpointError(f"{path}: is malformed (errors of {block.name} are null, though it validated)")
    return manifest


def read_record(path: Path, kind: type[T]) -> T:
    """A JSON object of a kind. Raises CheckpointError naming the first field that is not of its kind."""
    try:
        return record_of(read_json(path), kind)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is malformed ({error}); run streamprune verify, or take another copy"
        ) from error


def record_of(value: Any, kind: type[T]) -> T:
    """Plain data as a record. Raises ValueError naming the first field that is not of its kind."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("`$.", "`").replace("`", "")) from error


def plain(record: Struct) -> dict[str, Any]:
    """A record as plain data for JSON."""
    value: dict[str, Any] = msgspec.to_builtins(record)
    return value


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted names of the entries in which two nested objects differ, with both values in short."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, _short(old), _short(new)


def _short(value: Any) -> str:
    text = "other entries" if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."  # a digest
