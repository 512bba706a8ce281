"""Run several settings of `streamprune compress` on one model and print one table of perplexities.

    python examples/sweep.py MODEL --calibration CALIBRATION.txt --text A.txt --text B.txt --samples 32
        --sequence-length 512 --results results.jsonl "dense: dense" "wanda: --metric wanda --shuffle none --no-refine"
        "default:"

Each row is "NAME: OPTIONS", the options being those of `compress`; `dense` in their place only evaluates the model, and
`sparsegpt` prunes it with examples/benchmarks/sparsegpt.py. A row is run once for each --pattern and --seed, one after
the other, each in processes of its own; its output is deleted when it is evaluated. What it gave is appended to the
results file as one line of JSON, and a row whose line is there already is not run again: an interrupted sweep goes on
when the same command is run again. After a change of the code or its defaults begin a new results file. A row that
fails is reported with what it wrote, and the others still run; the exit code is then 1.

The table compares each row with the first that is not dense, at the same pattern and over the seeds that both have.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPARSEGPT = Path(__file__).resolve().parent / "benchmarks" / "sparsegpt.py"
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A name for the table and the options of `compress`, or `dense` or `sparsegpt` in their place."""

    name: str
    options: str

    @classmethod
    def parse(cls, text: str) -> "Row":
        """Read "NAME: OPTIONS". Raises argparse's error for anything else."""
        name, colon, options = text.partition(":")
        if not (name.strip() and colon):
            raise argparse.ArgumentTypeError(f'{text!r} is not "NAME: OPTIONS"')
        return cls(name.strip(), shlex.join(shlex.split(options)))


@dataclass(frozen=True)
class Conditions:
    """What all rows of a table have in common: the model, the texts, and how much of them is used."""

    model: Path
    calibration: Path
    texts: tuple[Path, ...]
    samples: int = 32
    sequence_length: int = 512
    eval_length: int = 1024
    eval_tokens: int = 20480

    def key(self, row: Row, pattern: str, seed: int) -> dict[str, Any]:
        """What decides a row's figures; a dense row's are decided by the model and the evaluation alone."""
        pruned = {
            "pattern": pattern,
            "seed": seed,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "calibration": self.calibration.name,
        }
        return {
            "model": self.model.name,
            "options": row.options,
            **(dict.fromkeys(pruned) if row.options == DENSE else pruned),
            "texts": [text.name for text in self.texts],
            "eval_length": self.eval_length,
            "eval_tokens": self.eval_tokens,
        }


class Failure(Exception):
    """A command of a row that did not end with 0; its text is what the command wrote to standard error."""


def figures_of(*arguments: str) -> dict[str, Any]:
    """The JSON object that a Python command prints. Raises Failure."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"exit code {done.returncode} from {shlex.join(arguments)}\n{done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def prune(conditions: Conditions, row: Row, pattern: str, seed: int, out: Path) -> dict[str, Any]:
    """Prune into `out`; return seconds, peak memory, the stages' seconds and the settings as they were resolved."""
    options = [
        *("--calibration", str(conditions.calibration), "--samples", str(conditions.samples)),
        *("--sequence-length", str(conditions.sequence_length), "--seed", str(seed), "--pattern", pattern),
    ]
    if row.options == "sparsegpt":
        job = figures_of(str(SPARSEGPT), str(conditions.model), str(out), *options)
        stages, settings = None, None
    else:
        arguments = ["-m", "streamprune", "compress", str(conditions.model), "--out", str(out), *options]
        job = figures_of(*arguments, *shlex.split(row.options), "--json", "--quiet")
        stages = json.loads((out / "timings.json").read_text())["stages"]
        settings = json.loads((out / "streamprune_manifest.json").read_text())["identity"]["settings"]
    return {
        "seconds": job["seconds"],
        "stages": stages,
        "peak_memory_bytes": job["peak_memory_bytes"],
        "settings": settings,
    }


def measure(conditions: Conditions, row: Row, pattern: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Prune and evaluate one row; return its whole record. Nothing stays in `scratch`."""
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=scratch) as folder:
        model, record = conditions.model, {}
        if row.options != DENSE:
            model = Path(folder) / "pruned"
            record = prune(conditions, row, pattern, seed, model)
        perplexity = {}
        for text in conditions.texts:
            window = ("--sequence-length", str(conditions.eval_length), "--max-tokens", str(conditions.eval_tokens))
            arguments = ("-m", "streamprune", "evaluate", str(model), "--text", str(text), *window)
            perplexity[text.name] = figures_of(*arguments, "--json", "--quiet")["perplexity"]
    return {
        "row": row.name,
        "key": conditions.key(row, pattern, seed),
        "perplexity": perplexity,
        **record,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "streamprune": importlib.metadata.version("streamprune"),
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a results file, oldest first; a last line that was cut off is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(dict(json.loads(line)))
    return records


def append_result(path: Path, record: dict[str, Any]) -> None:
    """Add one line and wait until the disk has it."""
    with path.open("a+b") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):  # a line that was cut off stays one line
            file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def find(records: Iterable[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    """The latest record of a key."""
    return next((record for record in reversed(list(records)) if record["key"] == key), None)


def run_row(conditions: Conditions, row: Row, pattern: str, seed: int, results: Path) -> bool:
    """Run one row unless its result is there; False where it failed."""
    if find(read_results(results), conditions.key(row, pattern, seed)):
        return True
    label = f"{conditions.model.name}: {row.name}" + ("" if row.options == DENSE else f", {pattern}, seed {seed}")
    print(f"{datetime.datetime.now():%H:%M:%S} {label}", file=sys.stderr, flush=True)
    try:
        append_result(results, measure(conditions, row, pattern, seed, results.absolute().parent))
    except Failure as failure:
        print(f"FAILED {label}: {failure}", file=sys.stderr, flush=True)
        return False
    return True


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(math.fsum(logs := [math.log(value) for value in values]) / len(logs))


def table(
    conditions: Conditions,
    rows: Sequence[Row],
    patterns: Sequence[str],
    seeds: Sequence[int],
    results: Path,
    reference: str | None = None,
) -> str:
    """A markdown table of the results so far. A row that has none is missing.

    Perplexities of a text are geometric means over seeds. `mean` is over texts and seeds, in brackets its range over
    seeds. The ratio is to the row named `reference` (default: the first that is not dense) at the same pattern, over
    the seeds that both have.
    """
    records = read_results(results)
    pruned = [row for row in rows if row.options != DENSE]
    reference = reference or next((row.name for row in pruned), DENSE)

    def done(row: Row, pattern: str) -> dict[int, dict[str, Any]]:
        found = {seed: find(records, conditions.key(row, pattern, seed)) for seed in seeds}
        return {seed: record for seed, record in found.items() if record}

    titles = [text.stem for text in conditions.texts]
    lines = [
        f"| row | pattern | {' | '.join(titles)} | mean | to {reference} | seeds | seconds | peak MB |",
        f"|{' --- |' * (len(titles) + 7)}",
    ]
    for row in rows:
        if row.options == DENSE and (dense := done(row, patterns[0])):
            cells = _perplexities(conditions.texts, {0: next(iter(dense.values()))})
            lines.append(_line(row.name, "", *cells, "", "", "", ""))
    for pattern in patterns:
        base = next((means(done(row, pattern)) for row in pruned if row.name == reference), {})
        for row in pruned:
            if here := done(row, pattern):
                lines.append(_line(row.name, pattern, *_perplexities(conditions.texts, here), *_costs(here, base)))
    return "\n".join(lines)


def means(done: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Geometric mean over the texts, by seed."""
    return {seed: geometric_mean(record["perplexity"].values()) for seed, record in done.items()}


def _perplexities(texts: Sequence[Path], done: dict[int, dict[str, Any]]) -> list[str]:
    """Cells: each text's perplexity, then the mean over texts and seeds."""
    by_text = [geometric_mean(record["perplexity"][text.name] for record in done.values()) for text in texts]
    by_seed = means(done).values()
    spread = f" ({min(by_seed):.2f} to {max(by_seed):.2f})" if len(done) > 1 else ""
    return [*(f"{value:.2f}" for value in by_text), f"{geometric_mean(by_seed):.2f}{spread}"]


def _costs(done: dict[int, dict[str, Any]], base: dict[int, float]) -> list[str]:
    """Cells: the ratio to `base`, the number of seeds, mean seconds, largest peak."""
    ratios = [mean / base[seed] for seed, mean in means(done).items() if seed in base]
    seconds = math.fsum(record["seconds"] for record in done.values()) / len(done)
    peak = max(record["peak_memory_bytes"] for record in done.values())
    ratio = f"{geometric_mean(ratios):.3f}" if ratios else ""
    return [ratio, str(len(done)), f"{seconds:.0f}", f"{peak / 1e6:.0f}"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Row.parse, nargs="+", metavar='"NAME: OPTIONS"')
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True, help="to evaluate on; several allowed")
    parser.add_argument("--pattern", action="append", help="several allowed (default: 2:4)")
    parser.add_argument("--seed", type=int, action="append", help="several allowed (default: 0)")
    parser.add_argument("--samples", type=int, default=Conditions.samples)
    parser.add_argument("--sequence-length", type=int, default=Conditions.sequence_length)
    parser.add_argument("--eval-length", type=int, default=Conditions.eval_length)
    parser.add_argument("--eval-tokens", type=int, default=Conditions.eval_tokens)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    conditions = Conditions(
        model=given.model,
        calibration=given.calibration,
        texts=tuple(given.text),
        samples=given.samples,
        sequence_length=given.sequence_length,
        eval_length=given.eval_length,
        eval_tokens=given.eval_tokens,
    )
    patterns, seeds = given.pattern or ["2:4"], given.seed or [0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running row's folder is deleted
    jobs = [(row, pattern, seed) for pattern in patterns for seed in seeds for row in given.rows]
    ok = [run_row(conditions, row, pattern, seed, given.results) for row, pattern, seed in jobs]
    print(table(conditions, given.rows, patterns, seeds, given.results))
    return 0 if all(ok) else 1


if __name__ == "__main__":
    raise SystemExit(main())
