"""`status`: how far jobs have come, by what lies in their output folders alone.

Nothing is written, and no scheduler is asked: any host that sees the folders can tell.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from msgspec import Struct

from streamprune.checkpoint.manifest import Count, JournalEntry, Number, read_manifest, read_record, record_of
from streamprune.checkpoint.packed import MANIFEST_FILE, TIMINGS_FILE
from streamprune.config import PathLike, path_of
from streamprune.errors import SettingsError, StreampruneError
from streamprune.pipeline.writing.journal import WORK_FOLDER, is_finished, read_sealed
from streamprune.pipeline.writing.lease import seen
from streamprune.pipeline.writing.runs import read_runs


@dataclass(frozen=True)
class JobStatus:
    """How far one job has come. What is not known is None.

    state              "finished"; "running"; "stopped", by a signal or because it has just been started; "killed":
                       nothing has been heard for a minute of a run that did not end; "failed", by `last_error`;
                       "not started": there is no job in the folder; "unreadable": `last_error` says why
    blocks_per_hour    by the median time from one finished block to the next
    seconds_left       at that rate, of a running job
    host               of the run that works, or that finished
    restarts           how often the job was taken up again
    last_error         of the last run that failed
    """

    out: str
    state: str
    blocks_done: int = 0
    blocks: int | None = None
    blocks_per_hour: float | None = None
    seconds_left: float | None = None
    host: str | None = None
    restarts: int | None = None
    last_error: str | None = None


@dataclass(frozen=True)
class StatusResult:
    """One entry for each folder asked for, in that order."""

    jobs: tuple[JobStatus, ...]

    @property
    def ended(self) -> bool:
        """Whether no job goes on any more by itself or by a scheduler's doing."""
        return all(job.state in ("finished", "failed", "unreadable") for job in self.jobs)


class _Finished(Struct, frozen=True):
    """What timings.json says of a finished job; former versions counted no restarts."""

    seconds: Number
    host: str | None = None
    restarts: Count | None = None


def status(folders: Sequence[PathLike]) -> StatusResult:
    """How far the jobs have come that write, or wrote, to these output folders.

    It is told from their journals alone: nothing is written, no scheduler is asked, and any host that sees the folders
    will do. A job that failed before it had a journal, for want of a model say, is "not started". Raises SettingsError
    for no folder, or what is no path.

    >>> [(job.state, job.blocks_done, job.blocks) for job in streamprune.status([pruned]).jobs]
    [('finished', 3, 3)]
    """
    if isinstance(folders, str) or not folders:
        raise SettingsError("folders is no list of output folders; give at least one")
    return StatusResult(tuple(_status_of(path_of("folder", folder)) for folder in folders))


def _status_of(out: Path) -> JobStatus:
    try:
        if is_finished(out):
            return _finished(out)
        return _unfinished(out) if (out / WORK_FOLDER).is_dir() else JobStatus(str(out), "not started")
    except (StreampruneError, OSError) as error:
        return JobStatus(str(out), "unreadable", last_error=str(error))


def _finished(out: Path) -> JobStatus:
    blocks = len(read_manifest(out / MANIFEST_FILE).blocks)
    timings = read_record(out / TIMINGS_FILE, _Finished)
    rate = 3600 * blocks / timings.seconds if timings.seconds > 0 else None
    return JobStatus(str(out), "finished", blocks, blocks, rate, None, timings.host, timings.restarts)


def _unfinished(out: Path) -> JobStatus:
    work, runs, holder = out / WORK_FOLDER, read_runs(out), seen(out / WORK_FOLDER)
    entries = sorted(work.glob("block-*.json"))
    ended = [path.stat().st_mtime for path in entries]
    pace = _seconds_per_block(entries, ended)
    if holder is not None:
        state = "running" if holder.lives else "killed"
    else:
        state = "failed" if runs is not None and runs.failed else "stopped"
    left = None
    if state == "running" and runs is not None and pace is not None:
        since = max(0.0, time.time() - ended[-1])
        left = max(0.0, pace * (runs.blocks - len(entries)) - min(since, pace))
    return JobStatus(
        str(out),
        state,
        len(entries),
        None if runs is None else runs.blocks,
        3600 / pace if pace else None,
        left,
        holder.host if holder is not None else None,
        None if runs is None else runs.restarts,
        None if runs is None else runs.last_error,
    )


def _seconds_per_block(entries: Sequence[Path], ended: Sequence[float]) -> float | None:
    """The median time between finished blocks, in which a pause between two runs does not show; of a single block its
    own seconds; None where there is none.
    """
    if len(ended) > 1:
        return max(0.0, statistics.median(later - earlier for earlier, later in pairwise(ended)))
    try:
        first = record_of(read_sealed(entries[0]), JournalEntry) if entries else None
    except ValueError:
        return None
    return None if first is None else sum(first.timings.seconds.values())
