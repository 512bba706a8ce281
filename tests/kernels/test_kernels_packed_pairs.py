"""Products in pairs of bfloat16, where the processor has instructions for them, held against those of floats."""

import pytest
import torch

from streamprune_kernels import expand, pack_mask, pack_values, packed_linear, packed_product, select_groups

product = packed_product.packed_product
pytestmark = pytest.mark.skipif(not packed_product.has_pairs(), reason="this processor lacks AVX-512 BF16")
kernels = pytest.mark.parametrize("many", [False, True], ids=["few", "many"])


def packed(out_features: int, groups: int, kept: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, groups * group_size, generator=generator).to(torch.bfloat16)
    keep = select_groups(torch.rand(weight.shape, generator=generator), kept, group_size)
    return pack_values(weight, keep), pack_mask(keep)


def inputs(rows: int, in_features: int) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


@kernels
@pytest.mark.parametrize(
    "pattern", [(2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (3, 4), (5, 16), (1, 64), (63, 64)], ids=str
)
def test_error_is_at_most_twice_that_of_plain_float32(pattern: tuple[int, int], many: bool) -> None:
    """Over 1,280 or more inputs; patterns that leave a value without a partner in blocks of 32 columns among them."""
    values, mask = packed(60, -(-1280 // pattern[1]), *pattern)
    weight = expand(values, mask, -(-1280 // pattern[1]) * pattern[1]).double()
    x = inputs(70, weight.shape[1])
    exact = x.double() @ weight.T
    plain = torch.nn.functional.linear(x.float(), weight.float())
    y = product(x, values, mask, many=many, pairs=True)
    assert y.dtype == torch.float32
    assert (y - exact).norm() <= 2 * (plain - exact).norm()


@kernels
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 64, 70, 255, 257, 600])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 5), (3, 15), (17, 35), (33, 160), (530, 165)])
def test_ragged_shapes(out_features: int, in_features: int, rows: int, many: bool) -> None:
    values, mask = packed(out_features, in_features // 5, 2, 5)
    x = inputs(rows, in_features)
    y = product(x, values, mask, many=many, pairs=True)
    torch.testing.assert_close(y, x.float() @ expand(values, mask, in_features).float().T, rtol=1e-5, atol=1e-5)


@kernels
def test_results_do_not_depend_on_threads_nor_on_the_other_rows(many: bool) -> None:
    values, mask = packed(531, 70, 2, 4)
    x = inputs(300, 280)
    former = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(product(x, values, mask, many=many, pairs=True))
    torch.set_num_threads(former)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for rows in (slice(0, 1), slice(5, 8), slice(100, 150), slice(40, 300)):
        assert torch.equal(product(x[rows], values, mask, many=many, pairs=True), found[0][rows])


@kernels
@pytest.mark.parametrize("in_features", [100, 128])
def test_permutation_gathers_the_inputs(in_features: int, many: bool) -> None:
    """Of 128 inputs tokens are read as they lie, where nothing permutes them; of 100 they are laid out first."""
    values, mask = packed(33, in_features // 4, 2, 4)
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    x = inputs(40, in_features)
    assert torch.equal(
        product(x, values, mask, order, many=many, pairs=True),
        product(x[:, order], values, mask, many=many, pairs=True),
    )


def test_infinite_tokens_stay_infinite_beside_a_value_without_a_partner() -> None:
    """The missing partner's product is 0, not 0 times infinity; subnormal numbers alone are taken for zero."""
    values, mask = torch.tensor([[2.0], [-1.0]]).bfloat16(), torch.tensor([[1], [1]], dtype=torch.uint8)
    x = torch.tensor([[torch.inf, torch.nan]]).bfloat16()
    assert product(x, values, mask, many=True, pairs=True).tolist() == [[torch.inf, -torch.inf]]
    least = torch.finfo(torch.bfloat16).smallest_normal
    x = torch.tensor([[least, 0.0], [least / 2, 0.0]]).bfloat16()
    assert product(x, values, mask, many=True, pairs=True)[:, 0].tolist() == [2 * least, 0.0]


@kernels
def test_results_are_rounded_once_to_the_dtype_asked_for(many: bool) -> None:
    values, mask = packed(40, 70, 2, 4)
    x = inputs(50, 280)
    y = product(x, values, mask, many=many, pairs=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = product(x, values, mask, many=many, pairs=True, dtype=dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, y.to(dtype))


@kernels
@pytest.mark.parametrize("bits", [0b0000, 0b0111, 0b1111])
def test_masks_that_keep_another_number_are_refused(bits: int, many: bool) -> None:
    values, mask = packed(40, 2, 2, 4)
    mask[39] = bits | bits << 4
    with pytest.raises(ValueError, match="a mask does not keep 4 values in every row"):
        product(inputs(40, 8), values, mask, many=many, pairs=True)


@kernels
def test_they_run_for_bfloat16_alone(many: bool) -> None:
    values, mask = packed(256, 150, 2, 4)
    x = inputs(packed_product.FEW_ROWS + many, 600)
    pairs, floats = product(x, values, mask, many=many, pairs=True), product(x, values, mask, many=many, pairs=False)
    assert not torch.equal(pairs, floats)
    assert torch.equal(product(x, values, mask), pairs)
    assert torch.equal(product(x.float(), values, mask), floats)
    assert torch.equal(product(x, values.float(), mask), product(x.float(), values.float(), mask))
    assert torch.equal(packed_linear(x, values, mask), pairs.bfloat16())


def test_few_rows_are_rounded_as_torch_rounds() -> None:
    """Ties to even either way, infinity from what is too large, and NaN."""
    columns = {
        "tie down": [1, 2**-8],
        "tie up": [1 + 2**-7, 2**-8],
        "above": [1, 2**-8 + 2**-12],
        "nan": [float("nan"), 0],
    }
    columns |= {"large": [3.3895e38, 1.2e36], "infinite": [float("inf"), 1], "negative": [-1, -(2**-8) - 2**-12]}
    values = torch.tensor(list(columns.values())).bfloat16()
    mask, x = torch.full((len(values), 1), 0b0011, dtype=torch.uint8), torch.ones(1, 4).bfloat16()
    rounded, exact = (product(x, values, mask, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert rounded[0, :3].tolist() == [1, 1 + 2**-6, 1 + 2**-7]
