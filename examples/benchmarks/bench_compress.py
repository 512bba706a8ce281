"""What compress costs beside the least it could cost: two forward passes of the same blocks over the same tokens.

    python examples/benchmarks/bench_compress.py [DIR]

DIR (default: demo) holds the inputs that `python examples/real_inputs.py DIR` makes. Compress runs with its default
method at 8 x 256 tokens into a fresh folder; the floor is transformers' own dense model in fp32, already in memory, run
twice over the same calibration tokens, one sequence at a time, without the head. The two take turns, so that a busy
machine slows both; medians of three. Takes about three minutes on two quiet cores, nearly all of it compress. Prints a
table, then the same figures as one line of JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import streamprune
from streamprune.pipeline.calibration import calibration_tokens

SAMPLES = 8
SEQUENCE_LENGTH = 256
SEED = 0
ROUNDS = 3


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compress_once(model: Path, text: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-", dir=model.parent) as folder:
        streamprune.compress(
            model,
            Path(folder) / "pruned",
            calibration=str(text),
            samples=SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
            seed=SEED,
            device="cpu",
            dtype="float32",
        )


def measure(model: Path, text: Path) -> dict[str, list[float]]:
    """Seconds of each round, interleaved, after one untimed forward pass."""
    tokens = calibration_tokens(model, str(text), SAMPLES, SEQUENCE_LENGTH, SEED)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def forward(passes: int) -> None:
        for _ in range(passes):
            for sequence in tokens:
                dense.model(input_ids=sequence[None], use_cache=False)

    forward(1)
    seconds: dict[str, list[float]] = {"compress": [], "two_forward_passes": []}
    for _ in range(ROUNDS):
        seconds["two_forward_passes"].append(seconds_of(lambda: forward(2)))
        seconds["compress"].append(seconds_of(lambda: compress_once(model, text)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    directory = parser.parse_args().directory
    model, text = directory / "smollm2-135m", directory / "text" / "calibration.txt"
    if not (model.is_dir() and text.is_file()):
        sys.exit(f"{directory} holds no inputs yet: run python examples/real_inputs.py {directory} first")

    seconds = measure(model, text)
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    print(f"SmolLM2-135M, {SAMPLES} x {SEQUENCE_LENGTH} tokens, fp32, {torch.get_num_threads()} threads")
    for name, rounds in seconds.items():
        print(f"  {name:<20}{medians[name]:>8.2f} s   rounds: {', '.join(f'{value:.2f}' for value in rounds)}")
    ratio = medians["compress"] / medians["two_forward_passes"]
    print(f"  {'ratio':<20}{ratio:>8.2f}")
    print(
        json.dumps(
            {
                "tokens": SAMPLES * SEQUENCE_LENGTH,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "processor": platform.processor() or platform.machine(),
                "seconds": seconds,
                "median_seconds": medians,
                "ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
