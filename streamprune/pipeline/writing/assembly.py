"""From the blocks' shards to a whole output: the outer shard, evidence, index, config, copied files, the manifest."""

import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from streamprune.checkpoint.beside import README, copy_beside
from streamprune.checkpoint.card import model_card, source_licence, source_name
from streamprune.checkpoint.layout import LAYOUT
from streamprune.checkpoint.manifest import BlockRecord, FileRecord, JournalEntry, Manifest, plain
from streamprune.checkpoint.packed import (
    MANIFEST_DIGEST_FILE,
    MANIFEST_FILE,
    quantization_config,
)
from streamprune.checkpoint.reader import byte_view, open_file, read_about
from streamprune.checkpoint.safetensors_header import read_header
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import (
    Pieces,
    Staged,
    file_digest,
    stage_safetensors,
    write_json,
    write_safetensors,
    write_text,
)
from streamprune.errors import Interrupted
from streamprune.pipeline.planning.job import Job, versions
from streamprune.pipeline.residual import reordered
from streamprune.pipeline.run import Run
from streamprune.pipeline.writing.entries import about_permutation
from streamprune.pipeline.writing.journal import Journal


def stage_outer(run: Run, given_up: threading.Event) -> tuple[Staged, dict[str, str]]:
    """Write the shard of what lies outside the blocks; with it the digests of the source's tensors in it.

    Raises Interrupted once the job is given up.
    """
    digests: dict[str, str] = {}
    path = run.journal.out / run.job.shard_name(None)
    staged = stage_safetensors(path, _outer_tensors(run, digests, given_up), run.journal.temporary)
    staged.sync()
    return staged, digests


def assemble(run: Run, entries: Sequence[JournalEntry], outer: Staged, digests: dict[str, str]) -> Manifest:
    """Write what is not a block, with the outer shard, whose source's tensors have the `digests`; the manifest."""
    job, out, temporary = run.job, run.journal.out, run.journal.temporary
    outer.publish()
    _merge_evidence(run)
    shards = [job.shard_name(None), *(job.shard_name(block) for block in job.source.blocks)]
    _write_index(out, shards, temporary)
    blocks = tuple(entry.record for entry in entries)
    layers = [layer for block in blocks for layer in block.layers]
    pruned = {layer.name: job.config.pattern for layer in layers}
    permuted = {layer.name for layer in layers if layer.permutation_bytes}
    dense = _dense_layers(job, blocks, set(pruned))
    source, beside = job.source.folder, job.beside.placed
    config = read_json(source / "config.json")
    write_json(
        out / "config.json", {**config, "quantization_config": quantization_config(pruned, permuted, dense)}, temporary
    )
    run.journal.note_copied([*beside.values(), README])
    copy_beside(source, beside, out, temporary)
    known = {job.shard_name(None): outer.digest}
    for entry in entries:
        digests = {**digests, **entry.source_tensors}
        known |= entry.files
    written = [*shards, *LAYOUT.files, "config.json", *beside.values()]
    manifest = Manifest(
        format_version=LAYOUT.version,
        identity=job.identity,
        blocks=blocks,
        dense_layers=dense,
        source_bytes=job.plan.source_bytes,
        source_tensors=digests,
        files={name: _file_record(out / name, known.get(name)) for name in written},
        source_name=source_name(source, config),
        made_by=f"streamprune {versions()['streamprune']}",
    )
    card = model_card(manifest, pruned, source_licence(source, job.beside), job.beside)
    write_text(out / README, card, temporary)
    return msgspec.structs.replace(manifest, files={**manifest.files, README: _file_record(out / README)})


def _file_record(path: Path, digest: str | None = None) -> FileRecord:
    """What the manifest says of a file; `digest` is its sha256 where it is known."""
    return FileRecord(digest or file_digest(path), path.stat().st_size)


def _outer_tensors(run: Run, digests: dict[str, str], given_up: threading.Event) -> dict[str, Pieces]:
    """Parameters outside the blocks, copied piece by piece, the residual stream in the job's order.

    `digests` gets the source's, by its names, while they are written.
    """
    job = run.job

    def copied(name: str) -> Iterator[torch.Tensor]:
        stored, digest = job.source.names[name], hashlib.sha256()
        rows_move = run.residual is not None and (name, 0) in run.residual.reorders
        pieces = iter(job.source.read([name]).values()) if rows_move else job.source.checkpoint.pieces(stored)
        for piece in pieces:
            if given_up.is_set():
                raise Interrupted(f"{run.journal.out}: given up")
            digest.update(byte_view(piece))
            yield reordered({name: piece}, run.residual)[name]
        digests[stored] = digest.hexdigest()

    sources = {name: job.source.stored(name) for name in job.source.skeleton.outer_parameters}
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
    for block in run.job.source.blocks:
        path = journal.evidence_path(block.index)
        tensors = open_file(path)
        for name, tensor in tensors.read(tensors.tensors).items():
            (statistics if name.endswith(".input_rms") else permutations)[name] = tensor
        reorders += read_about(path)
    write_safetensors(journal.out / LAYOUT.permutations, permutations, journal.temporary, reorders)
    write_safetensors(journal.out / LAYOUT.statistics, statistics, journal.temporary)


def _write_index(out: Path, shards: Sequence[str], temporary: Path) -> None:
    headers = {shard: read_header(out / shard)[0] for shard in shards}
    total = sum(entry.size_bytes for header in headers.values() for entry in header.values())
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    write_json(out / LAYOUT.index, {"metadata": {"total_size": total}, "weight_map": weight_map}, temporary)


def _dense_layers(job: Job, blocks: Sequence[BlockRecord], pruned: set[str]) -> dict[str, str]:
    """Linear layers of the blocks that are not pruned, each with the reason."""
    reasons = dict(job.plan.dense)
    for block, layers in zip(blocks, job.plan.blocks, strict=True):
        for name in sorted(layers.keys() - pruned):
            seen = block.starved.get(name.rpartition(".")[0])
            fewer = f"its expert saw {seen} tokens, fewer than {job.config.min_expert_tokens}"
            reasons[name] = f"block error {block.block_error:.6g} is above the budget" if seen is None else fewer
    return reasons


def write_manifest(journal: Journal, manifest: Manifest) -> None:
    """The manifest, then its digest; with the digest there the job is finished."""
    out = journal.out
    write_json(out / MANIFEST_FILE, plain(manifest), journal.temporary)
    digest = file_digest(out / MANIFEST_FILE)
    write_text(out / MANIFEST_DIGEST_FILE, f"{digest}  {MANIFEST_FILE}\n", journal.temporary)
