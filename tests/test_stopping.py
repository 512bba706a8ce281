"""Safe points, and budgets of time."""

from collections.abc import Iterator

import pytest

from streamprune.errors import Interrupted, SettingsError
from streamprune.pipeline.ahead import ahead
from streamprune.stopping import CLOSING_SECONDS, checked_by, either, parse_seconds, safe_point, time_is_up


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800), ("90m", 5400), ("45s", 45), (" 1D2h3M4s ", 93784), ("4:00:00", 14400), ("90:30", 5430),
        ("1-12:00:00", 129600), ("0-00:00:01", 1), ("100h", 360000),
    ],
)  # fmt: skip
def test_times_are_read(text: str, seconds: int) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "0s", "0:00", "-5m", "1.5h", "3m4h", "1-12", "1-12:00", "4:00:", "h", 90], ids=repr
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"is not a time; write for example 3h50m, 90m, 45s or 4:00:00$"):
        parse_seconds(text)


def test_a_budget_leaves_room_for_the_longest_step_twice() -> None:
    """Steps of 10 s, then of 30 s: from then on 60 s and the time to close are left."""
    asks = [10, 20, 50, 80, 110, 139 - CLOSING_SECONDS, 140 - CLOSING_SECONDS]
    moments = iter([0, 0, *asks])
    asked = time_is_up(200, lambda: next(moments))
    assert [asked() for _ in asks] == [False] * 6 + [True]


def test_one_yes_is_enough() -> None:
    assert [either(*(lambda a=a: a for a in answers))() for answers in ((0, 0), (0, 1), (1, 0))] == [False, True, True]


def stop() -> None:
    raise Interrupted("stopped")


def test_a_safe_point_asks_only_the_job_around_it() -> None:
    safe_point()
    with checked_by(stop), pytest.raises(Interrupted):
        safe_point()
    safe_point()


def endless() -> Iterator[int]:
    yield 0
    while True:
        safe_point()


@pytest.mark.parametrize("count", [0, 1])
def test_a_safe_point_in_a_thread_asks_its_job(count: int) -> None:
    """What one of its threads makes ends there, too."""
    with checked_by(stop):
        made = ahead(endless(), count, "test")
        assert next(made) == 0
        with pytest.raises(Interrupted):
            next(made)
