"""Products whose input channels are shared out in parts: sums, their order, the choice of parts and tiles, refusals."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cuda_tools import host, runners
from cuda_tools.layers import Layer, assert_accurate, assert_error_sums, random_inputs, random_layer

from streamprune_kernels import gemm
from streamprune_kernels.gemm import (
    COMMON_TILE,
    MAX_SHARED_TOKENS,
    NARROW_TILE,
    SPARSE_STAGES,
    WIDE_TILE,
    Tile,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    parts_for,
    sparse_linear,
    sparse_linear_with_error,
    sparse_tile,
)
from streamprune_kernels.launch import Launch, Run
from streamprune_kernels.metadata import SparseWeight, metadata_of_mask

DTYPES = (torch.float16, torch.bfloat16)
WAYS = (*SPARSE_STAGES, None)  # tiles of the 2:4 product, and the product of any N:M
COLUMNS = 7 * 64
H100 = 132  # multiprocessors


def product(layer: Layer, tile: Tile | None) -> Callable[..., torch.Tensor]:
    """y of x: by the 2:4 product in a tile, or by that of any N:M."""
    if tile is None:
        weight = nm_weight(layer.values, layer.mask, layer.kept, layer.group_size)
        return partial(nm_linear_cuda, weight=weight)
    return partial(sparse_linear, weight=SparseWeight(layer.values, metadata_of_mask(layer.mask)), tile=tile)


def product_with_error(layer: Layer, tile: Tile | None) -> Callable[..., tuple[torch.Tensor, ...]]:
    if tile is None:
        weight = nm_weight(layer.values, layer.mask, layer.kept, layer.group_size)
        return partial(nm_linear_with_error, weight=weight)
    sparse = SparseWeight(layer.values, metadata_of_mask(layer.mask))
    return partial(sparse_linear_with_error, weight=sparse, tile=tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", WAYS)
@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_products_in_parts(dtype: torch.dtype, tile: Tile | None, parts: int) -> None:
    """Of seven steps, so that parts differ by one or have one each; two tiles each way, neither full."""
    layer = random_layer(290, COLUMNS, 2, 4, dtype)
    x = random_inputs(150, COLUMNS, dtype)
    assert_accurate(product(layer, tile)(x, bias=layer.bias, parts=parts, run=host.run), x, layer)


@pytest.mark.parametrize(("kept", "group_size"), [(2, 4), (2, 8), (3, 8), (3, 24)])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_products_of_any_pattern_in_parts(kept: int, group_size: int, parts: int) -> None:
    """The last of four steps is not whole; where a part begins, a group of 24 has begun before."""
    layer = random_layer(20, 216, kept, group_size, torch.float16)
    x = random_inputs(9, 216, torch.float16)
    assert_accurate(product(layer, None)(x, bias=layer.bias, parts=parts, run=host.run), x, layer)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("tile", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_added_in_their_order(dtype: torch.dtype, tile: Tile | None, run: Run) -> None:
    """Bit for bit: float32 sums of the channels of each part, the first of which have a step more; then the bias."""
    layer = random_layer(40, COLUMNS, 2, 4, dtype)
    x = random_inputs(6, COLUMNS, dtype)
    added = torch.zeros(6, 40)
    for first, end in ((0, 192), (192, 320), (320, 448)):
        values, mask = layer.values[:, first // 2 : end // 2].clone(), layer.mask[:, first // 8 : end // 8].clone()
        piece = Layer(layer.dense[:, first:end], values, mask, layer.bias, 2, 4)
        added += product(piece, tile)(x[:, first:end].contiguous(), float_output=True, run=run)
    added += layer.bias
    arguments = {"bias": layer.bias, "parts": 3, "run": run}
    assert torch.equal(product(layer, tile)(x, float_output=True, **arguments), added)
    assert torch.equal(product(layer, tile)(x, **arguments), added.to(dtype))


@pytest.mark.parametrize("y_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("tile", WAYS)
def test_error_sums_are_those_of_the_plain_computation(tile: Tile | None, y_type: torch.dtype) -> None:
    """Two tiles of output features, and where a tile has 32 tokens two of tokens."""
    layer = random_layer(150, COLUMNS, 2, 4, torch.float16)
    x, reference = random_inputs(34, COLUMNS, torch.float16), random_inputs(34, 150, y_type, seed=9)
    y, error, norm = product_with_error(layer, tile)(x, reference=reference, bias=layer.bias, parts=3, run=host.run)
    assert y.dtype == y_type
    assert_accurate(y, x, layer)
    assert_error_sums(y, reference, error, norm)


@pytest.mark.parametrize("tile", [NARROW_TILE, None])
def test_bits_do_not_depend_on_the_runner(tile: Tile | None) -> None:
    """Both tools under three schedules; they may fuse sums of squares, but y is the same."""
    layer = random_layer(70, COLUMNS, 2, 4, torch.bfloat16)
    x, reference = random_inputs(34, COLUMNS, torch.bfloat16), random_inputs(34, 70, torch.bfloat16, seed=9)
    run_it = partial(product_with_error(layer, tile), x, reference=reference, bias=layer.bias, parts=3)
    found = {name: run_it(run=run) for name, run in runners.ALL.items()}
    for name, results in found.items():
        assert torch.equal(results[0], found["host-0"][0])
        of_tool = found[f"{name.partition('-')[0]}-0"]
        assert all(torch.equal(one, other) for one, other in zip(results, of_tool, strict=True))


def launches_of(linear: Callable[..., torch.Tensor], *arguments: object, **settings: object) -> list[Launch]:
    launched: list[Launch] = []
    linear(*arguments, run=launched.append, **settings)
    return launched


@pytest.mark.parametrize("tile", WAYS)
def test_one_part_is_the_product_as_it_was(tile: Tile | None) -> None:
    layer = random_layer(40, COLUMNS, 2, 4, torch.float16)
    x = random_inputs(6, COLUMNS, torch.float16)
    (launch,) = launches_of(product(layer, tile), x, parts=1)
    assert launch.grid[1] == 1
    (shared,) = launches_of(product(layer, tile), x.view(2, 3, COLUMNS), parts=4)
    assert (shared.kernel, shared.grid) == (launch.kernel, (launch.grid[0], 4, 1))
    assert launches_of(product(layer, tile), x[:0], parts=4) == []


@pytest.mark.parametrize("parts", [0, -1, 8])
@pytest.mark.parametrize("tile", [COMMON_TILE, None])
def test_parts_that_cannot_be_are_refused(tile: Tile | None, parts: int) -> None:
    layer = random_layer(40, COLUMNS, 2, 4, torch.float16)
    with pytest.raises(ValueError, match=f"^7 steps of 64 input channels cannot be shared out in {parts} parts$"):
        product(layer, tile)(random_inputs(4, COLUMNS, torch.float16), parts=parts, run=host.run)


@pytest.mark.parametrize(
    ("tiles", "tokens", "steps", "parts"),
    [
        (32, 16, 64, 8),  # 4096x4096: 256 blocks
        (32, 16, 172, 8),
        (64, 256, 64, 4),
        (128, 512, 64, 2),
        (86, 128, 64, 3),
        (132, 256, 64, 2),
        (133, 256, 64, 1),  # a part more would not fit
        (1, 16, 64, 8),  # at least eight steps each
        (1, 16, 7, 1),
        (4, 513, 64, 1),
        (0, 0, 64, 8),
    ],
)
def test_parts_fill_the_device(tiles: int, tokens: int, steps: int, parts: int) -> None:
    assert parts_for(tiles, tokens, steps, H100) == parts
    assert parts_for(tiles, tokens, steps, 0) == 1, "a processor has no multiprocessors"


def test_tiles_follow_the_tokens() -> None:
    for tokens, tile in ((1, NARROW_TILE), (128, NARROW_TILE), (129, COMMON_TILE)):
        assert sparse_tile(4096, tokens, 0) == tile
    assert sparse_tile(4096, 896, 108) == WIDE_TILE
    assert sparse_tile(4096, 768, 108) == COMMON_TILE  # 96 wide tiles
    assert sparse_tile(1 << 20, 20, 108) == NARROW_TILE


@pytest.mark.parametrize("tile", [NARROW_TILE, None])
def test_a_device_chooses(monkeypatch: pytest.MonkeyPatch, tile: Tile | None) -> None:
    """Parts by its multiprocessors; many tokens are never shared out, whatever their number."""
    monkeypatch.setattr(gemm, "_multiprocessors", lambda device: 2)
    layer = random_layer(130, 1024, 2, 4, torch.float16)
    linear = product(layer, tile)
    x = random_inputs(20, 1024, torch.float16)
    assert launches_of(linear, x)[0].grid == (2, 2, 1)
    assert torch.equal(linear(x, run=host.run), linear(x, parts=2, run=host.run))
    many = torch.zeros(MAX_SHARED_TOKENS + 1, 1024).half()
    monkeypatch.setattr(gemm, "_multiprocessors", lambda device: H100)
    assert launches_of(linear, many[1:])[0].grid[1] > 1
    assert launches_of(linear, many)[0].grid[1] == 1
