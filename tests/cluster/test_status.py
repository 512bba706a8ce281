"""`status`: what output folders tell of their jobs, and that looking changes nothing."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from command import run

import streamprune
from streamprune.cluster.status import JobStatus
from streamprune.errors import Interrupted, NumericsError, SettingsError
from streamprune.pipeline import compress as module
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.run import Watch

Prune = Callable[..., CompressResult]


def status_of(out: Path) -> JobStatus:
    (one,) = streamprune.status([out]).jobs
    return one


def stop_after(out: Path, blocks: int) -> Callable[[], bool]:
    return lambda: len(list(out.glob(".work/block-*.json"))) >= blocks


def test_a_job_from_its_start_to_its_end(
    prune: Prune, outputs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not started, stopped, failed, running, finished; it is looked at while it runs, and the bytes are the same."""
    out = tmp_path / "out"
    assert status_of(out) == JobStatus(str(out), "not started")
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=stop_after(out, 1))
    seen = status_of(out)
    assert (seen.state, seen.blocks_done, seen.blocks, seen.restarts) == ("stopped", 1, 3, 0)
    assert (seen.host, seen.last_error, seen.seconds_left) == (None, None, None)
    assert seen.blocks_per_hour is not None

    def fail(watch: Watch) -> None:
        raise NumericsError("layer 7:\nnot a number")

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "tick", fail)
        with pytest.raises(NumericsError):
            prune("llama", out)
    seen = status_of(out)
    assert (seen.state, seen.restarts, seen.last_error) == ("failed", 1, "layer 7: not a number")

    looks: list[JobStatus] = []

    def look() -> bool:
        before = sorted(out.rglob("*"))
        looks.append(status_of(out))
        assert sorted(out.rglob("*")) == before
        return False

    prune("llama", out, should_stop=look)
    assert {one.state for one in looks} == {"running"}
    assert {one.host for one in looks} == {socket.gethostname()}
    assert {one.last_error for one in looks} == {"layer 7: not a number"}
    assert {one.restarts for one in looks} == {1, 2}, "it is asked before the run is noted, too"
    assert looks[-1].restarts == 2
    assert [one.blocks_done for one in looks] == sorted(one.blocks_done for one in looks)
    assert {one.blocks_done for one in looks} >= {1, 2}
    assert all(one.seconds_left is not None and one.seconds_left >= 0 for one in looks)
    seen = status_of(out)
    assert (seen.state, seen.blocks_done, seen.blocks, seen.restarts) == ("finished", 3, 3, 2)
    assert (seen.host, seen.last_error) == (socket.gethostname(), None)
    assert tiny.digests(out) == tiny.digests(outputs("llama"))


def test_times_are_by_the_median_block(prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of a day between two blocks does not show. The last of 3 blocks takes what is left of 60 s."""
    out = tmp_path / "out"
    seen: list[JobStatus] = []

    def look() -> bool:
        entries = sorted(out.glob(".work/block-*.json"))
        if len(entries) == 2 and not seen:
            now = time.time()
            for entry, ago in zip(entries, (100.0, 40.0), strict=True):
                os.utime(entry, (now - ago, now - ago))
            seen.append(status_of(out))
        return False

    prune("llama", out, should_stop=look)
    (one,) = seen
    assert one.blocks_per_hour == pytest.approx(60.0, rel=1e-3)
    assert one.seconds_left == pytest.approx(20.0, abs=2.0)


@pytest.mark.parametrize("age", [1.0, 3600.0])
def test_a_job_of_another_host_lives_while_it_is_heard(prune: Prune, tmp_path: Path, age: float) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=stop_after(out, 1))
    (epoch,) = out.glob(".work/epoch-*")
    holder = epoch / f"holder-{epoch.name.rpartition('-')[2]}.json"
    holder.write_text(json.dumps({"host": "node7", "process": 1}))
    os.utime(holder, (time.time() - age, time.time() - age))
    one = status_of(out)
    assert (one.state, one.host) == ("running" if age < 60 else "killed", "node7")


def test_a_full_disk_is_the_last_error_or_not_known(
    prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no\nroom")

    monkeypatch.setattr(module, "check_disk", fail)
    with pytest.raises(OSError, match="room"):
        prune("llama", tmp_path / "out")
    assert status_of(tmp_path / "out").last_error == "no room"


def damage_runs(out: Path) -> None:
    (out / ".work" / "runs.json").write_text("{}")


def test_what_cannot_be_read_is_said(prune: Prune, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    finished = copy_of("llama")
    (finished / tiny.MANIFEST).write_text("[")
    one = status_of(finished)
    assert (one.state, one.last_error is not None and tiny.MANIFEST in one.last_error) == ("unreadable", True)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=stop_after(out, 1))
    damage_runs(out)
    one = status_of(out)
    assert (one.state, one.blocks_done, one.blocks, one.restarts) == ("stopped", 1, None, None)


def test_the_table(prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    out, finished = tmp_path / "out", outputs("llama")
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=stop_after(out, 1))
    result = run("status", out, finished, tmp_path / "none")
    assert (result.exit_code, result.stderr) == (0, "")
    head, *rows = (line.split() for line in result.stdout.splitlines())
    assert head == ["output", "state", "block", "done", "blocks/h", "left", "restarts", "host"]
    assert [row[:4] for row in rows[:2]] == [
        [str(out), "stopped", "1/3", "33.3%"],
        [str(finished), "finished", "3/3", "100.0%"],
    ]
    assert rows[2] == [str(tmp_path / "none"), "not", "started", "0/-", "-", "-", "-", "-", "-"]
    shown = json.loads(run("status", out, "--json").stdout)
    assert [one["state"] for one in shown["jobs"]] == ["stopped"]
    watched = run("status", finished, "--watch")  # of which nothing more is to come
    assert watched.stdout == run("status", finished).stdout


def test_watching_ends_with_the_jobs(
    outputs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shown: list[float] = []

    def finish(seconds: float) -> None:
        shown.append(seconds)
        out.symlink_to(outputs("llama"))

    monkeypatch.setattr("streamprune.cli.time.sleep", finish)
    result = run("status", out, "--watch")
    assert (result.exit_code, shown) == (0, [5.0])
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["state", "not", "state", "finished"]


@pytest.mark.parametrize("folders", [[], "out", ["a\0b"]])
def test_refused(folders: object) -> None:
    with pytest.raises(SettingsError):
        streamprune.status(folders)  # type: ignore[arg-type]
