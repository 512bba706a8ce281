"""What each method and each step of ours costs in perplexity: the tables of docs/benchmarks.md.

    python examples/benchmarks/bench_quality.py [DIR] [--part full] [--rows wanda] [--hours 4] [--print]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` and `python examples/small_opt.py DIR`
make. The parts:

    full         every row once: seed 0, 32 x 512 tokens of web text, 2:4, SmolLM2-135M and the small OPT
    claims       the rows that claims rest on: the same text, three seeds, 2:4 and 4:8, SmolLM2-135M
    second-text  the same rows at 2:4, calibrated on encyclopedia text, one seed
    sweep        the open choices of the esparse metric, without shuffle and refinement, both models, as in full

Perplexity is on web.txt and on wiki-held-out.txt, at most 10,240 tokens of each in windows of 1,024; calibration never
saw either. Each row runs in processes of its own and is appended to the results file (DIR/quality.jsonl); one that is
there is not run again, so the same command goes on where it was interrupted; after a change of the code or its
defaults begin a new file. No row is started after --hours. At the end, and alone with --print, the tables of all
results so far are printed as a section for the log.
"""

import argparse
import datetime
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sweep import DENSE, Conditions, Row, read_results, run_row, table

PLAIN = "--shuffle none --no-refine"
REFERENCE = "wanda"
SMOLLM2, SMALL_OPT = "smollm2-135m", "small-opt"

WANDA = Row(REFERENCE, f"--metric wanda {PLAIN}")
SPARSEGPT = Row("sparsegpt (changes kept weights)", "sparsegpt")
RIA_ACROSS_HEADS = Row("ria + assignment", "--metric ria --shuffle assignment --no-refine --fold across-heads")
RIA_HEADS = Row("ria + assignment, inside heads", "--metric ria --shuffle assignment --no-refine")
ESPARSE = Row("esparse", f"--metric esparse {PLAIN}")
DEFAULT = Row("default", "")
RECONSTRUCT = Row("default + reconstruct (changes kept weights)", "--reconstruct")


def shuffled(shuffle: str) -> Row:
    return Row(f"esparse + {shuffle}", f"--metric esparse --shuffle {shuffle} --no-refine")


PAPER = Row("paper: the same as esparse + global+local", shuffled("global+local").options)
FULL = (
    Row(DENSE, DENSE),
    Row("magnitude", f"--metric magnitude {PLAIN}"),
    WANDA,
    Row("ria", f"--metric ria {PLAIN}"),
    RIA_ACROSS_HEADS,
    RIA_HEADS,
    SPARSEGPT,
    ESPARSE,
    *map(shuffled, ("stride", "global", "local", "global+local")),
    PAPER,
    *map(shuffled, ("assignment", "global+assignment", "residual+assignment")),
    Row("esparse + assignment, across heads", f"{shuffled('assignment').options} --fold across-heads"),
    Row("wanda + refine", "--metric wanda --shuffle none --correction 0"),
    Row("esparse + assignment + refine", "--metric esparse --shuffle assignment --correction 0"),
    DEFAULT,
    RECONSTRUCT,
)
CLAIMS = (
    Row(DENSE, DENSE),
    WANDA,
    RIA_HEADS,
    shuffled("global+local"),
    DEFAULT,
    SPARSEGPT,
    RECONSTRUCT,
)


def esparse(name: str, options: str) -> Row:
    return Row(f"esparse, {name}", f"{ESPARSE.options} {options}")


SWEEP = (
    WANDA,
    *(esparse(f"l2, alpha {alpha}", f"--alpha {alpha}") for alpha in ("0", "0.1")),
    Row("esparse, l2, alpha 1, 100 bins", ESPARSE.options),
    esparse("l2, alpha 10", "--alpha 10"),
    *(esparse(f"rms, alpha {alpha}", f"--amplitude rms --alpha {alpha}") for alpha in (1, 16)),
    esparse("wanda's norm, alpha 1", "--amplitude wanda --alpha 1"),
    *(esparse(f"l2, alpha 1, {bins} bins", f"--entropy-bins {bins}") for bins in (32, 256)),
    esparse("l2, alpha 1, bins over the layer", "--entropy-range layer"),
    *(esparse(f"relative, alpha {alpha}", f"--relative --alpha {alpha}") for alpha in ("0.25", "1", "4")),
)


@dataclass(frozen=True)
class Table:
    """One table: its part, its title, what its rows share, and its rows."""

    part: str
    title: str
    conditions: Conditions
    rows: tuple[Row, ...]
    pattern: str = "2:4"
    seeds: tuple[int, ...] = (0,)


def tables(directory: Path, tiny: bool) -> list[Table]:
    """All tables, in the order in which they are run."""
    text = directory / "text"

    def conditions(model: str, calibration: str) -> Conditions:
        texts = (text / "web.txt", text / "wiki-held-out.txt")
        if tiny:
            return Conditions(directory / model, text / calibration, texts, 2, 64, 128, 256)
        return Conditions(directory / model, text / calibration, texts, 32, 512, eval_tokens=10240)

    models = {model: conditions(model, "calibration.txt") for model in (SMOLLM2, SMALL_OPT)}
    first = models[SMOLLM2]
    second = conditions(SMOLLM2, "wiki-calibration.txt")
    two = (Row(DENSE, DENSE), WANDA, DEFAULT)
    return [
        Table("claims", f"{SMOLLM2}, 2:4, three seeds", first, CLAIMS, seeds=(0, 1, 2)),
        Table("claims", f"{SMOLLM2}, 4:8, three seeds", first, two, pattern="4:8", seeds=(0, 1, 2)),
        Table("second-text", f"{SMOLLM2}, 2:4, calibrated on encyclopedia text", second, CLAIMS),
        *(Table("full", f"{model}, 2:4", shared, FULL) for model, shared in models.items()),
        *(Table("sweep", f"{model}, 2:4, the metric's choices", shared, SWEEP) for model, shared in models.items()),
    ]


def run(chosen: Sequence[Table], names: Sequence[str], results: Path, deadline: float) -> bool:
    """Run what is missing of the rows that `names` ask for; False where one failed or time was up."""
    ok = True
    for entry in chosen:
        rows = [row for row in entry.rows if not names or any(name in row.name for name in names)]
        for seed in entry.seeds:
            for row in rows:
                if time.monotonic() > deadline:
                    print("time is up: the same command goes on with the rows that are missing", file=sys.stderr)
                    return False
                ok = run_row(entry.conditions, row, entry.pattern, seed, results) and ok
    return ok


def section(chosen: Sequence[Table], results: Path) -> str:
    """The results so far in the form of docs/benchmarks.md's log: one dated entry with all tables."""
    records = read_results(results)
    dates = sorted(record["date"][:10] for record in records) or [str(datetime.date.today())]
    versions = ", ".join(sorted({record["streamprune"] for record in records}))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = importlib.metadata.version("torch")
    lines = [
        f"### {dates[-1]}: perplexity of every method",
        "",
        f"{os.cpu_count()} cores, {memory:.0f} GB; torch {torch}; streamprune {versions}.",
        "",
        "    $ make bench-quality",
    ]
    for entry in chosen:
        rows = table(entry.conditions, entry.rows, (entry.pattern,), entry.seeds, results, REFERENCE)
        if rows.count("\n") > 1:
            lines += ["", f"{entry.title}; {amounts(entry.conditions)}:", "", rows]
    return "\n".join(lines)


def amounts(shared: Conditions) -> str:
    """How much text a table's rows used."""
    calibration = f"{shared.samples} x {shared.sequence_length} tokens of {shared.calibration.name}"
    return f"{calibration}, at most {shared.eval_tokens} tokens of each text in windows of {shared.eval_length}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--part", choices=("full", "claims", "second-text", "sweep", "all"), default="all")
    parser.add_argument("--rows", action="append", help="run only rows whose name has this in it; several allowed")
    parser.add_argument("--results", type=Path, help="default: quality.jsonl in the directory")
    parser.add_argument("--hours", type=float, default=4.0, help="start no row after this many hours (default: 4)")
    parser.add_argument("--print", action="store_true", help="run nothing, print the tables of the results so far")
    parser.add_argument("--tiny", action="store_true", help="2 x 64 tokens, two windows: only to see that it runs")
    given = parser.parse_args()
    results = given.results or given.directory / "quality.jsonl"
    chosen = [entry for entry in tables(given.directory, given.tiny) if given.part in (entry.part, "all")]

    ok = True
    if not given.print:
        shared = [entry.conditions for entry in chosen]
        needed = {path for one in shared for path in (one.model, one.calibration, *one.texts)}
        if missing := sorted(str(path) for path in needed if not path.exists()):
            sys.exit(f"missing: {', '.join(missing)}; run examples/real_inputs.py and examples/small_opt.py first")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running row's folder is deleted
        ok = run(chosen, given.rows or (), results, time.monotonic() + 3600 * given.hours)
    print(section(chosen, results))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
