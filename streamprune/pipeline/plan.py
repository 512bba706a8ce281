"""What a job will do, from headers alone: layers, bytes, and what stays dense and why."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from streamprune.checkpoint.reader import Checkpoint
from streamprune.checkpoint.scratch import allocated_bytes
from streamprune.config import NMPattern, PruneConfig
from streamprune.errors import OutputError, SettingsError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.skeleton import Skeleton
from streamprune.model.text import fitting_length
from streamprune.pipeline.memory import Limits, Memory, Pace, Sizes, estimate_memory, fit_memory

TOKENS_AT_ONCE = 1024  # that go through a block together, where sequences are shorter
NO_LIMITS = Limits()


@dataclass(frozen=True)
class LayerPlan:
    """A linear layer to prune. Bytes are of the weight, without bias; packed ones without a stored permutation."""

    shape: tuple[int, int]
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Plan:
    """blocks[i] are the layers to prune in block i by full name; `dense` the linear layers left dense, with reasons.

    `sequence_length` is in tokens, 0 where no text passes the model.
    """

    blocks: tuple[dict[str, LayerPlan], ...]
    dense: dict[str, str]
    source_bytes: int
    output_bytes: int
    scratch_bytes: int
    memory: Memory
    micro_batch: int
    sequence_length: int

    @property
    def layers(self) -> dict[str, LayerPlan]:
        return {name: layer for block in self.blocks for name, layer in block.items()}


def plan_layers(
    skeleton: Skeleton, checkpoint: Checkpoint, names: dict[str, str], pattern: NMPattern
) -> tuple[tuple[dict[str, LayerPlan], ...], dict[str, str]]:
    """The layers to prune in each block, and the linear layers left dense with reasons.

    Raises SettingsError where no layer can be pruned.
    """
    blocks, dense = [], {}
    for index in range(len(skeleton.blocks)):
        layers, left = _plan_block(skeleton, index, checkpoint, names, pattern)
        blocks.append(layers)
        dense.update(left)
    if not any(blocks):
        reason = next(iter(dense.values()), "the model has no linear layers in its blocks")
        raise SettingsError(f"pattern {pattern}: no layer of this model can be pruned ({reason})")
    return tuple(blocks), dense


def make_plan(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    names: dict[str, str],
    config: PruneConfig,
    samples: int,
    sequence_length: int | None,
    arithmetic: Arithmetic,
    limits: Limits = NO_LIMITS,
    micro_batch: int | None = None,
    prefetch: int = 1,
) -> tuple[Plan, PruneConfig]:
    """Plan a job; returns with it the settings as they are used, fitted to limits on memory.

    sequence_length: None for `fitting_length`'s; without validation it does not matter. micro_batch: most sequences
    that go through a block at once (None: as many as make up TOKENS_AT_ONCE); prefetch: most blocks that are read
    ahead. No byte of the output depends on these two.
    """
    length = fitting_length(sequence_length, skeleton.positions) if config.validate else 0
    dtype = arithmetic.dtype
    blocks, dense = plan_layers(skeleton, checkpoint, names, config.pattern)
    shapes = [{name: layer.shape for name, layer in block.items()} for block in blocks]
    sizes = Sizes(skeleton, checkpoint, names, shapes, length, dtype, arithmetic.device.type == "cuda")
    at_once = micro_batch or max(1, TOKENS_AT_ONCE // max(length, 1))
    config, pace = fit_memory(sizes, config, Pace(min(at_once, samples), min(prefetch, len(blocks))), limits)
    source_bytes = sum(checkpoint.tensors[name].size_bytes for name in names.values())
    saved = sum(layer.dense_bytes - layer.packed_bytes for block in blocks for layer in block.values())
    # hidden states in, dense and out; with correction the reference in and out, of every k-th sequence
    sets = 3 + (2 / config.correction_stride if config.correction else 0)
    scratch_bytes = math.ceil(sets * samples * length) * skeleton.hidden_size * dtype.itemsize
    memory = estimate_memory(sizes, config, pace)
    needs = source_bytes, source_bytes - saved, scratch_bytes, memory
    return Plan(blocks, dense, *needs, pace.micro_batch, length), config


def check_outside(out: Path, model: Path) -> None:
    """Raise OutputError where an output would lie in the source's folder."""
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise OutputError(f"{out}: lies in the source folder; choose another --out")


def check_disk(plan: Plan, finished: int, out: Path, scratch: Path) -> None:
    """Raise OutputError where a file system has less free space than the job still writes there.

    Hidden states that a former process left in `scratch` are written over: their space is there already.
    """
    left = plan.output_bytes * (len(plan.blocks) - finished) // len(plan.blocks)
    hidden_states = max(0, plan.scratch_bytes - sum(allocated_bytes(path.lstat()) for path in scratch.glob("*.bin")))
    needs = {out: left, scratch: hidden_states}
    if out.stat().st_dev == scratch.stat().st_dev:
        needs = {out: left + hidden_states}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(
                f"{folder}: {needed} bytes are needed and {free} are free; free space or choose another folder"
            )


def _plan_block(
    skeleton: Skeleton, index: int, checkpoint: Checkpoint, names: dict[str, str], pattern: NMPattern
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    prefix = skeleton.blocks[index]
    linears = {f"{prefix}.{name}": m for name, m in skeleton.block(index).named_modules() if isinstance(m, nn.Linear)}
    layers: dict[str, LayerPlan] = {}
    dense = dict.fromkeys(linears, "no input group of this architecture names it")
    for _, members in skeleton.group_layers(index):
        missing = [name for name in members if name not in linears]
        if missing:
            raise SettingsError(f"{missing[0]}: is not a linear layer of this model, though its architecture names it")
        for name in members:
            out_features, in_features = linears[name].out_features, linears[name].in_features
            if in_features % pattern.group_size:
                dense[name] = f"{in_features} inputs are not a multiple of {pattern.group_size}"
                continue
            del dense[name]
            itemsize = checkpoint.tensors[names[name + ".weight"]].dtype.itemsize
            kept = in_features // pattern.group_size * pattern.kept
            packed_bytes = out_features * (kept * itemsize + -(-in_features // 8))
            layers[name] = LayerPlan((out_features, in_features), out_features * in_features * itemsize, packed_bytes)
    return layers, dense
