"""A small job under attack: the process that runs it with faults, and what must hold after each of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny

from streamprune.runtime.verify import verify

HERE = Path(__file__).parent
TIMINGS = "timings.json"


class Worker:
    """A process that runs jobs in forked children (worker.py); the library of faults.c, made in `folder`, preloaded."""

    def __init__(self, folder: Path | None = None) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="passive")
        if folder is not None:
            library = folder / "faults.so"
            command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(HERE / "faults.c")]
            subprocess.run([*command, "-ldl"], check=True)
            environment["LD_PRELOAD"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def start(self, job: dict[str, Any], **order: Any) -> None:
        """Begin a job; `ended` waits for its end."""
        self._send({"job": job, **order})

    def _send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def ended(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker itself has ended"
        return dict(json.loads(line))

    def run(self, job: dict[str, Any], **order: Any) -> dict[str, Any]:
        self.start(job, **order)
        return self.ended()

    def command(self, arguments: list[str], *, warm: bool = False, kill_after: float | None = None) -> dict[str, Any]:
        """Run the command line in a child, or in the worker itself, whose imports then are there for every child."""
        self._send({"warm": arguments} if warm else {"command": arguments, "kill_after": kill_after})
        return self.ended()


@dataclass
class Campaign:
    """What was done, and every promise that was broken, with the number of its attack."""

    name: str
    attacks: int = 0
    broken: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def shown(self, seconds: float) -> str:
        """One line, and one for each promise that was broken."""
        how = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        about = f"{self.attacks} attacks, {len(self.broken)} broken promises, {seconds:.0f} s"
        return "\n  ".join([f"{self.name}: {about}" + (f" ({how})" if how else ""), *self.broken])


@dataclass(frozen=True)
class Attacked:
    """A job, the bytes that it must end with, and how many operations and seconds it takes."""

    worker: Worker
    job: dict[str, Any]
    expected: dict[str, str]
    operations: int
    fillable: int
    renames: int
    seconds: float
    folder: Path

    def at(self, out: Path) -> dict[str, Any]:
        return {**self.job, "out": str(out)}

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """An output folder for one attack."""
        out = self.folder / "out"
        try:
            yield out
        finally:
            shutil.rmtree(out, ignore_errors=True)


CAN_FILL = ("write", "sync", "create")  # operations at which a disk can be full


def attack(worker: Worker, folder: Path, job: dict[str, Any]) -> Attacked:
    """Run a job without faults, three times: its bytes must be the same, and operations are counted by kind."""
    runs, bytes_of = [], []
    for number, kinds in enumerate(((), CAN_FILL, ("rename",))):
        out = folder / str(number)
        runs.append(worker.run({**job, "out": str(out)}, fault={"kinds": kinds}))
        bytes_of.append(tiny.digests(out))
    assert all(run["status"] == "finished" for run in runs), runs
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    counted = (run["operations"] for run in runs)
    return Attacked(worker, job, bytes_of[0], *counted, runs[-1]["seconds"], folder)


def finished_blocks(out: Path) -> dict[Path, tuple[int, int]]:
    """Shards of the blocks in the journal, each with what tells whether it was written again."""
    count = len(list(out.glob(".work/block-*.json")))
    names = [next(out.glob(f"streamprune-{index + 2:05d}-of-*"), None) for index in range(count)]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in names if path is not None}


def look(attacked: Attacked, out: Path) -> Iterator[str]:
    """What is wrong under final names after a fault: each must be absent or whole."""
    for name, digest in (tiny.digests(out) if out.exists() else {}).items():
        if name.startswith(".work"):
            continue
        if name not in attacked.expected:
            yield f"{name} is a stray file"
        elif digest != attacked.expected[name]:
            yield f"{name} is half written"


def go_on(attacked: Attacked, out: Path) -> Iterator[str]:
    """What is wrong with the same command after a fault: no block lost, the same bytes, nothing left behind."""
    before = finished_blocks(out)
    ended = attacked.worker.run(attacked.at(out))
    if ended["status"] not in ("finished", "already finished"):
        yield f"does not go on: {ended.get('message', ended['status'])}"
        return
    if again := sorted(set(range(len(before))) & set(ended["pruned"])):
        yield f"finished blocks {again} were done again"
    if rewritten := [path.name for path, was in before.items() if (path.stat().st_ino, path.stat().st_mtime_ns) != was]:
        yield f"{rewritten} were written again"
    if tiny.digests(out) != attacked.expected:
        yield "ends with other bytes"
    folders = {str(parent) for name in attacked.expected for parent in Path(name).parents}
    if stray := {str(path.relative_to(out)) for path in out.rglob("*")} - {*attacked.expected, *folders, TIMINGS}:
        yield f"leaves {sorted(stray)}"


def kill_at(attacked: Attacked, points: Iterable[int]) -> Campaign:
    """SIGKILL at chosen persistent operations, a write torn in half."""
    campaign = Campaign("SIGKILL at a persistent operation")
    for point in points:
        with attacked.fresh() as out:
            ended = attacked.worker.run(attacked.at(out), fault={"action": "kill", "at": point})
            campaign.count(ended["status"])
            _note(campaign, point, [*look(attacked, out), *go_on(attacked, out)])
    return campaign


def kill_sometime(attacked: Attacked, attacks: int, seed: int) -> Campaign:
    """SIGKILL after a random time; the job that goes on may be killed again."""
    campaign, draw = Campaign("SIGKILL at a random time"), random.Random(seed)
    while campaign.attacks < attacks:
        with attacked.fresh() as out:
            for _ in range(draw.randint(1, 3)):
                ended = attacked.worker.run(attacked.at(out), kill_after=draw.uniform(0, attacked.seconds))
                campaign.count(ended["status"])
                if ended["status"] == "killed":
                    _note(campaign, campaign.attacks, list(look(attacked, out)))
            _note(campaign, campaign.attacks, list(go_on(attacked, out)), attacks=0)
    return campaign


def full_at(attacked: Attacked, points: Iterable[int]) -> Campaign:
    """The disk is full from a chosen operation on, until the same command is given again."""
    campaign = Campaign("full disk")
    for point in points:
        with attacked.fresh() as out:
            fault = {"action": "full", "at": point, "kinds": CAN_FILL}
            ended = attacked.worker.run(attacked.at(out), fault=fault)
            campaign.count(ended["status"])
            broken = [*look(attacked, out)]
            if ended["status"] != "finished" and (ended["status"], ended.get("exit_code")) != ("refused", 5):
                broken.append(f"no error of the output's: {ended}")
            message = ended.get("message", "")
            if ended["status"] == "refused" and ("No space left" not in message or "\n" in message):
                broken.append(f"an unclear message: {message!r}")
            _note(campaign, point, [*broken, *go_on(attacked, out)])
    return campaign


def lose_power(attacked: Attacked, attacks: int, seed: int) -> Campaign:
    """Kill an unfinished job, then harm some of its files, synced or not: what a power loss leaves, and worse."""
    campaign, draw = Campaign("power loss"), random.Random(seed)
    while campaign.attacks < attacks:
        with attacked.fresh() as out:
            attacked.worker.run(attacked.at(out), fault={"action": "kill", "at": draw.randrange(attacked.operations)})
            if (out / tiny.MANIFEST_DIGEST).exists():
                continue  # finished: everything had been synced
            files = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith("holder-"))
            for path in draw.sample(files, min(len(files), draw.randint(1, 3))):
                campaign.count(_harm(path, draw))
            ended = attacked.worker.run(attacked.at(out))
            broken = [] if ended["status"] == "finished" else [f"does not go on: {ended}"]
            if tiny.digests(out) != attacked.expected:
                broken.append("ends with other bytes")
            _note(campaign, campaign.attacks, broken)
    return campaign


def wake_at(attacked: Attacked, successor: Worker, points: Iterable[int]) -> Campaign:
    """SIGSTOP exactly before a rename; another process takes over and finishes; SIGCONT: nothing may change."""
    campaign = Campaign("woken after it was taken over")
    for point in points:
        with attacked.fresh() as out:
            fault = {"action": "stop", "at": point, "kinds": ("rename",)}
            attacked.worker.start(attacked.at(out), fault=fault)
            stopped = _wait_until_stopped(attacked.worker)
            for holder in out.glob(".work*/epoch-*/holder-*.json"):
                os.utime(holder, (0, 0))
            broken = [*look(attacked, out)]
            taken = successor.run(attacked.at(out))
            if taken["status"] not in ("finished", "already finished"):
                broken.append(f"is not taken over: {taken}")
            before = _seen(out)
            os.kill(stopped, signal.SIGCONT)
            ended = attacked.worker.ended()
            campaign.count(ended["status"])
            if _seen(out) != before:
                broken.append(f"changes {sorted(set(_seen(out).items()) ^ set(before.items()))}")
            if ended["status"] == "broken" or "\n" in ended.get("message", ""):
                broken.append(f"ends unclearly: {ended}")
            if tiny.digests(out) != attacked.expected:
                broken.append("ends with other bytes")
            _note(campaign, point, broken)
    return campaign


def _wait_until_stopped(worker: Worker) -> int:
    """The forked child's number, once it has stopped itself."""
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in children.read_text().split():
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return int(child)
        time.sleep(0.01)
    raise TimeoutError("the child did not stop")


def _seen(out: Path) -> dict[str, tuple[int, int, str]]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, tiny.sha256(path)) for path in files}


def flip_bits(out: Path, flips: int, seed: int) -> Campaign:
    """One bit of one file of a finished output at a time: verify must name the file, or the layer that lies there."""
    campaign, draw = Campaign("one bit flipped"), random.Random(seed)
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != TIMINGS)
    for number in range(flips):
        path = draw.choice(files)
        content = path.read_bytes()
        position = draw.randrange(8 * len(content))
        tiny.flip_byte(path, position // 8, 1 << position % 8)
        found = verify(out)
        path.write_bytes(content)
        campaign.count(path.name)
        broken = ["is not found"] if found.ok else []
        if not found.ok and not any(path.name in fault for fault in found.faults):
            broken.append(f"{path.name} is not named: {found.faults}")
        _note(campaign, number, [f"bit {position} of {path.name} {what}" for what in broken])
    return campaign


def _harm(path: Path, draw: random.Random) -> str:
    kind = draw.choice(["truncated", "zeroed", "flipped", "dropped"])
    size = path.stat().st_size
    if kind == "truncated":
        os.truncate(path, draw.randint(0, size))
    elif kind == "zeroed":
        path.write_bytes(bytes(size))
    elif kind == "flipped" and size:
        tiny.flip_byte(path, draw.randrange(size), 1 << draw.randrange(8))
    elif kind == "dropped":
        path.unlink()
    return kind


def _note(campaign: Campaign, number: int, broken: list[str], attacks: int = 1) -> None:
    campaign.attacks += attacks
    campaign.broken += [f"{campaign.name} {number}: {what}" for what in broken]
