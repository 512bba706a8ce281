"""Threads that fit the place, and how long they spin: what is set before libraries are loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamprune import environment
from streamprune.environment import prepare, quota_processors

OF_A_BOX = "0::/\n"  # in a cgroup namespace
HALF = (("quota", "50000\n"), ("period", "100000\n"))
CASES: list[tuple[str, dict[str, str], float | None]] = [  # this process's cgroups, files, processors
    (OF_A_BOX, {}, None),
    (OF_A_BOX, {"cpu.max": "150000 100000\n"}, 1.5),
    (OF_A_BOX, {"cpu.max": "max 100000\n"}, None),
    (OF_A_BOX, {"cpu.max": "nonsense\n"}, None),
    ("0::/slurm/step\n", {"slurm/step/cpu.max": "max 100000\n", "slurm/cpu.max": "400000 100000\n"}, 4.0),
    ("0::/slurm/step\n", {"slurm/step/cpu.max": "100000 100000\n", "slurm/cpu.max": "400000 100000\n"}, 1.0),
    ("0::/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2.0),
    ("0::/a\n", {"b/cpu.max": "100000 100000\n"}, None),
    ("3:cpu,cpuacct:/a\n", {f"cpu,cpuacct/a/cpu.cfs_{name}_us": us for name, us in HALF}, 0.5),
    ("3:cpu:/of/the/host\n0::/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
    ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("4:cpuset:/a\n", {"cpuset/a/cpu.max": "100000 100000\n"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("own", "files", "processors"), CASES)
def test_quotas(own: str, files: dict[str, str], processors: float | None, tmp_path: Path) -> None:
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    assert quota_processors(tmp_path / "groups", tmp_path / "own") == processors


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota_processors(tmp_path / "groups", tmp_path / "own") is None


SPINS = {"GOMP_SPINCOUNT": str(environment.SPINS)}


@pytest.mark.parametrize(
    ("quota", "processors", "given", "expected"),
    [
        (None, 8, {}, SPINS),
        (8.0, 8, {}, SPINS),
        (2.0, 8, {}, {"OMP_NUM_THREADS": "2", **SPINS}),
        (1.5, 8, {}, {"OMP_NUM_THREADS": "2", **SPINS}),
        (0.1, 8, {}, {"OMP_NUM_THREADS": "1", **SPINS}),
        (2.0, 8, {"OMP_NUM_THREADS": "5"}, {"OMP_NUM_THREADS": "5", **SPINS}),
        (None, 8, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (None, 8, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_what_is_set(
    quota: float | None,
    processors: int,
    given: dict[str, str],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "quota_processors", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    prepare(given)
    assert given == expected


COUNT = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
import streamprune.environment as environment
environment.quota_processors = lambda: float(sys.argv[2])
environment.prepare()
import torch
print(torch.get_num_threads())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: nothing can be fewer")
@pytest.mark.parametrize(("processors", "quota", "threads"), [(1, 99, 1), (2, 0.5, 1), (2, 99, 2)])
def test_torch_takes_the_processors_that_there_are(processors: int, quota: float, threads: int) -> None:
    """Of an affinity mask, and of a quota."""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COUNT, str(processors), str(quota)]
    assert subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout == f"{threads}\n"
