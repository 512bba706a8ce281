"""`inspect`: what an output holds, read from its manifest and headers only."""

from dataclasses import dataclass
from typing import Any

from streamprune.checkpoint.manifest import plain, read_manifest
from streamprune.checkpoint.packed import MANIFEST_FILE, open_packed, packed_shape
from streamprune.config import PathLike, check_settings
from streamprune.errors import CheckpointError
from streamprune.model.hub import folder_of


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer; bytes are of its weight (values and mask), errors as recorded when it was compressed.

    Errors are None where the job did not validate. `steps` say what the layer was after selection, shuffle, refinement
    and reconstruction, as far as they were done.
    """

    name: str
    pattern: str
    shape: tuple[int, int]
    packed_bytes: int
    dense_bytes: int
    permutation_bytes: int
    kernel_error: float | None
    layer_error: float | None
    block_error: float | None
    steps: list[dict[str, Any]]
    shrinkage: list[float]


@dataclass(frozen=True)
class InspectResult:
    """An output's layers and their bytes in all; `dense_layers` are those not pruned, with reasons."""

    layers: list[LayerRow]
    dense_layers: dict[str, str]
    packed_bytes: int
    dense_bytes: int
    permutation_bytes: int


def inspect(folder: PathLike, *, progress: bool = False) -> InspectResult:
    """List the layers of an output folder. Raises CheckpointError where it is not a finished one.

    `progress` shows the download of an output that is named on the hub.

    >>> layer = streamprune.inspect(pruned).layers[0]
    >>> layer.name, layer.pattern
    ('model.layers.0.self_attn.q_proj', '2:4')
    """
    check_settings(progress=progress)
    folder = folder_of("folder", folder, progress)
    checkpoint, layers, _ = open_packed(folder)
    manifest = read_manifest(folder / MANIFEST_FILE)
    rows = [
        LayerRow(
            name=layer.name,
            pattern=layer.pattern,
            shape=layer.shape,
            packed_bytes=layer.packed_bytes,
            dense_bytes=layer.dense_bytes,
            permutation_bytes=layer.permutation_bytes,
            kernel_error=layer.kernel_error,
            layer_error=layer.layer_error,
            block_error=block.block_error,
            steps=[plain(step) for step in layer.steps],
            shrinkage=list(layer.shrinkage),
        )
        for block in manifest.blocks
        for layer in block.layers
    ]
    recorded = {row.name: (row.pattern, row.shape) for row in rows}
    stored = {name: (str(pattern), packed_shape(checkpoint, name, pattern)) for name, pattern in layers.items()}
    different = sorted(name for name in recorded | stored if recorded.get(name) != stored.get(name))
    if different:
        raise CheckpointError(
            f"{folder}: manifest and headers disagree on layer {different[0]}; run streamprune verify"
        )
    return InspectResult(
        rows,
        dict(manifest.dense_layers),
        sum(row.packed_bytes for row in rows),
        sum(row.dense_bytes for row in rows),
        sum(row.permutation_bytes for row in rows),
    )
