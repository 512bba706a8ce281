"""Items made ahead in a thread of their own."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from streamprune.pipeline.ahead import ahead


class Item:
    """What a weak reference can point at."""


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_items_come_in_order(count: int) -> None:
    assert list(ahead(iter(range(20)), count, "test")) == list(range(20))
    assert list(ahead(iter([]), count, "test")) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_more_are_made_than_may_wait(count: int) -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item

    with closing(ahead(map(make, range(20)), count, "test")) as items:
        for item in range(5):
            assert next(items) == item
            wait_until(lambda item=item: len(made) == item + 1 + count)
            time.sleep(0.01)
            assert made == list(range(item + 1 + count))


def test_each_is_made_in_one_thread_that_ends_with_it() -> None:
    def name_of(_: int) -> str:
        return threading.current_thread().name

    assert {name.rpartition("_")[0] for name in ahead(map(name_of, range(9)), 1, "maker")} == {"maker"}
    with closing(ahead(map(name_of, range(9)), 1, "maker")) as items:
        next(items)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("maker")]


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_is_raised_in_the_place_of_its_item(count: int) -> None:
    def made() -> Iterator[int]:
        yield from (0, 1)
        raise ZeroDivisionError

    items = ahead(made(), count, "test")
    assert (next(items), next(items)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_closing_waits_for_the_one_that_is_made_and_makes_no_other() -> None:
    started, go, made = threading.Event(), threading.Event(), []

    def make(item: int) -> int:
        if item == 1:
            started.set()
            assert go.wait(10)
        made.append(item)
        return item

    items = ahead(map(make, range(9)), 3, "test")
    assert next(items) == 0
    assert started.wait(10)
    threading.Timer(0.05, go.set).start()
    items.close()
    assert made == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_item_is_held_by_nobody_but_the_one_who_asked(count: int) -> None:
    def make(_: int) -> Item:
        return Item()

    items = ahead(map(make, range(9)), count, "test")
    for _ in range(4):
        seen = weakref.ref(next(items))
        gc.collect()
        wait_until(lambda seen=seen: seen() is None)
        assert seen() is None


def test_a_chain_works_on_several_items_at_once() -> None:
    """While item 0 is in use item 1 is at the second stage and item 2 at the first."""
    meeting = threading.Barrier(3, timeout=10)

    def met(item: int, there: int) -> int:
        if item == there:
            meeting.wait()
        return item

    first = ahead((met(item, 2) for item in range(4)), 1, "first")
    second = ahead((met(item, 1) for item in first), 1, "second")
    assert [met(item, 0) for item in second] == [0, 1, 2, 3]
