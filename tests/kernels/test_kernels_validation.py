"""What outputs are judged by, compiled, against plain versions, for any thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import on_threads

from streamprune_kernels import all_finite, reference, squared_distances

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(count=st.integers(1, 20_000), place=st.floats(0, 1), seed=seeds)
@repeatable
def test_all_finite(dtype: torch.dtype, count: int, place: float, seed: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values[::3] = torch.finfo(dtype).max
    assert all_finite(values)
    for fault in (torch.nan, torch.inf, -torch.inf):
        broken = values.clone()
        broken[int(place * (count - 1))] = fault
        assert not all_finite(broken)
        assert not reference.all_finite(broken)


def test_all_finite_of_what_is_empty_or_strided() -> None:
    assert all_finite(torch.empty(0, 3))
    values = torch.zeros(4, 4)
    values[:, 1] = torch.inf
    assert all_finite(values[:, ::2])
    assert not all_finite(values[:, 1::2])


@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=seeds)
@repeatable
def test_squared_distances(rows: int, width: int, seed: int) -> None:
    """Columns that are no multiple of a vector; in float64, on any number of threads, each row by itself."""
    x, y = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed))
    one, three = (on_threads(count, lambda: squared_distances(x, y)) for count in (1, 3))
    assert one.dtype == torch.float64
    assert torch.equal(one, three)
    assert torch.equal(one[-1:], squared_distances(x[-1:], y[-1:]))
    torch.testing.assert_close(one, reference.squared_distances(x, y), rtol=1e-12, atol=1e-12)
