"""Every malformed input of the catalogue, a sample of them by the real command, and what the checks themselves see."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attacks.attacked import Worker
from attacks.catalogue import Malformed
from attacks.malformed import CATALOGUE, MAX_BYTES, MAX_SECONDS, Materials, Outcome, broken, feed, feed_all, warm

REAL = (
    "header: header length beyond the file",
    "a header of a gigabyte",
    "a name that a terminal obeys",
    "bin: code in the pickle",
    "config: code of its own",
    "llama: num_hidden_layers is 10^12",
    "text: zero bytes",
    "parquet of numbers",
    "tokenizer: ids beyond the model's vocabulary",
    "manifest: blocks is None",
    "packed layer: every bit set",
    "a link for the work folder",
)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials(tmp_path_factory.mktemp("materials"))


def named(start: str) -> Malformed:
    return next(entry for entries in CATALOGUE.values() for entry in entries if entry.name.startswith(start))


def test_the_catalogue_is_large_and_each_input_has_a_name_of_its_own() -> None:
    entries = [entry for entries in CATALOGUE.values() for entry in entries]
    assert len({entry.name for entry in entries}) == len(entries) > 300
    assert all(entry.why for entry in entries)
    assert {entry.code for entry in entries} == {0, 1, 3, 4, 5, 6}


@pytest.mark.parametrize("kind", CATALOGUE)
def test_each_is_refused_in_one_line_soon_within_memory_and_nothing_is_written(
    kind: str, worker: Worker, materials: Materials
) -> None:
    campaign = feed_all(worker, materials.folder, kind)
    assert campaign.broken == []
    assert campaign.attacks == len(CATALOGUE[kind])


@pytest.mark.parametrize(
    "pair", [REAL[place : place + 2] for place in range(0, len(REAL), 2)], ids=lambda pair: pair[0]
)
def test_the_real_command(pair: tuple[str, ...], materials: Materials, tmp_path: Path) -> None:
    """What is imported is not there yet, and nothing of the tests' settings is. Two at once: starting takes long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS", "HF_"))}
    started = []
    for number, entry in enumerate(map(named, pair)):
        arguments = materials.place(entry, tmp_path / f"{number}")
        command = [sys.executable, "-m", "streamprune", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append((entry, subprocess.Popen(command, text=True, env=environment, **pipes)))
    for entry, process in started:
        stdout, stderr = process.communicate(timeout=120)
        assert broken(entry, Outcome(process.returncode, stdout, stderr, 0, 0.0, ())) == []


def test_the_checks_can_fail(worker: Worker, materials: Materials, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = named("a tensor less")
    outcome = Outcome(3, "", f"streamprune: {entry.message}\n", 0, 0.1, ())
    assert broken(entry, outcome) == []
    for changes, message in (
        ({"exit_code": 1}, "exit code 1, not 3"),
        ({"stderr": ""}, "0 lines on standard error"),
        ({"stderr": outcome.stderr * 2}, "2 lines on standard error"),
        ({"stderr": "streamprune: no\n"}, "not said"),
        ({"stderr": f"streamprune: unexpected ValueError {entry.message}\n"}, "unforeseen"),
        ({"stderr": f"streamprune: {entry.message}\x1b\n"}, "what no terminal should get"),
        ({"stdout": "x"}, "something on standard output"),
        ({"touched": ("out",)}, "wrote ['out']"),
        ({"seconds": MAX_SECONDS + 1}, "took 3.0 s"),
        ({"memory_bytes": MAX_BYTES + 1}, "took 100 MB"),
    ):
        assert any(message in fault for fault in broken(entry, dataclasses.replace(outcome, **changes))), message


def test_memory_and_writing_are_seen(worker: Worker, materials: Materials) -> None:
    """A job that may work takes memory and writes: both are measured."""
    warm(worker, materials)

    outcome = feed(worker, materials, named("one line of a megabyte"), materials.folder)
    assert outcome.memory_bytes > MAX_BYTES
    entry = dataclasses.replace(named("a holder that is deep JSON".lower()), code=3)
    assert "out/config.json" in feed(worker, materials, entry, materials.folder).touched


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_a_reader_that_stops_reading_ends_inspect_quietly(lines: int, outputs: Callable[..., Path]) -> None:
    """`streamprune inspect ... | head`."""
    command = [sys.executable, "-u", "-m", "streamprune", "inspect", str(outputs("llama"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() in (0, 1)
