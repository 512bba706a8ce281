"""Warnings of transformers: heard whatever its verbosity is, and passed on in one line each through our own logger.

The command line sets transformers to errors alone, since most of what it warns of concerns other uses than ours. What
it warns of while it builds something for us may be about our results, so then it is listened to.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils.logging import warning_once

logger = logging.getLogger("streamprune")


class _Kept(logging.Handler):
    """Keeps each message once, as one line that a terminal may print."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        self.messages["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)] = None


@contextmanager
def warnings_heard() -> Iterator[Iterable[str]]:
    """What transformers warns of inside, in place of printing it; to be read afterwards."""
    library, kept = logging.getLogger("transformers"), _Kept()
    level, handlers, propagate = library.level, library.handlers, library.propagate
    warning_once.cache_clear()  # or what was said of another model would not be said of this one
    library.handlers, library.propagate = [kept], False
    library.setLevel(logging.WARNING)
    try:
        yield kept.messages
    finally:
        library.handlers, library.propagate = handlers, propagate
        library.setLevel(level)


def pass_on(where: object, messages: Iterable[str]) -> None:
    """Warn of each in one line that says of what it was said."""
    for message in messages:
        logger.warning("%s: transformers warns: %s", where, message)
