"""Calibration statistics on a GPU, run on the CPU from text and from PTX: histograms exactly the plain function's."""

import copy
from dataclasses import replace

import pytest
import torch
from cuda_tools import runners

from streamprune_kernels import MIN_EXPONENT
from streamprune_kernels.launch import Launch, Run
from streamprune_kernels.statistics import STATIC_BYTES, Windows, add_tokens, add_tokens_cuda

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROW_GAP = 8  # unused counts between channels, as the accumulator has
# channels, bins, lengths of the sequences: less than a chunk's block, several blocks, more tokens than are read at once
CASES = ((8, 16, (1, 300)), (40, 100, (5, 70, 3)), (72, 4096, (33, 20)))

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Windows]


def fresh(channels: int, bins: int) -> State:
    """What a histogram begins with; counts are rows of a wider matrix."""
    counts = torch.zeros(channels, bins + ROW_GAP, dtype=torch.int32)[:, :bins]
    first = torch.zeros(channels, dtype=torch.int32)
    low, high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
    windows = Windows(torch.full((channels,), MIN_EXPONENT, dtype=torch.int32), first, counts)
    return low, high, torch.zeros(channels, dtype=torch.float64), windows


def sequences(channels: int, lengths: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Channels of very different sizes and shifts, whose range grows; a fifth of the values is 0, one channel all."""
    generator = torch.Generator().manual_seed(channels)
    size = torch.exp2(torch.randint(-20, 8, (channels,), generator=generator).float())
    shift = torch.randint(-3, 4, (channels,), generator=generator) * size
    found = []
    for number, length in enumerate(lengths):
        x = torch.randn(length, channels, generator=generator) * size * 3**number + shift
        x[torch.rand(x.shape, generator=generator) < 0.2] = 0
        x[:, 3] = 0
        found.append(x.to(dtype))
    return found


def assert_same_histograms(one: Windows, other: Windows) -> None:
    for name in ("exponent", "first_bin", "counts"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sequence_after_sequence(case: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, run: Run) -> None:
    channels, bins, lengths = case
    plain, state = fresh(channels, bins), fresh(channels, bins)
    for x in sequences(channels, lengths, dtype):
        add_tokens(x, *plain)
        add_tokens_cuda(x, *state, run=run)
        assert torch.equal(state[0], plain[0])
        assert torch.equal(state[1], plain[1])
        torch.testing.assert_close(state[2], plain[2], rtol=1e-13, atol=0)
        assert_same_histograms(state[3], plain[3])
    assert (state[3].counts.sum(dim=1) == sum(lengths)).all()


@pytest.mark.parametrize("resident", [0, 1, 64, 65, 127])
def test_rows_that_shared_memory_has_no_room_for_are_read_again(resident: int) -> None:
    (x,) = sequences(40, (131,), torch.float16)
    plain, state = fresh(40, 64), fresh(40, 64)
    add_tokens(x, *plain)
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        runners.PLAIN["host"](launch)

    add_tokens_cuda(x, *state, run=run, shared_bytes=STATIC_BYTES + 64 * resident)
    assert [launch.shared_bytes for launch in launches] == [64 * resident]
    assert_same_histograms(state[3], plain[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_schedule_nor_tool(dtype: torch.dtype) -> None:
    states = [fresh(40, 64) for _ in runners.ALL]
    for x in sequences(40, (67, 9), dtype):
        for state, run in zip(states, runners.ALL.values(), strict=True):
            add_tokens_cuda(x, *state, run=run, shared_bytes=STATIC_BYTES + 64 * 32)
    for state in states[1:]:
        assert torch.equal(state[2], states[0][2])
        assert_same_histograms(state[3], states[0][3])


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
def test_without_histograms(run: Run) -> None:
    (x,) = sequences(24, (50,), torch.bfloat16)
    plain, state = fresh(24, 1)[:3], fresh(24, 1)[:3]
    add_tokens(x, *plain)
    add_tokens_cuda(x, *state, run=run)
    assert torch.equal(torch.stack(state[:2]), torch.stack(plain[:2]))
    torch.testing.assert_close(state[2], plain[2], rtol=1e-13, atol=0)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_shows_and_is_not_counted(value: float, run: Run) -> None:
    """The channel's bounds are the plain ones; the other channels are as if it were not there."""
    first, x = sequences(16, (9, 70), torch.float32)
    plain, state = fresh(16, 32), fresh(16, 32)
    for rows in (first, x):
        add_tokens(rows, *plain)
    x[66, 5] = value
    bounds = fresh(16, 32)[:3]
    for rows in (first, x, first):  # and what follows does not hide it
        add_tokens(rows, *bounds)
        add_tokens_cuda(rows, *state, run=run)
        if rows is x:
            counted = state[3].counts.clone()
    for one, other in zip(state[:2], bounds[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert bool(state[0][5].isnan()) == bool(state[1][5].isnan()) == (value != value)
    assert (~torch.isfinite(state[2])).nonzero().tolist() == [[5]]
    others = torch.arange(16) != 5
    assert torch.equal(counted[others], plain[3].counts[others])
    assert state[3].counts[5].sum() == len(first)  # those of before


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
def test_extremes_of_float32(run: Run) -> None:
    """Subnormal and very large values, and signs of zero."""
    x = torch.zeros(3, 4)
    x[:, 0] = torch.tensor([1e-42, -1e-42, 1e-45])
    x[:, 1] = torch.tensor([1e38, -1e38, 3.0])
    x[:, 2] = torch.tensor([-0.0, 0.0, -0.0])
    x[:, 3] = torch.tensor([2.0**-126, -(2.0**-126), 1.0])
    plain, state = fresh(4, 16), fresh(4, 16)
    for rows in (x[:1].clone(), x):
        add_tokens(rows, *plain)
        add_tokens_cuda(rows, *state, run=run)
        assert_same_histograms(state[3], plain[3])


def test_without_tokens_nothing_is_launched() -> None:
    state = fresh(8, 16)
    before = copy.deepcopy(state)
    add_tokens_cuda(torch.zeros(0, 8), *state, run=nothing)
    assert torch.equal(state[2], before[2])
    assert torch.equal(state[0], before[0])


def nothing(launch: Launch) -> None:
    raise AssertionError(launch)


def test_tensors_that_do_not_fit_are_refused() -> None:
    low, high, squares, windows = fresh(8, 16)
    x = torch.zeros(3, 8)
    for arguments, message in [
        ((x.double(), low, high, squares, windows), "is not .tokens, channels. of float16"),
        ((x[0], low, high, squares, windows), "is not .tokens, channels. of float16"),
        ((x.T.contiguous().T, low, high, squares, windows), "not contiguous and aligned to 16 bytes: pass x.clone"),
        ((torch.zeros(25)[1:].view(3, 8), low, high, squares, windows), "not contiguous and aligned"),
        ((torch.zeros(3, 7), low, high, squares, windows), "7 channels are no multiple of 16 bytes: use add_tokens"),
        ((x, low[:7], high, squares, windows), "low torch.float32 .7. is not"),
        ((x, low, high.double(), squares, windows), "high torch.float64"),
        ((x, low, high, squares.float(), windows), "square_sum torch.float32"),
        ((x, low, high, squares.to("meta"), windows), "square_sum is on meta"),
        ((x, low, high, squares, replace(windows, exponent=windows.exponent.long())), "exponent torch.int64"),
        ((x, low, high, squares, replace(windows, counts=windows.counts[:7])), "counts torch.int32 .7, 16. is not"),
        ((x, low, high, squares, replace(windows, counts=windows.counts[:, ::2])), "counts torch.int32"),
        ((x, low, high, squares, replace(windows, counts=torch.zeros(8, 4097).int())), "1 to 4096 bins, not 4097"),
        ((x, low, high, squares, replace(windows, counts=windows.counts.to("meta"))), "counts is on meta"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            add_tokens_cuda(*arguments, run=nothing)
        assert "\n" not in str(refusal.value)
