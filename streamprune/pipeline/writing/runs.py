"""How often a job was taken up, and how its last run ended: for people who look at it, no byte of the output.

Kept in OUT/.work/runs.json until the job is finished. A run that was killed wrote nothing at its end.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from streamprune.checkpoint.manifest import Count, plain, record_of
from streamprune.errors import Interrupted, OutputError
from streamprune.pipeline.writing.journal import WORK_FOLDER, Journal, read_sealed

RUNS_FILE = "runs.json"
MAX_ERROR_CHARACTERS = 500


class Runs(Struct, frozen=True):
    """blocks: of the model. restarts: runs but the first. failed: the last run ended by `last_error`, an older one's
    otherwise.
    """

    blocks: Count
    restarts: Count
    failed: bool = False
    last_error: str | None = None


def read_runs(out: Path) -> Runs | None:
    """What an unfinished output says of its runs; None where it says nothing that can be read."""
    value = read_sealed(out / WORK_FOLDER / RUNS_FILE)
    try:
        return None if value is None else record_of(value, Runs)
    except ValueError:
        return None


@contextmanager
def run_noted(journal: Journal, blocks: int) -> Iterator[Runs]:
    """Note that a run begins, and the error by which it ends. An interruption is no error."""
    before = read_runs(journal.out)
    runs = Runs(blocks, 0) if before is None else Runs(blocks, before.restarts + 1, False, before.last_error)
    path = journal.work / RUNS_FILE
    journal.write(path, plain(runs))
    try:
        yield runs
    except Interrupted:
        raise
    except Exception as error:
        shown = " ".join(str(error).split())[:MAX_ERROR_CHARACTERS] or type(error).__name__
        with suppress(
            OutputError
        ):  # a full disk, or an output that is another's by now: the error itself is what counts
            journal.write(path, plain(Runs(blocks, runs.restarts, True, shown)))
        raise
