"""Wanda at 2:4 by streamprune and by llm-compressor, on the same model and the same tokens, in turns.

    python examples/benchmarks/bench_llmcompressor.py [DIR] [--rounds 3] [--samples 16] [--sequence-length 512]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` makes. llm-compressor gets a virtual
environment of its own under DIR/bench, made on the first run, which needs a package index (it wants an older
transformers). Both compute in float32,
and streamprune once more in its default dtype. Each job has a process of its own; seconds are from the first byte read
to the last written, without imports, and peak memory is the process's. Then the float32 masks are compared. A bit that
differs changes the inputs of every later block; so there are controls: llm-compressor's masks of the first round, which
may differ from those of the last; those where it sums the inputs' norms in float64, for what rounding alone turns; and
streamprune's where equal scores are decided as torch.topk does, whose order is not specified. Prints a table and one
line of JSON.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import streamprune
from streamprune.checkpoint.reader import open_checkpoint
from streamprune.model.arithmetic import name_of, resolve_arithmetic
from streamprune.pipeline.planning.job import versions
from streamprune.text.calibration import Calibration, calibration_tokens
from streamprune.text.documents import TEXT_COLUMN
from streamprune_kernels import kept_sums

REQUIREMENTS = ("llmcompressor", f"torch=={torch.__version__.partition('+')[0]}")
JOB = Path(__file__).with_name("llmcompressor_job.py")


def interpreter(folder: Path) -> Path:
    """Of an environment with llm-compressor, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (folder / "ready").touch()
    return python


def last_line(command: list[str]) -> dict[str, Any]:
    """Run a job and read the JSON that its standard output ends with."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip()[-2000:])
    text = done.stdout
    result: dict[str, Any] = json.loads(text if text.lstrip().startswith("{") else text.strip().splitlines()[-1])
    return result


def masks_compared(dense: Path, one: Path, other: Path) -> dict[str, float]:
    """Share of equal mask bits of all pruned layers, and of those of block 0; a kept zero cannot be told from a gap.

    "first unequal block" is the number of blocks where all are equal. Ends the program where anything but the layers of
    blocks was changed: then one of the two did more than the other.
    """
    ours, theirs, source = open_checkpoint(one), open_checkpoint(other), open_checkpoint(dense)
    same: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for name in sorted(source.tensors):
        a, b = (file.read([name])[name] for file in (ours, theirs))
        if not name.endswith("_proj.weight"):
            expected = source.read([name])[name]
            if not torch.equal(a, expected) or not torch.equal(b, expected):
                sys.exit(f"{name} is not the source's in {one} or {other}")
            continue
        a, b = a != 0, b != 0
        block = int(name.partition(".layers.")[2].partition(".")[0])
        same[block] += int((a == b).sum())
        total[block] += a.numel()
    first = min((block for block in total if same[block] < total[block]), default=len(total))
    return {"all": same.total() / total.total(), "block 0": same[0] / total[0], "first unequal block": first}


def select_as_topk(
    weight: torch.Tensor, factor: torch.Tensor, kept: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As streamprune_kernels.select_weights, but of equal scores those are kept that torch.topk leaves over."""
    scores = weight.to(torch.float32).abs() * factor
    groups = scores.view(len(scores), -1, group_size)
    dropped = torch.topk(groups, group_size - kept, dim=2, largest=False).indices
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(2, dropped, False).view_as(scores)
    return keep, kept_sums(scores, keep)


def compress_as_topk(model: Path, out: Path, text: Path, given: argparse.Namespace) -> None:
    """The float32 job of streamprune in this process, with ties decided by torch.topk."""
    with mock.patch("streamprune.pruning.group.select_weights", select_as_topk):
        streamprune.compress(
            model, out, calibration=str(text), samples=given.samples, sequence_length=given.sequence_length,
            seed=given.seed, metric="wanda", shuffle="none", refine=False, dtype="float32",
        )  # fmt: skip


def all_masks_compared(
    model: Path, text: Path, work: Path, reference: list[str], given: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """llm-compressor's masks with streamprune's and with each control's, by what they are compared with."""
    ties, control, dense = (work / f"wanda-{end}" for end in ("ties", "control", "dense"))
    for folder in (ties, control):
        shutil.rmtree(folder, ignore_errors=True)
    last_line([*reference, str(control), "float64"])
    compress_as_topk(model, ties, text, given)
    theirs, first = work / "wanda-llmcompressor", work / "wanda-llmcompressor-first"
    compared = {}
    for name, folder in {"streamprune": work / "wanda", "ties": ties}.items():
        shutil.rmtree(dense, ignore_errors=True)
        streamprune.export(folder, to="dense", out=dense)
        compared[name] = masks_compared(model, dense, theirs)
    compared["control"] = masks_compared(model, control, theirs)
    if first.exists():
        compared["first"] = masks_compared(model, first, theirs)
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration sequences")
    given = parser.parse_args()
    model, text = given.directory / "smollm2-135m", given.directory / "text" / "calibration.txt"
    work = given.directory / "bench"
    work.mkdir(exist_ok=True)
    python = interpreter(work / "llmcompressor")
    calibration = Calibration(str(text), TEXT_COLUMN, given.samples, given.sequence_length, given.seed)
    tokens = calibration_tokens(model, calibration)
    (work / "tokens.json").write_text(json.dumps(tokens.tolist()))
    ours, default, theirs, first = (
        work / f"wanda{end}" for end in ("", "-default", "-llmcompressor", "-llmcompressor-first")
    )
    amount = ["--samples", str(given.samples), "--sequence-length", str(given.sequence_length)]
    amount += ["--seed", str(given.seed)]
    method = ["--metric", "wanda", "--shuffle", "none", "--no-refine", "--calibration", str(text), *amount]
    compress = [sys.executable, "-m", "streamprune", "compress", str(model), "--json", "--quiet", *method]
    dtype = name_of(resolve_arithmetic("cpu", "auto", torch.bfloat16).dtype)
    reference = [str(python), str(JOB), str(model), str(work / "tokens.json")]
    jobs = {
        "streamprune": (ours, [*compress, "--out", str(ours), "--dtype", "float32"]),
        f"streamprune, default ({dtype})": (default, [*compress, "--out", str(default)]),
        "llm-compressor": (theirs, [*reference, str(theirs), "float32"]),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    shutil.rmtree(first, ignore_errors=True)
    for number in range(given.rounds):
        for name, (folder, command) in jobs.items():
            shutil.rmtree(folder, ignore_errors=True)
            found[name].append(last_line(command))
        if number == 0 and given.rounds > 1:
            theirs.rename(first)
    keys = ("seconds", "peak_memory_bytes")
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in keys} for name, runs in found.items()}
    unsaved = statistics.median(run["peak_before_saving_bytes"] for run in found["llm-compressor"])
    masks = all_masks_compared(model, text, work, reference, given)
    print(f"| {given.samples} x {given.sequence_length} tokens, {given.rounds} rounds | seconds | of llm-compressor's "
          "| peak MB | of llm-compressor's |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    other = medians["llm-compressor"]
    ratios = {name: {key: one[key] / other[key] for key in keys} for name, one in medians.items()}
    for name, one in medians.items():
        seconds, peak = one["seconds"], one["peak_memory_bytes"]
        print(f"| {name} | {seconds:.1f} | {ratios[name]['seconds']:.2f} | {peak / 1e6:.0f} "
              f"| {ratios[name]['peak_memory_bytes']:.2f} |")  # fmt: skip
    print(f"\nllm-compressor's peak before it saves its model: {unsaved / 1e6:.0f} MB")
    labels = {
        "streamprune": "streamprune's masks",
        "ties": "streamprune's with ties as topk has them",
        "control": "its own with norms in float64",
        "first": "its own of the first round",
    }
    for label, share in masks.items():
        print(f"llm-compressor's mask bits equal {labels[label]}: {share['all']:.3%} of all, {share['block 0']:.4%} "
              f"of block 0, first unequal block {share['first unequal block']}")  # fmt: skip
    print()
    about = {"ours": versions(), "theirs": found["llm-compressor"][0]["versions"]}
    print(
        json.dumps(
            {"versions": about, "medians": medians, "theirs_before_saving": unsaved, "ratios": ratios, "masks": masks}
        )
    )


if __name__ == "__main__":
    main()
