"""What a job will do, from headers alone: layers, bytes, and what stays dense and why."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from streamprune.checkpoint.scratch import allocated_bytes
from streamprune.config import NMPattern, PruneConfig, check_settings
from streamprune.errors import OutputError, SettingsError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.source import Source
from streamprune.model.weights import WeightView
from streamprune.pipeline.planning.memory import Limits, Memory, Pace, Sizes, estimate_memory, fit_memory
from streamprune.text.calibration import Calibration
from streamprune.text.tokenizers import fitting_length

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


@dataclass(frozen=True)
class Resources:
    """What a job computes with. No byte depends on limits and prefetch, nor on a processor on the micro-batch.

    device, dtype  as `resolve_arithmetic` takes them
    limits         on memory, which the settings are fitted to
    micro_batch    most sequences that go through a block at once; None: as many as make up TOKENS_AT_ONCE
    prefetch       most blocks that are read ahead

    Raises SettingsError for what is none of these.
    """

    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = NO_LIMITS
    micro_batch: int | None = None
    prefetch: int = 1

    def __post_init__(self) -> None:
        check_settings(device=self.device, dtype=self.dtype, micro_batch=self.micro_batch, prefetch=self.prefetch)


def plan_layers(source: Source, pattern: NMPattern) -> tuple[tuple[dict[str, LayerPlan], ...], dict[str, str]]:
    """The layers to prune in each block, and the linear layers left dense with reasons.

    Raises SettingsError where no layer can be pruned.
    """
    blocks: list[dict[str, LayerPlan]] = []
    dense: dict[str, str] = {}
    for block in source.blocks:
        dense.update(block.ungrouped)
        fits = {name: view for name, view in block.layers.items() if view.shape[1] % pattern.group_size == 0}
        blocks.append({name: _plan_layer(source, view, pattern) for name, view in fits.items()})
        for name, view in block.layers.items():
            if name not in fits:
                dense[name] = f"{view.shape[1]} inputs are not a multiple of {pattern.group_size}"
    if not any(blocks):
        reason = next(iter(dense.values()), "the model has no linear layers in its blocks")
        raise SettingsError(f"pattern {pattern}: no layer of this model can be pruned ({reason})")
    return tuple(blocks), dense


def make_plan(
    source: Source, config: PruneConfig, calibration: Calibration, arithmetic: Arithmetic, resources: Resources
) -> tuple[Plan, PruneConfig]:
    """Plan a job; returns with it the settings as they are used, fitted to limits on memory.

    Without validation calibration does not matter. Raises SettingsError where the job cannot fit.
    """
    if config.residual and source.skeleton.architecture.residual is None:
        kind = source.skeleton.model.config.model_type
        raise SettingsError(f"shuffle residual: is not known of model type {kind!r}; give a --shuffle without residual")
    length = fitting_length(calibration.sequence_length, source.skeleton.positions) if config.validate else 0
    blocks, dense = plan_layers(source, config.pattern)
    shapes = [{name: layer.shape for name, layer in block.items()} for block in blocks]
    sizes = Sizes(source, shapes, length, arithmetic.dtype, arithmetic.device.type == "cuda")
    at_once = resources.micro_batch or max(1, TOKENS_AT_ONCE // max(length, 1))
    at_once = at_once if source.skeleton.batched else 1
    pace = Pace(min(at_once, calibration.samples), min(resources.prefetch, len(blocks)))
    config, pace = fit_memory(sizes, config, pace, resources.limits)
    source_bytes = source.stored_bytes(source.names)
    saved = sum(layer.dense_bytes - layer.packed_bytes for block in blocks for layer in block.values())
    # hidden states in, dense and out; with correction the reference in and out, of every k-th sequence
    sets = 3 + (2 / config.correction_stride if config.correction else 0)
    tokens = math.ceil(sets * calibration.samples * length)
    scratch_bytes = tokens * source.skeleton.hidden_size * arithmetic.dtype.itemsize
    needs = source_bytes, source_bytes - saved, scratch_bytes, estimate_memory(sizes, config, pace)
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


def _plan_layer(source: Source, view: WeightView, pattern: NMPattern) -> LayerPlan:
    out_features, in_features = view.shape
    itemsize = source.stored(view.parameter).dtype.itemsize
    kept = in_features // pattern.group_size * pattern.kept
    packed_bytes = out_features * (kept * itemsize + -(-in_features // 8))
    return LayerPlan(view.shape, out_features * in_features * itemsize, packed_bytes)
