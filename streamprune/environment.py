"""What libraries read from the environment when they are loaded, set before that; what the user has set stays.

They start as many threads as the affinity mask has processors, and do not see that a cgroup allows the process less
time than that. A thread that waits for the others of its team spins for some milliseconds, which takes the processor
from other processes (docs/benchmarks.md, "Two jobs on the same cores").
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
SPINS = 1000  # of GNU's OpenMP, some tens of microseconds; its default is 300,000
THREADS, SPIN, POLICY = "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads, where a cgroup allows fewer than there are processors, and how long they spin."""
    quota = quota_processors()
    if quota is not None and quota < len(os.sched_getaffinity(0)):
        environment.setdefault(THREADS, str(max(1, math.ceil(quota))))
    if POLICY not in environment:
        environment.setdefault(SPIN, str(SPINS))


def quota_processors(groups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Processors' worth of time that this process's cgroup and those around it allow; None: no limit is known.

    `groups` is where cgroups are mounted, `own` says which are this process's (cgroups(7), version 1 and 2).
    """
    quotas = (_quota(folder) for folder in _folders(groups, own))
    return min((quota for quota in quotas if quota is not None), default=None)


def _folders(groups: Path, own: Path) -> Iterator[Path]:
    """This process's cgroup of processors and all around it. In a container its path may be the host's, and missing."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (groups / controllers, groups / "cpu") if controllers else (groups, groups / "unified"):
            inner = mount / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _quota(folder: Path) -> float | None:
    """Of one cgroup: of version 2 in cpu.max, of version 1 in two files; None where there is no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None
