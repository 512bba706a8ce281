"""How a command ends: errors become one line each; signals and streams that cannot be written are handled.

A job never fails because standard error cannot be written: the people who read it may have gone. A result that cannot
be written to standard output is a fault.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from streamprune.errors import StreampruneError
from streamprune.summaries import say

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ENDS = (signal.SIGTERM, signal.SIGHUP)  # as SIGINT does by KeyboardInterrupt
LIMITS = {"memory": "max_memory", "the GPU's memory": "max_device_memory"}
# In errors of torch and of oneDNN.
NO_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "bad_alloc", "could not create a primitive")


class ResultLost(StreampruneError):
    """The result cannot be written to standard output."""


class _Ended(BaseException):
    """A signal that ends the command. It is raised as an exception, so that temporary files are removed."""

    def __init__(self, kind: int) -> None:
        self.kind = signal.Signals(kind)


class _Unheard(io.FileIO):
    """A file whose writes never fail: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


class _Result(io.FileIO):
    """A file that fails once, with ResultLost, and drops what is written afterwards, so that closing it does not."""

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
    """Replace standard output and standard error, closed ones too, by files that fail as this module says.

    They lie below everything that writes text, so click, tqdm, logging and warnings all go through them.
    """
    for number, access in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # closed: a file of the job that got this number would be written to as a stream
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
    except BrokenPipeError:  # the reader of standard output has gone: click ends quietly
        raise
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
    """A message if memory ran out, with advice on options that the command has; None for other errors.

    Libraries report it in many ways, and their callers may take it for a malformed file.
    """
    place = next(filter(None, map(_short_of, _causes(error))), None)
    if place is None:
        return None
    wanted = (LIMITS[place], "micro_batch") if LIMITS[place] in options else ("sequence_length",)
    lower = " or ".join(f"--{name.replace('_', '-')}" for name in wanted if name in options)
    advice = f"give a lower {lower}, or free some" if lower else "free some and run again"
    return f"{place} ran out; {advice}{' (streamprune plan shows what a job takes)' * ('micro_batch' in options)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short_of(error: BaseException) -> str | None:
    """Which memory ran out according to an error; None for other errors."""
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
def end_on_signals(kinds: Iterable[signal.Signals] = ENDS) -> Iterator[None]:
    """Turn signals that would end the process into exceptions; a second one of the same kind ends it at once."""

    def end(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    with _handled(kinds, end):
        yield


@contextmanager
def _handled(kinds: Iterable[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle signals for a while; one that was ignored stays ignored, as nohup and background jobs of shells need."""
    heard = [kind for kind in kinds if signal.getsignal(kind) is not signal.SIG_IGN]
    former = {kind: signal.signal(kind, handler) for kind in heard}
    try:
        yield
    finally:
        for kind, before in former.items():
            signal.signal(kind, before)
