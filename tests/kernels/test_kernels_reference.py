"""The plain torch kernels against numpy and against the masked linear, bit for bit."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import streamprune_kernels
from streamprune_kernels import expand, nm_linear, pack_mask, pack_values, unpack_mask

PATTERNS = [(2, 4), (4, 8), (1, 4), (2, 8), (1, 2)]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}

repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
shapes = st.tuples(st.sampled_from(PATTERNS), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))


def random_keep(kept: int, group_size: int, rows: int, groups: int, generator: torch.Generator) -> torch.Tensor:
    """A mask [rows, groups * group_size] that keeps exactly `kept` of each group."""
    order = torch.rand(rows, groups, group_size, generator=generator).argsort(dim=2)
    return (order < kept).view(rows, groups * group_size)


def random_bits(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern of the dtype: both zeros, subnormals, infinities and NaN with payloads among them."""
    info = torch.iinfo(BITS[dtype])
    numbers = torch.randint(info.min, info.max, shape, dtype=BITS[dtype], generator=generator)
    numbers[torch.rand(shape, generator=generator) < 0.2] = info.min  # the pattern of -0.0
    return numbers.view(dtype)


@given(shapes, st.sampled_from(list(BITS)))
@repeatable
def test_pack_and_expand_keep_every_bit(shape: tuple[tuple[int, int], int, int, int], dtype: torch.dtype) -> None:
    (kept, group_size), rows, groups, seed = shape
    generator = torch.Generator().manual_seed(seed)
    keep = random_keep(kept, group_size, rows, groups, generator)
    weight = random_bits((rows, groups * group_size), dtype, generator)
    values, mask = pack_values(weight, keep), pack_mask(keep)
    assert values.shape == (rows, groups * kept)
    assert values.dtype == dtype
    dense = expand(values, mask, groups * group_size)
    assert dense.dtype == dtype
    assert torch.equal(dense.view(BITS[dtype]), torch.where(keep, weight.view(BITS[dtype]), 0))


@given(shapes)
@repeatable
def test_masks_are_numpys_packbits_little_end_first(shape: tuple[tuple[int, int], int, int, int]) -> None:
    (kept, group_size), rows, groups, seed = shape
    keep = random_keep(kept, group_size, rows, groups, torch.Generator().manual_seed(seed))
    mask = pack_mask(keep)
    assert mask.dtype == torch.uint8
    assert numpy.array_equal(mask.numpy(), numpy.packbits(keep.numpy(), axis=1, bitorder="little"))
    unpacked = unpack_mask(mask, groups * group_size)
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, keep)


@pytest.mark.parametrize(
    ("channels", "in_features", "expected"),
    [
        ([0], 4, [0b0001]),
        ([3], 4, [0b1000]),
        ([0, 2, 5, 7], 8, [0b10100101]),
        ([8, 9], 12, [0, 0b0011]),
        ([11], 12, [0, 0b1000]),
        ([0, 8, 16], 17, [1, 1, 1]),
    ],
    ids=str,
)
def test_mask_bit_of_channel_j_is_bit_j_mod_8_of_byte_j_div_8(
    channels: list[int], in_features: int, expected: list[int]
) -> None:
    keep = torch.zeros(1, in_features, dtype=torch.bool)
    keep[0, channels] = True
    assert pack_mask(keep).tolist() == [expected]
    assert unpack_mask(torch.tensor([expected], dtype=torch.uint8), in_features).nonzero()[:, 1].tolist() == channels


@pytest.mark.parametrize("in_features", [2, 4, 6, 12, 20])
def test_padding_bits_are_zero_and_ignored(in_features: int) -> None:
    keep = torch.ones(3, in_features, dtype=torch.bool)
    mask = pack_mask(keep)
    last_bits = in_features - 8 * (mask.shape[1] - 1)
    assert mask[:, -1].tolist() == [2**last_bits - 1] * 3
    assert torch.equal(
        unpack_mask(mask | torch.tensor([*[0] * (mask.shape[1] - 1), 255]).to(torch.uint8), in_features), keep
    )


def test_mask_of_a_transposed_view_is_packed_by_its_values() -> None:
    keep = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(pack_mask(keep.T), pack_mask(keep.T.contiguous()))


def test_dropped_weights_expand_to_positive_zero_and_kept_zeros_keep_their_sign() -> None:
    weight = torch.tensor([[-0.0, 0.0, -1.0, -2.0]])
    keep = torch.tensor([[True, True, False, False]])
    dense = expand(pack_values(weight, keep), pack_mask(keep), 4)
    assert dense.view(torch.int32).tolist() == [[-(2**31), 0, 0, 0]]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nm_linear_is_the_masked_linear(
    pattern: tuple[int, int], stored: torch.dtype, computed: torch.dtype, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    keep = random_keep(*pattern, 24, 48 // pattern[1], generator)
    weight = torch.randn(24, 48, generator=generator).to(stored)
    x = torch.randn(2, 5, 48, generator=generator).to(computed)
    bias = torch.randn(24, generator=generator).to(computed) if with_bias else None
    y = nm_linear(x, pack_values(weight, keep), pack_mask(keep), bias)
    masked = torch.where(keep, weight, torch.zeros((), dtype=stored)).to(computed)
    assert y.dtype == computed
    assert torch.equal(y, functional.linear(x, masked, bias))


def test_nm_linear_by_hand() -> None:
    values = torch.tensor([[2.0, 3.0], [-1.0, 0.5]])
    mask = torch.tensor([[0b1010], [0b0011]], dtype=torch.uint8)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert nm_linear(x, values, mask).tolist() == [[3020.0, 4.0]]
    assert nm_linear(x, values, mask, torch.tensor([0.0, 1.0])).tolist() == [[3020.0, 5.0]]


def test_the_package_exports_its_kernels() -> None:
    types = "KernelUnavailable NMWeight SparseWeight"
    functions = (
        "add_range all_finite count_values expand hinge_sums kept_sums library local_swaps nm_linear nm_linear_cuda "
        "nm_linear_with_error nm_weight nth_best pack_mask pack_values packed_linear packed_linear_with_error "
        "packed_metadata refine_rows select_groups select_weights sparse_linear sparse_linear_with_error "
        "sparse_unsuitable sparse_weight squared_distances unpack_mask unsupported_reason weighted_squares"
    )
    names = [*types.split(), *functions.split()]
    assert streamprune_kernels.__all__ == ["FEW_ROWS", "MAX_SHARED_TOKENS", "MIN_EXPONENT", *names]
    assert all(callable(getattr(streamprune_kernels, name)) for name in names)
