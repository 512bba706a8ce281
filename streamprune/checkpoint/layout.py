"""What the files of an output are called, by version of the format. docs/format.md says why.

Names of version 2 are such that a loader of plain checkpoints finds no weights: it ends with an error, where it would
fill the pruned layers of version 1 with random weights.
"""

from dataclasses import dataclass
from typing import Any

from streamprune.checkpoint.reader import SAFETENSORS_INDEX
from streamprune.errors import CheckpointError


@dataclass(frozen=True)
class Layout:
    """Names in one version of the format: `stem` begins those of the shards."""

    version: int
    stem: str
    index: str
    permutations: str
    statistics: str

    def shard(self, number: int, shards: int) -> str:
        """Name of a shard, counted from 1."""
        return f"{self.stem}-{number:05d}-of-{shards:05d}.safetensors"

    @property
    def shards(self) -> str:
        """A pattern of the names of all shards."""
        return f"{self.stem}-*-of-*.safetensors"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all but the shards and what has the same name in every version."""
        return self.index, self.permutations, self.statistics


LAYOUTS = {
    layout.version: layout
    for layout in (
        Layout(
            1, "model", SAFETENSORS_INDEX, "streamprune_permutations.safetensors", "streamprune_statistics.safetensors"
        ),
        Layout(
            2,
            "streamprune",
            "streamprune.safetensors.index.json",
            "streamprune_permutations.st",
            "streamprune_statistics.st",
        ),
    )
}
LAYOUT = LAYOUTS[max(LAYOUTS)]  # what is written


def layout_of(version: Any, where: Any) -> Layout:
    """The names in a version. Raises CheckpointError, which says `where` it stands, for one that is not known."""
    if type(version) is not int or version not in LAYOUTS:
        known = " and ".join(map(str, LAYOUTS))
        raise CheckpointError(f"{where}: has packed format {version!s:.40}; this streamprune reads {known}")
    return LAYOUTS[version]
