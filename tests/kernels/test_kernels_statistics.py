"""Calibration statistics, compiled, against their plain versions, for any thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import on_threads

from streamprune_kernels import MIN_EXPONENT, add_range, count_values, reference

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)


def range_state(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    return low, high, torch.zeros(channels, dtype=torch.float64)


@given(st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1, max_size=3), seeds)
@repeatable
def test_add_range(channels: int, lengths: list[int], seed: int) -> None:
    """Channels that are no multiple of 16, and sequence after sequence into the same state."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randn(length, channels, generator=generator) for length in lengths]
    states = [range_state(channels) for _ in range(4)]
    for x in sequences:
        reference.add_range(x, *states[0])
        for count in (1, 2, 3):
            on_threads(count, lambda count=count, x=x: add_range(x, *states[count]))
    for state in states[1:]:
        assert torch.equal(state[0], states[0][0])
        assert torch.equal(state[1], states[0][1])
        torch.testing.assert_close(state[2], states[0][2], rtol=1e-12, atol=0)
        assert torch.equal(state[2], states[1][2])
    x = torch.cat(sequences)
    assert torch.equal(states[1][0], x.amin(dim=0))
    torch.testing.assert_close(states[1][2], x.double().square().sum(dim=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_add_range_shows_what_is_not_finite(value: float) -> None:
    for row in (0, 4, 8):
        for channel in (0, 15, 16, 20):
            for function in (add_range, reference.add_range):
                x = torch.ones(9, 21)
                x[row, channel] = value
                low, high, squares = range_state(21)
                function(x, low, high, squares)
                assert (~torch.isfinite(squares)).nonzero().tolist() == [[channel]]


def windows(channels: int, bins: int) -> tuple[torch.Tensor, ...]:
    """exponent, first_bin and counts as a histogram begins with them."""
    exponent = torch.full((channels,), MIN_EXPONENT, dtype=torch.int32)
    return exponent, torch.zeros(channels, dtype=torch.int32), torch.zeros(channels, bins, dtype=torch.int32)


@given(
    st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([16, 100, 4096]), seeds
)
@repeatable
def test_count_values(channels: int, lengths: list[int], bins: int, seed: int) -> None:
    """Bit for bit the plain version, sequence after sequence whose range grows, for any threads."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-130, 100, (channels,), generator=generator).double()).float()
    shift = torch.randint(-3, 4, (channels,), generator=generator) * size
    states = [windows(channels, bins) for _ in range(3)]
    low, high, _ = range_state(channels)
    for number, length in enumerate(lengths):
        x = torch.randn(length, channels, generator=generator) * size * 3**number + shift
        x[torch.rand(length, channels, generator=generator) < 0.2] = 0
        torch.minimum(low, x.amin(dim=0), out=low)
        torch.maximum(high, x.amax(dim=0), out=high)
        reference.count_values(x, low, high, *states[0])
        for count in (1, 2):
            on_threads(count, lambda count=count, x=x: count_values(x, low, high, *states[count]))
        for state in states[1:]:
            assert all(torch.equal(one, other) for one, other in zip(state, states[0], strict=True))
    exponent, first, counts = states[1]
    assert (counts.sum(dim=1) == sum(lengths)).all()
    width = torch.exp2(exponent.double())
    assert (first * width <= low).all()
    assert (high < (first + bins) * width).all()


def test_count_values_of_negative_values_is_floor_and_of_views_their_values() -> None:
    x = torch.tensor([[-0.25, 0.25], [-1.0, 1.75], [-1.25, 0.0], [0.5, -0.0]])
    for values in (x, x.T.contiguous().T):
        exponent, first, counts = windows(2, 4)
        exponent.zero_()
        count_values(values, torch.tensor([-1.25, -0.0]), torch.tensor([0.5, 1.75]), exponent, first, counts)
        assert exponent.tolist() == [0, 0]
        assert [counts[0, -2 - first[0] + i] for i in range(3)] == [1, 2, 1]
        assert [counts[1, -first[1] + i] for i in range(2)] == [3, 1]
