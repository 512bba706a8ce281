"""`submit` on a real Slurm: whatever happens to a job, its output is that of an uninterrupted one, byte by byte."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from slurm_host import Slurm, until

import streamprune
from streamprune.pipeline.compress import CompressResult

pytestmark = pytest.mark.slurm
SMALL = {"cpus-per-task": 1, "mem": "1500M", "time": "10"}
BLOCKS = 48  # many, so that a job can be interrupted often


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("slurm-model") / "llama", blocks=BLOCKS)


@pytest.fixture
def job(model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a job into tmp_path/out, which is the working folder and has a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return {"model": str(model), "out": "the output", "calibration": str(calibration), **tiny.CALIBRATION}


@pytest.fixture(scope="session")
def expected(
    model: Path, prune: Callable[..., CompressResult], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Of the uninterrupted job."""
    out = tmp_path_factory.mktemp("slurm-expected") / "out"
    prune(model, out)
    return tiny.digests(out)


def submit(job: dict[str, Any], **how: Any) -> str:
    slurm = SMALL | how.pop("slurm", {})
    result = streamprune.submit([job], slurm=slurm, **how)
    assert result.job_id is not None
    return result.job_id


def holder(out: Path, former: object = None) -> int:
    """The process that works on an output, once there is another than the former."""

    def found() -> int | None:
        for path in out.glob(".work/epoch-*/holder-*.json"):
            try:
                process = int(json.loads(path.read_text())["process"])
            except (OSError, ValueError):
                continue
            if process != former:
                return process
        return None

    return until(found)


def block_done(out: Path, count: int = 1) -> None:
    until(lambda: len(list(out.glob(".work/block-*.json"))) >= count or None)


def log(job_id: str) -> str:
    return Path(f"streamprune-{job_id}.out").read_text()


def test_an_array_of_which_one_fails_leaves_the_others_whole(
    slurm: Slurm, job: dict[str, Any], expected: dict[str, str]
) -> None:
    """Settings from a file, options of sbatch too; the log of each index is its own."""
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in job.items() if name not in ("model", "out"))
    models = [job["model"], job["model"], "no such model", job["model"]]
    tables = [f'[[jobs]]\nmodel = {json.dumps(one)}\nout = "it\'s {i}"\n' for i, one in enumerate(models)]
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SMALL.items())
    Path("jobs.toml").write_text(f"[slurm]\n{options}[defaults]\n{settings}{''.join(tables)}")
    result = streamprune.submit("jobs.toml")
    assert result.job_id is not None
    ended = slurm.wait_for(result.job_id, "COMPLETED", "FAILED")
    assert [(one["JobState"], one["ExitCode"]) for one in ended] == [
        ("COMPLETED", "0:0"), ("COMPLETED", "0:0"), ("FAILED", "3:0"), ("COMPLETED", "0:0"),
    ]  # fmt: skip
    assert [tiny.digests(Path(f"it's {i}")) == expected for i in (0, 1, 3)] == [True] * 3
    assert "no such model" in log(f"{result.job_id}_2")
    assert "no such model" not in log(f"{result.job_id}_1")
    states = [one.state for one in streamprune.status(result.outs).jobs]
    assert states == ["finished", "finished", "not started", "finished"]


def test_requeued_five_times_and_preempted_once(slurm: Slurm, job: dict[str, Any], expected: dict[str, str]) -> None:
    out, draw, process = Path(job["out"]), random.Random(5), None
    job_id = submit(job, slurm={"partition": "spot"})
    for _ in range(5):
        slurm.wait_for(job_id, "RUNNING")
        process = holder(out, process)
        time.sleep(draw.uniform(0.0, 0.6))
        slurm.run("scontrol", "requeue", job_id)
    slurm.wait_for(job_id, "RUNNING")
    os.kill(holder(out, process), signal.SIGSTOP)  # it may not end before the urgent job is looked at
    urgent = slurm.run("sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true").strip()
    slurm.wait_for(urgent, "COMPLETED")
    (ended,) = slurm.wait_for(job_id, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "6"), log(job_id)
    assert tiny.digests(out) == expected
    assert 1 <= streamprune.status([out]).jobs[0].restarts <= 6  # some were requeued before they had noted themselves


@pytest.mark.parametrize("requeue", [1, 0])
def test_usr1_goes_on_by_requeue_or_where_that_is_refused_by_another_job(
    slurm: Slurm, job: dict[str, Any], expected: dict[str, str], requeue: int
) -> None:
    out = Path(job["out"])
    job_id = submit(job)
    block_done(out)
    slurm.run("scontrol", "update", f"jobid={job_id}", f"Requeue={requeue}")
    slurm.run("scancel", "--signal=USR1", "--batch", job_id)
    if requeue:
        until(lambda: slurm.jobs(job_id)[0]["Restarts"] == "1" or None)
    else:
        (ended,) = slurm.wait_for(job_id, "FAILED")
        assert ended["ExitCode"] == "85:0"
        said = re.search(r"requeue is refused here, so job (\d+) was submitted", log(job_id))
        assert said is not None, log(job_id)
        job_id = said[1]
    slurm.wait_for(job_id, "COMPLETED")
    assert "restart 1\n" in log(job_id)
    assert tiny.digests(out) == expected


def test_a_time_limit(slurm: Slurm, job: dict[str, Any], expected: dict[str, str]) -> None:
    """Slurm looks at limits twice a minute, so the worker is held still until the signal has come."""
    out = Path(job["out"])
    job_id = submit(job, slurm={"time": "1"}, notice=55)
    block_done(out)
    process = holder(out)
    os.kill(process, signal.SIGSTOP)
    until(lambda: is_pending(process, signal.SIGUSR1) or None)
    os.kill(process, signal.SIGCONT)
    until(lambda: slurm.jobs(job_id)[0]["Restarts"] == "1" or None)
    slurm.wait_for(job_id, "COMPLETED")
    assert "interrupted at a safe point; job" in log(job_id)
    assert tiny.digests(out) == expected


def is_pending(process: int, kind: signal.Signals) -> bool:
    pending = Path(f"/proc/{process}/status").read_text().partition("ShdPnd:")[2].split()[0]
    return bool(int(pending, 16) >> (kind - 1) & 1)


def test_of_two_writers_after_the_death_of_a_node_one_goes_on(
    slurm: Slurm, job: dict[str, Any], expected: dict[str, str]
) -> None:
    """The node's daemon is killed, its worker is not: the job starts a second time beside it, and is refused."""
    out = Path(job["out"])
    job_id = submit(job)
    process = holder(out)
    block_done(out)
    os.kill(process, signal.SIGSTOP)  # so that it does not finish before the other begins; its heart was just heard
    (running,) = slurm.jobs(job_id)
    node = running["NodeList"]
    daemon = slurm.state / "run" / f"slurmd.{node}.pid"
    os.kill(int(daemon.read_text()), signal.SIGKILL)
    os.kill(process, signal.SIGCONT)
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        (ended,) = slurm.wait_for(job_id, "COMPLETED", "FAILED")
        assert (ended["Restarts"], ended["NodeList"] != node) == ("1", True)
        if ended["JobState"] == "FAILED":  # the first still worked
            assert ended["ExitCode"] == "5:0"
            assert f"is in use by process {process}" in log(job_id)
        until(lambda: streamprune.is_finished(out) or None)
        until(lambda: not (out / ".work").exists() or None)
        assert tiny.digests(out) == expected
    finally:
        slurm.revive(node)


def test_a_job_that_restarts_too_often_gives_up(slurm: Slurm, job: dict[str, Any]) -> None:
    job_id = submit(job, max_restarts=0)
    slurm.wait_for(job_id, "RUNNING")
    slurm.run("scontrol", "requeue", job_id)
    (ended,) = slurm.wait_for(job_id, "FAILED")
    assert ended["ExitCode"] == "85:0"
    assert "was restarted 1 times, which is too often" in log(job_id)


def test_a_wrong_option_is_refused_in_sbatchs_words(slurm: Slurm, job: dict[str, Any]) -> None:
    with pytest.raises(streamprune.StreampruneError, match=r"sbatch refused the job: .*partition"):
        submit(job, slurm={"partition": "nowhere"})
