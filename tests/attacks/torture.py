"""All of the reliability campaigns, on a small job: `make torture` (about twenty minutes on two cores).

    python tests/attacks/torture.py [--json]

Kills at every persistent operation and at 200 random times, a full disk at every operation that needs room, power
losses, writers woken after they were taken over, 1,000 flipped bits, 50 intact outputs, and the catalogue of malformed
inputs. Prints one line a campaign; exits with 1 where a promise of docs/reliability.md was broken.
"""

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from attacks.attacked import (
    Attacked,
    Campaign,
    Worker,
    attack,
    flip_bits,
    full_at,
    kill_at,
    kill_sometime,
    lose_power,
    wake_at,
)
from attacks.malformed import CATALOGUE, feed_all
from streamprune.runtime.verify import verify

INTACT_RUNS = 50


def intact(attacked: Attacked) -> Campaign:
    """Outputs that nothing happened to: verify must find nothing."""
    campaign = Campaign("intact")
    for number in range(INTACT_RUNS):
        with attacked.fresh() as out:
            attacked.worker.run({**attacked.at(out), "seed": number})
            found = verify(out, source=attacked.job["model"])
            campaign.attacks += 1
            campaign.broken += [f"intact run {number}: {fault}" for fault in found.faults]
    return campaign


def campaigns(attacked: Attacked, successor: Worker) -> list[Callable[[], Campaign]]:
    return [
        lambda: kill_at(attacked, range(attacked.operations)),
        lambda: kill_sometime(attacked, 200, seed=0),
        lambda: full_at(attacked, range(attacked.fillable)),
        lambda: lose_power(attacked, 200, seed=0),
        lambda: wake_at(attacked, successor, range(attacked.renames)),
        lambda: flip_bits(attacked.folder / "0", 1000, seed=0),
        lambda: intact(attacked),
        *(functools.partial(malformed, attacked.folder / "malformed", kind) for kind in CATALOGUE),
    ]


def malformed(folder: Path, kind: str) -> Campaign:
    """All malformed inputs of a kind."""
    worker = Worker()
    try:
        folder.mkdir()
        return feed_all(worker, folder, kind)
    finally:
        worker.close()
        shutil.rmtree(folder)


def show(campaign: Campaign, seconds: float, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**vars(campaign), "seconds": seconds}), flush=True)
        return
    print(campaign.shown(seconds), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Attack a small job in every way that docs/reliability.md names.")
    parser.add_argument("--json", action="store_true", help="one JSON object a campaign")
    arguments = parser.parse_args()
    if shutil.which("gcc") is None:
        sys.exit("torture: faults.c needs gcc; install a C compiler")
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        source, text = tiny.write_beside(tiny.write_opt(folder / "opt")), folder / "text.txt"
        text.write_text(tiny.text(20_000, seed=1))
        (folder / "successor").mkdir()
        worker, successor = Worker(folder), Worker(folder / "successor")
        job = {"model": str(source), "calibration": str(text), "samples": 2, "sequence_length": 48}
        attacked = attack(worker, folder, job)
        broken = 0
        for run in campaigns(attacked, successor):
            start = time.perf_counter()
            campaign = run()
            broken += len(campaign.broken)
            show(campaign, time.perf_counter() - start, arguments.json)
        for each in (worker, successor):
            each.close()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
