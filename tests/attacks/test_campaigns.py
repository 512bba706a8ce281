"""A sample of each campaign; `make torture` runs all of it (torture.py)."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from attacks.attacked import (
    Attacked,
    Campaign,
    Worker,
    attack,
    flip_bits,
    full_at,
    go_on,
    kill_at,
    kill_sometime,
    look,
    lose_power,
    wake_at,
)
from streamprune.runtime.verify import verify

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="faults.c needs a C compiler")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Worker]]:
    pair = Worker(tmp_path_factory.mktemp("worker")), Worker(tmp_path_factory.mktemp("successor"))
    yield pair
    for worker in pair:
        worker.close()


@pytest.fixture(scope="module")
def attacked(workers: tuple[Worker, Worker], calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    source = tiny.write_beside(tiny.write_opt(tmp_path_factory.mktemp("source") / "opt"))
    job = {"model": str(source), "calibration": str(calibration), "samples": 2, "sequence_length": 48}
    return attack(workers[0], tmp_path_factory.mktemp("attacked"), job)


def assert_holds(campaign: Campaign, attacks: int, *happened: str) -> None:
    assert campaign.broken == []
    assert campaign.attacks >= attacks
    assert all(campaign.counts.get(what) for what in happened), campaign.counts


def test_the_job_has_enough_to_attack(attacked: Attacked) -> None:
    assert attacked.operations > 150


def test_killed_at_a_sample_of_operations(attacked: Attacked) -> None:
    assert_holds(kill_at(attacked, range(3, attacked.operations, 23)), 14, "killed")


def test_killed_at_random_times(attacked: Attacked) -> None:
    assert_holds(kill_sometime(attacked, 6, seed=1), 6, "killed")


def test_full_disk_at_a_sample_of_operations(attacked: Attacked) -> None:
    assert_holds(full_at(attacked, range(5, attacked.fillable, 31)), 8, "refused")


def test_files_lost_or_torn_by_a_power_loss(attacked: Attacked) -> None:
    assert_holds(lose_power(attacked, 6, seed=1), 6)


def test_woken_after_it_was_taken_over(attacked: Attacked, workers: tuple[Worker, Worker]) -> None:
    assert_holds(wake_at(attacked, workers[1], [0, 4, attacked.renames - 2, attacked.renames - 1]), 4, "refused")


def test_single_bits(copy_of: Callable[..., Path]) -> None:
    out = copy_of("llama")
    assert_holds(flip_bits(out, 60, seed=1), 60)
    assert verify(out).ok


def test_the_checks_can_fail(attacked: Attacked) -> None:
    """They are shown what a careless writer would leave."""
    with attacked.fresh() as out:
        shutil.copytree(attacked.folder / "0", out)
        assert list(look(attacked, out)) == []
        os.truncate(out / "config.json", 10)
        (out / "notes").write_text("x")
        assert sorted(look(attacked, out)) == ["config.json is half written", "notes is a stray file"]
        shutil.rmtree(out)
        attacked.worker.run(attacked.at(out), fault={"action": "kill", "at": attacked.operations // 2})
        shard = next(out.glob("streamprune-00002-*"))
        assert list(out.glob(".work/block-00000.json"))
        tiny.flip_byte(shard, shard.stat().st_size - 1)
        assert list(look(attacked, out)) == [f"{shard.name} is half written"]
        assert any("were done again" in fault for fault in go_on(attacked, out))


def test_a_file_size_limit_ends_the_command_in_one_line(
    sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    amount = [
        "--samples",
        "4",
        "--sequence-length",
        "48",
        "--dtype",
        "float32",
        "--calibration",
        str(calibration),
        "--quiet",
    ]
    command = [sys.executable, "-m", "streamprune", "compress", str(sources("llama")), "--out", str(tmp_path / "out")]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    ended = subprocess.run([*command, *amount], capture_output=True, text=True, preexec_fn=limit)
    assert ended.returncode == 5
    (line,) = [line for line in ended.stderr.splitlines() if "streamprune:" in line]
    assert "File too large" in line
    assert "Traceback" not in ended.stderr
    subprocess.run([*command, *amount], capture_output=True, check=True)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))
