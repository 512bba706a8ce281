"""verify runs the kernels that ship: one that gives one wrong output is found, with the layers that it is wrong for."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_tools import host
from cuda_tools.layers import random_layer
from cuda_tools.stand_in import standing_in

from streamprune.checkpoint.packed import PackedLayer
from streamprune.config import NMPattern
from streamprune.runtime import products as checks
from streamprune.runtime.products import ROWS, products
from streamprune.runtime.verify import verify
from streamprune_kernels import FEW_ROWS, library
from streamprune_kernels.launch import Launch
from streamprune_kernels.packed_product import has_pairs

CPU = torch.device("cpu")
FEW, MANY = ROWS
DOWN_CHANNELS = 160  # that no other layer of the tiny LLaMA reads
DOWN = {f"model.layers.{index}.mlp.down_proj" for index in range(3)}
FLOAT32, PAIRS = "product_rows", "product_pairs"
IN, OUTPUTS = {FLOAT32: 4, PAIRS: 3}, {FLOAT32: 9, PAIRS: 8}  # places of their arguments
needs_shim = pytest.mark.skipif(shutil.which("g++") is None, reason="the host shim needs a C++ compiler")


def packed(
    pattern: tuple[int, int] = (2, 4), dtype: torch.dtype = torch.float32, permuted: bool = False
) -> PackedLayer:
    layer = random_layer(40, 128, *pattern, dtype)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    return PackedLayer(layer.values, layer.mask, order if permuted else None)


@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
@pytest.mark.parametrize("kernel", [FLOAT32, PAIRS])
def test_a_broken_kernel_of_a_processor_is_found(
    kernel: str, many: bool, outputs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One output of one row of the layers that read so many channels; every other product is right."""
    if kernel == PAIRS and not has_pairs():
        pytest.skip("this processor multiplies no pairs of bfloat16")
    intact = getattr(library(), kernel)

    def broken(*arguments: int) -> int:
        wrong: int = intact(*arguments)
        if arguments[IN[kernel]] == DOWN_CHANNELS and arguments[OUTPUTS[kernel] + 1] == many:
            rounded = kernel == PAIRS and arguments[OUTPUTS[kernel] + 2]
            kind = ctypes.c_uint16 if rounded else ctypes.c_uint32
            kind.from_address(arguments[OUTPUTS[kernel]]).value ^= 1 << (14 if rounded else 30)  # of its exponent
        return wrong

    monkeypatch.setattr(library(), kernel, broken)
    verification = verify(outputs("llama"), device="cpu")
    assert not verification.ok
    assert {check.name for check in verification.layers if not check.ok} == DOWN
    dtype = "float32" if kernel == FLOAT32 else "bfloat16"
    about = f"its sparse product of {MANY if many else FEW} rows in {dtype} is off by "
    assert len(verification.faults) == len(DOWN)
    assert all(about in fault and fault.partition(": ")[0] in DOWN for fault in verification.faults)


def test_both_kernels_of_a_processor_are_run() -> None:
    assert FEW <= FEW_ROWS < MANY


@needs_shim
@pytest.mark.parametrize(
    ("pattern", "kernels"),
    [
        ((2, 4), ["decode24_bf16_8", "sparse_gemm_bf16_128x32", "sparse_gemm_bf16_128x128"]),
        ((4, 8), ["decode_bf16_8", "nm_gemm_bf16_4", "nm_gemm_bf16_4"]),
    ],
    ids=str,
)
def test_the_kernels_of_a_gpu_are_run_and_broken_ones_found(pattern: tuple[int, int], kernels: list[str]) -> None:
    layer = packed(pattern, torch.bfloat16, permuted=True)
    launched: list[str] = []

    def run(launch: Launch, broken: str = "") -> None:
        launched.append(launch.kernel)
        host.run(launch)
        if launch.kernel == broken:
            y = next(one for one in launch.tensors if one.shape[-1] == 40 and one.dim() == 2 and one is not layer.mask)
            y.view(-1)[-1] += 20

    with standing_in(run):
        done = list(products(layer, NMPattern(*pattern), CPU, seed=0))
    assert [name for name in launched if "gemm" in name or "decode" in name] == kernels
    assert [product.fault for product in done] == [None] * 4
    for kernel in kernels:
        with standing_in(lambda launch, kernel=kernel: run(launch, kernel)):
            found = [product for product in products(layer, NMPattern(*pattern), CPU, seed=0) if product.fault]
        assert len(found) == kernels.count(kernel), kernel
        assert all(product.dtype == torch.bfloat16 for product in found)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_intact_layers_are_far_from_a_fault(dtype: torch.dtype, permuted: bool) -> None:
    for product in products(packed(dtype=dtype, permuted=permuted), NMPattern(2, 4), CPU, seed=1):
        assert 0 <= product.error <= product.tolerance / 2


@pytest.mark.parametrize(
    "scale", [0.0, 2.0**-133, 2.0**-20, 3e38], ids=["zeros", "subnormal", "small", "beyond float32"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_size(dtype: torch.dtype, scale: float) -> None:
    """Outputs are neither beyond the dtype, nor is what some instructions take for zero a fault."""
    layer = packed(dtype=dtype)
    values = (layer.values.double().clamp(-1, 1) * scale).to(dtype)
    for product in products(PackedLayer(values, layer.mask, None), NMPattern(2, 4), CPU, seed=1):
        assert product.fault is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_a_fault(value: float) -> None:
    layer = packed()
    layer.values[3, 5] = value
    assert all(product.fault is not None for product in products(layer, NMPattern(2, 4), CPU, seed=1))


@pytest.mark.parametrize(("wrong", "error"), [((0, 0), 1.0), ((1, 2), 1.0), (None, 0.0)])
def test_an_error_is_that_of_the_worst_column(wrong: tuple[int, int] | None, error: float) -> None:
    """One output of 4 x 1,000, where the column is otherwise zero and so its own norm: nothing dilutes it."""
    expected = torch.zeros(4, 1000).index_put_((torch.tensor([0, 1]), torch.tensor([0, 2])), torch.tensor([3.0, -2.0]))
    y = expected.clone()
    if wrong is not None:
        y[wrong] = 0
    assert checks._worst_error(y, expected, 8) == pytest.approx(error)
