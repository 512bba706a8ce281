"""What tests ask of a private Slurm (slurm/cluster.sh), and how long they wait for it."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
SECONDS = 120.0  # most that any one thing takes on a busy machine


@dataclass(frozen=True)
class Slurm:
    """The cluster's commands. `state` is where its daemons keep their process numbers and logs."""

    state: Path

    def run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What Slurm says of a job, or of each task of an array by its index."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown if line]
        return sorted(found, key=lambda one: one.get("ArrayTaskId", ""))

    def revive(self, node: str) -> None:
        """Start a node's killed daemon again."""
        self.run("/usr/sbin/slurmd", "-N", node)
        resume = ["scontrol", "update", f"nodename={node}", "state=resume"]
        subprocess.run(resume, capture_output=True)  # refused where it came back by itself
        until(lambda: "State=IDLE" in self.run("scontrol", "show", "node", node) or None)

    def wait_for(self, job: str, *states: str) -> list[dict[str, str]]:
        """Wait until all of a job is in one of the states; a requeued job is made to start at once."""

        def reached() -> list[dict[str, str]] | None:
            found = self.jobs(job)
            for one in found:
                if one["JobState"] == "PENDING" and one["Reason"] == "BeginTime":
                    time.sleep(1.5)  # a credential of the second in which the last one was revoked is revoked too
                    subprocess.run(
                        ["scontrol", "update", f"jobid={one['JobId']}", "StartTime=now"], capture_output=True
                    )
            return found if all(one["JobState"] in states for one in found) else None

        return until(reached)


def until(found: Callable[[], T | None]) -> T:
    """Wait for something and return it."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if (value := found()) is not None:
            return value
        time.sleep(0.05)
    raise AssertionError(f"did not come in {SECONDS:.0f} s")
