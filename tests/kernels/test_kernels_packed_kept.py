"""Few vectors by AVX2 where every mask byte keeps as many columns: x is picked, weights are not expanded."""

import pytest
import torch
from thread_count import threads
from torch.nn import functional

from streamprune_kernels import library, pack_mask, pack_values, packed_product, select_groups
from streamprune_kernels.packed_product import TYPES, path_number

compiled = library()
assert compiled is not None, "the package was built without its compiled kernels"
AVX2 = 1  # as instructions.h numbers paths
pytestmark = pytest.mark.skipif(path_number(compiled, None) < AVX2, reason="this processor lacks AVX2")

PATTERNS = [(2, 4), (4, 8), (1, 2), (1, 4), (2, 8), (1, 8)]  # 4, 2 and 1 of each byte
COLUMNS = [8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 200, 1032]  # whole steps of 32, 64 and 128, and not
VECTORS = [1, 2, 3, 4, 5, 8, 9, 17, 24]
EXACT = 1 + 2.0**-12  # a float32 that is no bfloat16, and of which sums are exact

patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
dtypes = pytest.mark.parametrize("dtype", list(TYPES), ids=str)


def product(
    x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    return packed_product.packed_product(x, values, mask, order, path="avx2", many=False)


def packed(
    rows: int, columns: int, pattern: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, mask, and the dense weight that they stand for."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    keep = select_groups(torch.rand(weight.shape, generator=generator), *pattern)
    return pack_values(weight, keep), pack_mask(keep), weight.masked_fill(~keep, 0)


def inputs(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@dtypes
@patterns
@pytest.mark.parametrize("columns", COLUMNS)
def test_any_width_and_number_of_vectors(columns: int, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    """With inputs that are bfloat16 and that are not, which are held differently."""
    values, mask, weight = packed(13, columns, pattern, dtype)
    for count in VECTORS:
        for x in (inputs(count, columns), inputs(count, columns).bfloat16()):
            expected = functional.linear(x.double(), weight.double()).float()
            torch.testing.assert_close(product(x, values, mask), expected, rtol=1e-5, atol=3e-5)


@dtypes
@patterns
@pytest.mark.parametrize("out_features", [1, 3, 4, 17, 75])
def test_bits_depend_neither_on_threads_nor_on_other_vectors(
    out_features: int, pattern: tuple[int, int], dtype: torch.dtype
) -> None:
    """Nor on whether the others are bfloat16, nor on rows at once: each row alone gives the same."""
    values, mask, _ = packed(out_features, 2120, pattern, dtype)
    x = inputs(24, 2120).bfloat16()
    with threads(1):
        one = product(x, values, mask)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(product(x, values, mask), one)
    for vectors in (slice(0, 1), slice(3, 5), slice(5, 9), slice(7, 24)):
        assert torch.equal(product(x[vectors], values, mask), one[vectors])
    beside = torch.cat([x[:7].float(), torch.full((1, 2120), EXACT)])
    assert torch.equal(product(beside, values, mask)[:7], one[:7])
    alone = [product(x, values[row : row + 1], mask[row : row + 1]) for row in range(out_features)]
    assert torch.equal(torch.cat(alone, dim=1), one)


@patterns
def test_a_permutation_gathers_the_inputs(pattern: tuple[int, int]) -> None:
    values, mask, _ = packed(9, 136, pattern, torch.bfloat16)
    order = torch.randperm(136, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    for x in (inputs(3, 136), inputs(3, 136).bfloat16()):
        assert torch.equal(product(x, values, mask, order), product(x[:, order], values, mask))


@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
@pytest.mark.parametrize("number", [1.0, EXACT])
@patterns
def test_dropped_columns_are_not_multiplied(pattern: tuple[int, int], number: float, infinite: float) -> None:
    """Which expanded weights would be: so this is the kernel that runs."""
    kept, group_size = pattern
    mask = pack_mask((torch.arange(1032) % group_size < kept).repeat(5, 1))
    x = torch.where(torch.arange(1032) % group_size < kept, number, infinite).repeat(3, 1)
    y = product(x, torch.ones(5, 1032 * kept // group_size), mask)
    assert torch.equal(y, torch.full((3, 5), number * 1032 * kept / group_size))


@pytest.mark.parametrize("number", [1.0, EXACT])
@pytest.mark.parametrize("row", [0, 20, 39])
@pytest.mark.parametrize(("one", "other"), [(0b0111, 0b0001), (0xFF, 0x00), (0b1011, 0b0011), (0b0001, 0b0011)])
def test_masks_whose_bytes_keep_other_numbers(one: int, other: int, row: int, number: float) -> None:
    """Right ones, N of every 16, are multiplied as others are; wrong ones are refused, wherever they are."""
    mask = torch.full((40, 40), 0b10101010, dtype=torch.uint8)
    mask[row, 36], mask[row, 37] = one | 0b00110000, other | 0b11000000
    values, x = torch.ones(40, 160), torch.full((3, 320), number)
    if (one.bit_count() + other.bit_count()) == 4:
        assert torch.equal(product(x, values, mask), torch.full((3, 40), 160 * number))
        return
    with pytest.raises(ValueError, match="a mask does not keep 160 values in every row"):
        product(x, values, mask)
