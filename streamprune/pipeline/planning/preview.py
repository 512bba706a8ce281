"""`plan`: what a job will read, write, hold and take, from headers alone. Only a few products are run, and timed."""

import time
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from streamprune.config import (
    MIN_COVERAGE,
    Device,
    Dtype,
    PathLike,
    PruneConfig,
    Settings,
    Texts,
    check_settings,
    config_of,
    path_of,
    settings_spelled,
)
from streamprune.model.arithmetic import Arithmetic, resolve_arithmetic
from streamprune.model.hub import folder_of
from streamprune.model.source import Source, open_dense
from streamprune.pipeline.planning.memory import Limits, Memory
from streamprune.pipeline.planning.plan import Plan, Resources, check_outside, make_plan
from streamprune.stopping import parse_seconds
from streamprune.text.calibration import Calibration
from streamprune.text.documents import TEXT_COLUMN

MEASURED_SIZE = 1024  # of the square products that the speed of this machine is measured by
READ_BYTES_PER_SECOND = 1e9  # a guess too; both are named in what `plan` prints
OTHER_SHARE = 1.4  # of a job's time to that of its products: counting, searching, packing. A guess, not fitted


@dataclass(frozen=True)
class PlanResult:
    """What a job would do. Bytes are exact but for memory; `seconds` rests on `assumption`.

    Of the source's bytes `pruned_bytes` are weights that are pruned, `dense_bytes` other matrices of the blocks and
    `copied_bytes` all else; `weights` says of every stored tensor which it is. `coverage` is the share of the blocks'
    matrices that some pattern prunes. `samples` sequences of `sequence_length` tokens pass the model; both are 0
    without validation.
    """

    model: str
    blocks: int
    layers: int
    parameters: int
    samples: int
    sequence_length: int
    read_bytes: int
    written_bytes: int
    scratch_bytes: int
    memory: Memory
    peak_memory_bytes: int
    peak_device_memory_bytes: int
    micro_batch: int
    moments_width: int
    seconds: float
    assumption: str
    pruned_bytes: int
    dense_bytes: int
    copied_bytes: int
    coverage: float
    dense_layers: dict[str, str]
    weights: dict[str, str]


@settings_spelled
def plan(
    model: PathLike,
    out: PathLike | None = None,
    *,
    config: PruneConfig | None = None,
    calibration: Texts | None = None,
    text_column: str = TEXT_COLUMN,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: str | None = None,
    max_device_memory: str | None = None,
    micro_batch: int | None = None,
    prefetch: int = 1,
    min_coverage: float = MIN_COVERAGE,
    scratch: PathLike | None = None,
    restart: bool = False,
    time_budget: str | None = None,
    progress: bool = False,
    **settings: Unpack[Settings],
) -> PlanResult:
    """What `compress` with the same arguments would read, write, hold in memory and take; reads headers alone.

    A model that is named on the hub is downloaded for that, which `progress` shows. No text is read and nothing is
    looked for in `out` or `scratch`. Raises the errors that `compress` would: SettingsError where the job does not fit
    `max_memory`, for one.

    >>> foretold = streamprune.plan(model, pattern="4:8")
    >>> foretold.blocks, foretold.layers
    (3, 21)
    """
    check_settings(restart=restart, progress=progress)
    if time_budget is not None:
        parse_seconds(time_budget)
    config = config_of(config, settings)
    text = Calibration(calibration, text_column, samples, sequence_length, seed)
    limits = Limits.parse(max_memory, max_device_memory)
    resources = Resources(device, dtype, limits, micro_batch, prefetch, min_coverage)
    out, scratch = (None if p is None else path_of(name, p) for name, p in (("out", out), ("scratch", scratch)))
    model = folder_of("model", model, progress)
    if out is not None:
        check_outside(out, model)
    source = open_dense(model)
    arithmetic = resolve_arithmetic(device, dtype, source.dtype)
    planned, config = make_plan(source, config, text, arithmetic, resources)
    return _result(source, planned, config, samples, arithmetic)


def _result(source: Source, planned: Plan, config: PruneConfig, samples: int, arithmetic: Arithmetic) -> PlanResult:
    """A plan and the time that it takes on this machine."""
    speed = _products_per_second(arithmetic.device, arithmetic.dtype)
    products = _products(planned.layers.values(), config, samples * planned.sequence_length)
    read = planned.source_bytes + planned.output_bytes
    return PlanResult(
        model=str(source.folder),
        blocks=len(planned.blocks),
        layers=len(planned.layers),
        parameters=sum(torch.Size(source.stored(name).shape).numel() for name in source.names),
        samples=samples if config.validate else 0,
        sequence_length=planned.sequence_length,
        read_bytes=read,
        written_bytes=planned.output_bytes,
        scratch_bytes=planned.scratch_bytes,
        memory=planned.memory,
        peak_memory_bytes=planned.memory.peak,
        peak_device_memory_bytes=planned.memory.device_peak,
        micro_batch=planned.micro_batch,
        moments_width=config.moments_width,
        seconds=OTHER_SHARE * products / speed + read / READ_BYTES_PER_SECOND,
        assumption=(
            f"products at the {speed / 1e9:.0f} G multiplications a second that this machine does now, "
            f"{OTHER_SHARE:g} times for all that is not products, files at {READ_BYTES_PER_SECOND / 1e9:g} GB/s"
        ),
        pruned_bytes=planned.accounts.pruned,
        dense_bytes=planned.accounts.dense,
        copied_bytes=planned.accounts.copied,
        coverage=planned.accounts.coverage,
        dense_layers=planned.dense,
        weights=_fates(source, planned),
    )


def _fates(source: Source, planned: Plan) -> dict[str, str]:
    """What becomes of each stored tensor, by the source's names."""
    skeleton = source.skeleton
    fates = dict.fromkeys(source.names, "copied")
    fates.update({skeleton.parameter_of(name): f"left dense: {reason}" for name, reason in planned.dense.items()})
    fates.update({skeleton.parameter_of(name): "pruned" for name in planned.layers})
    return {source.names[name]: fate for name, fate in fates.items()}


def _products(layers: Any, config: PruneConfig, tokens: int) -> float:
    """Multiplications of the layers' two passes, of the reference pass, and of second and cross moments."""
    if not config.validate:
        return 0.0
    passes = 2 + (1 / config.correction_stride if config.correction else 0)
    of_passes = passes * sum(layer.shape[0] * layer.shape[1] for layer in layers)
    # each input's X^T X, by its upper half; of q/k/v and gate/up one serves two or three layers
    of_moments = sum(layer.shape[1] ** 2 / 2 for layer in layers) / 2 if config.needs_moments else 0
    return float(tokens * (of_passes + of_moments))


def _products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications a second of products of 1,024 squared, the best of three."""
    a = torch.ones(MEASURED_SIZE, MEASURED_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for a GPU
        best = min(best, time.perf_counter() - start)
    return float(MEASURED_SIZE**3 / best)
