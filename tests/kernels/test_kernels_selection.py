"""Selection, and the sums that it is judged by, compiled, against plain versions: the same masks bit for bit."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import on_threads, threads

from streamprune_kernels import (
    all_finite,
    kept_sums,
    reference,
    select_groups,
    select_weights,
    weighted_squares,
)

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
PROT_NONE = 0
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([(2, 4), (4, 8), (1, 2), (1, 3), (8, 16), (5, 12), (30, 64)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(sizes=SIZES, rows=st.integers(1, 9), groups=st.integers(1, 20), seed=seeds)
@repeatable
def test_select_weights(dtype: torch.dtype, sizes: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    """Few values and few factors, so that many scores are equal; widths that are no multiple of a vector."""
    kept, m = sizes
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randint(-3, 4, (rows, groups * m), generator=generator) / 4).to(dtype)
    factor = torch.randint(0, 3, (groups * m,), generator=generator) / 2
    with threads(2):
        keep, sums = select_weights(weight, factor, kept, m)
    expected, plain_sums = reference.select_weights(weight, factor, kept, m)
    assert torch.equal(keep, expected)
    assert (sums.dtype, sums.tolist()) == (torch.float64, plain_sums.tolist())  # of quarters: exact in any order
    assert (keep.view(rows, groups, m).sum(dim=2) == kept).all()
    with threads(1):
        alone = select_weights(weight, factor, kept, m)
    assert all(torch.equal(one, other) for one, other in zip(alone, (keep, sums), strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_are_rounded_once_to_float32(dtype: torch.dtype) -> None:
    """As the search's are, so that a mask does not depend on which of them is taken."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).to(dtype)
    factor = torch.rand(96, generator=generator)
    keep, sums = select_weights(weight, factor, 2, 4)
    scores = weight.float().abs() * factor
    assert torch.equal(keep, reference.select_groups(scores, 2, 4))
    torch.testing.assert_close(sums, (scores.double() * keep).sum(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_show_scores_that_are_not_finite(dtype: torch.dtype) -> None:
    for factor in (torch.inf, torch.nan, 3e38):
        weight = torch.full((1, 16), 60000.0).to(dtype)
        factors = torch.ones(16)
        factors[7] = factor
        assert not select_weights(weight, factors, 1, 4)[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits_becomes_its_float(dtype: torch.dtype) -> None:
    """Subnormal numbers, signed zeros and the largest; one a row, so that nothing hides behind another's sum."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = every[every.isfinite()][:, None]
    dropped, whole = weighted_squares(values, torch.zeros(values.shape, dtype=torch.bool), torch.ones(1))
    assert torch.equal(whole, values[:, 0].double().square())
    assert torch.equal(dropped, whole)
    assert whole.count_nonzero() == len(values) - 2
    keep, sums = select_weights(values, torch.ones(1), 1, 1)
    assert keep.all()
    assert torch.equal(sums, values[:, 0].double().abs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=seeds)
@repeatable
def test_weighted_squares(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, keep = (
        torch.randn(rows, width, generator=generator).to(dtype),
        torch.rand(rows, width, generator=generator) < 0.5,
    )
    scale = torch.rand(width, generator=generator)
    found, expected = weighted_squares(x, keep, scale), reference.weighted_squares(x, keep, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [kept_sums, weighted_squares])
@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=seeds)
@repeatable
def test_sums_of_rows(kernel: Callable[..., Any], rows: int, width: int, seed: int) -> None:
    """Columns that are no multiple of a vector; in float64, on any number of threads, each row by itself."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    keep = torch.rand(rows, width, generator=generator) < 0.5
    scale = torch.rand(width, generator=generator)
    rest = {"kept_sums": (keep,), "weighted_squares": (keep, scale)}[kernel.__name__]

    def sums(function: Callable[..., Any], *arguments: torch.Tensor) -> torch.Tensor:
        found = function(*arguments)
        return torch.stack(found) if isinstance(found, tuple) else found[None]

    one, three = (on_threads(count, lambda: sums(kernel, x, *rest)) for count in (1, 3))
    last = sums(kernel, *(tensor[-1:] if tensor.ndim == 2 else tensor for tensor in (x, *rest)))
    assert one.dtype == torch.float64
    assert torch.equal(one, three)
    assert torch.equal(one[:, -1:], last)
    torch.testing.assert_close(one, sums(getattr(reference, kernel.__name__), x, *rest), rtol=1e-12, atol=1e-12)


@given(st.sampled_from([(2, 4), (4, 8), (1, 3), (8, 16)]), st.integers(1, 20), st.integers(1, 9), seeds)
@repeatable
def test_select_groups(sizes: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    """Bit for bit, ties among few values included."""
    kept, m = sizes
    scores = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float() - 1.5
    expected = reference.select_groups(scores, kept, m)
    for count in (1, 2):
        assert torch.equal(on_threads(count, lambda: select_groups(scores, kept, m)), expected)
    assert torch.equal(select_groups(scores.T.contiguous().T, kept, m), expected)
    assert (expected.view(rows, groups, m).sum(dim=2) == kept).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [4, 12, 20, 36])
def test_nothing_behind_the_last_row_is_read_or_written(dtype: torch.dtype, width: int) -> None:
    """The tensors end where a page does that may not be touched."""
    held = []

    def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
        room = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(room))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, PROT_NONE) == 0
        held.append(room)
        start = mmap.PAGESIZE - tensor.nbytes
        placed = torch.frombuffer(room, dtype=torch.uint8, count=tensor.nbytes, offset=start).view(tensor.dtype)
        return placed.view(tensor.shape).copy_(tensor)

    weight, factor = torch.randn(3, width).to(dtype), torch.rand(width)
    keep, sums = select_weights(weight, factor, 2, 4)
    placed_keep = at_the_end(keep)
    again = select_weights(at_the_end(weight), at_the_end(factor), 2, 4)
    assert torch.equal(again[0], keep)
    assert torch.equal(again[1], sums)
    squares = weighted_squares(at_the_end(weight), placed_keep, at_the_end(factor))
    assert torch.equal(squares[0], weighted_squares(weight, keep, factor)[0])
    assert all_finite(at_the_end(weight))
    assert torch.equal(kept_sums(at_the_end(weight.float()), placed_keep), kept_sums(weight.float(), keep))
    assert torch.equal(select_groups(at_the_end(weight.float()), 2, 4), select_groups(weight.float(), 2, 4))


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(2, 8)
    for factor in (torch.ones(7), torch.ones(8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="do not fit a weight"):
            select_weights(weight, factor, 2, 4)
    with pytest.raises(ValueError, match="do not fit a weight"):
        select_weights(weight, torch.ones(8), 2, 3)
