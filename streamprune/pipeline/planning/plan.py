"""What a job will do, from headers alone: layers, bytes, and what stays dense and why."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from streamprune.checkpoint.scratch import allocated_bytes
from streamprune.config import MIN_COVERAGE, OF_EXPERTS, NMPattern, PruneConfig, check_settings
from streamprune.errors import CheckpointError, OutputError, SettingsError, UnsupportedModelError
from streamprune.model.arithmetic import Arithmetic, check_arithmetic
from streamprune.model.skeleton import Block
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
class Accounts:
    """Bytes of the source's tensors by what becomes of them: every one is in one of the first three.

    pruned    weights that are packed
    dense     other matrices of the blocks, each with a reason in the plan
    copied    all else: embeddings, norms, biases
    coverage  share of the weights in the blocks' matrices that some pattern prunes
    """

    pruned: int
    dense: int
    copied: int
    coverage: float


@dataclass(frozen=True)
class Plan:
    """blocks[i] are the layers to prune in block i by full name; `dense` what else of matrices it has, with reasons.

    `sequence_length` is in tokens, 0 where no text passes the model.
    """

    blocks: tuple[dict[str, LayerPlan], ...]
    dense: dict[str, str]
    source_bytes: int
    output_bytes: int
    scratch_bytes: int
    memory: Memory
    accounts: Accounts
    micro_batch: int
    sequence_length: int

    @cached_property
    def layers(self) -> dict[str, LayerPlan]:
        """Those to prune in the whole model, by full name."""
        return {name: layer for block in self.blocks for name, layer in block.items()}

    def of(self, part: Block) -> dict[str, LayerPlan]:
        """Those of a block, or of a part of one."""
        return {name: self.blocks[part.index][name] for name in part.layers if name in self.blocks[part.index]}


@dataclass(frozen=True)
class Resources:
    """What a job computes with. No byte depends on limits and prefetch, nor on a processor on the micro-batch.

    device, dtype  as `resolve_arithmetic` takes them
    limits         on memory, which the settings are fitted to
    micro_batch    most sequences that go through a block at once; None: as many as make up TOKENS_AT_ONCE
    prefetch       most blocks that are read ahead
    min_coverage   least share of the blocks' matrices that must be layers which some pattern prunes

    Raises SettingsError for what is none of these.
    """

    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = NO_LIMITS
    micro_batch: int | None = None
    prefetch: int = 1
    min_coverage: float = MIN_COVERAGE

    def __post_init__(self) -> None:
        check_settings(device=self.device, dtype=self.dtype, micro_batch=self.micro_batch, prefetch=self.prefetch)
        check_settings(min_coverage=self.min_coverage)
        check_arithmetic(self.device, self.dtype)


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


def account(source: Source, blocks: Sequence[Mapping[str, LayerPlan]], dense: Mapping[str, str]) -> Accounts:
    """What becomes of every byte of the source's tensors. Raises CheckpointError where one is in two places or none."""
    pruned = sum(layer.dense_bytes for block in blocks for layer in block.values())
    packed = {source.skeleton.views[name].parameter for block in blocks for name in block}
    left = {source.skeleton.parameter_of(name) for name in dense} - packed
    copied = source.names.keys() - packed - left
    of_left, of_copied = source.stored_bytes(left), source.stored_bytes(copied)
    total = sum(source.checkpoint.tensors[name].size_bytes for name in set(source.names.values()))
    if pruned + of_left + of_copied != total:
        raise CheckpointError(
            f"{source.folder}: {pruned} bytes are to be pruned, {of_left} left dense and {of_copied} copied, of {total}"
        )
    matrices = [name for block in source.blocks for name in block.parameters if len(source.stored(name).shape) > 1]
    can_be = sum(math.prod(view.shape) for view in source.skeleton.views.values())
    return Accounts(pruned, of_left, of_copied, can_be / sum(math.prod(source.stored(n).shape) for n in matrices))


def make_plan(
    source: Source, config: PruneConfig, calibration: Calibration, arithmetic: Arithmetic, resources: Resources
) -> tuple[Plan, PruneConfig]:
    """Plan a job; returns with it the settings as they are used, fitted to limits on memory.

    Without validation calibration does not matter. Raises SettingsError where the job cannot fit.
    """
    if config.residual and source.skeleton.residual is None:
        kind = source.skeleton.model.config.model_type
        raise SettingsError(f"shuffle residual: is not known of model type {kind!r}; give a --shuffle without residual")
    if not any(block.experts for block in source.blocks):
        check_no_experts(config)
    length = fitting_length(calibration.sequence_length, source.skeleton.positions) if config.validate else 0
    blocks, dense = plan_layers(source, config.pattern)
    accounts = account(source, blocks, dense)
    if accounts.coverage < resources.min_coverage:
        name, reason = next(iter(_not_covered(source).items()))
        raise UnsupportedModelError(
            f"{source.folder}: only {accounts.coverage:.1%} of the blocks' matrices can be pruned (first {name}: "
            f"{reason}); give --min-coverage {math.floor(1000 * accounts.coverage) / 1000:g} to prune these alone"
        )
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
    scratch_bytes = tokens * source.skeleton.stream_width * arithmetic.dtype.itemsize
    if any(block.experts for block in source.blocks):  # their inputs, and in float32 their outputs, of two streams
        streams = tokens * (sets - 2) / sets
        scratch_bytes += math.ceil(streams * source.skeleton.hidden_size * (arithmetic.dtype.itemsize + 4))
    needs = source_bytes, source_bytes - saved, scratch_bytes, estimate_memory(sizes, config, pace)
    return Plan(blocks, dense, *needs, accounts, pace.micro_batch, length), config


def check_no_experts(config: PruneConfig) -> None:
    """Raise SettingsError for a setting that only experts heed."""
    for name in OF_EXPERTS:
        if getattr(config, name) != getattr(PruneConfig, name):
            raise SettingsError(f"{name} {getattr(config, name)} has no effect: the model has no experts; leave it out")


def _not_covered(source: Source) -> dict[str, str]:
    return {name: reason for block in source.blocks for name, reason in block.ungrouped.items()}


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
