"""Products of packed weights, run on the CPU from the kernels' own text: accuracy, edges, patterns, refusals."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from cuda_tools import host, ptx
from cuda_tools.layers import assert_accurate, assert_error_sums, random_inputs, random_layer

from streamprune_kernels.gemm import (
    COMMON_TILE,
    SPARSE_STAGES,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear,
    sparse_linear_with_error,
)
from streamprune_kernels.launch import Launch
from streamprune_kernels.metadata import SparseWeight, metadata_of_mask, sparse_weight

DTYPES = (torch.float16, torch.bfloat16)
PATTERNS = ((2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (1, 8), (3, 8), (3, 6), (5, 16), (7, 32))
# Output features and tokens that end before, on and after the edges of tiles, of 64 rows and of 16 bytes.
EDGES = ((1, 1), (8, 127), (63, 2), (65, 129), (129, 33), (200, 130), (300, 7))


def pack(out_features: int, in_features: int, dtype: torch.dtype, seed: int = 0):
    layer = random_layer(out_features, in_features, 2, 4, dtype, seed)
    return layer, SparseWeight(layer.values, metadata_of_mask(layer.mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", SPARSE_STAGES)
@pytest.mark.parametrize("steps", range(1, 9))
def test_sparse_product_over_every_residue_of_the_stages(dtype, tile, steps):
    layer, weight = pack(72, 64 * steps, dtype)
    x = random_inputs(40, 64 * steps, dtype)
    assert_accurate(sparse_linear(x, weight, layer.bias, tile=tile, run=host.run), x, layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", SPARSE_STAGES)
@pytest.mark.parametrize(("out_features", "tokens"), EDGES)
def test_sparse_product_at_the_edges(dtype, tile, out_features, tokens):
    layer, weight = pack(out_features, 128, dtype)
    x = random_inputs(tokens, 128, dtype)
    assert_accurate(sparse_linear(x, weight, tile=tile, run=host.run), x, layer, bias=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "group_size"), PATTERNS)
def test_product_of_every_pattern(dtype, kept, group_size):
    """in_features is no multiple of 64."""
    in_features = 24 * group_size if group_size % 8 else 5 * group_size if group_size > 8 else 88
    layer = random_layer(140, in_features, kept, group_size, dtype)
    x = random_inputs(30, in_features, dtype)
    weight = nm_weight(layer.values, layer.mask, kept, group_size)
    assert_accurate(nm_linear_cuda(x, weight, layer.bias, run=host.run), x, layer)


@pytest.mark.parametrize(("kept", "group_size"), [(2, 4), (2, 8), (3, 8)])
@pytest.mark.parametrize("in_features", [8, 56, 64, 72, 120, 136, 192, 200, 256, 328])
def test_product_of_every_length(kept, group_size, in_features):
    layer = random_layer(20, in_features, kept, group_size, torch.float16)
    x = random_inputs(9, in_features, torch.float16)
    weight = nm_weight(layer.values, layer.mask, kept, group_size)
    assert_accurate(nm_linear_cuda(x, weight, run=host.run), x, layer, bias=False)


@pytest.mark.parametrize(("out_features", "tokens"), EDGES)
def test_product_of_any_pattern_at_the_edges(out_features, tokens):
    layer = random_layer(out_features, 72, 4, 8, torch.bfloat16)
    x = random_inputs(tokens, 72, torch.bfloat16)
    weight = nm_weight(layer.values, layer.mask, 4, 8)
    assert_accurate(nm_linear_cuda(x, weight, layer.bias, run=host.run), x, layer)


def test_tiles_give_the_same_bits():
    layer, weight = pack(150, 320, torch.bfloat16)
    x = random_inputs(140, 320, torch.bfloat16)
    first, *others = (sparse_linear(x, weight, layer.bias, tile=tile, run=host.run) for tile in SPARSE_STAGES)
    assert all(torch.equal(first, other) for other in others)


def test_tiles_beyond_the_first_group():
    """Nine tiles of output features: blocks go through groups of eight."""
    layer, weight = pack(1100, 64, torch.float16)
    x = random_inputs(130, 64, torch.float16)
    assert_accurate(sparse_linear(x, weight, tile=COMMON_TILE, run=host.run), x, layer, bias=False)
    dense = nm_weight(layer.values, layer.mask, 2, 4)
    assert_accurate(nm_linear_cuda(x, dense, run=host.run), x, layer, bias=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
def test_shim_and_interpreter_give_the_same_bits(dtype, tile):
    """Two independent readings of the layouts, one of the C++ text and one of the PTX."""
    layer, weight = pack(40, 192, dtype)
    x, reference = random_inputs(30, 192, dtype), random_inputs(30, 40, dtype)
    dense = nm_weight(layer.values, layer.mask, 2, 4)
    results = [
        nm_linear_with_error(x, dense, reference, layer.bias, run=run)
        if tile is None
        else sparse_linear_with_error(x, weight, reference, layer.bias, tile=tile, run=run)
        for run in (host.run, ptx.run)
    ]
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(*results, strict=True):  # sums of squares may be fused on one of them
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_output_is_the_unrounded_sum(dtype):
    layer, weight = pack(70, 320, dtype)
    x = random_inputs(33, 320, dtype)
    dense = nm_weight(layer.values, layer.mask, 2, 4)
    for linear in (partial(sparse_linear, x, weight), partial(nm_linear_cuda, x, dense)):
        y = linear(layer.bias, float_output=True, run=host.run)
        assert y.dtype == torch.float32
        assert_accurate(y, x, layer)
        assert torch.equal(y.to(dtype), linear(layer.bias, run=host.run))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_four_runs_on_sparse_tensor_cores(dtype):
    layer = random_layer(70, 192, 1, 4, dtype)
    x = random_inputs(33, 192, dtype)
    weight = sparse_weight(layer.values, layer.mask, run=host.run)
    assert_accurate(sparse_linear(x, weight, layer.bias, run=host.run), x, layer)


@pytest.mark.parametrize("y_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
def test_error_sums_are_those_of_the_plain_computation(y_type, tile):
    """`None`: the kernel for any pattern. Both products have several tiles of tokens and of output features."""
    layer, weight = pack(300, 128, torch.float16)
    x = random_inputs(290, 128, torch.float16)
    reference = (x.float() @ random_layer(300, 128, 4, 4, torch.float16).dense.float().T).to(y_type)
    if tile is None:
        dense = nm_weight(layer.values, layer.mask, 2, 4)
        y, error, norm = nm_linear_with_error(x, dense, reference, layer.bias, run=host.run)
    else:
        y, error, norm = sparse_linear_with_error(x, weight, reference, layer.bias, tile=tile, run=host.run)
    assert y.dtype == y_type
    assert_accurate(y, x, layer)
    assert_error_sums(y, reference, error, norm)


@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
def test_bits_do_not_depend_on_the_schedule(tile):
    layer, weight = pack(140, 256, torch.float16)
    x = random_inputs(130, 256, torch.float16)
    reference = random_inputs(130, 140, torch.float16)
    results = []
    for schedule in range(4):
        run = partial(host.run, schedule=schedule)
        if tile is None:
            dense = nm_weight(layer.values, layer.mask, 2, 4)
            results.append(nm_linear_with_error(x, dense, reference, layer.bias, run=run))
        else:
            results.append(sparse_linear_with_error(x, weight, reference, layer.bias, tile=tile, run=run))
    for one, other in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tile", [*SPARSE_STAGES, None])
def test_work_done(tile):
    """As many products as the tiles have, half as many on sparse tensor cores, and no bank conflicts of ldmatrix."""
    layer, weight = pack(300, 320, torch.float16)
    x = random_inputs(140, 320, torch.float16)
    counted = []

    def run(launch: Launch) -> None:
        counted.append(host.measure(launch))

    if tile is None:
        nm_linear_cuda(x, nm_weight(layer.values, layer.mask, 2, 4), run=run)
    else:
        sparse_linear(x, weight, tile=tile, run=run)
    (counts,) = counted
    out, tokens = tile or COMMON_TILE
    tile_products = -(-300 // out) * -(-140 // tokens) * (out // 16) * (tokens // 8)
    assert counts.mma_dense == (tile_products * 320 // 16 if tile is None else 0)
    assert counts.mma_sparse == (0 if tile is None else tile_products * 320 // 32)
    assert counts.bank_conflicts == 0


def test_leading_dimensions_are_kept():
    _, weight = pack(40, 64, torch.float16)
    x = random_inputs(6, 64, torch.float16)
    y = sparse_linear(x.view(2, 3, 64), weight, run=host.run)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), sparse_linear(x, weight, run=host.run))


def test_without_tokens_nothing_is_launched():
    _, weight = pack(40, 64, torch.float16)

    def run(launch: Launch) -> None:
        raise AssertionError(launch)

    y, error, norm = sparse_linear_with_error(torch.empty(0, 64).half(), weight, torch.empty(0, 40).half(), run=run)
    assert y.shape == (0, 40)
    assert torch.equal(torch.cat([error, norm]), torch.zeros(80, dtype=torch.float64))


def refusals():
    x = random_inputs(4, 64, torch.float16)
    reference = torch.zeros(4, 40).half()
    return [
        ({"x": x.bfloat16()}, "both float16 or both bfloat16"),
        ({"x": x.float()}, "both float16 or both bfloat16"),
        ({"x": x[:, :32]}, "does not have the weight's 64 in_features"),
        ({"x": x.T.contiguous().T}, "x is not contiguous"),
        ({"x": torch.zeros(4 * 64 + 1).half()[1:].view(4, 64)}, "aligned to 16 bytes"),
        ({"x": x.clone().requires_grad_()}, "the product has no gradient: its x must not require one; detach it"),
        ({"x": x.double()}, "both float16 or both bfloat16"),
        ({"x": torch.zeros(4, 0).half()}, "does not have the weight's 64 in_features"),
        ({"x": torch.tensor(1.0).half()}, "does not have the weight's 64 in_features"),
        ({"x": x.to("meta")}, "is on cpu, x on meta"),
        ({"bias": torch.zeros(41).half()}, "bias .* does not fit"),
        ({"bias": torch.zeros(40)}, "bias .* does not fit"),
        ({"reference": reference[:3]}, "reference .* is not y's"),
        ({"reference": reference.bfloat16()}, "reference .* is not y's"),
        ({"reference": reference.to("meta")}, "reference is on meta"),
    ]


@pytest.mark.parametrize(("changed", "message"), refusals())
def test_tensors_that_do_not_fit_are_refused(changed, message):
    layer, weight = pack(40, 64, torch.float16)
    fitting = {"x": random_inputs(4, 64, torch.float16), "reference": torch.zeros(4, 40).half(), "bias": layer.bias}
    dense = nm_weight(layer.values, layer.mask, 2, 4)
    for product in (partial(sparse_linear_with_error, weight=weight), partial(nm_linear_with_error, weight=dense)):
        product(**fitting, run=lambda launch: None)
        with pytest.raises(ValueError, match=message) as refusal:
            product(**{**fitting, **changed}, run=lambda launch: None)
        assert "\n" not in str(refusal.value)


def test_tiles_that_no_kernel_has_are_refused():
    _, weight = pack(40, 64, torch.float16)
    with pytest.raises(ValueError, match=r"one of \(256, 128\), .*, not \(64, 64\)"):
        sparse_linear(random_inputs(4, 64, torch.float16), weight, tile=(64, 64), run=host.run)


def test_weights_that_are_not_packed_are_refused():
    layer = random_layer(8, 64, 2, 4, torch.float16)
    broken = layer.mask.clone()
    broken[7, 7] ^= 1
    for arguments, message in [
        ((layer.values, broken, 2, 4), "keep 2 values in every group of 4"),
        ((layer.values, layer.mask, 1, 4), "are not 1:4"),
        ((layer.values[:7], layer.mask, 2, 4), "are not 2:4"),
        ((layer.values, layer.mask, 32, 64), "M up to 32"),
        ((layer.values, layer.mask, 0, 4), "M up to 32"),
        ((layer.values, layer.mask.int(), 2, 4), "no packed weight"),
        ((random_layer(8, 24, 2, 4, torch.float16).values, layer.mask[:, :3], 8, 16), "are not 8:16"),
        ((layer.values[:, :0], layer.mask[:, :0], 2, 4), "no packed weight"),
        ((layer.values[:0], layer.mask[:0], 2, 4), "no packed weight"),
        ((random_layer(8, 60, 2, 4, torch.float16).values, layer.mask, 2, 4), "multiple of 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            nm_weight(*arguments)
