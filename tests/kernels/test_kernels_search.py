"""The searches over orders of channels, compiled, against their plain versions, for any thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import on_threads

from streamprune_kernels import hinge_sums, local_swaps, reference

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 100), seeds)
@repeatable
def test_hinge_sums(n_s: int, n_t: int, rows: int, seed: int) -> None:
    """Rows that are no multiple of 16, channels that are none of the tiles' 4 and 6."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(n, rows, generator=generator).exp() for n in (n_s, n_t))
    exact = (s.double()[None] - t.double()[:, None]).clamp(min=0).sum(dim=2)
    one, two, three = (on_threads(count, lambda: hinge_sums(s, t)) for count in (1, 2, 3))
    assert (one.shape, one.dtype) == ((n_t, n_s), torch.float32)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    # of what is added up: both sides of max(s, t) - t
    scale = s.double().sum(dim=1)[None] + t.double().sum(dim=1)[:, None]
    assert ((one - exact).abs() <= 1e-6 * scale).all()
    assert ((one - reference.hinge_sums(s, t)).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 4099])
def test_hinge_sums_of_more_rows_than_stay_in_the_cache(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    s, t = (torch.rand(n, rows, generator=generator) for n in (13, 9))
    exact = (s.double()[None] - t.double()[:, None]).clamp(min=0).sum(dim=2)
    torch.testing.assert_close(hinge_sums(s, t).double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(hinge_sums(s, t), reference.hinge_sums(s, t), rtol=1e-5, atol=0)


def test_hinge_sums_of_views_that_are_not_contiguous() -> None:
    whole = torch.rand(64, 40, generator=torch.Generator().manual_seed(0))
    s, t = whole.T[:, ::2], whole.T[3:9, 1::2]
    assert not s.is_contiguous()
    torch.testing.assert_close(hinge_sums(s, t), hinge_sums(s.contiguous(), t.contiguous()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hinge_sums(s, t), reference.hinge_sums(s, t), rtol=1e-5, atol=1e-5)


@given(
    st.sampled_from([(2, 4), (4, 8), (1, 4), (1, 2), (3, 4), (1, 3), (8, 16)]),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([16, 24, 64]),
    seeds,
)
@repeatable
def test_local_swaps_of_whole_numbers(sizes: tuple[int, int], groups: int, rows: int, block: int, seed: int) -> None:
    """Whole scores add up exactly, so the compiled search takes the very swaps of the plain one, ties among them."""
    kept, m = sizes
    block = max(block // m, 2) * m
    generator = torch.Generator().manual_seed(seed)
    s = torch.randint(0, 50, (groups * m, rows), generator=generator).float()
    start = torch.randperm(groups * m, generator=generator)
    arguments = start, block, kept, m, 32, 1e-6
    expected = reference.local_swaps(s, *arguments)
    for count in (1, 2, 3):
        found = on_threads(count, lambda: local_swaps(s, *arguments))
        assert torch.equal(found, expected)
    assert torch.equal(local_swaps(s.T.contiguous().T, *arguments), expected)
    assert torch.equal(expected.sort().values, torch.arange(groups * m))


def test_local_swaps_of_any_scores_reach_what_the_plain_ones_do() -> None:
    """Rounding may choose other swaps; the score that is kept in the end is the same to a hair."""
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(192, 700, generator=generator).exp() * torch.randn(192, 1, generator=generator).exp()
    arguments = torch.arange(192), 64, 2, 4, 32, 1e-6

    def kept_score(order: torch.Tensor) -> float:
        groups = s[order].view(48, 4, -1)
        return float(groups.sort(dim=1, descending=True).values[:, :2].double().sum())

    before, plain = kept_score(arguments[0]), kept_score(reference.local_swaps(s, *arguments))
    compiled = kept_score(local_swaps(s, *arguments))
    assert plain > 1.01 * before
    assert compiled - before == pytest.approx(plain - before, rel=0.01)
