"""What compress costs beside the least it could cost: time, memory, reading.

    python examples/benchmarks/bench_compress.py [DIR] [--part ratio] [--rounds 3] [--plot docs/benchmarks.png]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` makes; checkpoints of random weights are
made under DIR/bench and kept. The parts:

    ratio    compress of SmolLM2-135M on 32 x 1024 tokens in --dtype, over two forward passes of transformers' own dense
             model, in memory, on the same tokens, a sequence at a time, without the head; with each stage's share
    depth    peak memory at 6, 12, 24 and 48 blocks of LLaMA-160M's shape, 8 x 256 tokens
    tokens   peak memory and seconds at 8, 32 and 128 x 256 tokens, 6 blocks of that shape
    experts  peak memory and seconds of a block of DeepSeek-V3's shape with 8 and 32 experts, 4 x 512 tokens, and of
             Mixtral's with 8, 16 x 512, without refinement and shuffle, over two forward passes of the same block
             (7 GB are written)
    read     the reader's bytes a second, and those of a whole job that runs no text through the model, over a plain
             sequential read's of the same files, all evicted from the page cache before; and what bounds each stage

What is compared takes turns, so that a busy machine slows all of it; figures are medians over --rounds. Every job is a
process of its own, but for `ratio`'s, whose imports are not counted on either side. Prints a table for each part, then
all figures as one line of JSON; --plot draws them.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM

import streamprune
from make_checkpoint import make_checkpoint
from streamprune.checkpoint.reader import open_checkpoint
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.blocks import RunnableBlock, load_block
from streamprune.model.source import open_dense
from streamprune.model.streaming import advance, embed, text_inputs
from streamprune.text.calibration import Calibration, calibration_tokens

RATIO_TOKENS = 32, 1024
METHODS: dict[str, dict[str, Any]] = {
    "global": {"shuffle": "global", "refine": False},
    "global+local": {"shuffle": "global+local", "refine": False},
    "wanda": {"metric": "wanda", "shuffle": "none", "refine": False},
    "default": {},
}
SHAPE = "llama-160m"
DEPTHS = (6, 12, 24, 48)
SAMPLES = (8, 32, 128)
LENGTH = 256
EXPERT_CASES = (("deepseek-v3", 8, 4), ("deepseek-v3", 32, 4), ("mixtral-8x7b", 8, 16))
EXPERT_LENGTH = 512
CHUNK_BYTES = 1 << 24

Rounds = dict[str, list[float]]


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(
    directory: Path, rounds: int, dtype: str = "float32", methods: Sequence[str] = tuple(METHODS)
) -> dict[str, Any]:
    """Seconds of each method and of two forward passes, and each stage's share of a method's."""
    model, text = directory / "smollm2-135m", directory / "text" / "calibration.txt"
    samples, length = RATIO_TOKENS
    tokens = calibration_tokens(model, Calibration(str(text), samples=samples, sequence_length=length))
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    amount: dict[str, Any] = {"calibration": str(text), "samples": samples, "sequence_length": length, "device": "cpu",
                              "dtype": dtype, "micro_batch": 1}  # fmt: skip

    @torch.inference_mode()
    def forward(passes: int) -> None:
        for _ in range(passes):
            for sequence in tokens:
                dense.model(input_ids=sequence[None], use_cache=False)

    seconds: Rounds = {"two forward passes": [], **{name: [] for name in methods}}
    stages: dict[str, dict[str, float]] = {}
    forward(1)
    for _ in range(rounds):
        seconds["two forward passes"].append(seconds_of(lambda: forward(2)))
        for name in methods:
            with tempfile.TemporaryDirectory(prefix="bench-", dir=directory) as folder:
                out = Path(folder) / "pruned"
                job = functools.partial(streamprune.compress, model, out, **amount, **METHODS[name])
                seconds[name].append(seconds_of(job))
                stages[name] = json.loads((out / "timings.json").read_text())["stages"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = medians["two forward passes"]
    print(f"SmolLM2-135M, {samples} x {length} tokens, {dtype}, {torch.get_num_threads()} threads, {rounds} rounds")
    table(
        ("", "seconds", "over two passes"),
        [(name, f"{value:.1f}", f"{value / floor:.2f}") for name, value in medians.items()],
    )
    names = sorted({stage for shares in stages.values() for stage in shares})
    shares = [(stage, *(f"{stages[name].get(stage, 0):.1f}" for name in methods)) for stage in names]
    table(("seconds of stage, last round", *methods), shares)
    return {"seconds": seconds, "ratio": {name: value / floor for name, value in medians.items()}, "stages": stages}


def job_of(model: Path, out: Path, samples: int, length: int = LENGTH, more: Sequence[str] = ()) -> dict[str, float]:
    """Compress in a process of its own; seconds and peak memory."""
    arguments = [sys.executable, "-m", "streamprune", "compress", str(model), "--out", str(out), "--json", "--quiet"]
    amount = ["--samples", str(samples), "--sequence-length", str(length), "--dtype", "float32"]
    done = subprocess.run([*arguments, *amount, *more], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    result = json.loads(done.stdout)
    shutil.rmtree(out)
    return {"seconds": result["seconds"], "peak_memory_bytes": result["peak_memory_bytes"]}


def checkpoint(directory: Path, blocks: int) -> Path:
    """A checkpoint of random weights, made if it is not there."""
    folder = directory / "bench" / f"{SHAPE}-{blocks}"
    if not folder.exists():
        make_checkpoint(folder, SHAPE, blocks, "safetensors", 1_000_000_000)
    return folder


def jobs(directory: Path, rounds: int, cases: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """Median seconds and peak memory of jobs (label, blocks, samples), in turns."""
    measured: dict[str, list[dict[str, float]]] = {label: [] for label, _, _ in cases}
    for _ in range(rounds):
        for label, blocks, samples in cases:
            out = directory / "bench" / "out"
            measured[label].append(job_of(checkpoint(directory, blocks), out, samples))
    keys = ("seconds", "peak_memory_bytes")
    found = {label: {key: statistics.median(run[key] for run in runs) for key in keys}
             for label, runs in measured.items()}  # fmt: skip
    least = found[cases[0][0]]["peak_memory_bytes"]
    rows = []
    for label, one in found.items():
        peak = one["peak_memory_bytes"]
        rows.append((label, f"{peak / 1e6:.1f}", f"{peak / least:.3f}", f"{one['seconds']:.1f}"))
    table(("", "peak MB", "over the first", "seconds"), rows)
    return found


def depth(directory: Path, rounds: int) -> dict[str, Any]:
    print(f"{SHAPE}'s blocks, 8 x {LENGTH} tokens, default method")
    return jobs(directory, rounds, [(f"{blocks} blocks", blocks, 8) for blocks in DEPTHS])


def tokens(directory: Path, rounds: int) -> dict[str, Any]:
    print(f"6 of {SHAPE}'s blocks, default method")
    return jobs(directory, rounds, [(f"{samples} x {LENGTH} tokens", 6, samples) for samples in SAMPLES])


def experts(directory: Path, rounds: int) -> dict[str, Any]:
    """Jobs on blocks with experts, and their time over two streamed forward passes of the dense block."""
    found: dict[str, Any] = {}
    rows = []
    for like, count, samples in EXPERT_CASES:
        folder = directory / "bench" / f"{like}-{count}"
        if not folder.exists():
            make_checkpoint(folder, like, 1, "safetensors", 5_000_000_000, "bfloat16", experts=count)
        runs, passes = [], []
        for _ in range(rounds):
            passes.append(2 * forward_seconds(folder, samples, directory / "bench"))
            more = ["--no-refine", "--shuffle", "none"]
            runs.append(job_of(folder, directory / "bench" / "out", samples, EXPERT_LENGTH, more))
        over = statistics.median(run["seconds"] / two for run, two in zip(runs, passes, strict=True))
        peak, seconds = (statistics.median(run[key] for run in runs) for key in ("peak_memory_bytes", "seconds"))
        found[f"{like}, {count} experts"] = {"peak_memory_bytes": peak, "seconds": seconds, "over two passes": over}
        rows.append((f"{like}, {count} experts", f"{peak / 1e6:.0f}", f"{seconds:.0f}", f"{over:.2f}"))
    table(("", "peak MB", "seconds", "over two passes"), rows)
    return found


def forward_seconds(folder: Path, samples: int, scratch: Path) -> float:
    """Of one pass of random tokens through the first block, all of it in memory, hidden states from disk to disk."""
    source, arithmetic = open_dense(folder), Arithmetic(torch.device("cpu"), torch.float32)
    skeleton, block = source.skeleton, source.blocks[0]
    tokens = torch.randint(0, 255, (samples, EXPERT_LENGTH), generator=torch.Generator().manual_seed(0))
    sizes = samples, EXPERT_LENGTH, skeleton.hidden_size, arithmetic.dtype
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        streams = [HiddenStates(Path(work) / name, *sizes) for name in ("in.bin", "out.bin")]
        arguments = embed(skeleton, text_inputs(source), tokens, arithmetic, streams[0], lambda: None)

        def forward() -> None:
            module = load_block(source, block, arithmetic)
            runnable = RunnableBlock(block.name, module, arguments[0])
            advance(runnable, streams[0], streams[1], arithmetic, lambda: None)

        spent = seconds_of(forward)
        for stream in streams:
            stream.close()
    return spent


def read(directory: Path, rounds: int) -> dict[str, Any]:
    """Bytes a second of the reader and of a plain read, from files that are not in the page cache."""
    folder = checkpoint(directory, max(DEPTHS))
    files = sorted(folder.glob("*.safetensors"))
    count = sum(path.stat().st_size for path in files)

    def plain() -> None:
        buffer = bytearray(CHUNK_BYTES)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def reader() -> None:
        opened = open_checkpoint(folder)
        blocks: dict[str, list[str]] = {}
        for name in opened.tensors:
            blocks.setdefault(name.partition("layers.")[2].partition(".")[0], []).append(name)
        for names in blocks.values():
            opened.read_unchecked(names)

    out = directory / "bench" / "out"
    stages: dict[str, float] = {}

    def whole_job() -> None:
        streamprune.compress(folder, out, metric="magnitude", shuffle="none", validate=False, device="cpu")
        stages.update(json.loads((out / "timings.json").read_text())["stages"])

    cases = {"plain sequential read": plain, "reader": reader, "whole job, magnitude, no text": whole_job}
    seconds: Rounds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in cases.items():
            shutil.rmtree(out, ignore_errors=True)
            evict(files)
            seconds[name].append(seconds_of(work))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{count / 1e9:.2f} GB in {len(files)} files, evicted before each read")
    first = medians["plain sequential read"]
    table(
        ("", "GB/s", "of the plain read"),
        [(name, f"{count / value / 1e9:.2f}", f"{first / value:.2f}") for name, value in medians.items()],
    )
    table(("seconds of stage, last round", "s"), [(name, f"{value:.1f}") for name, value in sorted(stages.items())])
    written = sum(path.stat().st_size for path in out.glob("streamprune-*.safetensors"))
    ceilings = {
        "reading the source, as above": first,
        "sha256 of the source, on the core that reads": seconds_of(lambda: checksum(files)),
        "writing the output and syncing it": seconds_of(lambda: write_plainly(directory / "bench" / "plain", written)),
        "sha256 of the output": seconds_of(lambda: checksum(out.glob("streamprune-*.safetensors"))),
    }
    shutil.rmtree(out)
    table(("what bounds it", "s"), [(name, f"{value:.1f}") for name, value in ceilings.items()])
    return {"bytes": count, "seconds": seconds, "stages": stages, "ceilings": ceilings}


def checksum(files: Iterable[Path]) -> None:
    """sha256 of files that are in the page cache."""
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def write_plainly(path: Path, count: int) -> None:
    """Write so many bytes to a file, sync it, and remove it."""
    chunk = os.urandom(CHUNK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-count // CHUNK_BYTES)):
            file.write(chunk)
        os.fsync(file.fileno())
    path.unlink()


def plot(found: dict[str, Any], path: Path) -> None:
    """Stages over the floor, and peak memory by depth and by amount of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), width_ratios=(3, 2), layout="constrained")
    stages, floor = found["ratio"]["stages"], statistics.median(found["ratio"]["seconds"]["two forward passes"])
    names = sorted({name for one in stages.values() for name in one}, key=lambda name: -stages["default"].get(name, 0))
    for place, method in enumerate(stages):
        left = 0.0
        for color, name in enumerate(names):
            width = stages[method].get(name, 0.0) / floor
            label = name if place == 0 else None
            axes[0].barh(place, width, left=left, color=f"C{color}", label=label)
            left += width
        rest = max(statistics.median(found["ratio"]["seconds"][method]) / floor - left, 0.0)
        axes[0].barh(place, rest, left=left, color="lightgrey", label="outside of blocks" if place == 0 else None)
    axes[0].axvline(1, color="black", linestyle="--", linewidth=1)
    axes[0].set_yticks(range(len(stages)), list(stages))
    axes[0].set_xlabel("time, over two forward passes of transformers (dashed)")
    axes[0].legend(fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    for part, label in (("depth", "blocks"), ("tokens", "sequences of 256 tokens")):
        counts = [int(name.split()[0]) for name in found[part]]
        axes[1].plot(
            counts, [one["peak_memory_bytes"] / 1e6 for one in found[part].values()], marker="o", label=f"by {label}"
        )
    axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter("{x:.0f}")
    axes[1].set_xlabel("blocks, or sequences")
    axes[1].set_ylabel("peak memory of the process, MB")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def evict(files: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "ratio": ratio,
    "depth": depth,
    "tokens": tokens,
    "experts": experts,
    "read": read,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="several allowed (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of both sides of the part ratio: float32 or bfloat16")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="of the part ratio (default: all)")
    parser.add_argument("--plot", type=Path, help="a PNG file; needs the parts ratio, depth and tokens")
    given = parser.parse_args()
    chosen = given.part or list(PARTS)
    if "ratio" in chosen and not (given.directory / "smollm2-135m").is_dir():
        sys.exit(f"{given.directory} holds no inputs: run python examples/real_inputs.py {given.directory} first")
    parts: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        **PARTS,
        "ratio": functools.partial(ratio, dtype=given.dtype, methods=given.method or tuple(METHODS)),
    }
    found = {name: parts[name](given.directory, given.rounds) for name in chosen}
    if given.plot is not None:
        plot(found, given.plot)
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({**about, **found}))


if __name__ == "__main__":
    main()
