"""A model on disk: its modules, what lies where in its files, and by which names."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamprune.checkpoint.packed import is_packed, open_packed
from streamprune.checkpoint.reader import Checkpoint, TensorSource, open_checkpoint
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError
from streamprune.model.folding import with_folds
from streamprune.model.names import check_tied, match_names, output_names, with_experts_apart
from streamprune.model.skeleton import Block, Skeleton, build_skeleton


@dataclass(frozen=True)
class Source:
    """An opened model, dense or packed.

    skeleton    its modules, without weights
    checkpoint  what lies where in its files
    names       the checkpoint's name of each parameter that is one tensor there
    packed      the pattern of each layer that is packed there; none in a dense checkpoint
    """

    skeleton: Skeleton
    checkpoint: Checkpoint
    names: dict[str, str]
    packed: dict[str, NMPattern] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.skeleton.blocks

    @property
    def small_parameters(self) -> list[str]:
        """Those of the base model outside the blocks that text passes through, but what embeds tokens."""
        skeleton = self.skeleton
        outer = (name for name in skeleton.outer_parameters if name not in skeleton.read_by_rows | skeleton.aside)
        return [name for name in outer if name.startswith(skeleton.base_prefix)]

    @property
    def dtype(self) -> torch.dtype:
        """What the first block's first weight is stored in."""
        first = self.blocks[0].parameters[0]
        name = self.names.get(first, f"{first.removesuffix('.weight')}.weight_values")
        return self.checkpoint.tensors[name].dtype

    def stored(self, parameter: str) -> TensorSource:
        """Where a parameter lies."""
        return self.checkpoint.tensors[self.names[parameter]]

    def stored_bytes(self, parameters: Iterable[str]) -> int:
        """Bytes of parameters as they are stored."""
        return sum(self.stored(parameter).size_bytes for parameter in parameters)

    def stored_names(self, parameters: Iterable[str]) -> list[str]:
        return [self.names[parameter] for parameter in parameters]

    def read(self, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
        """Parameters by name in their stored dtypes, on the CPU. Raises the errors of `Checkpoint.read`."""
        wanted = list(parameters)
        tensors = self.checkpoint.read(self.stored_names(wanted))
        return {name: tensors[self.names[name]] for name in wanted}

    def check_tied(self) -> None:
        """Raise CheckpointError where a tensor that config.json ties to another is there too, and is not the same."""
        check_tied(self.skeleton, self.checkpoint, self.names)


def open_source(folder: Path) -> Source:
    """A dense checkpoint or an output. Raises CheckpointError for what is neither, UnsupportedModelError for others."""
    return open_output(folder) if is_packed(folder) else open_dense(folder)


def open_output(folder: Path) -> Source:
    """An output. Raises CheckpointError where it is none, or its headers contradict its config.json."""
    checkpoint, packed, _ = open_packed(folder)
    skeleton = build_skeleton(folder, checkpoint)
    return Source(skeleton, checkpoint, output_names(skeleton, checkpoint, packed), packed)


def open_dense(folder: Path) -> Source:
    """A dense checkpoint, its folds found. Raises CheckpointError for an output of ours, too."""
    if is_packed(folder):
        raise CheckpointError(f"{folder}: is already an output of streamprune; give the dense model")
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(folder, checkpoint)
    checkpoint = with_experts_apart(skeleton, checkpoint)
    names = match_names(skeleton, checkpoint)
    return Source(with_folds(skeleton), checkpoint, names)
