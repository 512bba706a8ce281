"""examples/benchmarks/bench_gpu.py on a CPU: shapes, rooflines, who takes part, what is shown; with made-up times."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cuda_tools import host

from streamprune.config import NMPattern
from streamprune_kernels.gemm import SPARSE_STAGES

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "bench_gpu.py"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the host shim needs a C++ compiler")
CPU = torch.device("cpu")


def _loaded() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    sys.path.insert(0, str(SCRIPT.parent))  # as python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


bench_gpu = _loaded()
A100 = bench_gpu.Device("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41e9, 1.215e9, 5120, 40 << 20)


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "clock_hz", "teraflops"),
    [
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41e9, 312),
        ("NVIDIA A40", (8, 6), 84, 1.74e9, 149.7),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695e9, 71.2),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52e9, 165.2),
        ("NVIDIA L40", (8, 9), 142, 2.49e9, 181),
        ("NVIDIA L40S", (8, 9), 142, 2.52e9, 366),
        ("NVIDIA L4", (8, 9), 58, 2.04e9, 121),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.83e9, 989),
    ],
)
def test_peaks_are_the_published_ones(
    name: str, capability: tuple[int, int], multiprocessors: int, clock_hz: float, teraflops: float
) -> None:
    device = replace(A100, name=name, capability=capability, multiprocessors=multiprocessors, clock_hz=clock_hz)
    assert device.dense_flops == pytest.approx(teraflops * 1e12, rel=0.005)
    assert ("half" in device.assumption) == ("GeForce" in name or name == "NVIDIA L40")
    assert ("wgmma" in device.assumption) == (capability == (9, 0))
    assert f"{multiprocessors} multiprocessors x {clock_hz / 1e9:.3f} GHz" in device.assumption


def test_rooflines() -> None:
    """An A100: 1,555 GB/s; arithmetic counts where memory does not, and sparse tensor cores halve it."""
    assert A100.bytes_per_second == pytest.approx(1555e9, rel=1e-3)
    assert bench_gpu.least_seconds(A100, 312e12, 1e9, False) == pytest.approx(1, rel=1e-3)
    assert bench_gpu.least_seconds(A100, 312e12, 1e9, True) == pytest.approx(0.5, rel=1e-3)
    assert bench_gpu.least_seconds(A100, 1e9, 1555.2e9, True) == pytest.approx(1)
    unknown = replace(A100, capability=(12, 0))
    assert unknown.dense_flops is None
    assert "sm_120: the rate of its tensor cores is not known" in unknown.assumption
    assert bench_gpu.least_seconds(unknown, 312e12, 1555.2e9, True) == pytest.approx(1)


def test_shapes_are_llamas() -> None:
    assert bench_gpu.layer_shapes("7B") == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert bench_gpu.layer_shapes("65B") == [(8192, 8192), (22016, 8192), (8192, 22016)]
    assert (bench_gpu.TOKENS[0], bench_gpu.TOKENS[-1]) == (1, 8192)


def compared(
    pattern: str,
    tokens: int,
    timer: Callable[..., Any],
    dtype: torch.dtype = torch.float16,
    parts: tuple[int, ...] = (),
) -> Any:
    torch.manual_seed(0)
    weights = bench_gpu.pruned_weights((72, 128), NMPattern.parse(pattern), dtype, CPU)
    x = torch.randn(tokens, 128).to(dtype)
    return bench_gpu.compared(weights, x, A100, timer, host.run, parts)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_figures_of_a_comparison(dtype: torch.dtype) -> None:
    """By hand: 2 x 72 x 128 x 4 operations; packed weights are 9/16 of the dense 18,432 bytes."""
    flushed = []

    def timer(run: Callable[[], torch.Tensor], flush: bool) -> tuple[float, float]:
        assert run().shape == (4, 72)
        flushed.append(flush)
        return len(flushed) * 1e-6, 7e-5

    found = compared("2:4", 4, timer, dtype)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["cuBLAS dense", "sparse GEMM", "N:M GEMM", "decode", "torch CUTLASS", "torch cuSPARSELt"]
    assert flushed == [True] * 4
    dense, decode = rows["cuBLAS dense"], rows["decode"]
    assert dense["teraflops"] == pytest.approx(73728 / 1e-6 / 1e12)
    vectors = 2 * 4 * (128 + 72)
    assert dense["gigabytes_per_second"] == pytest.approx((18432 + vectors) / 1e-6 / 1e9)
    assert decode["gigabytes_per_second"] == pytest.approx((10368 + vectors) / 4e-6 / 1e9)
    assert decode["of_roofline"] == pytest.approx((10368 + vectors) / A100.bytes_per_second / 4e-6)
    assert [row.get("over_cublas") for row in found["rows"]] == [1, 1 / 2, pytest.approx(1 / 3), 1 / 4, None, None]
    assert all(0 < row["error"] < bench_gpu.TOLERANCE[dtype] for row in found["rows"][:4])
    assert "needs weights on a GPU, these are on cpu" in rows["torch CUTLASS"]["reason"]
    assert bench_gpu.wrong_rows([found]) == []
    json.dumps(found)
    lines = bench_gpu.table(found).splitlines()
    assert lines[1] == f"72x128, 2:4, {str(dtype).removeprefix('torch.')}, 4 tokens"
    assert lines[5].startswith("| cuBLAS dense | 0.0010 | 0.1 | 20 | ")
    assert lines[5].endswith(" | 1.00 | 0.0700 |")
    assert all(line.count("|") == 8 for line in lines[3:])


@needs_compiler
def test_parts_are_swept_in_every_tile() -> None:
    """Of the two steps there are not three parts; the last of each product is the fastest."""
    times = iter(range(100, 0, -1))
    found = compared(
        "2:4", 9, lambda run, flush: (next(times) * 1e-6 if run() is not None else 0.0, 1.0), parts=(1, 2, 3)
    )
    names = [row["name"] for row in found["rows"] if ", parts: " in row["name"]]
    assert len(set(names)) == len(names) == len(SPARSE_STAGES) * 2 + 2
    assert bench_gpu.fastest(found) == [
        "72x128, 2:4, float16, 9 tokens: sparse GEMM 99.0 us, at best 92.0 us: sparse GEMM 128x32, parts: 2",
        "72x128, 2:4, float16, 9 tokens: N:M GEMM 98.0 us, at best 90.0 us: N:M GEMM, parts: 2",
    ]
    assert bench_gpu.fastest(compared("4:8", 9, lambda run, flush: (1.0, 1.0))) == []


@needs_compiler
def test_who_cannot_take_part_says_why() -> None:
    found = compared("4:8", 9, lambda run, flush: (0.0 if flush else 1.0, 1.0))
    reasons = {row["name"]: row.get("reason") for row in found["rows"]}
    assert "not 4:8" in reasons["sparse GEMM"]
    assert "1 to 8 vectors at once, not 9" in reasons["decode"]
    assert reasons["torch CUTLASS"] == "knows 2:4 alone, not 4:8"
    assert reasons["cuBLAS dense"] is reasons["N:M GEMM"] is None


@needs_compiler
def test_no_speed_of_a_wrong_product() -> None:
    torch.manual_seed(0)
    weights = bench_gpu.pruned_weights((72, 128), NMPattern.parse("2:4"), torch.float16, CPU)
    weights.values[40] = weights.values[41]
    x = torch.randn(20, 128).half()
    found = bench_gpu.compared(weights, x, A100, lambda run, flush: (1.0, 1.0), host.run)
    for row in found["rows"][1:3]:
        assert "seconds" not in row
        assert row["reason"].startswith("WRONG: error")
    assert "seconds" in found["rows"][0]
    assert bench_gpu.wrong_rows([found]) == ["N:M GEMM", "sparse GEMM"]
    assert "WRONG" in bench_gpu.table(found)
    broken = bench_gpu.Contender("nan", lambda: torch.full((20, 72), torch.nan).half())
    assert "WRONG" in bench_gpu.measured(broken, weights, x, A100, lambda run, flush: (1.0, 1.0))["reason"]


def test_a_whole_run_with_a_made_up_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice is carried out and every comparison is in the JSON; what is wrong ends the run with an error."""
    rows: list[dict[str, Any]] = [{"name": "cuBLAS dense", "seconds": 1.0, "error": 0.0}]
    monkeypatch.setattr(bench_gpu, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(bench_gpu, "described", lambda device: A100)
    monkeypatch.setattr(bench_gpu, "cuda_timer", lambda *arguments: lambda run, flush: (1.0, 1.0))
    monkeypatch.setattr(bench_gpu, "copy_bytes_per_second", lambda device, timer: 1e12)
    monkeypatch.setattr(bench_gpu, "WIDTHS", {"7B": (64, 128)})
    monkeypatch.setattr(bench_gpu, "compared", lambda w, x, *rest: {"shape": list(w.dense.shape), "rows": rows})
    monkeypatch.setattr(bench_gpu.torch, "device", lambda *arguments: CPU)
    arguments = ["--model", "7B", "--pattern", "2:4", "--pattern", "1:4", "--tokens", "1", "--tokens", "3", "--json"]
    result = CliRunner().invoke(bench_gpu.main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["copy_bytes_per_second"] == 1e12
    assert found["assumption"] == A100.assumption
    assert [one["shape"] for one in found["comparisons"][::8]] == [[64, 64], [128, 64], [64, 128]]
    assert len(found["comparisons"]) == 3 * 2 * 2 * 2
    result = CliRunner().invoke(bench_gpu.main, ["--shape", "64x128", *arguments[2:]])
    assert {tuple(one["shape"]) for one in json.loads(result.output)["comparisons"]} == {(64, 128)}
    assert "64by128' is not OUTxIN" in CliRunner().invoke(bench_gpu.main, ["--shape", "64by128"]).output
    rows[0] = {"name": "decode", "error": 3.0, "reason": "WRONG"}
    result = CliRunner().invoke(bench_gpu.main, arguments)
    assert result.exit_code == 1
    assert "products that are not right: decode" in result.output
    assert CliRunner().invoke(bench_gpu.main, ["--pattern", "half"]).exit_code == 2
    result = CliRunner().invoke(bench_gpu.main, ["--model", "7B", "--pattern", "3:5"])
    assert "3:5 does not divide 64 input channels" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    finished = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode != 0
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("Error: there is nothing to measure: CUDA kernels need a GPU")
