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
def test_every_number_of_vectors(vectors: int, dtype: torch.dtype, run: Run) -> None:
    layer, weight = pack(35, 256, 2, 4, dtype)
    x = random_inputs(vectors, 256, dtype)
    assert_accurate(nm_decode(x, weight, run=run), x, layer, bias=False)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("out_features", [1, 2, 15, 16, 17, 33])
def test_every_number_of_rows(out_features: int, run: Run) -> None:
    layer, weight = pack(out_features, 128, 2, 4)
    x = random_inputs(3, 128, torch.float16)
    assert_accurate(nm_decode(x, weight, layer.bias, run=run), x, layer)


@pytest.mark.parametrize(("vectors", "kept", "group_size"), [(1, 2, 4), (5, 3, 8)])
def test_bits_depend_on_neither_schedule_nor_tool(vectors: int, kept: int, group_size: int) -> None:
    layer, weight = pack(21, 2176, kept, group_size)
    x = random_inputs(vectors, 2176, torch.float16)
    results = [nm_decode(x, weight, layer.bias, run=run) for run in runners.ALL.values()]
    assert len(results) == 6
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_vector_s_result_does_not_depend_on_the_others() -> None:
    layer, weight = pack(18, 256, 4, 8)
    x = random_inputs(8, 256, torch.float16)
    together = nm_decode(x, weight, layer.bias, run=runners.PLAIN["host"])
    for i in range(8):
        assert torch.equal(
            nm_decode(x[i : i + 1].clone(), weight, layer.bias, run=runners.PLAIN["host"])[0], together[i]
        )


def test_special_values_come_through() -> None:
    """Infinity and NaN reach just the outputs whose rows keep their column; a dropped column's does not count."""
    layer, weight = pack(16, 128, 2, 4)
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
