"""Products of packed weights on a processor beside torch's dense ones, and beside what reading alone takes.

    python examples/benchmarks/bench_kernels.py [--shape 8192x8192] [--pattern 2:4] [--tokens 1] [--rounds 15] [--json]

For each shape (out x in) and pattern: `streamprune::packed_linear` of bfloat16 values, and torch's linear of dense
weights in bfloat16 and in float32, each with inputs of that dtype. A processor with AVX-512 computes packed products of
bfloat16 inputs by AVX2 alone too, which is what most processors have; ONEDNN_MAX_CPU_ISA=AVX2 and
ATEN_CPU_CAPABILITY=avx2 in the environment hold torch to that as well. What is compared takes turns, a round is one
product of each; figures are medians. Weights rotate through copies of more than the last-level cache, so that they come
from memory on all sides. The ceiling is what as many threads read at most: an exclusive or of a large buffer, measured
in every round.
"""

import functools
import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch.nn import functional

from streamprune import PackedLinear, StreampruneError
from streamprune_kernels import library, packed_linear
from streamprune_kernels.native import paths
from streamprune_kernels.packed_product import has_pairs, packed_product

SHAPES = ("8192x8192", "22016x8192", "4096x11008")
PATTERNS = ("2:4", "4:8")
TOKENS = (1, 8, 32, 256, 1024)
ROTATED_BYTES = 640 << 20  # of each kind of weights; twice a last-level cache of 260 MiB and more
READ_BYTES = 1 << 30
BY_AVX2 = "packed by AVX2, bfloat16 inputs"
SLOW_TOKENS = 64  # from here on a round in three is measured: a product takes up to seconds

Weights = list[list[torch.Tensor]]  # copies of the tensors of one layer


@dataclass(frozen=True)
class Turn:
    """One of the things compared: called with the number of the round; the bytes that it reads from memory."""

    run: Callable[[int], object]
    size_bytes: int


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def copies_of(tensors: list[torch.Tensor]) -> Weights:
    """The tensors and as many copies that together they exceed ROTATED_BYTES."""
    count = math.ceil(ROTATED_BYTES / size_of(tensors))
    return [tensors, *([tensor.clone() for tensor in tensors] for _ in range(count - 1))]


def weights_of(out_features: int, in_features: int, pattern: str) -> dict[str, Weights]:
    """Packed and dense weights of the same shape, each in its copies."""
    weight = torch.randn(out_features, in_features)
    layer = PackedLinear.from_dense(weight.to(torch.bfloat16), pattern)
    kinds = {
        "packed": [layer.weight_values, layer.weight_mask],
        "bfloat16": [weight.to(torch.bfloat16)],
        "float32": [weight],
    }
    return {kind: copies_of(tensors) for kind, tensors in kinds.items()}


def products(weights: dict[str, Weights], tokens: int) -> dict[str, Turn]:
    """What takes turns: the packed and the dense product, for inputs of both dtypes."""
    in_features = weights["float32"][0][0].shape[1]
    turns: dict[str, Turn] = {}
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        x = torch.randn(tokens, in_features).to(dtype)
        packed, dense = weights["packed"], weights[name]
        turns[f"packed, {name} inputs"] = Turn(functools.partial(in_turn, packed_linear, x, packed), size_of(packed[0]))
        if name == "bfloat16" and "avx2" in paths()[:-1]:
            by_avx2 = functools.partial(packed_product, dtype=dtype, path="avx2")
            turns[BY_AVX2] = Turn(functools.partial(in_turn, by_avx2, x, packed), size_of(packed[0]))
        turns[f"dense {name}"] = Turn(functools.partial(in_turn, functional.linear, x, dense), size_of(dense[0]))
    return turns


def in_turn(product: Callable[..., object], x: torch.Tensor, weights: Weights, number: int) -> None:
    """One product, with the copy of the weights whose turn it is."""
    product(x, *weights[number % len(weights)])


def measure(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after another in every round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn.run(number)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def compare(weights: dict[str, Weights], tokens: int, rounds: int, reading: Turn) -> dict[str, Any]:
    """Medians for one number of tokens, with bytes a second and their share of the ceiling."""
    turns = {**products(weights, tokens), "reading alone": reading}
    seconds = measure(turns, rounds if tokens < SLOW_TOKENS else max(3, rounds // 3))
    rate = {name: turns[name].size_bytes / value for name, value in seconds.items()}
    by_avx2 = {"over_dense_bfloat16_by_avx2": seconds["dense bfloat16"] / seconds[BY_AVX2]} if BY_AVX2 in turns else {}
    return {
        "tokens": tokens,
        **by_avx2,
        "seconds": seconds,
        "bytes_per_second": rate,
        "of_ceiling": {name: value / rate["reading alone"] for name, value in rate.items()},
        "over_dense_bfloat16": seconds["dense bfloat16"] / seconds["packed, bfloat16 inputs"],
        "over_dense_float32": seconds["dense float32"] / seconds["packed, float32 inputs"],
    }


def show(found: dict[str, Any]) -> None:
    """One comparison as a markdown table."""
    print(f"\n{found['shape']}, {found['pattern']}, {found['tokens']} tokens\n")
    print("| | ms | GB/s of weights | of the ceiling | times as fast as dense |\n|" + " --- |" * 5)
    faster = {f"packed, {dtype} inputs": found[f"over_dense_{dtype}"] for dtype in ("bfloat16", "float32")}
    faster |= {BY_AVX2: found["over_dense_bfloat16_by_avx2"]} if BY_AVX2 in found["seconds"] else {}
    for name, seconds in found["seconds"].items():
        rate = f"{found['bytes_per_second'][name] / 1e9:.1f} | {found['of_ceiling'][name]:.2f}"
        print(f"| {name} | {seconds * 1e3:.2f} | {rate} | {f'{faster[name]:.2f}' if name in faster else ''} |")


@click.command(epilog="Example: python examples/benchmarks/bench_kernels.py --shape 8192x8192 --pattern 2:4 --tokens 1")
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="OUTxIN; several allowed.")
@click.option("--pattern", "patterns", multiple=True, default=PATTERNS, show_default=True, help="N:M; several allowed.")
@click.option("--tokens", multiple=True, type=click.IntRange(1), default=TOKENS, show_default=True, help="Rows of x.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Of which medians are taken.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON and no tables.")
def main(
    shapes: tuple[str, ...], patterns: tuple[str, ...], tokens: tuple[int, ...], rounds: int, as_json: bool
) -> None:
    """Products of packed weights on a processor beside torch's dense ones."""
    compiled, threads = library(), torch.get_num_threads()
    if compiled is None:
        raise click.ClickException("streamprune was built without its compiled kernels; there is nothing to measure")
    torch.manual_seed(0)
    buffer = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    reading = Turn(lambda number: compiled.xor_of_words(buffer.data_ptr(), buffer.numel(), threads), READ_BYTES)
    about = {
        "threads": threads,
        "torch": torch.__version__,
        "instructions": paths()[-1],
        "bfloat16 pairs": has_pairs(),
        "rounds": rounds,
    }
    if not as_json:
        print(", ".join(f"{key} {value}" for key, value in about.items()))
    comparisons = []
    for shape, pattern in itertools.product(shapes, patterns):
        try:
            weights = weights_of(*sizes(shape), pattern)
        except (StreampruneError, ValueError) as error:
            raise click.UsageError(str(error)) from error
        for count in tokens:
            found = {"shape": shape, "pattern": pattern, **compare(weights, count, rounds, reading)}
            comparisons.append(found)
            if not as_json:
                show(found)
    if as_json:
        print(json.dumps({**about, "comparisons": comparisons}))


def sizes(shape: str) -> tuple[int, int]:
    """Output and input features of "8192x4096"."""
    match = re.fullmatch(r"(\d+)x(\d+)", shape)
    if match is None:
        raise click.BadParameter(f"shape {shape!r} is not OUTxIN, such as 8192x8192")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main()
