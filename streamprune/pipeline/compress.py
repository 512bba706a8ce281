"""`compress`: the whole job, from a checkpoint folder to a packed one."""

import datetime
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from streamprune.checkpoint.layout import LAYOUT
from streamprune.checkpoint.manifest import (
    JournalEntry,
    Manifest,
    Timings,
    read_manifest,
    read_record,
    record_of,
)
from streamprune.checkpoint.packed import MANIFEST_FILE, TIMINGS_FILE, scaling_dropped
from streamprune.checkpoint.writer import file_digest, write_json
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
from streamprune.errors import JobMismatchError, OutputError, SettingsError
from streamprune.model.hub import folder_of
from streamprune.model.machine import former_instruction_set
from streamprune.pipeline.gate import check_outcomes
from streamprune.pipeline.planning.job import Job, resolve_job, surroundings, versions, without_budget
from streamprune.pipeline.planning.memory import Limits
from streamprune.pipeline.planning.plan import Resources, check_disk, check_outside
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.residual import residual_permutation
from streamprune.pipeline.run import Run, Watch
from streamprune.pipeline.two_passes import pruned_blocks
from streamprune.pipeline.weights_only import blocks_by_weights
from streamprune.pipeline.writing.assembly import assemble, stage_outer, write_manifest
from streamprune.pipeline.writing.journal import (
    WORK_FOLDER,
    Journal,
    as_recorded,
    check_identity,
    is_finished,
    output_leased,
    remove_output,
)
from streamprune.pipeline.writing.runs import run_noted
from streamprune.process import peak_memory_bytes, return_free_memory
from streamprune.stopping import checked_by, either, parse_seconds, time_is_up
from streamprune.text.calibration import Calibration
from streamprune.text.documents import TEXT_COLUMN, check_named

WORST_LAYERS = 5


@dataclass(frozen=True)
class CompressResult:
    """What a job has done. `dense_bytes` and `packed_bytes` are of the pruned layers' weights (values and mask),
    `permutation_bytes` of the permutations stored beside them, `source_bytes` and `output_bytes` of whole models.
    """

    status: str  # "finished" or "already finished"
    format_version: int  # of the output; a former one where it was already finished by a former version
    out: str
    blocks: int
    seconds: float
    peak_memory_bytes: int
    dense_bytes: int
    packed_bytes: int
    permutation_bytes: int
    source_bytes: int
    output_bytes: int
    worst_layers: tuple[tuple[str, float], ...]  # by layer_error, worst first; none without validation
    worst_block: tuple[str, float] | None  # by block_error; None without validation
    kept_dense: tuple[str, ...]  # blocks above the budget
    dense_layers: dict[str, str]  # linear layers that the pattern does not fit, with reasons
    moments_bytes: int  # of second moments held at once, most of any block
    layers_in_moment_blocks: tuple[str, ...]  # whose inputs were too wide for one matrix of second moments
    reconstructed: bool  # kept weights were fitted: they are not the source's
    starved: dict[str, int]  # experts that saw fewer tokens of the text than min_expert_tokens, with how many
    left_out: dict[str, str]  # files beside the source's weights that were not copied, with reasons
    manifest_sha256: str


@settings_spelled
def compress(
    model: PathLike,
    out: PathLike,
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
    should_stop: Callable[[], bool] | None = None,
    **settings: Unpack[Settings],
) -> CompressResult:
    """Prune a causal LM to N:M sparsity, block by block from disk, into the folder `out`.

    `model` is a folder, or ORG/MODEL or ORG/MODEL@REVISION on the hub: then what its cache lacks is downloaded.
    The method's settings are the fields of streamprune.PruneConfig, each by keyword or all in `config`. `calibration`
    is a file's path, the name of a data set, or an iterable of strings (default: the text that ships with the package);
    `text_column` holds the texts in JSON, .parquet or a data set. `sequence_length` is by default 2048 tokens, or the
    model's positions where they are fewer. `max_memory` ("12GiB") limits host memory by an estimate,
    `max_device_memory` a GPU's: fewer sequences go through a block at once than `micro_batch` (default: as make up 1024
    tokens), fewer blocks are read ahead than `prefetch`, then second moments are cut; what cannot fit is refused, and
    a model of whose blocks' matrices a smaller share than `min_coverage` can be pruned. A program that calls
    streamprune.process.map_large_pieces first takes the memory that `plan` foretells.

    The same call again goes on after the last finished block; a finished job says so. `restart` throws away what `out`
    holds, `scratch` is a folder for hidden states. `should_stop` is asked at every safe point, at least once a
    sequence, by the thread that reaches it; when true, Interrupted is raised, and nothing finished is lost. So it is
    where the job would not end within `time_budget` ("3h50m", "4:00:00") from the call. Raises the errors of
    streamprune.errors.

    >>> result = streamprune.compress(model, out, pattern="4:8", samples=4, sequence_length=48)
    >>> result.status, result.packed_bytes / result.dense_bytes
    ('finished', 0.5625)
    """
    start = time.perf_counter()
    check_settings(restart=restart, progress=progress)
    config, text = config_of(config, settings), Calibration(calibration, text_column, samples, sequence_length, seed)
    limits = Limits.parse(max_memory, max_device_memory)
    resources = Resources(device, dtype, limits, micro_batch, prefetch, min_coverage)
    out, scratch = path_of("out", out), None if scratch is None else path_of("scratch", scratch)
    if not callable(should_stop := should_stop or _never):
        raise SettingsError(f"should_stop {should_stop!r:.40} is no function")
    if time_budget is not None:
        should_stop = either(should_stop, time_is_up(parse_seconds(time_budget)))
    if config.validate:
        check_named(calibration)
    model = folder_of("model", model, progress, should_stop)
    check_outside(out, model)
    job = resolve_job(model, config, text, resources)
    if is_finished(out) and not restart and not (out / WORK_FOLDER).exists():
        return _already_finished(job, out)
    with output_leased(out, should_stop) as journal:
        if restart or journal.is_removing():
            remove_output(journal)
        elif is_finished(out):  # but for a kill at its very end, or by another process a moment ago
            result = _already_finished(job, out)
            journal.clear()
            return result
        watch = Watch(journal, Progress(progress), should_stop, len(job.source.blocks))
        with checked_by(watch.stop_if_asked):
            return _finish(job, watch, scratch, start)


def _never() -> bool:
    return False


def _finish(job: Job, watch: Watch, scratch: Path | None, start: float) -> CompressResult:
    """Do what is left of a job that began, in this process, at `start` (time.perf_counter)."""
    journal, out = watch.journal, watch.journal.out
    about = {**surroundings(job), "format_version": LAYOUT.version}
    entries = journal.start({**without_budget(job.identity), **about})
    earlier = _stages(entries).values()  # without passes stages overlap, and the longest comes nearest to all
    earlier_seconds = sum(earlier) if job.config.validate else max(earlier, default=0.0)
    folder = _scratch_folder(journal, scratch)
    with run_noted(journal, watch.blocks) as runs:
        check_disk(job.plan, len(entries), out, folder)
        if job.config.validate and job.config.max_block_error is None:
            watch.progress.note("no --max-block-error: every block is pruned, whatever it costs")
        entries, manifest = _work(job, watch, folder, entries)
        if scratch is not None:
            shutil.rmtree(folder, ignore_errors=True)
        timings = _timings(entries, earlier_seconds + time.perf_counter() - start) | {"restarts": runs.restarts}
        write_json(out / TIMINGS_FILE, timings, journal.temporary)
        write_manifest(journal, manifest)
    journal.clear()
    return _result("finished", out, job, manifest, record_of(timings, Timings))


def _work(job: Job, watch: Watch, scratch: Path, entries: list[JournalEntry]) -> tuple[list[JournalEntry], Manifest]:
    """Write all of the output but its manifest; the entries of all blocks, of which some may be done, and the manifest.

    Hidden states lie in the folder `scratch`.
    """
    check_outcomes(job.config, (entry.record for entry in entries))
    with ExitStack() as open_files:
        open_files.callback(watch.progress.close)
        residual = residual_permutation(job, watch.journal, watch.tick) if job.config.residual else None
        background = ThreadPoolExecutor(1, thread_name_prefix="sync")
        open_files.callback(background.shutdown, cancel_futures=True)
        run = Run(job, watch, scratch, open_files, background, residual)
        given_up = threading.Event()
        open_files.callback(given_up.set)  # before `background` waits for what it works on
        # beside passes it would compute in a second team of threads, which makes all of theirs slower by a tenth
        copying = None if job.config.validate else background.submit(stage_outer, run, given_up)
        entries = _all_blocks(run, entries)
        outer, digests = stage_outer(run, given_up) if copying is None else copying.result()
    return entries, assemble(run, entries, outer, digests)


def _all_blocks(run: Run, finished: list[JournalEntry]) -> list[JournalEntry]:
    """Compress every block that is not finished yet; returns the entries of all blocks."""
    job, watch, entries = run.job, run.watch, list(finished)
    left = job.source.blocks[len(finished) :]
    if not left:
        return entries
    watch.progress.start(len(job.source.blocks), len(finished), len(job.tokens))
    following = pruned_blocks(run, finished) if job.config.validate else blocks_by_weights(run, left)
    run.open_files.callback(following.close)
    for block, entry in zip(left, following, strict=True):
        watch.journal.record(block.index, entry)
        entries.append(entry)
        if job.config.validate:  # without passes a block's memory is the next one's; to fetch it anew takes long
            return_free_memory()
        watch.progress.block_done(entry)
    return entries


def _already_finished(job: Job, out: Path) -> CompressResult:
    """The result of this job as finished before. Raises JobMismatchError where it was another."""
    manifest = read_manifest(out / MANIFEST_FILE)
    if scaling_dropped(out, manifest.format_version):
        raise JobMismatchError(
            f"{out}: was made by a streamprune that dropped the model's rope_scaling, so that its masks are of another "
            "model; choose another --out, or --restart"
        )
    recorded, asked = without_budget(manifest.identity), without_budget(job.identity)
    if manifest.format_version < LAYOUT.version:  # by a streamprune that looked at less of source and machine
        former = {"instruction_set": former_instruction_set(job.arithmetic.device, job.arithmetic.dtype)}
        asked["compute"] = as_recorded(recorded.get("compute"), asked["compute"] | former)
        asked["source"] = as_recorded(recorded.get("source"), asked["source"])
    check_identity(out, recorded, asked)
    check_outcomes(job.config, manifest.blocks)
    return _result("already finished", out, job, manifest, read_record(out / TIMINGS_FILE, Timings))


def _scratch_folder(journal: Journal, scratch: Path | None) -> Path:
    """Where hidden states lie; those of a writer that may still be alive are not shared with it."""
    folder = journal.work if scratch is None else _own_folder(journal, scratch)
    if not journal.lease.sole:
        for path in folder.glob("*.bin"):
            path.unlink(missing_ok=True)
    return folder


def _own_folder(journal: Journal, scratch: Path) -> Path:
    name = hashlib.sha256(str(journal.out.resolve()).encode()).hexdigest()[:16]
    folder = scratch / f"streamprune-{name}"
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a symbolic link where hidden states belong; remove it and run again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as scratch folder ({error.strerror})") from error
    return folder


def _timings(entries: Sequence[JournalEntry], seconds: float) -> dict[str, Any]:
    """What may differ between equal runs. `seconds`, `stages` and peak memory cover every process that worked on it."""
    peaks = [peak_memory_bytes(), *(entry.timings.peak_memory_bytes for entry in entries)]
    return {
        "seconds": seconds,
        "stages": _stages(entries),
        "peak_memory_bytes": max(peaks),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _stages(entries: Sequence[JournalEntry]) -> dict[str, float]:
    """Seconds of each stage over all blocks."""
    stages: dict[str, float] = {}
    for entry in entries:
        for stage, spent in entry.timings.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + spent
    return stages


def _result(status: str, out: Path, job: Job, manifest: Manifest, timings: Timings) -> CompressResult:
    blocks, layers = manifest.blocks, manifest.layers
    by_layer = ((layer.name, layer.layer_error) for layer in layers)
    by_block = ((block.name, block.block_error) for block in blocks)
    worst_layers, worst_blocks = (
        sorted(((name, error) for name, error in errors if error is not None), key=lambda item: -item[1])
        for errors in (by_layer, by_block)
    )
    return CompressResult(
        status=status,
        format_version=manifest.format_version,
        out=str(out),
        blocks=len(blocks),
        seconds=timings.seconds,
        peak_memory_bytes=timings.peak_memory_bytes,
        dense_bytes=sum(layer.dense_bytes for layer in layers),
        packed_bytes=sum(layer.packed_bytes for layer in layers),
        permutation_bytes=sum(layer.permutation_bytes for layer in layers),
        source_bytes=manifest.source_bytes,
        output_bytes=manifest.weights_bytes,
        worst_layers=tuple(worst_layers[:WORST_LAYERS]),
        worst_block=worst_blocks[0] if worst_blocks else None,
        kept_dense=tuple(block.name for block in blocks if block.outcome == "kept dense"),
        dense_layers=manifest.dense_layers,
        moments_bytes=max(block.moments.bytes for block in blocks),
        layers_in_moment_blocks=tuple(name for block in blocks for name in block.moments.layers_in_blocks),
        reconstructed=manifest.reconstructed,
        starved={name: seen for block in blocks for name, seen in block.starved.items()},
        left_out=job.beside.left_out,
        manifest_sha256=file_digest(out / MANIFEST_FILE),
    )
