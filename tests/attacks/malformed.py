"""The catalogue of malformed inputs, fed to the command line one by one, and what must hold of each.

    python tests/attacks/malformed.py [WORD ...]

Every input must end with one line on standard error and its exit code, within two seconds and 100 MB above what the
imports take, and nothing may be written. Prints one line a kind, and every promise that was broken; with words, only
inputs whose names hold one of them, and what each of them ended with.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import families
import tiny

from attacks import (
    malformed_bins,
    malformed_configs,
    malformed_experts,
    malformed_outputs,
    malformed_texts,
    malformed_weights,
)
from attacks.attacked import Campaign, Worker
from attacks.catalogue import Malformed
from streamprune.pipeline.compress import compress

MAX_SECONDS = 2.0
MAX_BYTES = 100_000_000
ATTEMPTS = 3  # where one took too long: the machine may be busy
AMOUNT = ["--sequence-length", "48", "--dtype", "float32", "--quiet"]

CATALOGUE: dict[str, tuple[Malformed, ...]] = {
    "weights": (*malformed_weights.CATALOGUE, *malformed_bins.CATALOGUE),
    "configs": tuple(malformed_configs.CATALOGUE),
    "experts": tuple(malformed_experts.CATALOGUE),
    "texts and tokenizers": tuple(malformed_texts.CATALOGUE),
    "outputs": tuple(malformed_outputs.CATALOGUE),
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: what the worker says of it, and which files it made, changed or removed."""

    exit_code: int | None
    stdout: str
    stderr: str
    memory_bytes: int
    seconds: float
    touched: tuple[str, ...]


class Materials:
    """The valid inputs that malformed ones are made from, each made on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text.txt").write_text(tiny.text(3000, seed=1))

    def base(self, name: str) -> Path:
        path = self.folder / name
        if path.exists():
            return path
        if name in families.FAMILIES and name not in ("llama", "opt"):
            return families.write_family(path, name)
        if name == "packed":
            settings: dict[str, Any] = {**tiny.CALIBRATION, "samples": 2}
            compress(self.base("llama"), path, calibration=str(self.folder / "text.txt"), **settings)
            return path
        makers: dict[str, Callable[[], Path]] = {
            "llama": lambda: tiny.write_llama(path),
            "llama-sharded": lambda: tiny.write_as_safetensors_shards(self.base("llama"), path),
            "opt": lambda: tiny.write_opt(path),
            "opt-bin": lambda: tiny.write_as_bin_shards(self.base("opt"), path),
        }
        return makers[name]()

    def place(self, entry: Malformed, case: Path) -> list[str]:
        """Make the malformed input in a new folder; returns the command's arguments."""
        case.mkdir()
        shutil.copytree(self.base(entry.base), case / "model")
        shutil.copyfile(self.folder / "text.txt", case / "text.txt")
        entry.make(case)
        llama, model, out, text = (
            str(self.base("llama")),
            str(case / "model"),
            str(case / "out"),
            str(case / entry.text),
        )
        return {
            "plan": ["plan", model],
            "compress": ["compress", model, "--out", out, "--calibration", text, "--samples", "2", *AMOUNT],
            "again": ["compress", llama, "--out", model, "--calibration", text, "--samples", "2", *AMOUNT],
            "evaluate": ["evaluate", model, "--text", text, "--max-tokens", "96", *AMOUNT],
            "verify": ["verify", model, "--quiet"],
            "verify --source": ["verify", model, "--quiet", "--source", llama],
            "inspect": ["inspect", model],
            "export": ["export", model, "--out", out, "--quiet"],
        }[entry.command]


def seen(case: Path) -> dict[str, tuple[int, int, int]]:
    """Every path of a folder with what tells whether it was written to."""
    stats = {str(path.relative_to(case)): path.lstat() for path in case.rglob("*")}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def feed(worker: Worker, materials: Materials, entry: Malformed, folder: Path) -> Outcome:
    """Run an entry's command on its input; where that took too long, again, and the shortest counts."""
    outcomes: list[Outcome] = []
    while not outcomes or (entry.code and len(outcomes) < ATTEMPTS and outcomes[-1].seconds > MAX_SECONDS):
        case = folder / "case"
        try:
            arguments = materials.place(entry, case)
            before = seen(case)
            ended = worker.command(arguments, kill_after=10 * MAX_SECONDS)
            after = seen(case)
        finally:
            shutil.rmtree(case, ignore_errors=True)
        touched = sorted({name for name, _ in before.items() ^ after.items()})
        printed = ended.get("stdout", ""), ended.get("stderr", "")
        code = ended.get("exit_code")
        outcomes.append(Outcome(code, *printed, ended.get("memory_bytes", 0), ended["seconds"], tuple(touched)))
    return min(outcomes, key=lambda outcome: outcome.seconds)


def broken(entry: Malformed, outcome: Outcome) -> list[str]:
    """The promises that did not hold."""
    wrong = []
    if outcome.exit_code != entry.code:
        wrong.append(f"exit code {outcome.exit_code}, not {entry.code}: {outcome.stderr or outcome.stdout}")
    lines = outcome.stderr.splitlines()
    if entry.code and not entry.is_verified:
        if len(lines) != 1 or not lines[0].startswith("streamprune: "):
            wrong.append(f"{len(lines)} lines on standard error: {outcome.stderr}")
        if outcome.stdout:
            wrong.append(f"something on standard output: {outcome.stdout}")
    elif lines:
        wrong.append(f"something on standard error: {outcome.stderr}")
    said = outcome.stdout if entry.is_verified else outcome.stderr
    if entry.code and entry.message not in said:
        wrong.append(f"not said: {entry.message!r}, but: {said}")
    if "Traceback" in outcome.stderr or "unexpected" in outcome.stderr:
        wrong.append(f"unforeseen: {outcome.stderr}")
    if not all(line.isprintable() for line in (*lines, *outcome.stdout.splitlines())):
        wrong.append(f"what no terminal should get: {said!r}")
    if written := [name for name in outcome.touched if not entry.may_write(name)]:
        wrong.append(f"wrote {written}")
    if entry.code and outcome.seconds > MAX_SECONDS:
        wrong.append(f"took {outcome.seconds:.1f} s")
    if entry.code and outcome.memory_bytes > MAX_BYTES:
        wrong.append(f"took {outcome.memory_bytes / 1e6:.0f} MB")
    return [f"{entry.name}: {what}" for what in wrong]


def warm(worker: Worker, materials: Materials) -> None:
    """Let the worker import what the commands import."""
    model, packed, text = (
        str(materials.base("llama")),
        str(materials.base("packed")),
        str(materials.folder / "text.txt"),
    )
    for arguments in (
        ["plan", model],
        ["evaluate", packed, "--text", text, "--max-tokens", "96", *AMOUNT],
        ["inspect", packed],
    ):
        assert worker.command(arguments, warm=True)["exit_code"] == 0


def feed_all(
    worker: Worker, folder: Path, kind: str, note: Callable[[Malformed, Outcome], object] = lambda entry, outcome: None
) -> Campaign:
    """All inputs of a kind."""
    campaign, materials = Campaign(f"malformed {kind}"), Materials(folder)
    warm(worker, materials)
    seconds = most_bytes = 0.0
    for entry in CATALOGUE[kind]:
        outcome = feed(worker, materials, entry, folder)
        note(entry, outcome)
        campaign.attacks += 1
        campaign.broken += broken(entry, outcome)
        campaign.count(f"exit code {entry.code}")
        if entry.code:
            seconds, most_bytes = max(seconds, outcome.seconds), max(most_bytes, outcome.memory_bytes)
    campaign.counts.update({"ms at most": round(1000 * seconds), "MB at most": round(most_bytes / 1e6)})
    return campaign


def main(words: Iterable[str]) -> int:
    failed = 0
    worker = Worker()
    with tempfile.TemporaryDirectory(prefix="malformed-") as name:
        materials = Materials(Path(name))
        warm(worker, materials)
        for kind, entries in CATALOGUE.items():
            if not words:
                start = time.perf_counter()
                campaign = feed_all(worker, Path(name), kind)
                print(campaign.shown(time.perf_counter() - start), flush=True)
                failed += len(campaign.broken)
            for entry in (entry for entry in entries if any(word in entry.name for word in words)):
                outcome = feed(worker, materials, entry, Path(name))
                print(entry.name, outcome, *broken(entry, outcome), sep="\n  ", flush=True)
    worker.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
