"""Shuffles: valid permutations that never retain less, the search's identity by brute force, optima of small cases."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.config import NMPattern, PruneConfig
from streamprune.pruning import shuffle
from streamprune.pruning.selection import select, stable_sum
from streamprune.pruning.shuffle import (
    ascending_in_groups,
    assignment_shuffle,
    global_shuffle,
    local_shuffle,
    search_permutation,
)
from streamprune_kernels import kept_sums, nth_best, reference

PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "2:8", "1:2", "3:4")]
TWO_FOUR = NMPattern(2, 4)


def random_scores(rows: int, channels: int, seed: int, levels: int = 0) -> torch.Tensor:
    """Positive scores float32 [rows, channels]; with `levels`, small integers and so many ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, (rows, channels), generator=generator).to(torch.float32)
    spread = torch.randn(channels, generator=generator).exp()
    return torch.randn(rows, channels, generator=generator).abs() * spread


def config_of(stages: str, block: int, pattern: NMPattern = TWO_FOUR) -> PruneConfig:
    """A search's settings; blocks are the local one's."""
    return PruneConfig(pattern, shuffle=stages, **({"shuffle_block": block} if "local" in stages else {}))


def retained(scores: torch.Tensor, permutation: torch.Tensor, pattern: NMPattern) -> float:
    permuted = scores[:, permutation]
    return stable_sum(kept_sums(permuted, select(permuted, pattern)))


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
    st.sampled_from(
        ["none", "stride", "global", "local", "global+local", "global+assignment", "residual", "residual+assignment"]
    ),
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
    config = config_of(stages, block_groups * pattern.group_size, pattern)
    permutation = search_permutation(scores, config)
    assert torch.equal(scores, before)
    assert_valid(permutation, channels, pattern)
    identity = torch.arange(channels)
    assert retained(scores, permutation, pattern) >= retained(scores, identity, pattern)
    if stages in ("none", "residual"):
        assert torch.equal(permutation, identity)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_stage_retains_more_than_the_one_before(pattern: NMPattern) -> None:
    scores = random_scores(24, 96, 7)
    stages = [
        retained(scores, search_permutation(scores, config_of(s, 48, pattern)), pattern)
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
    gain = torch.full((size, size), torch.nan)
    stale = torch.ones(groups, dtype=torch.bool)
    reference._update_gain(gain, scores.T.contiguous(), stale, pattern.kept, pattern.group_size)
    assert not stale.any()
    start = retained(scores, identity, pattern)
    for i, j in itertools.combinations(range(size), 2):
        if i // pattern.group_size == j // pattern.group_size:
            continue
        swapped = identity.clone()
        swapped[[i, j]] = swapped[[j, i]]
        expected = retained(scores, swapped, pattern) - start
        computed = float(gain[i, j] - gain[i, i] + gain[j, i] - gain[j, j])
        assert computed == pytest.approx(expected, abs=1e-5 * float(scores.sum()))


def test_gain_is_the_sum_over_rows_of_what_exceeds_the_threshold() -> None:
    scores = random_scores(5, 8, 11)
    gain = torch.zeros(8, 8)
    reference._update_gain(gain, scores.T.contiguous(), torch.ones(2, dtype=torch.bool), 2, 4)
    for i, b in itertools.product(range(8), range(8)):
        expected = 0.0
        for row in scores.tolist():
            group = range(i // 4 * 4, i // 4 * 4 + 4)
            threshold = sorted((row[c] for c in group if c != i), reverse=True)[1]
            expected += max(0.0, row[b] - threshold)
        assert float(gain[i, b]) == pytest.approx(expected, abs=1e-5)


def test_only_stale_groups_are_computed_anew() -> None:
    scores = random_scores(5, 12, 12)
    gain = torch.full((12, 12), -7.0)
    stale = torch.tensor([False, True, False])
    reference._update_gain(gain, scores.T.contiguous(), stale, 2, 4)
    assert not stale.any()
    assert (gain[4:8] > -1e-5).all()
    assert (gain[:4] == -7).all()
    assert (gain[8:] == -7).all()


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
    config = PruneConfig(shuffle="global+local+assignment", shuffle_block=32)
    expected = search_permutation(scores, config)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(search_permutation(scores * factor, config), expected)


@pytest.mark.parametrize("stages", ["global+local", "global+assignment", "stride+local+assignment"])
def test_result_does_not_depend_on_threads(stages: str) -> None:
    scores = random_scores(32, 160, 41)
    config = config_of(stages, 32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(search_permutation(scores, config))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], torch.arange(160))


def test_order_of_rows_does_not_matter_to_the_retained_score_it_reaches() -> None:
    scores = random_scores(16, 64, 51)
    flipped = scores.flip(0)
    config = PruneConfig(shuffle="global+local", shuffle_block=64)
    one, other = search_permutation(scores, config), search_permutation(flipped, config)
    assert retained(scores, one, TWO_FOUR) == pytest.approx(retained(scores, other, TWO_FOUR), rel=1e-3)


def test_nth_best_by_sorting() -> None:
    columns = list(random_scores(5, 30, 61, levels=4))
    for count in range(1, 6):
        for n in range(1, count + 1):
            computed = nth_best(columns[:count], n)
            expected = [sorted(values, reverse=True)[n - 1] for values in torch.stack(columns[:count]).T.tolist()]
            assert computed.tolist() == expected


def test_disjoint_swaps_take_the_best_first_and_each_group_once() -> None:
    swap = torch.full((8, 8), -1.0)
    for i, j, value in ((0, 2, 5.0), (1, 4, 9.0), (3, 6, 4.0), (5, 7, 8.0)):
        swap[i, j] = swap[j, i] = value
    # Groups of two: 9 joins groups 0 and 2, which shuts 5 and 8 out; then 4 joins groups 1 and 3.
    assert reference._disjoint_swaps(swap, 2).tolist() == [[1, 4], [3, 6]]
    assert reference._disjoint_swaps(torch.full((8, 8), -1.0), 2).shape == (0, 2)


def test_stride_deals_always_in_the_same_direction() -> None:
    scores = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert global_shuffle(scores, TWO_FOUR, snake=False).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert global_shuffle(scores, NMPattern(1, 2), snake=False).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([0, 3]),
    st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_assignment_is_valid_and_never_loses(
    pattern: NMPattern, rows: int, groups: int, levels: int, seed: int
) -> None:
    """By itself, from any start: each assignment is at least as good as the one that it finds."""
    channels = groups * pattern.group_size
    scores = random_scores(rows, channels, seed, levels)
    start = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    before = scores.clone(), start.clone()
    permutation = assignment_shuffle(scores, start, pattern)
    assert torch.equal(scores, before[0])
    assert torch.equal(start, before[1])
    assert_valid(permutation, channels, pattern)
    lost = retained(scores, start, pattern) - retained(scores, permutation, pattern)
    assert lost <= 1e-5 * float(scores.sum())


@pytest.mark.parametrize("groups_at_once", [1, 2, 3, 96])
def test_assignment_in_parts(groups_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "ASSIGNMENT_GROUPS", groups_at_once)
    scores, start = random_scores(12, 64, 71), torch.arange(64)
    permutation = assignment_shuffle(scores, start, TWO_FOUR)
    assert_valid(permutation, 64, TWO_FOUR)
    gain = retained(scores, permutation, TWO_FOUR) - retained(scores, start, TWO_FOUR)
    if groups_at_once == 1:  # nothing to exchange
        assert torch.equal(permutation, start)
    else:
        assert gain > 0.001 * float(scores.sum())
    assert torch.equal(permutation, assignment_shuffle(scores, start, TWO_FOUR))


@pytest.mark.parametrize("pattern", [TWO_FOUR, NMPattern(1, 2), NMPattern(1, 3)], ids=str)
def test_assignment_finds_the_best_grouping_of_small_cases(pattern: NMPattern) -> None:
    """In most cases the best of all, and never below the global shuffle that it starts from."""
    groups, count = 2 if pattern.group_size == 4 else 3, 40
    optimal, shares = 0, []
    for seed in range(count):
        scores = random_scores(4, groups * pattern.group_size, seed)
        dealt, found = (
            retained(scores, search_permutation(scores, PruneConfig(pattern=pattern, shuffle=stages)), pattern)
            for stages in ("global", "global+assignment")
        )
        best = best_grouping(scores, pattern)
        assert dealt <= found <= best * (1 + 1e-6)
        optimal += found >= best * (1 - 1e-6)
        if best > dealt * (1 + 1e-6):
            shares.append((found - dealt) / (best - dealt))
    assert optimal >= count // 2
    assert sum(shares) / len(shares) >= 0.4


@pytest.mark.parametrize("stages", ["global", "local", "assignment", "global+local+assignment"])
def test_objective_energy_raises_the_sum_of_squares(stages: str) -> None:
    scores = random_scores(12, 64, 81)
    by_energy = search_permutation(scores, PruneConfig(shuffle=stages, objective="energy"))
    by_squares = search_permutation(scores.square(), PruneConfig(shuffle=stages))
    assert torch.equal(by_energy, by_squares)
    assert retained(scores.square(), by_energy, TWO_FOUR) > retained(scores.square(), torch.arange(64), TWO_FOUR)
    by_score = search_permutation(scores, PruneConfig(shuffle=stages))
    assert not torch.equal(by_energy, by_score)


@given(st.permutations(["stride", "global", "local", "assignment"]), st.integers(0, 4), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_stages_in_any_order_never_retain_less(order: list[str], count: int, seed: int) -> None:
    """And a stage more never less than the stages before it."""
    scores = random_scores(5, 40, seed)
    levels = []
    for length in range(count + 1):
        config = config_of("+".join(order[:length]) or "none", 16)
        levels.append(retained(scores, search_permutation(scores, config), TWO_FOUR))
    assert levels == sorted(levels)
