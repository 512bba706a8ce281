"""Refined masks by float64 numpy: the objective never rises, small problems end at fixed points or optima."""

import itertools
import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.config import NMPattern
from streamprune.pruning.refinement import (
    MIN_GAIN,
    SHRINKAGES,
    choose_shrinkage,
    group_patterns,
    objective,
    quadratic_form,
    refine_mask,
)
from streamprune.pruning.selection import select

TWO_FOUR, FOUR_EIGHT = NMPattern(2, 4), NMPattern(4, 8)
PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "1:3", "1:2", "8:16")]
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(pattern: NMPattern, rows: int, groups: int, tokens: int, seed: int) -> Problem:
    """weight, plain selection, moments, linear. Channels are correlated; few tokens leave the moments singular."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * pattern.group_size
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = x + torch.randn(tokens, 1, generator=generator) * width**0.5
    moments = x.T @ x
    linear = torch.randn(rows, width, generator=generator) * moments.diagonal() * 0.3
    keep = select(weight.abs() * moments.diagonal().sqrt(), pattern)
    return weight, keep, moments, linear


def cost(
    weight: torch.Tensor, keep: Any, moments: torch.Tensor, shrinkage: float, linear: torch.Tensor | None
) -> numpy.ndarray:
    """d H d^T + 2 d l^T with off-diagonal H times 1 - shrinkage, of each row, all in float64."""
    h = moments.double().numpy()
    h = (1 - shrinkage) * h + shrinkage * numpy.diag(numpy.diag(h))
    d = numpy.where(numpy.asarray(keep), 0, weight.double().numpy())
    value = numpy.einsum("...i,ij,...j->...", d, h, d)
    return value if linear is None else value + 2 * (d * linear.double().numpy()).sum(axis=-1)


def scale_of(weight: torch.Tensor, moments: torch.Tensor) -> numpy.ndarray:
    """Sum of w^2 h of each row: what rounding is relative to."""
    return (weight.double().square() @ moments.double().diagonal()).numpy()


def all_group_masks(pattern: NMPattern) -> list[numpy.ndarray]:
    masks = []
    for kept in itertools.combinations(range(pattern.group_size), pattern.kept):
        mask = numpy.zeros(pattern.group_size, dtype=bool)
        mask[list(kept)] = True
        masks.append(mask)
    return masks


def assert_exactly_n_of_m(keep: torch.Tensor, pattern: NMPattern) -> None:
    assert keep.dtype == torch.bool
    assert (keep.view(len(keep), -1, pattern.group_size).sum(dim=2) == pattern.kept).all()


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([1, 3, 200]),
    st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]) | st.floats(0, 1),
    st.booleans(),
    seeds,
)
@repeatable
def test_the_objective_never_rises(
    pattern: NMPattern, rows: int, groups: int, tokens: int, shrinkage: float, with_linear: bool, seed: int
) -> None:
    weight, keep, moments, linear = problem(pattern, rows, groups, tokens, seed)
    slope = linear if with_linear else None
    before = tuple(tensor.clone() for tensor in (weight, keep, moments, linear))
    refined = refine_mask(weight, keep, moments, pattern, shrinkage, slope)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, keep, moments, linear), strict=True))
    assert_exactly_n_of_m(refined, pattern)
    rise = cost(weight, refined, moments, shrinkage, slope) - cost(weight, keep, moments, shrinkage, slope)
    # a row of few groups can be all noise, where tokens are fewer than channels: its own size does not count
    assert (rise <= 2e-6 * scale_of(weight, moments)).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_objective_falls_by_much_on_correlated_inputs(pattern: NMPattern, shrinkage: float) -> None:
    """Over more columns than one block of the kernel holds, so that changes are carried from block to block."""
    weight, keep, moments, linear = problem(pattern, 16, 480 // pattern.group_size, 2000, 5)
    for slope in (None, linear):
        refined = refine_mask(weight, keep, moments, pattern, shrinkage, slope)
        before, after = (cost(weight, mask, moments, shrinkage, slope).sum() for mask in (keep, refined))
        assert after < before - 0.1 * abs(before)
        assert (cost(weight, refined, moments, shrinkage, slope) <= cost(weight, keep, moments, shrinkage, slope)).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("with_linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize(
    ("pattern", "groups"), [(TWO_FOUR, 2), (TWO_FOUR, 6), (NMPattern(1, 3), 4), (FOUR_EIGHT, 2)], ids=str
)
def test_ends_where_no_other_pattern_of_a_single_group_costs_less(
    pattern: NMPattern, groups: int, with_linear: bool, shrinkage: float
) -> None:
    for seed in range(4):
        weight, keep, moments, linear = problem(pattern, 5, groups, 60, seed)
        slope = linear if with_linear else None
        refined = refine_mask(weight, keep, moments, pattern, shrinkage, slope, passes=100)
        end, slack = cost(weight, refined, moments, shrinkage, slope), 5 * MIN_GAIN * scale_of(weight, moments)
        for first in range(0, groups * pattern.group_size, pattern.group_size):
            for mask in all_group_masks(pattern):
                other = refined.numpy().copy()
                other[:, first : first + pattern.group_size] = mask
                assert (cost(weight, other, moments, shrinkage, slope) >= end - slack).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("with_linear", [False, True], ids=["plain", "linear"])
@pytest.mark.parametrize("pattern", [TWO_FOUR, FOUR_EIGHT, NMPattern(3, 4), NMPattern(2, 8)], ids=str)
def test_a_single_group_takes_the_best_of_all_patterns(pattern: NMPattern, with_linear: bool, shrinkage: float) -> None:
    """By brute force in float64; and from any mask to start with."""
    weight, _, moments, linear = problem(pattern, 40, 1, 30, 7)
    slope = linear if with_linear else None
    options = [cost(weight, numpy.tile(mask, (40, 1)), moments, shrinkage, slope) for mask in all_group_masks(pattern)]
    best = numpy.min(options, axis=0)
    keep = torch.zeros(40, pattern.group_size, dtype=torch.bool)
    keep[:, -pattern.kept :] = True
    reached = cost(weight, refine_mask(weight, keep, moments, pattern, shrinkage, slope), moments, shrinkage, slope)
    assert (reached <= best + 5 * MIN_GAIN * scale_of(weight, moments)).all()
    assert (cost(weight, keep, moments, shrinkage, slope) > best + 1e-3 * scale_of(weight, moments)).mean() > 0.5


def test_many_patterns_go_by_exchanges_to_where_none_saves() -> None:
    """8:16 has 12,870 patterns; with one group, no exchange of a kept place for a dropped one costs less."""
    pattern = NMPattern(8, 16)
    assert group_patterns(pattern).shape == (0, 16)
    weight, keep, moments, linear = problem(pattern, 8, 1, 40, 3)
    refined = refine_mask(weight, keep, moments, pattern, 0.1, linear, passes=100)
    end, slack = cost(weight, refined, moments, 0.1, linear), 5 * MIN_GAIN * scale_of(weight, moments)
    assert (end < cost(weight, keep, moments, 0.1, linear) - slack).sum() >= 4
    for row in range(8):
        for i, j in itertools.combinations(range(16), 2):
            other = refined.numpy().copy()
            if other[row, i] != other[row, j]:
                other[row, [i, j]] = other[row, [j, i]]
                assert cost(weight, other, moments, 0.1, linear)[row] >= end[row] - slack[row]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_full_shrinkage_is_the_plain_selection_by_energy(pattern: NMPattern) -> None:
    """With the diagonal alone a group drops what has the least w^2 h, wherever it starts."""
    weight, keep, moments, _ = problem(pattern, 20, 5, 50, 9)
    expected = select(weight.square() * moments.diagonal(), pattern)
    assert torch.equal(expected, keep)
    start = select(torch.rand(20, 5 * pattern.group_size, generator=torch.Generator().manual_seed(0)), pattern)
    assert not torch.equal(start, expected)
    assert torch.equal(refine_mask(weight, start, moments, pattern, 1.0, passes=100), expected)


def test_refined_twice_is_refined_once() -> None:
    weight, keep, moments, linear = problem(TWO_FOUR, 12, 30, 300, 2)
    once = refine_mask(weight, keep, moments, TWO_FOUR, 0.1, linear, passes=100)
    assert torch.equal(refine_mask(weight, once, moments, TWO_FOUR, 0.1, linear), once)
    assert not torch.equal(once, keep)


def test_masks_do_not_depend_on_threads() -> None:
    weight, keep, moments, linear = problem(TWO_FOUR, 64, 112, 900, 2)
    former, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(refine_mask(weight, keep, moments, TWO_FOUR, 0.1, linear))
    finally:
        torch.set_num_threads(former)
    assert torch.equal(*found)


def test_no_correction_is_a_linear_term_of_zeros() -> None:
    """With X_dense equal to X, C and so the linear term are 0."""
    weight, keep, moments, linear = problem(TWO_FOUR, 12, 30, 300, 4)
    none = refine_mask(weight, keep, moments, TWO_FOUR, 0.1)
    assert torch.equal(refine_mask(weight, keep, moments, TWO_FOUR, 0.1, torch.zeros_like(linear)), none)
    assert not torch.equal(refine_mask(weight, keep, moments, TWO_FOUR, 0.1, linear), none)


def test_the_corrected_objective_is_that_of_the_outputs() -> None:
    """||c (X_dense - X) w + X d||^2 less its constant, computed from activations: what the linear term stands for."""
    generator, c = torch.Generator().manual_seed(8), 0.7
    x = torch.randn(90, 24, generator=generator)
    dense_x = x + 0.3 * torch.randn(90, 24, generator=generator)
    weight = torch.randn(5, 24, generator=generator)
    keep = select(weight.abs(), TWO_FOUR)
    linear = c * weight @ ((dense_x - x).T @ x)
    refined = refine_mask(weight, keep, x.T @ x, TWO_FOUR, 0.0, linear)
    offset = c * (dense_x - x).double() @ weight.double().T
    for mask in (keep, refined):
        moved = x.double() @ torch.where(mask, 0, weight).double().T
        expected = (offset + moved).square().sum(dim=0) - offset.square().sum(dim=0)
        computed = objective(weight, mask, x.T @ x, 0.0, linear)
        torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-3)
    assert objective(weight, refined, x.T @ x, 0.0, linear).sum() < objective(weight, keep, x.T @ x, 0.0, linear).sum()


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([2, 40]), st.floats(0, 1), st.booleans(), seeds)
@repeatable
def test_objective_is_the_formula(
    rows: int, groups: int, tokens: int, shrinkage: float, with_linear: bool, seed: int
) -> None:
    weight, keep, moments, linear = problem(TWO_FOUR, rows, groups, tokens, seed)
    slope = linear if with_linear else None
    computed = objective(weight, keep, moments, shrinkage, slope)
    assert computed.dtype == torch.float64
    difference = numpy.abs(computed.numpy() - cost(weight, keep, moments, shrinkage, slope))
    assert (difference <= 2e-6 * groups * scale_of(weight, moments)).all()
    form = quadratic_form(weight, moments).numpy()
    nothing_kept = cost(weight, torch.zeros_like(keep), moments, 0.0, None)
    assert (numpy.abs(form - nothing_kept) <= 2e-6 * 4 * groups * scale_of(weight, moments)).all()


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "1:3", "1:64", "5:10", "8:16", "32:64"])
def test_group_patterns_are_all_or_none(text: str) -> None:
    pattern = NMPattern.parse(text)
    places = group_patterns(pattern)
    count = math.comb(pattern.group_size, pattern.kept)
    assert places.shape == (count if count <= 256 else 0, pattern.group_size)
    assert (places.sum(dim=1) == pattern.kept).all()
    assert len({tuple(row) for row in places.tolist()}) == len(places)


def halves_of(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of two samples of one distribution, whose neighbouring channels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(64) + 0.6 * torch.eye(64).roll(1, 0) + 0.3 * torch.eye(64).roll(2, 0)
    one, other = (torch.randn(tokens, 64, generator=generator) @ mix for _ in range(2))
    return one.T @ one, other.T @ other


def test_fewer_tokens_are_shrunk_more() -> None:
    """What many tokens show is so; what few show is mostly chance."""
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    chosen = []
    for tokens in (24, 20_000):
        halves = halves_of(tokens, 2)
        keep = select(weight.abs() * sum(halves).diagonal().sqrt(), TWO_FOUR)
        chosen.append(choose_shrinkage(weight, keep, halves, TWO_FOUR))
    assert chosen[0] > chosen[1]
    assert chosen[0] == max(SHRINKAGES) / (2 - max(SHRINKAGES))
    assert chosen[1] == min(SHRINKAGES) / (2 - min(SHRINKAGES))


@given(st.sampled_from(PATTERNS), st.integers(1, 200), st.sampled_from([1, 4, 100]), seeds)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_the_chosen_shrinkage_is_one_of_those_tried(pattern: NMPattern, rows: int, tokens: int, seed: int) -> None:
    weight, keep, one, _ = problem(pattern, rows, 3, tokens, seed)
    other = problem(pattern, rows, 3, tokens, seed + 1)[2]
    strength = choose_shrinkage(weight, keep, (one, other), pattern)
    assert 0 < strength < 1
    assert strength in [s / (2 - s) for s in SHRINKAGES]


def test_a_single_sequence_is_shrunk_as_much_as_any() -> None:
    """Nothing is held out then: the moments of one sequence are not to be trusted more than those of many."""
    weight, keep, seen, _ = problem(TWO_FOUR, 64, 6, 48, 3)
    strength = choose_shrinkage(weight, keep, (seen, torch.zeros_like(seen)), TWO_FOUR)
    assert strength == max(SHRINKAGES) / (2 - max(SHRINKAGES))
