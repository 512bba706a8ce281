"""Work that goes on in a thread of its own until its results are asked for."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int, name: str) -> Generator[T, None, None]:
    """The items in order, each made in a thread `name` while the one before it is in use; at most `count` wait.

    With a count of 0 they are made when they are asked for. What making one raises is raised in its place. Closing it
    waits for the item that is being made, up to its next safe point where the job stops. Nothing here holds an item
    longer than the one who asked.
    """
    if not count:
        yield from items
        return
    upcoming: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as worker:
        try:
            while True:
                while len(upcoming) <= count:
                    upcoming.append(worker.submit(copy_context().run, lambda: list(islice(items, 1))))
                found = upcoming.popleft().result()
                if not found:
                    return
                yield found.pop()
        finally:
            worker.shutdown(cancel_futures=True)
