"""When a job ends before it is finished: safe points in however deep a loop, and budgets of time.

A loop that may take long calls `safe_point`. What that asks is set by the job that runs, for its own thread and for the
threads that it starts (copy_context); without a job nothing is asked. Nothing may be half done where it is called: what
is in memory is dropped, and a file is not yet in its place.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from streamprune.errors import SettingsError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
CLOSING_SECONDS = 5.0  # to close files and to leave
STEPS_LEFT = 2  # as long as the longest so far: the next may be longer than any before
_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


def safe_point() -> None:
    """Raise what the job's check raises, which is Interrupted where it was asked to stop."""
    _check.get()()


@contextmanager
def checked_by(check: Callable[[], None]) -> Iterator[None]:
    """Have safe points call `check` meanwhile."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def parse_seconds(text: str) -> int:
    """Read a time: "3h50m", "90m", "45s", or as Slurm writes it, "4:00:00", "90:00" (minutes:seconds), "1-12:00:00".

    Raises SettingsError for anything else, for a bare number, and for less than a second.
    """
    given = text.strip().lower() if isinstance(text, str) else ""
    named = re.fullmatch(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", given)
    slurm = re.fullmatch(r"(?:(\d{1,6})-(?=\d+:\d+:))?(?:(\d{1,6}):)?(\d{1,6}):(\d{1,6})", given)
    if match := named or slurm:
        seconds = sum(int(count or 0) * unit for count, unit in zip(match.groups(), UNITS.values(), strict=True))
        if seconds:
            return seconds
    raise SettingsError(f"{text!r:.80} is not a time; write for example 3h50m, 90m, 45s or 4:00:00")


def time_is_up(seconds: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Asked at safe points: whether the job must stop to end within `seconds` from now.

    Room is left for steps as long as the longest between two questions so far, and for closing. Any thread may ask.
    """
    end, before, longest = clock() + seconds - CLOSING_SECONDS, clock(), 0.0

    def asked() -> bool:
        nonlocal before, longest
        now = clock()
        before, longest = now, max(longest, now - before)
        return now + STEPS_LEFT * longest >= end

    return asked


def either(*questions: Callable[[], object]) -> Callable[[], bool]:
    """A question that is answered by yes where one of several is."""
    return lambda: any(question() for question in questions)
