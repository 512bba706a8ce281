"""Products of packed weights run from their PTX: accuracy at every residue of the stages, edges, three schedules."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from cuda_tools import ptx
from cuda_tools.layers import assert_accurate, assert_error_sums, random_inputs, random_layer

from streamprune_kernels.gemm import (
    SPARSE_STAGES,
    Tile,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear_with_error,
)
from streamprune_kernels.metadata import sparse_weight

DTYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", SPARSE_STAGES)
@pytest.mark.parametrize("steps", range(1, 6))
def test_sparse_product_over_every_residue_of_the_stages(dtype: torch.dtype, tile: Tile, steps: int) -> None:
    """Metadata by its kernel, too; sums of errors beside."""
    layer = random_layer(72, 64 * steps, 2, 4, dtype)
    weight = sparse_weight(layer.values, layer.mask, run=ptx.run)
    x, reference = random_inputs(20, 64 * steps, dtype), random_inputs(20, 72, dtype, seed=9)
    y, error, norm = sparse_linear_with_error(x, weight, reference, layer.bias, tile=tile, run=ptx.run)
    assert_accurate(y, x, layer)
    assert_error_sums(y, reference, error, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "group_size"), [(2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (3, 8), (5, 16)])
@pytest.mark.parametrize("in_features", [16, 64, 144, 208, 320])
def test_product_of_any_pattern(dtype: torch.dtype, kept: int, group_size: int, in_features: int) -> None:
    """Each residue of the stages, with a last step that is whole and one that is not."""
    layer = random_layer(40, in_features, kept, group_size, dtype)
    x = random_inputs(9, in_features, dtype)
    weight = nm_weight(layer.values, layer.mask, kept, group_size)
    assert_accurate(nm_linear_cuda(x, weight, layer.bias, run=ptx.run), x, layer)


@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
@pytest.mark.parametrize(("out_features", "tokens"), [(1, 1), (65, 129), (300, 7)])
def test_edges(tile: Tile | None, out_features: int, tokens: int) -> None:
    """`None`: the product of any N:M."""
    layer = random_layer(out_features, 128, 2, 4, torch.bfloat16)
    x, reference = random_inputs(tokens, 128, torch.bfloat16), torch.zeros(tokens, out_features).bfloat16()
    if tile is None:
        weight = nm_weight(layer.values, layer.mask, 2, 4)
        y, error, norm = nm_linear_with_error(x, weight, reference, run=ptx.run)
    else:
        sparse = sparse_weight(layer.values, layer.mask, run=ptx.run)
        y, error, norm = sparse_linear_with_error(x, sparse, reference, tile=tile, run=ptx.run)
    assert_accurate(y, x, layer, bias=False)
    assert_error_sums(y, reference, error, norm)


@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
def test_bits_do_not_depend_on_the_schedule(tile: Tile | None) -> None:
    layer = random_layer(140, 256, 2, 4, torch.float16)
    x, reference = random_inputs(130, 256, torch.float16), random_inputs(130, 140, torch.float16)
    results = []
    for schedule in ptx.SCHEDULES:
        run = partial(ptx.run, schedule=schedule)
        if tile is None:
            weight = nm_weight(layer.values, layer.mask, 2, 4)
            results.append(nm_linear_with_error(x, weight, reference, layer.bias, run=run))
        else:
            sparse = sparse_weight(layer.values, layer.mask, run=run)
            results.append(sparse_linear_with_error(x, sparse, reference, layer.bias, tile=tile, run=run))
    for one, other in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
