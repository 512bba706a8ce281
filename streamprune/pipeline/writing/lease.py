"""One writer of an output folder: a lease that is a folder, so that the file system itself fences an old writer off.

OUT/.work/epoch-N-TOKEN/                   there is one; files that are not yet in their places lie in it
OUT/.work/epoch-N-TOKEN/holder-TOKEN.json  who works there; its time of modification is the heartbeat
OUT/.work-TOKEN/                           about to be .work, or to be removed

A successor writes its own holder file into the epoch's folder and then renames that folder to the holder file's token,
which only one of several can: no epoch is seen without the one who holds it, and no name comes twice. A writer that
wakes up afterwards finds that its paths are gone: nothing of it can be renamed out of the folder any more, and what it
wants to remove it would have had to rename into it. No locks of the operating system: clusters keep jobs on file
systems where they do not hold.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.checkpoint.untrusted import read_json
from streamprune.checkpoint.writer import output_errors
from streamprune.errors import CheckpointError, Interrupted, OutputError

HEARTBEAT_SECONDS = 5.0
FRESH_SECONDS = 15.0  # three heartbeats: the holder lives
STALE_SECONDS = 60.0  # nobody holds a file system up for so long and then goes on
PREFIX = "epoch-"


def holder_file(epoch: Path) -> Path:
    """Of the folder of an epoch, whose name ends in the holder's token."""
    return epoch / f"holder-{epoch.name.rpartition('-')[2]}.json"


@dataclass(frozen=True)
class Lease:
    """A held lease. `folder` is the epoch's, on the same file system as the output.

    `sole`: no former writer can still be alive, so that files which are written in place can be taken over from it.
    """

    folder: Path
    sole: bool

    def check(self) -> None:
        """Raise OutputError where another process has taken the lease over."""
        if not holder_file(self.folder).exists():
            raise OutputError(
                f"{self.folder.parent.parent}: another process has taken this output over, because nothing was heard "
                "of this one for a minute; this one stops"
            )

    def discard(self, path: Path) -> None:
        """Remove a file or folder, which only the holder can: it is renamed into the epoch's folder first."""
        target = self.folder / f"discarded-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):
            path.rename(target)
            _remove(target)
        self.check()

    def close(self) -> None:
        """Remove the work folder, whose job is finished."""
        work = os.open(self.folder.parent, os.O_RDONLY)  # whatever the name stands for later, this one is meant
        try:
            with output_errors(self.folder.parent):
                self.folder.rename(self.folder.with_name("closing"))
            with os.scandir(work) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.name, ignore_errors=True, dir_fd=work)
                    else:
                        os.unlink(entry.name, dir_fd=work)
        finally:
            os.close(work)
        with suppress(OSError):
            self.folder.parent.rmdir()


@contextmanager
def leased(work: Path, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Lease]:
    """Hold the lease of the folder `work`, made where it is missing.

    Raises OutputError, naming the holder, where another lives; one of which nothing has been heard for a while is
    watched until it beats or is stale.
    """
    with output_errors(work):
        lease = _acquire(work, should_stop)
        for leftover in work.parent.glob(f"{work.name}-*"):
            _remove(leftover)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(holder_file(lease.folder))
            except FileNotFoundError:
                return  # taken over; whoever works finds out at its next step
            except OSError:
                continue  # a file system that is away for a moment

    heartbeat = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heartbeat.start()
    try:
        yield lease
    except OutputError:
        lease.check()  # was it a rename that failed because the folder is another's now?
        raise
    finally:
        done.set()
        heartbeat.join()
        with suppress(OSError):
            holder_file(lease.folder).unlink()


def _acquire(work: Path, should_stop: Callable[[], bool]) -> Lease:
    while True:
        try:
            if not work.exists():
                return _first(work)
            epochs = sorted(work.glob(f"{PREFIX}*"), key=_number)
            if not epochs:
                _clear(work)
                continue
            folder = epochs[-1]
            holder, age = _holder(folder), _age_seconds(folder)
            known_dead = holder is None or _is_dead(holder)
            if known_dead or age >= STALE_SECONDS:
                return _take_over(folder, sole=known_dead)
        except FileNotFoundError:
            continue  # somebody else's this moment
        if age < FRESH_SECONDS:
            raise OutputError(
                f"{work.parent}: is in use by {_described(holder)}, heard of {age:.0f} s ago; wait for it or stop it"
            )
        if should_stop():
            raise Interrupted(f"{work.parent}: interrupted while waiting for {_described(holder)}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Seen:
    """Who holds a lease, as one sees that only looks. `seconds` since the last heartbeat, by this host's clock."""

    host: str
    seconds: float
    lives: bool  # as far as one can tell: a heartbeat not long ago, and no process of this system that is gone


def seen(work: Path) -> Seen | None:
    """The holder of the lease of the folder `work`; None where nobody holds it. Writes nothing."""
    for epoch in sorted(work.glob(f"{PREFIX}*"), key=_number, reverse=True)[:1]:
        with suppress(OSError):
            holder, changed = _holder(epoch), holder_file(epoch).stat().st_mtime
            if holder is not None:
                seconds = max(0.0, time.time() - changed)
                return Seen(str(holder.get("host")), seconds, seconds < STALE_SECONDS and not _is_dead(holder))
    return None


def _clear(work: Path) -> None:
    """Remove the folder of a job that was finished and could not remove it all."""
    away = work.rename(work.with_name(f"{work.name}-{secrets.token_hex(8)}"))
    if any(away.glob(f"{PREFIX}*")):  # the name stood for another's folder by then
        away.rename(work)
    else:
        _remove(away)


def _first(work: Path) -> Lease:
    """The work folder appears together with its epoch and holder; renaming it onto another's, not empty, fails."""
    new = work.with_name(f"{work.name}-{secrets.token_hex(8)}")
    folder = new / f"{PREFIX}1-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    _sign(holder_file(folder))
    try:
        new.rename(work)
    except OSError as error:
        _remove(new)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileNotFoundError from error  # another was first
        raise
    return Lease(work / folder.name, sole=True)


def _take_over(old: Path, *, sole: bool) -> Lease:
    folder = old.with_name(f"{PREFIX}{_number(old) + 1}-{secrets.token_hex(8)}")
    holder = holder_file(folder)
    _sign(old / holder.name)  # which nobody reads before the folder has that name
    old.rename(folder)
    for path in folder.iterdir():
        if path != holder:
            _remove(path)
    return Lease(folder, sole)


def _sign(holder: Path) -> None:
    holder.write_text(json.dumps(_myself()), encoding="utf-8")


def _holder(folder: Path) -> dict[str, Any] | None:
    """Who holds an epoch; None where it was given back, or nothing can be read of it."""
    try:
        return read_json(holder_file(folder))
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None  # a file system that is away for a moment says nothing about the holder
        return None


def _age_seconds(folder: Path) -> float:
    """Since the last heartbeat, by the file system's clock: hosts do not agree on the time."""
    probe = folder / f"now-{secrets.token_hex(8)}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    holder = holder_file(folder)
    return max(0.0, now - (holder if holder.exists() else folder).stat().st_mtime)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Known to be: its process ran on this very system and is no more."""
    mine = _myself()
    if any(holder.get(key) != mine[key] for key in ("host", "boot", "namespace")):
        return False
    return _start_of(holder.get("process")) != holder.get("start")


def _myself() -> dict[str, Any]:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "start": _start_of(os.getpid()),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "namespace": str(namespace.readlink()) if namespace.exists() else None,
    }


def _start_of(process: Any) -> int | None:
    """When a process started, in clock ticks since boot: its number alone may be another's by now."""
    try:
        return int(Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _described(holder: dict[str, Any] | None) -> str:
    return "another process" if holder is None else f"process {holder.get('process')} on {holder.get('host')}"


def _number(epoch: Path) -> int:
    number = epoch.name.removeprefix(PREFIX).partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
