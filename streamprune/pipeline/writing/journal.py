"""The job's journal: what is finished, under which identity, and who is at work.

OUT/.work/epoch-N-TOKEN/       the lease of the process that works (lease.py), and its files not yet renamed
OUT/.work/identity.json        what the job is; another identity is refused by name
OUT/.work/residual.json        the residual stream's permutation, where the job has one
OUT/.work/block-00003.json     one entry for each finished block, written after its shard is on disk
OUT/.work/block-00003.safetensors   its folded permutations and input RMS, merged at the end
OUT/.work/runs.json            how often the job was taken up, its last error; no byte depends on it (runs.py)
OUT/.work/copied.json          names of files that are, or soon will be, copied into OUT; whether all is being removed
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from streamprune.checkpoint.beside import file_inside, is_inside, refuse_link
from streamprune.checkpoint.layout import LAYOUTS
from streamprune.checkpoint.manifest import JournalEntry, differences, plain, read_manifest, record_of
from streamprune.checkpoint.packed import MANIFEST_DIGEST_FILE, MANIFEST_FILE, TIMINGS_FILE
from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import canonical_json, file_digest, write_json
from streamprune.config import PathLike, path_of
from streamprune.errors import CheckpointError, JobMismatchError, OutputError
from streamprune.pipeline.writing.lease import Lease, leased
from streamprune.stopping import safe_point

WORK_FOLDER = ".work"
OUTPUT_PATTERNS = (  # of every version: a restart may find a former one's
    *("streamprune_*", "config.json", TIMINGS_FILE),
    *(name for layout in LAYOUTS.values() for name in (layout.shards, layout.index)),
)
LOST_FOUND = "lost+found"  # what a fresh file system holds


@dataclass(frozen=True)
class Journal:
    """The journal of the job in an output folder."""

    out: Path
    lease: Lease

    @property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    @property
    def copied_path(self) -> Path:
        return self.work / "copied.json"

    @property
    def temporary(self) -> Path:
        return self.lease.folder

    def evidence_path(self, index: int) -> Path:
        """Where a block's folded permutations and input RMS lie until the end."""
        return self.work / f"block-{index:05d}.safetensors"

    def entry_path(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.json"

    def finished_blocks(self) -> int:
        """How many blocks have an entry, once the job has started."""
        return sum(1 for _ in self.work.glob("block-*.json"))

    def start(self, identity: dict[str, Any]) -> list[JournalEntry]:
        """Entries of the finished blocks, in order; empty for a new job, whose identity is then written.

        An entry that is damaged, or whose files are not as it recorded them, is dropped with all after it: those blocks
        are done again. Raises JobMismatchError for a job with another identity.
        """
        path = self.work / "identity.json"
        recorded = self.read(path)
        if recorded is not None:
            check_identity(self.out, {"format_version": 1, **recorded}, identity)  # version 1 did not record it
        entries: list[JournalEntry] = []
        while recorded is not None and (entry := self._entry(len(entries))) is not None:
            safe_point()
            if not all(_is_as_recorded(self.out / name, digest) for name, digest in entry.files.items()):
                break
            entries.append(entry)
        kept = {self.entry_path(index) for index in range(len(entries))}
        for stale in sorted({*self.work.glob("block-*.json")} - kept):
            self.lease.discard(stale)
        if recorded is None:
            self.write(path, identity)
        return entries

    def record(self, index: int, entry: JournalEntry) -> None:
        """Write the entry of a finished block; its files must be on disk."""
        self.write(self.entry_path(index), plain(entry))

    def _entry(self, index: int) -> JournalEntry | None:
        """The entry of a block; None where there is none, or it is not one."""
        value = self.read(self.entry_path(index))
        try:
            return None if value is None else record_of(value, JournalEntry)
        except ValueError:
            return None

    def write(self, path: Path, value: dict[str, Any]) -> None:
        """Write a file of the journal, with the sha256 of what it says."""
        write_json(path, {"sha256": _sealed(value), "value": value}, self.temporary)

    def read(self, path: Path) -> dict[str, Any] | None:
        """What a file of the journal says; None where it is missing or not as it was written."""
        return read_sealed(path)

    def copied(self) -> set[str]:
        """Names of the files that may have been copied into the output."""
        return _copied((self.read(self.copied_path) or {}).get("names"))

    def note_copied(self, names: Iterable[str]) -> None:
        """Record which files are about to be copied into the output; those recorded before that are not are removed."""
        wanted = set(names)
        for stale in sorted(self.copied() - wanted):
            self.discard(stale)
        self.write(self.copied_path, {"names": sorted(wanted)})

    def is_removing(self) -> bool:
        """Whether the removal of all of it has begun, and was interrupted."""
        return (self.read(self.copied_path) or {}).get("removing") is True

    def discard(self, name: str) -> None:
        """Remove a file of the output by its relative name, with the folders around it that are empty then."""
        folders = [self.out / inner for inner in PurePosixPath(name).parents[:-1]]
        for folder in folders:
            refuse_link(folder)
        if path := file_inside(self.out, name):
            self.lease.discard(path)
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                self.lease.discard(folder)

    def clear(self) -> None:
        """Remove the work folder; the job is finished."""
        self.lease.close()


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What a file of a journal says; None where it is missing or not as it was written."""
    try:
        content = read_json(path)
    except CheckpointError:
        return None
    value = content.get("value")
    return value if isinstance(value, dict) and content.get("sha256") == _sealed(value) else None


def check_identity(out: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise JobMismatchError naming each entry in which two identities differ."""
    shown = "; ".join(f"{name}: {old} there, {new} now" for name, old, new in differences(recorded, asked))
    if shown:
        raise JobMismatchError(
            f"{out}: holds a job with other settings ({shown}); use them, another --out, or --restart"
        )


def as_recorded(recorded: Any, asked: Any) -> Any:
    """Of a nested object the entries that another one has too."""
    if not isinstance(recorded, dict) or not isinstance(asked, dict):
        return asked
    return {key: as_recorded(recorded[key], value) for key, value in asked.items() if key in recorded}


def is_finished(out: PathLike) -> bool:
    """Whether a folder holds a finished output: the digest of the manifest is written last.

    >>> streamprune.is_finished(pruned), streamprune.is_finished(out)
    (True, False)
    """
    out = path_of("out", out)
    return (out / MANIFEST_DIGEST_FILE).exists() and (out / MANIFEST_FILE).exists()


@contextmanager
def output_leased(out: Path, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Journal]:
    """Hold an output folder, made if it is missing. Raises OutputError where it is in use or holds other files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in out.iterdir() if path.name != LOST_FOUND]
        foreign = any(not name.startswith(WORK_FOLDER) for name in names)
        if foreign and not is_finished(out) and not (out / WORK_FOLDER).exists():
            raise OutputError(f"{out}: is not empty and not an output of streamprune; choose another --out")
        _refuse_links(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be used as output ({error.strerror})") from error
    with leased(out / WORK_FOLDER, should_stop) as lease:
        yield Journal(out, lease)


def _refuse_links(out: Path) -> None:
    work = out / WORK_FOLDER
    for path in (*out.iterdir(), *(() if work.is_symlink() or not work.is_dir() else work.iterdir())):
        refuse_link(path)


def remove_output(journal: Journal) -> None:
    """Remove what a job of ours left in a folder, foreign files excepted; for --restart.

    Interrupted at any point it is to be done again: that, and what is to be removed, stays on record until all is.
    """
    ours = journal.copied()
    with suppress(CheckpointError):  # of a finished output; a malformed one names nothing
        ours |= _copied(list(read_manifest(journal.out / MANIFEST_FILE).files))
    journal.write(journal.copied_path, {"names": sorted(ours), "removing": True})
    journal.lease.discard(journal.out / MANIFEST_DIGEST_FILE)  # now it is no finished output any more
    for name in sorted(ours):
        journal.discard(name)
    for pattern in OUTPUT_PATTERNS:
        for path in journal.out.glob(pattern):
            journal.lease.discard(path)
    for path in journal.work.iterdir():
        if path not in (journal.lease.folder, journal.copied_path):
            journal.lease.discard(path)
    journal.lease.discard(journal.copied_path)


def _copied(names: Any) -> set[str]:
    """Of a list of names those that a copied file can have: inside the output, and none that the job itself writes."""
    inside = {name for name in names if isinstance(name, str) and is_inside(name)} if isinstance(names, list) else set()
    return {name for name in inside if not any(fnmatchcase(name, pattern) for pattern in OUTPUT_PATTERNS)}


def _sealed(value: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _is_as_recorded(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False
