"""The job's journal: what is finished, under which identity, and who is at work.

OUT/.work/epoch-N-TOKEN/       the lease of the process that works (lease.py), and its files not yet renamed
OUT/.work/identity.json        what the job is; another identity is refused by name
OUT/.work/block-00003.json     one entry for each finished block, written after its shard is on disk
OUT/.work/block-00003.safetensors   its folded permutations and input RMS, merged at the end
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.checkpoint.packed import MANIFEST_DIGEST_FILE, MANIFEST_FILE, TIMINGS_FILE
from streamprune.checkpoint.reader import SAFETENSORS_INDEX, read_json
from streamprune.checkpoint.writer import file_digest, write_json
from streamprune.errors import JobMismatchError, OutputError
from streamprune.pipeline.lease import Lease, leased

WORK_FOLDER = ".work"
OUTPUT_PATTERNS = ("streamprune_*", "model-*-of-*.safetensors", SAFETENSORS_INDEX, "config.json", TIMINGS_FILE)


@dataclass(frozen=True)
class Journal:
    """The journal of the job in an output folder."""

    out: Path
    lease: Lease

    @property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    @property
    def temporary(self) -> Path:
        return self.lease.folder

    def evidence_path(self, index: int) -> Path:
        """Where a block's folded permutations and input RMS lie until the end."""
        return self.work / f"block-{index:05d}.safetensors"

    def entry_path(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.json"

    def start(self, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of the finished blocks, in order; empty for a new job, whose identity is then written.

        An entry whose files are not as it recorded them is dropped with all after it: those blocks are done again.
        Raises JobMismatchError for a job with another identity.
        """
        path = self.work / "identity.json"
        if not path.exists():
            write_json(path, identity, self.temporary)
            return []
        check_identity(self.out, read_json(path), identity)
        entries: list[dict[str, Any]] = []
        while self.entry_path(len(entries)).exists():
            entry = read_json(self.entry_path(len(entries)))
            if not all(_is_as_recorded(self.out / name, digest) for name, digest in entry["files"].items()):
                break
            entries.append(entry)
        index = len(entries)
        while self.entry_path(index).exists():
            self.lease.discard(self.entry_path(index))
            index += 1
        return entries

    def record(self, index: int, entry: dict[str, Any]) -> None:
        """Write the entry of a finished block; its files must be on disk."""
        write_json(self.entry_path(index), entry, self.temporary)

    def clear(self) -> None:
        """Remove the work folder; the job is finished."""
        self.lease.close()


def check_identity(out: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise JobMismatchError naming each entry in which two identities differ."""
    old, new = _flatten(recorded), _flatten(asked)
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differing:
        shown = "; ".join(f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} now" for name in differing)
        raise JobMismatchError(
            f"{out}: holds a job with other settings ({shown}); use them, another --out, or --restart"
        )


def is_finished(out: Path) -> bool:
    """Whether a folder holds a finished output: the digest of the manifest is written last."""
    return (out / MANIFEST_DIGEST_FILE).exists() and (out / MANIFEST_FILE).exists()


@contextmanager
def output_leased(out: Path, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Journal]:
    """Hold an output folder, made if it is missing. Raises OutputError where it is in use or holds other files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = not is_finished(out) and any(not path.name.startswith(WORK_FOLDER) for path in out.iterdir())
        if foreign and not (out / WORK_FOLDER).exists():
            raise OutputError(f"{out}: is not empty and not an output of streamprune; choose another --out")
    except OSError as error:
        raise OutputError(f"{out}: cannot be used as output ({error.strerror})") from error
    with leased(out / WORK_FOLDER, should_stop) as lease:
        yield Journal(out, lease)


def remove_output(journal: Journal) -> None:
    """Remove what a job of ours left in a folder, foreign files excepted; for --restart."""
    for pattern in OUTPUT_PATTERNS:
        for path in journal.out.glob(pattern):
            journal.lease.discard(path)
    for path in journal.work.iterdir():
        if path != journal.lease.folder:
            journal.lease.discard(path)


def _is_as_recorded(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."  # a digest


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat.update(_flatten(inner, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = inner
    return flat
