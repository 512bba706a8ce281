"""How a command ends: by errors, which are one line each, by signals, or by streams that take no more.

Standard error is for people who may have gone: whatever happens to it no job ends by it. A result that standard output
does not take is a fault.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from streamprune.errors import StreampruneError
from streamprune.summaries import say

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ENDS = (signal.SIGTERM, signal.SIGHUP)  # as SIGINT does by KeyboardInterrupt
LIMITS = {"memory": "max_memory", "the GPU's memory": "max_device_memory"}
NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "bad_alloc")  # in errors of torch


class ResultLost(StreampruneError):
    """Standard output does not take the result."""


class _Ended(BaseException):
    """A signal that ends the command, unwinding it: what it holds of temporary files is removed."""

    def __init__(self, kind: int) -> None:
        self.kind = signal.Signals(kind)


class _Unheard(io.FileIO):
    """A file that cannot fail: what it does not take is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


class _Result(io.FileIO):
    """A file that fails once, with ResultLost; so that what it did not take is not tried again at the end."""

    lost = False

    def write(self, data: Any, /) -> int:
        try:
            return len(data) if self.lost else super().write(data)
        except OSError as error:
            self.lost = True
            if error.errno == errno.EPIPE:  # a reader that stops reading, as head does: click ends quietly
                raise
            raise ResultLost(
                f"standard output cannot be written ({error.strerror}), so the result is lost; mend that and run again"
            ) from error


def guard_streams() -> None:
    """Put standard output and standard error on files that fail as this module says, closed ones included.

    Below everything that writes text: click, tqdm, logging and warnings all come through.
    """
    for number, access in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed: no file of the job may get the number, and be written to as a stream
            os.open(os.devnull, access)
    sys.stdout = _text(_Result(1, "w", closefd=False), sys.stdout, "strict")
    sys.stderr = _text(_Unheard(2, "w", closefd=False), sys.stderr, "backslashreplace")


def _text(raw: io.FileIO, former: Any, errors: str) -> io.TextIOWrapper:
    encoding, errors = getattr(former, "encoding", "utf-8"), getattr(former, "errors", errors)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors, and signals that end the command, as one line on standard error and an exit code of their kind."""
    context = click.get_current_context()
    try:
        yield
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except _Ended as ended:
        _end(f"ended by {ended.kind.name}", 128 + ended.kind)
    except Exception as error:
        if context.find_root().obj:  # --debug
            raise
        if message := _memory_ran_out(error, {option.name for option in context.command.params}):
            _end(message, 1)
        if isinstance(error, StreampruneError):
            _end(str(error), error.exit_code)
        _end(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _end(message: str, code: int) -> NoReturn:
    say(f"streamprune: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _memory_ran_out(error: BaseException, options: set[str | None]) -> str | None:
    """Where memory ran out: that, and what to do about it by the options that the command has.

    Libraries have many ways to say so, and what calls them may take it for a malformed file.
    """
    place = next(filter(None, map(_short_of, _causes(error))), None)
    if place is None:
        return None
    wanted = (LIMITS[place], "micro_batch") if LIMITS[place] in options else ("sequence_length",)
    lower = " or ".join(f"--{name.replace('_', '-')}" for name in wanted if name in options)
    advice = f"give a lower {lower}, or free some" if lower else "free some and run again"
    return f"{place} ran out; {advice}{' (streamprune plan shows what a job takes)' * (LIMITS[place] in options)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short_of(error: BaseException) -> str | None:
    """The memory that an error says has run out."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in text:  # torch's and cupy's
        return "the GPU's memory"
    told = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return "memory" if isinstance(error, MemoryError) or no_memory or told else None


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ask the job to stop at its next safe point; a second signal of the same kind ends the process at once."""
    asked: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    with _handled(STOPS, ask):
        yield lambda: bool(asked)


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Have signals that would end the process unwind it first; a second one of the same kind ends it at once."""

    def end(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    with _handled(ENDS, end):
        yield


@contextmanager
def _handled(kinds: tuple[signal.Signals, ...], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Signals handled; one that is ignored stays so, as nohup and shells' background jobs want it."""
    heard = [kind for kind in kinds if signal.getsignal(kind) is not signal.SIG_IGN]
    former = {kind: signal.signal(kind, handler) for kind in heard}
    try:
        yield
    finally:
        for kind, before in former.items():
            signal.signal(kind, before)
