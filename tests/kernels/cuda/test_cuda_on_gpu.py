"""The CUDA kernels on a GPU: `pytest -m gpu`. They need CuPy and sm_80 or later."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cuda_tools.layers import assert_accurate, assert_error_sums, random_inputs, random_layer
from cuda_tools.mutation import CASES
from refinement_problems import whole_problem

from streamprune import PackedLinear
from streamprune.config import NMPattern
from streamprune_kernels import MIN_EXPONENT, hinge_sums, local_swaps, reference, refine_rows
from streamprune_kernels.decode import nm_decode
from streamprune_kernels.gemm import nm_linear_with_error, nm_weight, sparse_linear, sparse_linear_with_error
from streamprune_kernels.launch import Launch, on_device
from streamprune_kernels.metadata import sparse_weight
from streamprune_kernels.packing import expand_cuda, pack_mask_cuda, pack_values_cuda, unpack_mask_cuda
from streamprune_kernels.statistics import Windows, add_tokens, add_tokens_cuda

pytestmark = pytest.mark.gpu


def run_there(launch: Launch) -> None:
    """Run a launch of CPU tensors on the GPU, and take its results back."""
    tensors = {id(tensor): tensor.cuda() for tensor in launch.tensors}
    on_device(replace(launch, arguments=tuple(tensors.get(id(one), one) for one in launch.arguments)))
    for tensor in launch.tensors:
        tensor.copy_(tensors[id(tensor)])


@pytest.mark.parametrize("case", CASES)
def test_cases_of_the_mutants(case):
    CASES[case](run_there)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 1024, 512), (1000, 320, 77), (64, 64, 1)])
def test_tile_that_the_device_chooses(dtype, shape):
    out_features, in_features, tokens = shape
    layer = random_layer(out_features, in_features, 2, 4, dtype)
    x = random_inputs(tokens, in_features, dtype)
    weight = sparse_weight(layer.values.cuda(), layer.mask.cuda())
    assert_accurate(sparse_linear(x.cuda(), weight, layer.bias.cuda()).cpu(), x, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [None, 3, 16])
@pytest.mark.parametrize("tokens", [16, 50, 200, 512])
def test_products_in_parts(dtype: torch.dtype, parts: int | None, tokens: int) -> None:
    """Both products, in as many parts as the device chooses and in others; the same bits each time."""
    layer = random_layer(1000, 2112, 2, 4, dtype)
    x, reference = random_inputs(tokens, 2112, dtype), random_inputs(tokens, 1000, dtype, seed=9)
    values, mask, bias = layer.values.cuda(), layer.mask.cuda(), layer.bias.cuda()
    for product in (
        partial(sparse_linear_with_error, weight=sparse_weight(values, mask)),
        partial(nm_linear_with_error, weight=nm_weight(values, mask, 2, 4)),
    ):
        arguments = {"reference": reference.cuda(), "bias": bias, "parts": parts}
        found = [[one.cpu() for one in product(x.cuda(), **arguments)] for _ in range(3)]
        y, error, norm = found[0]
        assert_accurate(y, x, layer)
        assert_error_sums(y, reference, error, norm)
        for again in found[1:]:
            assert all(torch.equal(one, other) for one, other in zip(again, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vectors", [1, 2, 3, 8])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 8)])
def test_decoding(pattern: tuple[int, int], vectors: int, dtype: torch.dtype) -> None:
    layer = random_layer(4099, 4096, *pattern, dtype)
    x = random_inputs(vectors, 4096, dtype)
    weight = nm_weight(layer.values.cuda(), layer.mask.cuda(), *pattern)
    results = [nm_decode(x.cuda(), weight, layer.bias.cuda()).cpu() for _ in range(3)]
    assert_accurate(results[0], x, layer)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1000, 4096), (77, 260)])
def test_packing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    keep = reference.select_groups(torch.rand(shape, generator=generator), 2, 4)
    values, mask = reference.pack_values(weight, keep), reference.pack_mask(keep)
    permutation = torch.randperm(shape[1], generator=generator)
    assert torch.equal(pack_mask_cuda(keep.cuda()).cpu(), mask)
    assert torch.equal(unpack_mask_cuda(mask.cuda(), shape[1]).cpu(), keep)
    assert torch.equal(pack_values_cuda(weight.cuda(), keep.cuda()).cpu(), values)
    expected = reference.expand(values, mask, shape[1], permutation)
    assert torch.equal(expand_cuda(values.cuda(), mask.cuda(), shape[1], permutation.cuda()).cpu(), expected)


@pytest.mark.parametrize("sizes", [(96, 96, 44032), (1, 300, 4096)])
def test_sums_of_the_search(sizes: tuple[int, int, int]) -> None:
    """Those of an assignment of LLaMA's gate and up projections; to float32's rounding, the same bits each time."""
    n_s, n_t, rows = sizes
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, rows, generator=generator).exp() for n in (n_s, n_t))
    results = [hinge_sums(s.cuda(), t.cuda()).cpu() for _ in range(3)]
    for i in range(n_t):
        exact = (s.double() - t[i].double()).clamp(min=0).sum(dim=1)
        assert ((results[0][i] - exact).abs() <= 1e-6 * exact).all()
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
def test_swaps_of_the_search(pattern: tuple[int, int]) -> None:
    """LLaMA's sizes. Whole scores below 100 add up exactly: the processor's swaps; any: the kept score, to a hair."""
    kept, m = pattern
    generator = torch.Generator().manual_seed(0)
    start, order = torch.randperm(4096, generator=generator), torch.arange(4096)
    whole = torch.randint(0, 100, (4096, 4096), generator=generator).float()
    arguments = 64, kept, m, 32, 1e-6
    assert torch.equal(local_swaps(whole.cuda(), start.cuda(), *arguments).cpu(), local_swaps(whole, start, *arguments))
    scores = torch.randn(4096, 4096, generator=generator).exp() * torch.randn(4096, 1, generator=generator).exp()

    def kept_score(order: torch.Tensor) -> float:
        return float(scores[order].view(4096 // m, m, -1).topk(kept, dim=1).values.sum(dtype=torch.float64))

    found = [local_swaps(scores.cuda(), order.cuda(), *arguments).cpu() for _ in range(3)]
    before, plain = kept_score(order), kept_score(local_swaps(scores, order, *arguments))
    assert kept_score(found[0]) - before == pytest.approx(plain - before, rel=0.01)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [100, 4096])
def test_calibration(tokens: int, dtype: torch.dtype) -> None:
    """4,096 tokens are more than shared memory holds on any GPU."""

    def state(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Windows]:
        exponent = torch.full((1000,), MIN_EXPONENT, dtype=torch.int32, device=device)
        counts = torch.zeros(1000, 4096, dtype=torch.int32, device=device)
        low = torch.full((1000,), torch.inf, device=device)
        windows = Windows(exponent, torch.zeros_like(exponent), counts)
        return low, -low, torch.zeros(1000, dtype=torch.float64, device=device), windows

    plain, on_gpu, again = state("cpu"), state("cuda"), state("cuda")
    for scale in (1, 5):
        x = (scale * torch.randn(tokens, 1000, generator=torch.Generator().manual_seed(scale))).to(dtype)
        add_tokens(x, *plain)
        for one in (on_gpu, again):
            add_tokens_cuda(x.cuda(), *one)
    for place in range(2):
        assert torch.equal(on_gpu[place].cpu(), plain[place])
    torch.testing.assert_close(on_gpu[2].cpu(), plain[2], rtol=1e-12, atol=0)
    assert torch.equal(on_gpu[2], again[2])
    for name in ("exponent", "first_bin", "counts"):
        assert torch.equal(getattr(on_gpu[3], name).cpu(), getattr(plain[3], name))


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_refinement(text: str) -> None:
    """Whole numbers, so that the order of sums is no matter; the rows and the width of a large layer's piece."""
    plain = whole_problem(NMPattern.parse(text), 2048, 192 // NMPattern.parse(text).group_size)
    on_gpu = [tensor.cuda() for tensor in plain]
    count = reference.refine_rows(*plain, 0.5, 1e-6)
    assert refine_rows(*on_gpu, 0.5, 1e-6) == count > 0
    for field in (1, 2):
        assert torch.equal(on_gpu[field].cpu(), plain[field])


def test_a_layer_moved_to_the_gpu_computes_as_on_the_processor() -> None:
    layer, x = random_layer(520, 1024, 2, 4, torch.bfloat16), random_inputs(77, 1024, torch.bfloat16)
    module = PackedLinear.from_packed(layer.values, layer.mask, in_features=1024, pattern="2:4", bias=layer.bias)
    assert module.weight_metadata is None
    module.cuda()
    assert module.weight_metadata is not None
    y, error, norm = module.forward_with_error(x.cuda(), torch.zeros(77, 520, device="cuda").bfloat16())
    assert torch.equal(y, module(x.cuda()))
    assert_accurate(y.cpu(), x, layer)
    assert_error_sums(y.cpu(), torch.zeros(77, 520), error.cpu(), norm.cpu())
