"""The ways to run a kernel on the CPU, by name: each of both tools under three schedules."""

from functools import partial

from cuda_tools import host, ptx
from streamprune_kernels.launch import Run

PLAIN: dict[str, Run] = {"host": host.run, "ptx": ptx.run}
ALL: dict[str, Run] = {
    f"{name}-{schedule}": partial(run, schedule=schedule) for name, run in PLAIN.items() for schedule in ptx.SCHEDULES
}
