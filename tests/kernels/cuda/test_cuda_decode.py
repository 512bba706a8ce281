"""Packed weights times a few vectors, run on the CPU from text and from PTX: accuracy, edges, patterns, refusals."""

import pytest
import torch
from cuda_tools import runners
from cuda_tools.layers import Layer, assert_accurate, random_inputs, random_layer

from streamprune_kernels.decode import decode_unsuitable, nm_decode, tile_columns
from streamprune_kernels.gemm import NMWeight, nm_weight
from streamprune_kernels.launch import Launch, Run

DTYPES = (torch.float16, torch.bfloat16)
# kept, group_size, in_features: inside one tile, two tiles with a part, tiles that the pattern makes narrower
CASES = ((2, 4, 128), (2, 4, 2176), (4, 8, 2304), (1, 4, 4096), (3, 6, 384), (3, 8, 3072), (5, 16, 2176), (7, 32, 2048),
         (1, 1, 256), (1, 24, 3072))  # fmt: skip
BOTH_WAYS = ((2, 4), (4, 8))  # 2:4 has kernels of its own


def pack(
    out_features: int, in_features: int, kept: int, group_size: int, dtype: torch.dtype = torch.float16
) -> tuple[Layer, NMWeight]:
    layer = random_layer(out_features, in_features, kept, group_size, dtype)
    return layer, nm_weight(layer.values, layer.mask, kept, group_size)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "group_size", "in_features"), CASES)
def test_every_pattern(kept: int, group_size: int, in_features: int, dtype: torch.dtype, run: Run) -> None:
    layer, weight = pack(19, in_features, kept, group_size, dtype)
    x = random_inputs(2, in_features, dtype)
    assert_accurate(nm_decode(x, weight, layer.bias, run=run), x, layer)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", range(1, 9))
@pytest.mark.parametrize("pattern", BOTH_WAYS)
def test_every_number_of_vectors(pattern: tuple[int, int], vectors: int, dtype: torch.dtype, run: Run) -> None:
    layer, weight = pack(35, 256, *pattern, dtype)
    x = random_inputs(vectors, 256, dtype)
    assert_accurate(nm_decode(x, weight, run=run), x, layer, bias=False)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("out_features", [1, 2, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("pattern", BOTH_WAYS)
def test_every_number_of_rows(pattern: tuple[int, int], vectors: int, out_features: int, run: Run) -> None:
    layer, weight = pack(out_features, 128, *pattern)
    x = random_inputs(vectors, 128, torch.float16)
    assert_accurate(nm_decode(x, weight, layer.bias, run=run), x, layer)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vectors", "in_features"), [(1, 9344), (2, 5248), (3, 6272), (4, 3328), (6, 4224), (8, 3200)])
def test_several_tiles_of_2_4(vectors: int, in_features: int, dtype: torch.dtype, run: Run) -> None:
    """A tile has 8,192 columns for one vector, 4,096 for two, 2,048 for more; the last and its turns are not full."""
    layer, weight = pack(5, in_features, 2, 4, dtype)
    x = random_inputs(vectors, in_features, dtype)
    assert_accurate(nm_decode(x, weight, layer.bias, run=run), x, layer)


@pytest.mark.parametrize(
    ("vectors", "kept", "group_size", "in_features"),
    [(1, 2, 4, 9344), (2, 2, 4, 2176), (3, 2, 4, 3328), (8, 2, 4, 3328), (1, 4, 8, 2176), (5, 3, 8, 2304)],
)
def test_bits_depend_on_neither_schedule_nor_tool(vectors: int, kept: int, group_size: int, in_features: int) -> None:
    layer, weight = pack(21, in_features, kept, group_size)
    x = random_inputs(vectors, in_features, torch.float16)
    results = [nm_decode(x, weight, layer.bias, run=run) for run in runners.ALL.values()]
    assert len(results) == 6
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("pattern", BOTH_WAYS)
def test_a_vector_s_result_does_not_depend_on_the_others(pattern: tuple[int, int]) -> None:
    """Nor on the kernel, though those of 2:4 give a warp other numbers of rows."""
    layer, weight = pack(18, 2304, *pattern)
    x = random_inputs(8, 2304, torch.float16)
    together = nm_decode(x, weight, layer.bias, run=runners.PLAIN["host"])
    for vectors in (1, 2, 4):
        for i in range(0, 8, vectors):
            few = nm_decode(x[i : i + vectors].clone(), weight, layer.bias, run=runners.PLAIN["host"])
            assert torch.equal(few, together[i : i + vectors])


def test_2_4_has_kernels_of_its_own() -> None:
    launched: list[Launch] = []
    for kept, group_size in ((2, 4), (1, 2), (4, 8)):
        weight = pack(33, 256, kept, group_size, torch.bfloat16)[1]
        for vectors in (1, 3, 8):
            nm_decode(random_inputs(vectors, 256, torch.bfloat16), weight, run=launched.append)
    own, others = launched[:3], launched[3:]
    assert [(one.kernel, one.grid[0]) for one in own] == [
        ("decode24_bf16_1", 5), ("decode24_bf16_4", 3), ("decode24_bf16_8", 3),
    ]  # fmt: skip
    assert [(one.kernel, one.grid[0]) for one in others] == 2 * [
        ("decode_bf16_1", 3), ("decode_bf16_4", 3), ("decode_bf16_8", 3),
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", BOTH_WAYS)
def test_special_values_come_through(pattern: tuple[int, int]) -> None:
    """Infinity and NaN reach just the outputs whose rows keep their column; a dropped column's does not count."""
    layer, weight = pack(16, 128, *pattern)
    x = random_inputs(1, 128, torch.float16)
    x[0, 5] = torch.inf
    keeps = layer.dense[:, 5] != 0
    assert keeps.any()
    assert not keeps.all()
    for run in runners.PLAIN.values():
        assert torch.equal(~torch.isfinite(nm_decode(x, weight, run=run)[0]), keeps)


@pytest.mark.parametrize(("kept", "group_size", "in_features"), CASES)
def test_tiles_end_where_masks_and_values_are_whole_chunks(kept: int, group_size: int, in_features: int) -> None:
    columns = tile_columns(pack(2, in_features, kept, group_size)[1])
    assert 0 < columns <= min(in_features, 2048)
    if columns < in_features:
        assert columns % 128 == columns % group_size == columns // group_size * kept % 8 == 0


def nothing(launch: Launch) -> None:
    raise AssertionError(launch)


def test_what_is_not_taken_names_the_reason() -> None:
    weight = pack(4, 256, 2, 4)[1]
    x = random_inputs(2, 256, torch.float16)
    bias = torch.zeros(4).half()
    for arguments, message in [
        ((x.bfloat16(), weight), "both float16 or both bfloat16"),
        ((x[:, :128].clone(), weight), r"is not \[vectors, 256\]"),
        ((x[0], weight), r"is not \[vectors, 256\]"),
        ((x.repeat(5, 1), weight), "1 to 8 vectors at once, not 10: use nm_linear_cuda"),
        ((x[:0], weight), "1 to 8 vectors at once, not 0"),
        ((x, weight, bias[:3]), "bias .* does not fit"),
        ((x, weight, bias.float()), "bias .* does not fit"),
        ((torch.zeros(2 * 256 + 1).half()[1:].view(2, 256), weight), "x is not contiguous and aligned"),
        ((x, NMWeight(weight.values, weight.mask.to("meta"), 2, 4)), "mask is on meta"),
        ((random_inputs(1, 192, torch.float16), pack(4, 192, 2, 4)[1]), "multiples of 128, not 192"),
        ((random_inputs(1, 384, torch.float16), pack(4, 384, 1, 32)[1]), "multiple of 8 values, not 12"),
        ((random_inputs(1, 3968, torch.float16), pack(4, 3968, 2, 31)[1]), "does not take 2:31 of 3968"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            nm_decode(*arguments, run=nothing)
        assert "\n" not in str(refusal.value)
    assert decode_unsuitable(weight, 8) is None
