"""`compress`: the whole job, from a checkpoint folder to a packed one."""

import dataclasses
import datetime
import functools
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.manifest import TIMINGS, read_checked, read_manifest
from streamprune.checkpoint.packed import (
    MANIFEST_DIGEST_FILE,
    MANIFEST_FILE,
    PERMUTATIONS_FILE,
    STATISTICS_FILE,
    TIMINGS_FILE,
    quantization_config,
)
from streamprune.checkpoint.reader import SAFETENSORS_INDEX, byte_view, open_file, read_about
from streamprune.checkpoint.safetensors_header import read_header
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import (
    Pieces,
    Staged,
    file_digest,
    stage_safetensors,
    write_atomically,
    write_json,
    write_safetensors,
    write_text,
)
from streamprune.config import NMPattern, PruneConfig, parse_bytes
from streamprune.errors import Interrupted, OutputError
from streamprune.model.arithmetic import map_large_pieces, peak_memory_bytes
from streamprune.pipeline.entries import about_permutation
from streamprune.pipeline.job import Job, resolve_job, versions, without_budget
from streamprune.pipeline.journal import (
    WORK_FOLDER,
    Journal,
    check_identity,
    is_finished,
    output_leased,
    remove_output,
)
from streamprune.pipeline.memory import Limits
from streamprune.pipeline.plan import check_disk
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.residual import reordered, residual_permutation
from streamprune.pipeline.run import Run
from streamprune.pipeline.scheduler import check_outcomes, compress_blocks

COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
)
WORST_LAYERS = 5


@dataclass(frozen=True)
class CompressResult:
    """What a job has done. `dense_bytes` and `packed_bytes` are of the pruned layers' weights (values and mask),
    `permutation_bytes` of the permutations stored beside them, `source_bytes` and `output_bytes` of whole models.
    """

    status: str  # "finished" or "already finished"
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
    manifest_sha256: str


def compress(
    model: str | Path,
    out: str | Path,
    *,
    pattern: str = "2:4",
    calibration: str | None = None,
    samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: str | None = None,
    max_device_memory: str | None = None,
    micro_batch: int | None = None,
    prefetch: int = 1,
    scratch: str | Path | None = None,
    restart: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> CompressResult:
    """Prune a causal LM to N:M sparsity, block by block from disk, into the folder `out`.

    `settings` are the fields of streamprune.config.PruneConfig but the pattern. `max_memory` ("12GiB") limits host
    memory by an estimate, `max_device_memory` a GPU's: fewer sequences go through a block at once than `micro_batch`
    (default: as make up 1024 tokens), fewer blocks are read ahead than `prefetch`, then second moments are cut into
    blocks; a job that cannot fit is refused. With `validate=False` no text passes the model and no error is known.

    The same call again goes on after the last finished block; a finished job says so. `restart` throws away what `out`
    holds. `scratch` is a folder for hidden states (default: inside `out`). `should_stop` is asked after every sequence;
    when true, Interrupted is raised and nothing finished is lost. Under glibc, pieces of memory of 8 MiB or more
    are mapped by themselves from then on, in the whole process. Raises the errors of streamprune.errors.
    """
    start = time.perf_counter()
    map_large_pieces()
    config = PruneConfig(NMPattern.parse(pattern), **settings)
    limits = Limits(parse_bytes(max_memory), parse_bytes(max_device_memory))
    model, out = Path(model), Path(out)
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise OutputError(f"{out}: lies in the source folder; choose another --out")
    amount = samples, sequence_length, seed
    resources: dict[str, Any] = {"limits": limits, "micro_batch": micro_batch, "prefetch": prefetch}
    job = resolve_job(model, config, calibration, *amount, device, dtype, **resources)
    if is_finished(out) and not restart and not (out / WORK_FOLDER).exists():
        return _already_finished(job, out)
    with output_leased(out, should_stop) as journal:
        if restart:
            remove_output(journal)
        elif is_finished(out):  # but for a kill at its very end, or by another process a moment ago
            result = _already_finished(job, out)
            journal.clear()
            return result
        entries = journal.start({**without_budget(job.identity), "versions": versions()})
        earlier = _stages(entries).values()  # without passes stages overlap, and the longest comes nearest to all
        earlier_seconds = sum(earlier) if config.validate else max(earlier, default=0.0)
        folder = _scratch_folder(journal, scratch)
        bars = Progress(progress)
        with ExitStack() as open_files:
            open_files.callback(bars.close)
            check_disk(job.plan, len(entries), out, folder)
            background = open_files.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
            run = Run(job, journal, folder, bars, should_stop, open_files, background)
            if config.residual:
                run = dataclasses.replace(run, residual=residual_permutation(job, journal, run.tick))
            given_up = threading.Event()
            open_files.callback(given_up.set)  # before `background` waits for what it works on
            # beside passes it would compute in a second team of threads, which makes all of theirs slower by a tenth
            copying = None if config.validate else background.submit(_stage_outer, run, given_up)
            entries = compress_blocks(run, entries)
            outer, digests = _stage_outer(run, given_up) if copying is None else copying.result()
        if scratch is not None:
            shutil.rmtree(folder, ignore_errors=True)
        manifest = _finish(run, entries, outer, digests)
        timings = _timings(entries, earlier_seconds + time.perf_counter() - start)
        write_json(out / TIMINGS_FILE, timings, journal.temporary)
        _write_manifest(journal, manifest)
        journal.clear()
        return _result("finished", out, manifest, timings)


def _already_finished(job: Job, out: Path) -> CompressResult:
    """The result of this job as finished before. Raises JobMismatchError where it was another."""
    manifest = read_manifest(out / MANIFEST_FILE)
    check_identity(out, without_budget(manifest["identity"]), without_budget(job.identity))
    check_outcomes(job.config, manifest["blocks"])
    return _result("already finished", out, manifest, read_checked(out / TIMINGS_FILE, TIMINGS))


def _scratch_folder(journal: Journal, scratch: str | Path | None) -> Path:
    """Where hidden states lie; those of a writer that may still be alive are not shared with it."""
    folder = journal.work if scratch is None else _own_folder(journal, scratch)
    if not journal.lease.sole:
        for path in folder.glob("*.bin"):
            path.unlink(missing_ok=True)
    return folder


def _own_folder(journal: Journal, scratch: str | Path) -> Path:
    name = hashlib.sha256(str(journal.out.resolve()).encode()).hexdigest()[:16]
    folder = Path(scratch) / f"streamprune-{name}"
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a symbolic link where hidden states belong; remove it and run again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as scratch folder ({error.strerror})") from error
    return folder


def _stage_outer(run: Run, given_up: threading.Event) -> tuple[Staged, dict[str, str]]:
    """Write the shard of what lies outside the blocks; with it the digests of the source's tensors in it.

    Raises Interrupted once the job is given up.
    """
    digests: dict[str, str] = {}
    path = run.journal.out / run.job.shard_name(None)
    staged = stage_safetensors(path, _outer_tensors(run, digests, given_up), run.journal.temporary)
    staged.sync()
    return staged, digests


def _finish(run: Run, entries: Sequence[dict[str, Any]], outer: Staged, digests: dict[str, str]) -> dict[str, Any]:
    """Write what is not a block, with the outer shard, whose source's tensors have the `digests`; the manifest."""
    job, out, temporary = run.job, run.journal.out, run.journal.temporary
    outer.publish()
    shard_digests = [outer.digest, *(entry["files"][job.shard_name(index)] for index, entry in enumerate(entries))]
    _merge_evidence(run)
    shards = [job.shard_name(None), *(job.shard_name(index) for index in range(len(entries)))]
    _write_index(out, shards, temporary)
    pruned = {layer["name"]: job.config.pattern for entry in entries for layer in entry["layers"]}
    dense = _dense_layers(job, entries, set(pruned))
    config = {**read_json(job.source / "config.json"), "quantization_config": quantization_config(pruned, dense)}
    write_json(out / "config.json", config, temporary)
    copied = _copy_files(job.source, out, temporary)
    for entry in entries:
        digests = {**digests, **entry["source_tensors"]}
    known = dict(zip(shards, shard_digests, strict=True))
    written = [*shards, PERMUTATIONS_FILE, STATISTICS_FILE, SAFETENSORS_INDEX, "config.json", *copied]
    kept = ("name", "outcome", "block_error", "moments", "layers")
    return {
        "format_version": 1,
        "identity": job.identity,
        "blocks": [{key: entry[key] for key in kept} for entry in entries],
        "dense_layers": dense,
        "source_bytes": job.plan.source_bytes,
        "source_tensors": digests,
        "files": {
            name: {"sha256": known.get(name) or file_digest(out / name), "bytes": (out / name).stat().st_size}
            for name in written
        },
    }


def _outer_tensors(run: Run, digests: dict[str, str], given_up: threading.Event) -> dict[str, Pieces]:
    """Parameters outside the blocks, copied piece by piece, the residual stream in the job's order.

    `digests` gets the source's, by its names, while they are written.
    """
    job = run.job

    def copied(name: str) -> Iterator[torch.Tensor]:
        stored, digest = job.names[name], hashlib.sha256()
        rows_move = run.residual is not None and (name, 0) in run.residual.reorders
        pieces = iter([job.checkpoint.read([stored])[stored]]) if rows_move else job.checkpoint.pieces(stored)
        for piece in pieces:
            if given_up.is_set():
                raise Interrupted(f"{run.journal.out}: given up")
            digest.update(byte_view(piece))
            yield reordered({name: piece}, run.residual)[name]
        digests[stored] = digest.hexdigest()

    sources = {name: job.checkpoint.tensors[job.names[name]] for name in job.skeleton.outer_parameters()}
    return {name: Pieces(s.dtype, s.shape, functools.partial(copied, name)) for name, s in sources.items()}


def _merge_evidence(run: Run) -> None:
    """Gather the folded permutations, the residual stream's and the blocks', and the input RMS into one file each."""
    journal = run.journal
    permutations: dict[str, torch.Tensor] = {}
    statistics: dict[str, torch.Tensor] = {}
    reorders: list[dict[str, Any]] = []
    if run.residual is not None:
        permutations[run.residual.name] = run.residual.permutation.to(torch.int32)
        reorders.append(about_permutation(run.residual))
    for index in range(len(run.job.skeleton.blocks)):
        path = journal.evidence_path(index)
        tensors = open_file(path)
        for name, tensor in tensors.read(tensors.tensors).items():
            (statistics if name.endswith(".input_rms") else permutations)[name] = tensor
        reorders += read_about(path)
    write_safetensors(journal.out / PERMUTATIONS_FILE, permutations, journal.temporary, reorders)
    write_safetensors(journal.out / STATISTICS_FILE, statistics, journal.temporary)


def _write_index(out: Path, shards: Sequence[str], temporary: Path) -> None:
    headers = {shard: read_header(out / shard)[0] for shard in shards}
    total = sum(entry.size_bytes for header in headers.values() for entry in header.values())
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    write_json(out / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}, temporary)


def _dense_layers(job: Job, entries: Sequence[dict[str, Any]], pruned: set[str]) -> dict[str, str]:
    """Linear layers of the blocks that are not pruned, each with the reason."""
    above = {entry["name"]: entry["block_error"] for entry in entries if entry["outcome"] == "kept dense"}
    reasons = dict(job.plan.dense)
    for entry, layers in zip(entries, job.plan.blocks, strict=True):
        for name in sorted(layers.keys() - pruned):
            reasons[name] = f"block error {above[entry['name']]:.6g} is above the budget"
    return reasons


def _copy_files(source: Path, out: Path, temporary: Path) -> list[str]:
    names = sorted({path.name for pattern in COPIED_FILES for path in source.glob(pattern) if path.is_file()})
    for name in names:
        write_atomically(out / name, temporary, functools.partial(shutil.copyfile, source / name))
    return names


def _write_manifest(journal: Journal, manifest: dict[str, Any]) -> None:
    """The manifest, then its digest; with the digest there the job is finished."""
    out = journal.out
    write_json(out / MANIFEST_FILE, manifest, journal.temporary)
    digest = file_digest(out / MANIFEST_FILE)
    write_text(out / MANIFEST_DIGEST_FILE, f"{digest}  {MANIFEST_FILE}\n", journal.temporary)


def _timings(entries: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What may differ between equal runs. `seconds`, `stages` and peak memory cover every process that worked on it."""
    peaks = [peak_memory_bytes(), *(entry["timings"]["peak_memory_bytes"] for entry in entries)]
    return {
        "seconds": seconds,
        "stages": _stages(entries),
        "peak_memory_bytes": max(peaks),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _stages(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each stage over all blocks."""
    stages: dict[str, float] = {}
    for entry in entries:
        for stage, spent in entry["timings"]["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + spent
    return stages


def _result(status: str, out: Path, manifest: dict[str, Any], timings: dict[str, Any]) -> CompressResult:
    blocks = manifest["blocks"]
    layers = [layer for block in blocks for layer in block["layers"]]
    validated = manifest["identity"]["settings"]["validate"]
    worst = sorted(layers, key=lambda layer: -layer["layer_error"])[:WORST_LAYERS] if validated else []
    block = max(blocks, key=lambda block: block["block_error"]) if validated else None
    return CompressResult(
        status=status,
        out=str(out),
        blocks=len(blocks),
        seconds=timings["seconds"],
        peak_memory_bytes=timings["peak_memory_bytes"],
        dense_bytes=sum(layer["dense_bytes"] for layer in layers),
        packed_bytes=sum(layer["packed_bytes"] for layer in layers),
        permutation_bytes=sum(layer["permutation_bytes"] for layer in layers),
        source_bytes=manifest["source_bytes"],
        output_bytes=sum(file["bytes"] for name, file in manifest["files"].items() if name.startswith("model-")),
        worst_layers=tuple((layer["name"], layer["layer_error"]) for layer in worst),
        worst_block=None if block is None else (block["name"], block["block_error"]),
        kept_dense=tuple(block["name"] for block in blocks if block["outcome"] == "kept dense"),
        dense_layers=manifest["dense_layers"],
        moments_bytes=max(block["moments"]["bytes"] for block in blocks),
        layers_in_moment_blocks=tuple(name for block in blocks for name in block["moments"]["layers_in_blocks"]),
        reconstructed=manifest["identity"]["settings"]["reconstruct"],
        manifest_sha256=file_digest(out / MANIFEST_FILE),
    )
