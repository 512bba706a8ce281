"""Shuffles: valid permutations that never retain less, the search's identity by brute force, optima of small cases."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.config import NMPattern, PruneConfig
from streamprune.pruning import shuffle
from streamprune.pruning.selection import retained_score, select
from streamprune.pruning.shuffle import ascending_in_groups, global_shuffle, local_shuffle, search_permutation

PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "2:8", "1:2", "3:4")]
TWO_FOUR = NMPattern(2, 4)


def random_scores(rows: int, channels: int, seed: int, levels: int = 0) -> torch.Tensor:
    """Positive scores float32 [rows, channels]; with `levels`, small integers and so many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (rows, channels), generator=generator).to(torch.float32)
    spread = torch.randn(channels, generator=generator).exp()
    return torch.randn(rows, channels, generator=generator).abs() * spread


def retained(scores: torch.Tensor, permutation: torch.Tensor, pattern: NMPattern) -> float:
    permuted = scores[:, permutation]
    return retained_score(permuted, select(permuted, pattern))


def assert_valid(permutation: torch.Tensor, channels: int, pattern: NMPattern) -> None:
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(channels))
    groups = permutation.view(-1, pattern.group_size)
    assert (groups.diff(dim=1) > 0).all()


def best_grouping(scores: torch.Tensor, pattern: NMPattern) -> float:
    """Highest retained score over all ways to divide the channels into groups."""

    def divide(channels: tuple[int, ...]) -> Any:
        if not channels:
            yield ()
            return
        first, rest = channels[0], channels[1:]
        for others in itertools.combinations(rest, pattern.group_size - 1):
            for division in divide(tuple(c for c in rest if c not in others)):
                yield (first, *others, *division)

    return max(retained(scores, torch.tensor(d), pattern) for d in divide(tuple(range(scores.shape[1]))))


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(2, 4),
    st.sampled_from(["none", "global", "global+local"]),
    st.sampled_from([0, 3]),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_search_returns_a_valid_permutation_that_retains_no_less(
    pattern: NMPattern, rows: int, groups: int, block_groups: int, stages: Any, levels: int, seed: int
) -> None:
    channels = groups * pattern.group_size
    scores = random_scores(rows, channels, seed, levels)
    before = scores.clone()
    config = PruneConfig(pattern=pattern, shuffle=stages, shuffle_block=block_groups * pattern.group_size)
    permutation = search_permutation(scores, config)
    assert torch.equal(scores, before)
    assert_valid(permutation, channels, pattern)
    identity = torch.arange(channels)
    assert retained(scores, permutation, pattern) >= retained(scores, identity, pattern)
    if stages == "none":
        assert torch.equal(permutation, identity)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_stage_retains_more_than_the_one_before(pattern: NMPattern) -> None:
    scores = random_scores(24, 96, 7)
    stages = [
        retained(scores, search_permutation(scores, PruneConfig(pattern=pattern, shuffle=s, shuffle_block=48)), pattern)
        for s in ("none", "global", "global+local")
    ]
    assert stages[0] <= stages[1] < stages[2]
    assert stages[2] > stages[0] * 1.001


def test_ascending_in_groups_sorts_inside_groups_alone() -> None:
    permutation = torch.tensor([7, 2, 5, 0, 6, 1, 4, 3])
    assert ascending_in_groups(permutation, TWO_FOUR).tolist() == [0, 2, 5, 7, 1, 3, 4, 6]
    assert ascending_in_groups(permutation, NMPattern(1, 2)).tolist() == [2, 7, 0, 5, 1, 6, 3, 4]


def test_global_shuffle_deals_back_and_forth() -> None:
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    # Rounds 0 1, 3 2 (backwards), 4 5, 7 6: the groups get 0 3 4 7 and 1 2 5 6.
    assert global_shuffle(scores, TWO_FOUR).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert global_shuffle(scores, NMPattern(1, 2)).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert global_shuffle(scores.flip(1), TWO_FOUR).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_global_shuffle_orders_by_the_mean_over_rows_with_ties_by_channel() -> None:
    scores = torch.tensor([[0.0, 9.0, 1.0, 5.0], [4.0, 1.0, 1.0, 5.0]])  # means 2 5 1 5
    # Order 1 3 0 2: rounds 1 3, then 2 0 backwards.
    assert global_shuffle(scores, NMPattern(1, 2)).tolist() == [1, 2, 0, 3]
    assert global_shuffle(torch.ones(3, 8), TWO_FOUR).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@given(st.sampled_from(PATTERNS), st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_gain_is_the_change_of_retained_score_by_a_swap(pattern: NMPattern, groups: int, rows: int, seed: int) -> None:
    """G[i, j] - G[i, i] + G[j, i] - G[j, j] against swapping channels i and j and selecting anew."""
    size = groups * pattern.group_size
    scores = random_scores(rows, size, seed)
    identity = torch.arange(size)
    gain = torch.full((1, size, size), torch.nan)
    stale = torch.ones(1, groups, dtype=torch.bool)
    shuffle._update_gain(gain, scores.T[None].contiguous(), stale, pattern)
    assert not stale.any()
    start = retained(scores, identity, pattern)
    for i, j in itertools.combinations(range(size), 2):
        if i // pattern.group_size == j // pattern.group_size:
            continue
        swapped = identity.clone()
        swapped[[i, j]] = swapped[[j, i]]
        expected = retained(scores, swapped, pattern) - start
        computed = float(gain[0, i, j] - gain[0, i, i] + gain[0, j, i] - gain[0, j, j])
        assert computed == pytest.approx(expected, abs=1e-5 * float(scores.sum()))


def test_gain_is_the_sum_over_rows_of_what_exceeds_the_threshold() -> None:
    scores = random_scores(5, 8, 11)
    gain = torch.zeros(1, 8, 8)
    shuffle._update_gain(gain, scores.T[None].contiguous(), torch.ones(1, 2, dtype=torch.bool), TWO_FOUR)
    for i, b in itertools.product(range(8), range(8)):
        expected = 0.0
        for row in scores.tolist():
            group = range(i // 4 * 4, i // 4 * 4 + 4)
            threshold = sorted((row[c] for c in group if c != i), reverse=True)[1]
            expected += max(0.0, row[b] - threshold)
        assert float(gain[0, i, b]) == pytest.approx(expected, abs=1e-5)


def test_only_stale_groups_are_computed_anew() -> None:
    scores = random_scores(5, 12, 12)
    gain = torch.full((2, 12, 12), -7.0)
    stale = torch.tensor([[False, True, False], [False, False, False]])
    shuffle._update_gain(gain, scores.T[None].repeat(2, 1, 1), stale, TWO_FOUR)
    assert (gain[0, 4:8] > -1e-5).all()
    assert (gain[0, :4] == -7).all()
    assert (gain[0, 8:] == -7).all()
    assert (gain[1] == -7).all()


@given(st.sampled_from(PATTERNS), st.integers(2, 5), st.permutations(list(range(40))))
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_local_shuffle_of_one_row_keeps_its_highest_scores(pattern: NMPattern, groups: int, order: list[int]) -> None:
    """With one row some swap gains as long as not all of the best N * groups scores are kept."""
    channels = groups * pattern.group_size
    scores = torch.tensor([order[:channels]], dtype=torch.float32) + 1
    permutation = local_shuffle(scores, torch.arange(channels), pattern, channels)
    best = sum(sorted(scores[0].tolist(), reverse=True)[: groups * pattern.kept])
    assert retained(scores, permutation, pattern) == best


CRAFTED = {
    "all the best in one group": (TWO_FOUR, [[9, 8, 7, 6, 1, 1, 1, 1]]),
    "rows that disagree": (TWO_FOUR, [[9, 8, 0, 0, 5, 0, 0, 0], [0, 0, 0, 1, 0, 7, 7, 7]]),
    "two alike in each pair": (NMPattern(1, 2), [[9, 9, 0, 0, 5, 5, 0, 0], [0, 0, 3, 3, 0, 0, 4, 4]]),
    "groups of three": (NMPattern(1, 3), [[9, 8, 7, 0, 0, 0], [1, 0, 0, 6, 5, 4]]),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_local_shuffle_finds_the_optimum_of_small_cases(case: str) -> None:
    pattern, rows = CRAFTED[case]
    scores = torch.tensor(rows, dtype=torch.float32)
    identity = torch.arange(scores.shape[1])
    permutation = local_shuffle(scores, identity, pattern, scores.shape[1])
    assert_valid(permutation, scores.shape[1], pattern)
    best = best_grouping(scores, pattern)
    assert best > retained(scores, identity, pattern)
    assert retained(scores, permutation, pattern) == best


@pytest.mark.parametrize("seed", range(5))
def test_local_shuffle_ends_where_no_single_swap_gains(seed: int) -> None:
    scores = random_scores(6, 16, seed)
    permutation = local_shuffle(scores, torch.arange(16), TWO_FOUR, 16)
    end = retained(scores, permutation, TWO_FOUR)
    for i, j in itertools.combinations(range(16), 2):
        swapped = permutation.clone()
        swapped[[i, j]] = swapped[[j, i]]
        assert retained(scores, swapped, TWO_FOUR) <= end * (1 + 1e-5)


def test_channels_stay_in_their_block() -> None:
    scores = random_scores(8, 48, 21)
    start = global_shuffle(scores, TWO_FOUR)
    permutation = local_shuffle(scores, start, TWO_FOUR, 16)
    assert_valid(permutation, 48, TWO_FOUR)
    assert not torch.equal(permutation, start)
    for begin in range(0, 48, 16):
        assert set(permutation[begin : begin + 16].tolist()) == set(start[begin : begin + 16].tolist())


def test_remainder_of_two_groups_is_searched_like_a_block() -> None:
    scores = torch.ones(1, 24)
    scores[0, 16:20] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    permutation = local_shuffle(scores, torch.arange(24), TWO_FOUR, 16)
    assert permutation[:16].tolist() == list(range(16))
    assert retained(scores, permutation, TWO_FOUR) == 9 + 8 + 7 + 6 + 8


def test_remainder_of_one_group_is_left_alone() -> None:
    scores = random_scores(4, 20, 5)
    scores[:, 16:] *= 100
    permutation = local_shuffle(scores, torch.arange(20), TWO_FOUR, 8)
    assert permutation[16:].tolist() == [16, 17, 18, 19]
    assert permutation[:16].tolist() != list(range(16))


@pytest.mark.parametrize(("channels", "block"), [(4, 8), (4, 128), (8, 128), (12, 9), (24, 10)])
def test_blocks_that_do_not_divide_the_channels(channels: int, block: int) -> None:
    scores = random_scores(4, channels, channels)
    permutation = local_shuffle(scores, torch.arange(channels), TWO_FOUR, block)
    assert_valid(permutation, channels, TWO_FOUR)
    size = max(8, block // 4 * 4)
    for begin in range(0, channels, size):
        expected = set(range(begin, min(begin + size, channels)))
        assert set(permutation[begin : begin + size].tolist()) == expected


def test_equal_channels_are_not_swapped() -> None:
    for scores in (torch.ones(4, 32), torch.zeros(4, 32), torch.rand(4, 1).expand(4, 32).contiguous()):
        assert local_shuffle(scores, torch.arange(32), TWO_FOUR, 16).tolist() == list(range(32))
        config = PruneConfig(shuffle="global+local", shuffle_block=16)
        assert search_permutation(scores, config).tolist() == list(range(32))


def test_scale_of_the_scores_does_not_change_the_permutation() -> None:
    scores = random_scores(16, 64, 31)
    config = PruneConfig(shuffle_block=32)
    expected = search_permutation(scores, config)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(search_permutation(scores * factor, config), expected)


def test_result_does_not_depend_on_batches_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(32, 160, 41)
    config = PruneConfig(shuffle_block=32)
    expected = search_permutation(scores, config)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(search_permutation(scores, config), expected)
    finally:
        torch.set_num_threads(threads)
    for elements in (1, 2 * 32 * 32):
        monkeypatch.setattr(shuffle, "BATCH_ELEMENTS", elements)
        assert torch.equal(search_permutation(scores, config), expected)


def test_order_of_rows_does_not_matter_to_the_retained_score_it_reaches() -> None:
    scores = random_scores(16, 64, 51)
    flipped = scores.flip(0)
    config = PruneConfig(shuffle_block=64)
    one, other = search_permutation(scores, config), search_permutation(flipped, config)
    assert retained(scores, one, TWO_FOUR) == pytest.approx(retained(scores, other, TWO_FOUR), rel=1e-3)


def test_threshold_without_self_by_sorting() -> None:
    members = random_scores(3 * 4, 7, 61, levels=4).view(3, 4, 7)
    for kept in (1, 2, 3):
        computed = shuffle._threshold_without_self(members, kept)
        for group, i, row in itertools.product(range(3), range(4), range(7)):
            others = [float(members[group, c, row]) for c in range(4) if c != i]
            assert float(computed[group, i, row]) == sorted(others, reverse=True)[kept - 1]


def test_disjoint_swaps_take_the_best_first_and_each_group_once() -> None:
    swap = torch.full((2, 8, 8), -1.0)
    for block, i, j, value in ((0, 0, 2, 5.0), (0, 1, 4, 9.0), (0, 3, 6, 4.0), (0, 5, 7, 8.0), (1, 6, 1, 2.0)):
        swap[block, i, j] = swap[block, j, i] = value
    # Groups of two: 9 joins groups 0 and 2, which shuts 5 and 8 out; then 4 joins groups 1 and 3.
    assert shuffle._disjoint_swaps(swap, 2).tolist() == [[0, 1, 4], [0, 3, 6], [1, 1, 6]]
    assert shuffle._disjoint_swaps(torch.full((1, 8, 8), -1.0), 2).shape == (0, 3)
