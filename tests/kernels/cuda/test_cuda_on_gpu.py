"""Decoding, packing and calibration statistics on a GPU: `pytest -m gpu`. They need CuPy and sm_80 or later."""

import pytest
import torch
from cuda_tools.layers import assert_accurate, random_inputs, random_layer

from streamprune_kernels import LEAST_EXPONENT, reference
from streamprune_kernels.calibration import Windows, add_tokens, add_tokens_cuda
from streamprune_kernels.decode import nm_decode
from streamprune_kernels.gemm import nm_weight
from streamprune_kernels.packing import expand_cuda, pack_mask_cuda, pack_values_cuda, unpack_mask_cuda

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [100, 4096])
def test_calibration(tokens: int, dtype: torch.dtype) -> None:
    """4,096 tokens are more than shared memory holds on any GPU."""

    def state(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Windows]:
        exponent = torch.full((1000,), LEAST_EXPONENT, dtype=torch.int32, device=device)
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
