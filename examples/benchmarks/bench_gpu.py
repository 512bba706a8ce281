"""Speeds of the CUDA kernels on a GPU beside cuBLAS and torch's own 2:4 products, and what the device allows at most.

    python examples/benchmarks/bench_gpu.py [--model 7B | --shape 4096x4096] [--pattern 2:4] [--dtype float16]
                                            [--tokens 1] [--parts 1 --parts 4] [--rounds 20] [--json]

For each layer shape (out x in) of LLaMA, pattern, type and number of tokens, y = x W^T is computed by torch.mm on dense
weights (cuBLAS), by `sparse_linear` (2:4), `nm_linear_cuda` (any N:M) and `nm_decode` (up to 8 tokens) on packed ones,
and by torch's semi-structured weights (CUTLASS and cuSPARSELt). Whoever cannot run says why. A speed is printed only of
a product that was right: its error against float64, on a sample of tokens, is within the type's rounding.

With `--parts` the products of packed weights are measured also in that many parts of the input channels (split-K), the
2:4 one in every tile; at the end stands which was the fastest, beside what the launcher takes by itself.

TFLOP/s count 2 out in tokens, whatever was skipped. GB/s count what must be read and written once: weights as stored, x
and y. The roofline is the least time that arithmetic and memory allow: multiprocessors x clock x operations of tensor
cores (twice as many for sparse ones), and bus width x memory clock. Times are the GPU's alone, which waits until all is
queued: medians by CUDA events after a warm-up; up to 8 tokens L2 is overwritten before each run, as the next layer's
weights come from memory in decoding, too. The last column is what a call takes with the processor's share, of many in a
row.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
import torch

from bench_kernels import sizes
from streamprune.config import NMPattern
from streamprune.errors import SettingsError
from streamprune_kernels import (
    nm_linear_cuda,
    nm_weight,
    pack_mask,
    pack_values,
    select_groups,
    sparse_linear,
    sparse_unsuitable,
    sparse_weight,
    unsupported_reason,
)
from streamprune_kernels.decode import decode_unsuitable, nm_decode
from streamprune_kernels.gemm import K_STEP, SPARSE_STAGES
from streamprune_kernels.launch import Run, on_device

WIDTHS = {"7B": (4096, 11008), "13B": (5120, 13824), "65B": (8192, 22016)}  # hidden, intermediate (LLaMA, Table 2)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Relative error (Frobenius) of a product rounded once, with room for another order of sums; as in model/arithmetic.py.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHECKED_TOKENS = 32
FLUSHED_TOKENS = 8  # up to here L2 is overwritten before each run
WARM_UP = 3
CALLS = 50  # in a row
HELD_CYCLES = 1 << 20  # about half a millisecond that the GPU waits, in which a call is queued
COPIED_BYTES = 1 << 30
SPARSE_NAME, GENERAL_NAME = "sparse GEMM", "N:M GEMM"

# 16-bit operations (a multiply-add is two) of one multiprocessor's tensor cores a cycle, dense, summed in float32: the
# figures that give the published peaks. A100: 108 x 1.41 GHz x 2048 = 312 TFLOP/s; A40: 84 x 1.74 x 1024 = 150;
# L40S: 142 x 2.52 x 1024 = 366; H100 SXM: 132 x 1.83 x 4096 = 989.
TENSOR_OPERATIONS = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096}
# GeForce cards of sm_86 and sm_89 sum in float32 at half that rate: RTX 3090: 82 x 1.695 x 512 = 71 TFLOP/s, RTX 4090:
# 128 x 2.52 x 512 = 165; so does, by its data sheet, the L40: 142 x 2.49 x 512 = 181.
HALVED = ((8, 6), (8, 9))


@dataclass(frozen=True)
class Device:
    """What a roofline is made of; clocks are the highest that the driver names."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_hz: float
    memory_clock_hz: float
    bus_bits: int
    l2_bytes: int

    @property
    def dense_flops(self) -> float | None:
        """Peak of dense 16-bit products summed in float32, operations a second; None for an unknown architecture."""
        operations = TENSOR_OPERATIONS.get(self.capability)
        if operations is None:
            return None
        return self.multiprocessors * self.clock_hz * operations / (2 if self.is_halved else 1)

    @property
    def is_halved(self) -> bool:
        words = self.name.split()
        return self.capability in HALVED and ("GeForce" in words or "L40" in words)

    @property
    def bytes_per_second(self) -> float:
        """Peak of memory, which moves two bits a cycle on each wire."""
        return 2 * self.memory_clock_hz * self.bus_bits / 8

    @property
    def assumption(self) -> str:
        """How the peak was worked out, in one line."""
        if self.dense_flops is None:
            major, minor = self.capability
            return f"sm_{major}{minor}: the rate of its tensor cores is not known here; rooflines are those of memory"
        rate = TENSOR_OPERATIONS[self.capability] // (2 if self.is_halved else 1)
        text = f"{self.multiprocessors} multiprocessors x {self.clock_hz / 1e9:.3f} GHz x {rate} operations"
        if self.is_halved:
            text += ", half of the architecture's, as this card sums in float32 at half the rate"
        if self.capability == (9, 0):
            text += ", which wgmma reaches; kernels of mma.sync, as ours, reach less"
        return text


@dataclass(frozen=True)
class Contender:
    """A way to a product: `run` computes y [tokens, out]; or the reason why it cannot, in one line."""

    name: str
    run: Callable[[], torch.Tensor] | None
    reason: str = ""
    is_sparse: bool = False  # on sparse tensor cores
    weight_bytes: int = 0


@dataclass(frozen=True)
class Weights:
    """A pruned weight: dense with zeros [out, in], its packed values and mask, and the pattern."""

    dense: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    pattern: NMPattern


# Seconds of a call on the GPU alone, with L2 overwritten before or not, and of one of many calls in a row.
Timer = Callable[[Callable[[], object], bool], tuple[float, float]]


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of a LLaMA: attention, gate and up, down."""
    hidden, intermediate = WIDTHS[model]
    return [(hidden, hidden), (intermediate, hidden), (hidden, intermediate)]


def least_seconds(device: Device, flops: float, moved_bytes: float, is_sparse: bool) -> float:
    """The roofline: what arithmetic or memory needs, whichever is longer."""
    peak = device.dense_flops
    arithmetic = flops / (peak * (2 if is_sparse else 1)) if peak else 0.0
    return max(arithmetic, moved_bytes / device.bytes_per_second)


def pruned_weights(shape: tuple[int, int], pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> Weights:
    """Normal weights, of which each group keeps the largest magnitudes."""
    weight = torch.randn(shape, device=device).to(dtype)
    keep = select_groups(weight.to(torch.float32).abs(), pattern.kept, pattern.group_size)
    return Weights(weight.mul_(keep), pack_values(weight, keep), pack_mask(keep), pattern)


def contenders(
    weights: Weights, x: torch.Tensor, run: Run = on_device, swept_parts: Sequence[int] = ()
) -> list[Contender]:
    """All ways to x W^T, in the order of the table; each number of parts in every tile last."""
    kept, group_size = weights.pattern.kept, weights.pattern.group_size
    dense, packed_bytes = weights.dense, weights.values.nbytes + weights.mask.nbytes
    counts = [parts for parts in swept_parts if parts <= -(-x.shape[1] // K_STEP)]
    swept: list[Contender] = []
    found = [Contender("cuBLAS dense", lambda: torch.mm(x, dense.T), weight_bytes=dense.nbytes)]
    packed = nm_weight(weights.values, weights.mask, kept, group_size)
    reason = sparse_unsuitable(kept, group_size, x.shape[1])
    if reason is None:
        sparse = sparse_weight(weights.values, weights.mask, run=run)
        size = sparse.values.nbytes + sparse.metadata.nbytes
        found.append(Contender(SPARSE_NAME, lambda: sparse_linear(x, sparse, run=run), "", True, size))
        for tile, parts in itertools.product(SPARSE_STAGES, counts):
            product = partial(sparse_linear, x, sparse, tile=tile, parts=parts, run=run)
            swept.append(Contender(f"{SPARSE_NAME} {tile[0]}x{tile[1]}, parts: {parts}", product, "", True, size))
    else:
        found.append(Contender(SPARSE_NAME, None, reason))
    general = Contender(GENERAL_NAME, lambda: nm_linear_cuda(x, packed, run=run), weight_bytes=packed_bytes)
    for parts in counts:
        product = partial(nm_linear_cuda, x, packed, parts=parts, run=run)
        swept.append(Contender(f"{GENERAL_NAME}, parts: {parts}", product, weight_bytes=packed_bytes))
    reason = decode_unsuitable(packed, len(x))
    decode = Contender("decode", None, reason or "")
    if reason is None:
        decode = Contender("decode", lambda: nm_decode(x, packed, run=run), weight_bytes=packed_bytes)
    theirs = [semi_structured(name, weights, x) for name in ("CUTLASS", "cuSPARSELt")]
    return [*found, general, decode, *theirs, *swept]


def semi_structured(name: str, weights: Weights, x: torch.Tensor) -> Contender:
    """torch's own 2:4 weights, by CUTLASS or by cuSPARSELt, where these are there."""
    title = f"torch {name}"
    if str(weights.pattern) != "2:4":
        return Contender(title, None, f"knows 2:4 alone, not {weights.pattern}")
    if weights.dense.device.type != "cuda":
        return Contender(title, None, f"needs weights on a GPU, these are on {weights.dense.device}")
    if name == "cuSPARSELt" and not torch.backends.cusparselt.is_available():
        return Contender(title, None, "this torch has no cuSPARSELt for this GPU")
    kind: type[torch.sparse.SparseSemiStructuredTensor] = torch.sparse.SparseSemiStructuredTensorCUTLASS
    if name == "cuSPARSELt":
        kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    try:
        sparse = kind.from_dense(weights.dense)
        torch.nn.functional.linear(x, sparse)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Contender(title, None, str(error).strip().partition("\n")[0])
    size = weights.dense.nbytes // 2 + weights.dense.nbytes // 16  # half of the values, 2 bits for each kept one
    return Contender(title, lambda: torch.nn.functional.linear(x, sparse), "", True, size)


def relative_error(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> float:
    """||y - x W^T|| / ||x W^T|| (Frobenius) in float64, of evenly spaced tokens, the first and the last among them."""
    count = min(len(x), CHECKED_TOKENS)
    rows = torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long().to(x.device)
    expected = x[rows].double() @ dense.double().T
    return float((y[rows].double() - expected).norm() / expected.norm())


def measured(contender: Contender, weights: Weights, x: torch.Tensor, device: Device, timer: Timer) -> dict[str, Any]:
    """A row of the table: seconds, TFLOP/s, GB/s and the roofline's share; or the reason why there is none."""
    if contender.run is None:
        return {"name": contender.name, "reason": contender.reason}
    error = relative_error(contender.run(), x, weights.dense)
    if not error <= TOLERANCE[x.dtype]:
        return {"name": contender.name, "reason": f"WRONG: error {error:.3g} against float64", "error": error}
    (out_features, in_features), tokens = weights.dense.shape, len(x)
    flops = 2 * out_features * in_features * tokens
    moved = contender.weight_bytes + x.itemsize * tokens * (in_features + out_features)
    seconds, call_seconds = timer(contender.run, tokens <= FLUSHED_TOKENS)
    return {
        "name": contender.name,
        "seconds": seconds,
        "call_seconds": call_seconds,
        "teraflops": flops / seconds / 1e12,
        "gigabytes_per_second": moved / seconds / 1e9,
        "of_roofline": least_seconds(device, flops, moved, contender.is_sparse) / seconds,
        "error": error,
    }


def compared(
    weights: Weights,
    x: torch.Tensor,
    device: Device,
    timer: Timer,
    run: Run = on_device,
    swept_parts: Sequence[int] = (),
) -> dict[str, Any]:
    """All contenders on one product, with each one's speed over cuBLAS."""
    rows = [measured(contender, weights, x, device, timer) for contender in contenders(weights, x, run, swept_parts)]
    dense = rows[0].get("seconds")
    for row in rows:
        if dense is not None and "seconds" in row:
            row["over_cublas"] = dense / row["seconds"]
    return {
        "shape": list(weights.dense.shape),
        "pattern": str(weights.pattern),
        "dtype": str(x.dtype).removeprefix("torch."),
        "tokens": len(x),
        "rows": rows,
    }


def title(found: dict[str, Any]) -> str:
    out_features, in_features = found["shape"]
    return f"{out_features}x{in_features}, {found['pattern']}, {found['dtype']}, {found['tokens']} tokens"


def table(found: dict[str, Any]) -> str:
    """One comparison as a markdown table."""
    lines = [
        f"\n{title(found)}\n",
        "| | ms | TFLOP/s | GB/s | of the roofline | times as fast as cuBLAS | ms a call in a row |",
        "|" + " --- |" * 7,
    ]
    for row in found["rows"]:
        if "seconds" not in row:
            lines.append(f"| {row['name']} | {row['reason']} |" + " |" * 5)
            continue
        speeds = f"{row['seconds'] * 1e3:.4f} | {row['teraflops']:.1f} | {row['gigabytes_per_second']:.0f}"
        faster = f"{row['over_cublas']:.2f}" if "over_cublas" in row else ""
        called = f"{row['call_seconds'] * 1e3:.4f}"
        lines.append(f"| {row['name']} | {speeds} | {row['of_roofline']:.0%} | {faster} | {called} |")
    return "\n".join(lines)


def fastest(found: dict[str, Any]) -> list[str]:
    """Of each product that was measured in several parts, a line: the launcher's choice, and the fastest."""
    lines = []
    for name in (SPARSE_NAME, GENERAL_NAME):
        times = {row["name"]: row["seconds"] * 1e6 for row in found["rows"] if "seconds" in row}
        swept = {one: time for one, time in times.items() if one.startswith(name) and one != name}
        if swept and name in times:
            best = min(swept, key=swept.__getitem__)
            lines.append(f"{title(found)}: {name} {times[name]:.1f} us, at best {swept[best]:.1f} us: {best}")
    return lines


def wrong_rows(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """Names of contenders whose product was not right."""
    rows = [row for found in comparisons for row in found["rows"]]
    return sorted({row["name"] for row in rows if "error" in row and "seconds" not in row})


def cuda_timer(device: torch.device, l2_bytes: int, rounds: int) -> Timer:
    """Medians by CUDA events on the current stream, after WARM_UP runs that do not count."""
    flushed = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def seconds(run: Callable[[], object], flush: bool) -> tuple[float, float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for _ in range(WARM_UP):
            run()
        for begin, end in events:
            if flush:
                flushed.zero_()
            torch.cuda._sleep(HELD_CYCLES)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize(device)
        in_a_row = (time.perf_counter() - start) / CALLS
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3, in_a_row

    return seconds


def copy_bytes_per_second(device: torch.device, timer: Timer) -> float:
    """What copying a large buffer moves, read and written."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / timer(lambda: target.copy_(source), False)[0]


def described(device: torch.device) -> Device:
    """A GPU's figures, by CuPy, which has the clocks of every CUDA version."""
    import cupy

    index = device.index or 0
    found = cupy.cuda.Device(index).attributes
    return Device(
        torch.cuda.get_device_name(index),
        torch.cuda.get_device_capability(index),
        found["MultiProcessorCount"],
        found["ClockRate"] * 1e3,
        found["MemoryClockRate"] * 1e3,
        found["GlobalMemoryBusWidth"],
        found["L2CacheSize"],
    )


@click.command(epilog="Example: python examples/benchmarks/bench_gpu.py --model 7B --tokens 1 --tokens 2048")
@click.option("--model", "models", type=click.Choice(list(WIDTHS)), multiple=True, default=list(WIDTHS),
              show_default=True, help="LLaMA whose layers' shapes are taken; several allowed.")  # fmt: skip
@click.option("--shape", "shapes", multiple=True, help="OUTxIN instead of the models' layers; several allowed.")
@click.option("--pattern", "patterns", multiple=True, default=("2:4",), show_default=True,
              help="N:M; several allowed.")  # fmt: skip
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=list(DTYPES),
              show_default=True, help="Of weights and inputs; several allowed.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), multiple=True, default=TOKENS, show_default=True,
              help="Rows of x; several allowed.")  # fmt: skip
@click.option("--parts", type=click.IntRange(1), multiple=True,
              help="Also measure packed weights in so many parts, in every tile; several allowed.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Of which medians are taken.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON and no tables.")
def main(
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    patterns: tuple[str, ...],
    dtypes: tuple[str, ...],
    tokens: tuple[int, ...],
    parts: tuple[int, ...],
    rounds: int,
    as_json: bool,
) -> None:
    """Products of packed weights on a GPU beside cuBLAS and torch's 2:4 ones."""
    where = torch.device("cuda", 0)
    reason = unsupported_reason(where)
    if reason is not None:
        raise click.ClickException(f"there is nothing to measure: {reason}")
    try:
        parsed = [NMPattern.parse(pattern) for pattern in patterns]
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    chosen = [sizes(shape) for shape in shapes] or [shape for model in models for shape in layer_shapes(model)]
    torch.manual_seed(0)
    device = described(where)
    timer = cuda_timer(where, device.l2_bytes, rounds)
    about = {**asdict(device), "torch": torch.__version__, "rounds": rounds, "assumption": device.assumption}
    about |= {"dense_flops": device.dense_flops, "bytes_per_second": device.bytes_per_second}
    about["copy_bytes_per_second"] = copy_bytes_per_second(where, timer)
    if not as_json:
        print("\n".join(f"{key}: {value}" for key, value in about.items()))
    comparisons = []
    for shape, pattern, dtype in itertools.product(chosen, parsed, dtypes):
        if shape[1] % pattern.group_size:
            raise click.UsageError(f"{pattern} does not divide {shape[1]} input channels")
        weights = pruned_weights(shape, pattern, DTYPES[dtype], where)
        for count in tokens:
            x = torch.randn(count, shape[1], device=where).to(DTYPES[dtype])
            comparisons.append(compared(weights, x, device, timer, on_device, parts))
            if not as_json:
                print(table(comparisons[-1]), flush=True)
    if as_json:
        print(json.dumps({**about, "comparisons": comparisons}))
    elif parts:
        print("", *(line for found in comparisons for line in fastest(found)), sep="\n")
    if wrong := wrong_rows(comparisons):
        raise click.ClickException(f"products that are not right: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
