"""One writer: who holds an output folder, who takes it over, and what a writer that was taken over can still do."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from streamprune.errors import Interrupted, OutputError
from streamprune.pipeline.writing import lease as module
from streamprune.pipeline.writing.lease import Lease, holder_file, leased

HOLD = """
import sys, time
from pathlib import Path
from streamprune.pipeline.writing.lease import leased
with leased(Path(sys.argv[1])) as lease:
    print(lease.folder, flush=True)
    sys.stdin.readline()
"""
RACE = """
import sys
from pathlib import Path
from streamprune.errors import OutputError
from streamprune.pipeline.writing.lease import leased
sys.stdin.readline()
try:
    with leased(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except OutputError as error:
    print(error, flush=True)
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / ".work"


@contextmanager
def process(code: str, work: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def holder(work: Path) -> dict[str, Any]:
    (epoch,) = work.glob("epoch-*")
    return dict(json.loads(holder_file(epoch).read_text()))


def pretend(work: Path, seconds: float = 0.0, **changes: Any) -> Path:
    """A folder held by somebody, last heard of `seconds` ago."""
    with leased(work) as held:
        about = holder(work)
    path = holder_file(held.folder)
    path.write_text(json.dumps(about | changes))
    beat = time.time() - seconds
    os.utime(path, (beat, beat))
    return held.folder


def test_the_second_is_refused_by_name_and_the_first_not_disturbed(work: Path) -> None:
    with leased(work) as first:
        with (
            pytest.raises(OutputError, match=rf"is in use by process {os.getpid()} on .*, heard of 0 s ago"),
            leased(work),
        ):
            pass
        first.check()
        assert [path.name for path in work.iterdir()] == [first.folder.name]
    assert not holder_file(first.folder).exists()
    assert first.folder.exists()


def test_one_that_was_given_back_or_whose_process_is_gone_is_taken_over_at_once(work: Path) -> None:
    with leased(work) as first:
        (first.folder / "half written").write_text("x")
    with leased(work) as second:
        assert second.sole
        assert second.folder != first.folder
        assert [path.name for path in second.folder.iterdir()] == [holder_file(second.folder).name]
    with process(HOLD, work) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip()
        other.kill()
        other.wait()
        assert holder(work)["process"] == other.pid
        with leased(work) as third:
            assert third.sole
    assert len(list(work.glob("epoch-*"))) == 1


def test_a_number_that_another_process_has_by_now_is_not_the_holder(work: Path) -> None:
    pretend(work, start=1)
    with leased(work) as taken:
        assert taken.sole


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "another"}, {"namespace": "pid:[1]"}])
def test_one_of_another_system_is_believed_until_it_is_stale(
    work: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(work, 1.0, **change, process=12345)
    with pytest.raises(OutputError, match="in use by process 12345 on "), leased(work):
        pass
    pretended = pretend(work.parent / "other", module.STALE_SECONDS + 1, **change)
    with leased(work.parent / "other") as taken:
        assert not taken.sole, "it may still be alive"
        assert not pretended.exists()


def test_a_holder_in_doubt_is_watched_until_it_beats_or_is_stale(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretend(work, module.FRESH_SECONDS + 1, host="elsewhere")
    asked: list[float] = []

    def beats() -> bool:
        asked.append(module._age_seconds(folder))
        if len(asked) == 2:
            os.utime(holder_file(folder))
        return False

    with pytest.raises(OutputError, match="in use by process"), leased(work, beats):
        pass
    assert len(asked) == 2
    os.utime(holder_file(folder), (time.time() - module.STALE_SECONDS + 1,) * 2)
    with leased(work) as taken:
        assert not taken.sole
    pretend(work, module.FRESH_SECONDS + 1, host="elsewhere")
    with pytest.raises(Interrupted, match="while waiting for process"), leased(work, lambda: True):
        pass


def test_a_heartbeat_keeps_it_fresh(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    with leased(work) as held:
        path = holder_file(held.folder)
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert module._age_seconds(held.folder) < module.FRESH_SECONDS


@pytest.fixture
def taken_over(work: Path) -> Iterator[Lease]:
    """A lease that its holder believes to have."""
    with leased(work) as held:
        old = held.folder
        os.utime(holder_file(old), (0, 0))
        with leased(work) as successor:
            assert not successor.sole
            (work / "entry").write_text("the successor's")
            yield held
            assert (work / "entry").read_text() == "the successor's"
            successor.check()


def test_whoever_was_taken_over_can_publish_discard_and_close_nothing(taken_over: Lease, work: Path) -> None:
    with pytest.raises(OutputError, match="has taken this output over"):
        taken_over.check()
    with pytest.raises(OutputError, match="has taken this output over"):
        taken_over.discard(work / "entry")
    with pytest.raises(OutputError, match="cannot be written"):
        taken_over.close()
    with pytest.raises(FileNotFoundError):
        (taken_over.folder / "shard").write_bytes(b"x")


def test_a_rename_that_fails_says_who_has_the_folder_now(work: Path) -> None:
    def work_on() -> None:
        with leased(work) as held:
            os.utime(holder_file(held.folder), (0, 0))
            with leased(work):
                raise OutputError("shard: cannot be written")

    with pytest.raises(OutputError, match="another process has taken this output over"):
        work_on()


def test_no_name_comes_twice(work: Path) -> None:
    """So that a writer of a job long finished finds nothing of its own in a new one."""
    names = set()
    for _ in range(3):
        with leased(work) as held:
            names.add(held.folder.name)
            held.close()
        assert not work.exists()
    assert len(names) == 3


def test_what_a_kill_leaves_is_removed(work: Path) -> None:
    (work.parent / ".work-0123" / "epoch-1-0").mkdir(parents=True)
    (work / "closing").mkdir(parents=True)
    (work / "block-00000.json").write_text("{}")
    with leased(work) as held:
        assert held.sole
        assert sorted(path.name for path in work.parent.iterdir()) == [".work"]
        assert [path.name for path in work.iterdir()] == [held.folder.name]


def test_a_torn_holder_file_holds_nothing(work: Path) -> None:
    folder = pretend(work)
    for content in ("", "{", "[1]"):
        holder_file(folder).write_text(content)
        with leased(work) as taken:
            assert taken.folder != folder
            folder = taken.folder
        holder_file(folder).touch()


def as_left(work: Path, state: str) -> None:
    """Make the output folder, and in it what those who begin find."""
    work.parent.mkdir()
    if state == "given back":
        with leased(work):
            pass
    if state == "stale":
        pretend(work, 3600, host="elsewhere")
    if state == "killed while closing":
        (work / "closing").mkdir(parents=True)
        (work / "block-00000.json").write_text("{}")


@contextmanager
def held_up(at: int, meanwhile: Callable[[], object]) -> Iterator[list[int]]:
    """Whoever begins in here does `meanwhile` before line `at`, counted as they run, of those that see the folders."""
    alone = ("holder_file", "_number", "_myself", "_start_of", "_is_dead", "_described")
    lines = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename != module.__file__ or code.co_name in alone:
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == at:
                meanwhile()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


class Race(ExitStack):
    """Several that begin in one folder and go on until it ends."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work
        self.said: list[str] = []
        self.held: list[Lease] = []

    def begin(self) -> None:
        try:
            self.held.append(self.enter_context(leased(self.work)))
            (self.work / "record").touch()
        except OutputError as error:
            self.said.append(str(error))

    def one_runs(self) -> bool:
        (lease,) = self.held
        lease.check()
        return lease.folder.is_dir() and (self.work / "record").exists() and all("in use by" in t for t in self.said)


STATES = ["new", "given back", "stale", "killed while closing"]


@pytest.mark.parametrize("state", STATES)
def test_a_job_that_ends_and_one_that_begins_while_another_begins(state: str, tmp_path: Path) -> None:
    def end_and_begin(race: Race) -> None:
        with suppress(OutputError), leased(race.work) as lease:
            lease.close()
        race.begin()

    for at in itertools.count(1):
        work = tmp_path / str(at) / ".work"
        as_left(work, state)
        with Race(work) as race:
            with held_up(at, partial(end_and_begin, race)) as lines:
                race.begin()
            assert race.one_runs(), (at, race.said)
        if lines[0] < at:
            break
    assert at > 20


class HeldUp:
    """One that begins in a thread of its own and stands at line `at` until it is told to go on."""

    def __init__(self, race: Race, at: int) -> None:
        self.race, self.at, self.stood = race, at, False
        self.seen, self.told = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.begin, daemon=True)
        self.thread.start()
        self.seen.wait()

    def begin(self) -> None:
        try:
            with held_up(self.at, self.stand):
                self.race.begin()
        finally:
            self.seen.set()

    def stand(self) -> None:
        self.stood = True
        self.seen.set()
        self.told.wait()

    def go_on(self) -> None:
        self.told.set()
        self.thread.join()


@pytest.mark.parametrize("state", STATES)
def test_two_begin_and_hold_each_other_up(state: str, tmp_path: Path) -> None:
    """One stops at some line, then the other begins and stops at some line, then one goes on and then the other."""
    for at in itertools.count(1):
        for other_at in itertools.count(1):
            work = tmp_path / f"{at} {other_at}" / ".work"
            as_left(work, state)
            with Race(work) as race:
                one = HeldUp(race, at)
                with held_up(other_at, one.go_on) as lines:
                    race.begin()
                one.go_on()
                assert race.one_runs(), (at, other_at, race.said)
            if lines[0] < other_at:
                break
        if not one.stood:
            break
    assert at > 20


@pytest.mark.parametrize("state", ["new", "given back", "stale"])
def test_of_many_that_begin_at_once_one_runs(state: str, tmp_path: Path) -> None:
    work = tmp_path / "out" / ".work"
    as_left(work, state)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert said.count("held") == 1, said
    assert all("in use by" in line or line == "held" for line in said)


def test_a_stopped_writer_that_wakes_up_after_it_was_taken_over(work: Path) -> None:
    """SIGSTOP stops its heartbeat too; nothing that it does afterwards has an effect, and it ends with the reason."""
    code = HOLD + "    (lease.folder / 'shard').write_bytes(b'x')\n"
    with process(code, work) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        folder = Path(writer.stdout.readline().strip())
        os.kill(writer.pid, signal.SIGSTOP)
        os.utime(holder_file(folder), (0, 0))
        with leased(work) as successor:
            assert not successor.sole
            os.kill(writer.pid, signal.SIGCONT)
            writer.stdin.write("go on\n")
            writer.stdin.flush()
            assert writer.wait(timeout=60) != 0
            successor.check()
            assert [path.name for path in successor.folder.iterdir()] == [holder_file(successor.folder).name]
