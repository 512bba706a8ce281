"""How commands end: standard streams that take nothing, signals, and memory that runs out."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run

import streamprune
from streamprune.errors import CheckpointError
from streamprune.runtime import evaluate, export
from streamprune.runtime.verify import verify

COMMAND = [sys.executable, "-m", "streamprune"]


@pytest.fixture
def job(sources: Callable[[str], Path], calibration: Path) -> list[str]:
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.CALIBRATION.items()]
    return ["compress", str(sources("llama")), "--calibration", str(calibration), *settings]


@contextmanager
def stream(kind: str) -> Iterator[int]:
    """A file descriptor that takes nothing: of a full device, or of a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    yield full if kind == "full" else writing
    os.close(writing)
    os.close(full)


def start(arguments: list[str], number: int, kind: str, streams: ExitStack) -> subprocess.Popen[str]:
    """A command of which one of the streams, 1 or 2, is full, broken, or closed; the other one is a pipe."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if kind == "closed":
        shell = f'exec "$@" {number}>&-'
        return subprocess.Popen(["sh", "-c", shell, "sh", *COMMAND, *arguments], text=True, **pipes)
    pipes[("stdout", "stderr")[number - 1]] = streams.enter_context(stream(kind))
    return subprocess.Popen([*COMMAND, *arguments], text=True, **pipes)


def test_no_job_ends_by_standard_error(job: list[str], outputs: Callable[..., Path], tmp_path: Path) -> None:
    """Lines, bars and warnings go there. The real command, three at once: starting takes most of their time."""
    with ExitStack() as streams:
        started = {kind: start([*job, "--out", str(tmp_path / kind)], 2, kind, streams) for kind in KINDS}
        for kind, process in started.items():
            stdout, _ = process.communicate(timeout=120)
            assert process.returncode == 0, kind
            assert stdout.startswith(f"finished: {tmp_path / kind}, 3 blocks\n")
            assert tiny.digests(tmp_path / kind) == tiny.digests(outputs("llama"))
            assert verify(tmp_path / kind).ok


KINDS = ("full", "closed", "broken")
LOST = "streamprune: standard output cannot be written ({}), so the result is lost; mend that and run again\n"


@pytest.mark.parametrize("command", ["inspect", "--help"])
def test_a_result_that_is_lost_is_a_fault(command: str, outputs: Callable[..., Path]) -> None:
    """One line; but a reader that has gone, as `| head`, wanted no more."""
    reasons = {"full": "No space left on device", "closed": "Bad file descriptor"}
    arguments = [command, *([str(outputs("llama"))] if command == "inspect" else [])]
    with ExitStack() as streams:
        started = {kind: start(arguments, 1, kind, streams) for kind in KINDS}
        for kind, process in started.items():
            _, stderr = process.communicate(timeout=60)
            assert (process.returncode, stderr) == (1, LOST.format(reasons[kind]) if kind in reasons else ""), kind


def test_errors_that_nobody_reads_keep_their_codes() -> None:
    with ExitStack() as streams:
        started = {kind: start(["inspect"], 2, kind, streams) for kind in KINDS}
        assert {kind: process.wait(timeout=60) for kind, process in started.items()} == dict.fromkeys(KINDS, 2)
        assert [process.communicate()[0] for process in started.values()] == [""] * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(100_000, seed=4))
    return path


ENDS = [signal.SIGTERM, signal.SIGHUP]


def test_a_signal_leaves_no_hidden_states(sources: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Real processes, sent a signal while their hidden states lie in the temporary folder; one of them by nohup."""
    ways = {"ended": ([], signal.SIGTERM), "ignored": (["nohup"], signal.SIGHUP)}
    processes = {}
    for way, (before, _) in ways.items():
        (tmp_path / way).mkdir()
        arguments = ["evaluate", str(sources("llama")), "--text", str(text), "--sequence-length", "300", "--quiet"]
        processes[way] = subprocess.Popen(
            [*before, *COMMAND, *arguments, "--scratch", str(tmp_path / way)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    waiting, deadline = set(ways), time.monotonic() + 100
    while waiting and time.monotonic() < deadline:
        for way in [way for way in waiting if list((tmp_path / way).glob("*/0.bin"))]:
            processes[way].send_signal(ways[way][1])
            waiting.remove(way)
        time.sleep(0.001)
    assert not waiting
    ends = {way: (*process.communicate(timeout=100), process.returncode) for way, process in processes.items()}
    assert ends["ended"] == ("", "streamprune: ended by SIGTERM\n", 143)
    assert ends["ignored"][0].startswith("perplexity ")
    assert ends["ignored"][1:] == ("", 0)
    assert [list((tmp_path / way).iterdir()) for way in ways] == [[], []]


@pytest.mark.parametrize("kind", ENDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_signal_unwinds_a_command(
    command: str, kind: signal.Signals, outputs: Callable[..., Path], held_out: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    """Sent at a chosen place; then again where it is ignored, and a handler that was there before is there again."""
    module, name = {"evaluate": (evaluate, "load_block"), "export": (export, "write_json")}[command]
    original = getattr(module, name)

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), kind)
        return original(*arguments, **settings)

    monkeypatch.setattr(module, name, interrupted)
    (tmp_path / "scratch").mkdir()
    arguments = {
        "evaluate": ["--text", held_out, "--sequence-length", 100, "--scratch", tmp_path / "scratch"],
        "export": ["--out", tmp_path / "scratch" / "dense"],
    }[command]
    result = run(command, outputs("llama"), *arguments, "--quiet")
    assert (result.exit_code, result.stderr) == (128 + kind, f"streamprune: ended by {kind.name}\n")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert signal.getsignal(kind) == signal.SIG_DFL
    signal.signal(kind, signal.SIG_IGN)
    try:
        assert run(command, outputs("llama"), *arguments, "--quiet").exit_code == 0
        assert signal.getsignal(kind) == signal.SIG_IGN
    finally:
        signal.signal(kind, signal.SIG_DFL)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda k: k.name)
def test_an_ignored_signal_does_not_stop_compress(
    kind: signal.Signals, job: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*arguments: Any, should_stop: Callable[[], bool], **settings: Any) -> None:
        os.kill(os.getpid(), kind)
        raise CheckpointError("stops" if should_stop() else "goes on")

    monkeypatch.setattr(streamprune, "compress", stopped, raising=False)
    arguments = [*job, "--out", tmp_path / "out", "--quiet"]
    assert run(*arguments).stderr == "streamprune: stops\n"
    before = signal.signal(kind, signal.SIG_IGN)
    try:
        assert run(*arguments).stderr == "streamprune: goes on\n"
    finally:
        signal.signal(kind, before)


def allocate_too_much() -> None:
    torch.empty(1 << 50)


def fail(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def failing() -> None:
        raise error from cause

    return failing


PLAN = " (streamprune plan shows what a job takes)"
LESS = f"give a lower --max-memory or --micro-batch, or free some{PLAN}"


@pytest.mark.parametrize(
    ("command", "failing", "line"),
    [
        ("compress", fail(MemoryError()), f"memory ran out; {LESS}"),
        ("compress", allocate_too_much, f"memory ran out; {LESS}"),
        ("compress", fail(OSError(12, os.strerror(12))), f"memory ran out; {LESS}"),
        ("compress", fail(RuntimeError("could not create a primitive")), f"memory ran out; {LESS}"),
        ("compress", fail(CheckpointError("is not a .bin"), MemoryError()), f"memory ran out; {LESS}"),
        (
            "compress",
            fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has")),
            f"the GPU's memory ran out; give a lower --max-device-memory or --micro-batch, or free some{PLAN}",
        ),
        ("evaluate", allocate_too_much, "memory ran out; give a lower --sequence-length, or free some"),
        ("inspect", fail(MemoryError()), "memory ran out; free some and run again"),
        ("inspect", fail(RuntimeError("odd")), "unexpected RuntimeError: odd (--debug shows where)"),
    ],
)
def test_memory_that_runs_out_says_what_to_do(
    command: str, failing: Callable[[], None], line: str, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamprune, command, lambda **settings: failing(), raising=False)
    arguments = {"compress": [*job, "--out", "out", "--quiet"], "evaluate": ["evaluate", "x", "--text", "y"]}
    result = run(*arguments.get(command, [command, "x"]))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"streamprune: {line}\n")
