"""The same checks on a GPU: `pytest -m gpu`. They need CuPy and sm_80 or later."""

from dataclasses import replace

import pytest
import torch
from cuda_tools.layers import assert_accurate, random_inputs, random_layer
from cuda_tools.mutants import CASES

from streamprune_kernels.gemm import sparse_linear
from streamprune_kernels.launch import Launch, on_device
from streamprune_kernels.metadata import sparse_weight

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
