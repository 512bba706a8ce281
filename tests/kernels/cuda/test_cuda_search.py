"""The search over orders of channels on a GPU, run on the CPU from text and from PTX."""

import pytest
import torch
from cuda_tools import runners
from cuda_tools.stand_in import standing_in

import streamprune_kernels
from streamprune_kernels import reference
from streamprune_kernels.launch import Launch, Run
from streamprune_kernels.search import PART_ROWS, hinge_sums_cuda, local_swaps_cuda

# n_s, n_t, rows: less than a chunk, a tile or a part, and somewhat more
SIZES = ((1, 1, 1), (5, 7, 33), (64, 64, 32), (96, 96, 300), (3, 130, 257), (70, 2, 513))
# channels, rows, block, kept, group_size
SWAPS = (
    (16, 5, 16, 2, 4),
    (44, 70, 20, 2, 4),  # the last block has one group
    (56, 40, 24, 2, 4),  # and here two
    (48, 33, 32, 4, 8),
    (32, 40, 16, 1, 4),
    (60, 31, 48, 3, 12),  # a last block of one group
    (24, 20, 12, 2, 3),
)
BELOW = float("-inf")


def scores(*shape: int, most: int = 50, seed: int = 0) -> torch.Tensor:
    """Whole numbers, which add up exactly."""
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed)).float()


def plain_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (s.double()[None] - t.double()[:, None]).clamp(min=0).sum(dim=2)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_of_whole_numbers_are_exact(sizes: tuple[int, int, int], run: Run) -> None:
    n_s, n_t, rows = sizes
    s, t = scores(n_s, rows), scores(n_t, rows, seed=1)
    sums = hinge_sums_cuda(s, t, run=run)
    assert (sums.dtype, sums.shape) == (torch.float32, (n_t, n_s))
    assert torch.equal(sums.double(), plain_sums(s, t))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_of_any_scores(sizes: tuple[int, int, int]) -> None:
    """Within float32's rounding, which does not grow with the rows, and the same bits whatever the order."""
    n_s, n_t, rows = sizes
    generator = torch.Generator().manual_seed(2)
    s, t = (torch.randn(n, 40 * rows, generator=generator).exp() for n in (n_s, n_t))
    exact = plain_sums(s, t)
    host = [hinge_sums_cuda(s, t, run=run) for name, run in runners.ALL.items() if name.startswith("host")]
    assert ((host[0] - exact).abs() <= 1e-6 * exact).all()
    assert all(torch.equal(sums, host[0]) for sums in host)


@pytest.mark.parametrize("sizes", [*SIZES[:2], (66, 9, 257)], ids=str)
def test_sums_have_the_same_bits_in_both_tools(sizes: tuple[int, int, int]) -> None:
    n_s, n_t, rows = sizes
    s, t = (torch.randn(n, rows, generator=torch.Generator().manual_seed(n)).exp() for n in (n_s, n_t))
    first, *others = (hinge_sums_cuda(s, t, run=run) for run in runners.ALL.values())
    assert all(torch.equal(sums, first) for sums in others)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
def test_thresholds_that_are_not_there(run: Run) -> None:
    """-inf where a group has too few others: nth_best says so, and the sum is infinite."""
    s, t = scores(6, PART_ROWS + 9), scores(9, PART_ROWS + 9, seed=1)
    t[2] = BELOW
    t[7, PART_ROWS + 3] = BELOW
    sums = hinge_sums_cuda(s, t, run=run)
    assert torch.equal(sums.double(), plain_sums(s, t))
    assert sums.isinf().sum(dim=1).tolist() == [0, 0, 6, 0, 0, 0, 0, 6, 0]


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("case", SWAPS, ids=str)
def test_swaps_of_whole_numbers_are_the_plain_ones(case: tuple[int, int, int, int, int], run: Run) -> None:
    """The very swaps, in the same rounds; few different scores, so that there are ties."""
    channels, rows, *pattern = case
    for most, rounds in ((50, 32), (3, 32), (50, 1)):
        s, start = (
            scores(channels, rows, most=most),
            torch.randperm(channels, generator=torch.Generator().manual_seed(1)),
        )
        given = start.clone()
        expected = reference.local_swaps(s, start, *pattern, rounds, 1e-6)
        assert torch.equal(local_swaps_cuda(s, start, *pattern, rounds, 1e-6, run=run), expected)
        assert torch.equal(start, given)
    assert not torch.equal(expected, start)
    assert torch.equal(expected.sort().values, torch.arange(channels))


@pytest.mark.parametrize("least_gain", [0.0, 0.05])
def test_swaps_must_gain_their_share(least_gain: float) -> None:
    s, start = scores(64, 50), torch.arange(64)
    expected = reference.local_swaps(s, start, 64, 2, 4, 32, least_gain)
    assert torch.equal(local_swaps_cuda(s, start, 64, 2, 4, 32, least_gain, run=runners.PLAIN["host"]), expected)


@pytest.mark.parametrize("sizes", [(260, 2, 4), (400, 2, 4), (384, 31, 64), (300, 3, 5)], ids=str)
def test_blocks_larger_than_shared_memory_holds(sizes: tuple[int, int, int]) -> None:
    """Their gains alone are more than 228 KiB; several tiles each way, the last not full; the largest groups."""
    channels = 400 // sizes[2] * sizes[2]
    s, start = scores(channels, 40), torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    expected = reference.local_swaps(s, start, *sizes, 32, 1e-6)
    assert not torch.equal(expected, start)
    assert torch.equal(local_swaps_cuda(s, start, *sizes, 32, 1e-6, run=runners.PLAIN["host"]), expected)


def kept_score(s: torch.Tensor, order: torch.Tensor) -> float:
    groups = s[order].view(len(s) // 4, 4, -1)
    return float(groups.sort(dim=1, descending=True).values[:, :2].double().sum())


def test_swaps_of_any_scores_reach_what_the_plain_ones_do() -> None:
    """Rounding may choose other swaps; the score kept is the same to a hair, and the bits under any schedule."""
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(192, 700, generator=generator).exp() * torch.randn(192, 1, generator=generator).exp()
    arguments = torch.arange(192), 64, 2, 4, 32, 1e-6
    found = [local_swaps_cuda(s, *arguments, run=run) for name, run in runners.ALL.items() if name.startswith("host")]
    before, plain = kept_score(s, arguments[0]), kept_score(s, reference.local_swaps(s, *arguments))
    assert plain > 1.01 * before
    assert kept_score(s, found[0]) - before == pytest.approx(plain - before, rel=0.01)
    assert all(torch.equal(order, found[0]) for order in found)


def test_both_tools_make_the_same_swaps() -> None:
    s = torch.randn(40, 70, generator=torch.Generator().manual_seed(4)).exp()
    arguments = s, torch.arange(40), 20, 2, 4, 32, 1e-6
    first, *others = (local_swaps_cuda(*arguments, run=run) for run in runners.ALL.values())
    assert all(torch.equal(order, first) for order in others)
    assert kept_score(s, first) > kept_score(s, torch.arange(40))


def test_what_the_package_exports_chooses_the_kernels() -> None:
    """Where something runs them; scores that are not contiguous are made so."""
    launched = []

    def run(launch: Launch) -> None:
        launched.append(launch.kernel)
        runners.PLAIN["host"](launch)

    s, start = scores(30, 16).T, torch.arange(16)
    swaps = 16, 2, 4, 32, 1e-6
    expected = [streamprune_kernels.hinge_sums(s, s[:3]), streamprune_kernels.local_swaps(s, start, *swaps)]
    assert torch.equal(streamprune_kernels.local_swaps(s, start, *swaps), expected[1])
    assert launched == []
    with standing_in(run):
        assert torch.equal(streamprune_kernels.hinge_sums(s, s[:3]), expected[0])
        assert torch.equal(streamprune_kernels.local_swaps(s, start, *swaps), expected[1])
    assert launched == ["hinge_sums", "local_swaps"]


def test_nothing_to_do_is_not_launched() -> None:
    s, start = scores(16, 6), torch.arange(16)
    with standing_in(nothing):
        assert torch.equal(streamprune_kernels.local_swaps(s[:4], start[:4], 8, 2, 4, 32, 0.0), start[:4])
        assert torch.equal(streamprune_kernels.local_swaps(s, start, 4, 2, 4, 32, 0.0), start)
        assert streamprune_kernels.hinge_sums(s[:0], s).shape == (16, 0)


def nothing(launch: Launch) -> None:
    raise AssertionError(launch)


def test_tensors_that_do_not_fit_are_refused() -> None:
    s, start = scores(16, 6), torch.arange(16)
    for function, arguments, message in [
        (hinge_sums_cuda, (s.double(), s), "s is torch.float64"),
        (hinge_sums_cuda, (s, s[0]), r"t is torch.float32 \[6\]"),
        (hinge_sums_cuda, (s, s.T), "t is not contiguous: pass t.contiguous"),
        (hinge_sums_cuda, (s, scores(16, 5)), "does not fit s"),
        (local_swaps_cuda, (s[:0], start, 16, 2, 4, 1, 0.0), r"\[0, 6\]"),
        (local_swaps_cuda, (s, start[:8], 16, 2, 4, 1, 0.0), "does not fit s"),
        (local_swaps_cuda, (s, start.int(), 16, 2, 4, 1, 0.0), "start torch.int32"),
        (local_swaps_cuda, (s, start, 16, 4, 4, 1, 0.0), "not 4:4"),
        (local_swaps_cuda, (s, start, 16, 4, 65, 1, 0.0), "N of up to 64"),
        (local_swaps_cuda, (s, start, 16, 2, 3, 1, 0.0), "are not groups of 3"),
        (local_swaps_cuda, (s, start, 10, 2, 4, 1, 0.0), "in blocks of 10"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            function(*arguments, run=nothing)
        assert "\n" not in str(refusal.value)
