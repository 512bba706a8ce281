"""Selection against a brute-force loop: exactly N of M, ties to the lower channel; sums against numpy."""

import itertools
import math
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.config import NMPattern
from streamprune.pruning.selection import select, stable_sum, weighted_error
from streamprune_kernels import kept_sums

PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "2:8", "1:2", "3:4", "7:8", "1:64", "63:64", "5:6")]


def select_by_loop(scores: torch.Tensor, pattern: NMPattern) -> list[list[bool]]:
    """For each group: channels by score, highest first, lower channel first among equals; the first N are kept."""
    mask = []
    for row in scores.tolist():
        kept: set[int] = set()
        for start in range(0, len(row), pattern.group_size):
            channels = range(start, start + pattern.group_size)
            kept |= set(sorted(channels, key=lambda channel: (-row[channel], channel))[: pattern.kept])
        mask.append([channel in kept for channel in range(len(row))])
    return mask


@pytest.mark.parametrize("distinct", [True, False], ids=["distinct scores", "many ties"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_select_equals_a_loop_over_groups(pattern: NMPattern, distinct: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (20, 3 * pattern.group_size)
    scores = torch.rand(shape, generator=generator) if distinct else torch.randint(0, 3, shape, generator=generator)
    keep = select(scores.to(torch.float32), pattern)
    assert keep.dtype == torch.bool
    assert keep.tolist() == select_by_loop(scores, pattern)
    counts = keep.view(20, 3, pattern.group_size).sum(dim=2)
    assert torch.equal(counts, torch.full((20, 3), pattern.kept))


@given(
    st.sampled_from(PATTERNS[:5]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, 2.0, 1e-45, 3e38]), min_size=1, max_size=50),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_select_equals_a_loop_on_awkward_scores(
    pattern: NMPattern, rows: int, groups: int, pool: list[float], draw: random.Random
) -> None:
    scores = torch.tensor([[draw.choice(pool) for _ in range(groups * pattern.group_size)] for _ in range(rows)])
    assert select(scores, pattern).tolist() == select_by_loop(scores, pattern)


def test_equal_scores_keep_the_lower_channels() -> None:
    assert select(torch.ones(2, 8), NMPattern(2, 4)).tolist() == [[True, True, False, False] * 2] * 2
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0]])
    assert select(scores, NMPattern(2, 4)).tolist() == [[True, True, False, False, False, True, True, False]]


def test_negative_scores_are_ranked_like_any_others() -> None:
    scores = torch.tensor([[-1.0, -3.0, -2.0, -1.0]])
    assert select(scores, NMPattern(2, 4)).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 2), NMPattern(3, 6)], ids=str)
def test_no_other_mask_of_the_pattern_retains_more(pattern: NMPattern) -> None:
    scores = torch.rand(1, pattern.group_size, generator=torch.Generator().manual_seed(2))
    retained = stable_sum(kept_sums(scores, select(scores, pattern)))
    best = max(sum(combination) for combination in itertools.combinations(scores[0].tolist(), pattern.kept))
    assert retained == pytest.approx(best, rel=1e-12)


def test_retained_score_is_numpys_sum_and_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(50, 64, generator=generator) * torch.logspace(-8, 8, 50)[:, None]
    keep = select(scores, NMPattern(2, 4))
    expected = scores.to(torch.float64).numpy()[keep.numpy()].sum()
    assert stable_sum(kept_sums(scores, keep)) == pytest.approx(expected, rel=1e-13)
    order = torch.randperm(50, generator=generator)
    assert stable_sum(kept_sums(scores[order], keep[order])) == stable_sum(kept_sums(scores, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weighted_error_is_the_formula_in_numpy(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(24, 32, generator=generator).to(dtype)
    rms = torch.rand(32, generator=generator) * 10
    keep = select(weight.abs().to(torch.float32), NMPattern(2, 4))
    w, scale = weight.to(torch.float64).numpy(), rms.to(torch.float64).numpy()
    pruned = numpy.where(keep.numpy(), w, 0)
    expected = numpy.linalg.norm((w - pruned) * scale) / numpy.linalg.norm(w * scale)
    assert weighted_error(weight, keep, rms) == pytest.approx(expected, rel=1e-13)
    assert 0 < expected < 1


def test_weighted_error_at_its_ends() -> None:
    weight, rms = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 1.0])
    assert weighted_error(weight, torch.tensor([[True, True]]), rms) == 0
    assert weighted_error(weight, torch.tensor([[False, False]]), rms) == 1
    assert weighted_error(weight, torch.tensor([[False, True]]), rms) == 0.6
    assert weighted_error(weight, torch.tensor([[False, True]]), torch.tensor([0.0, 1.0])) == 0
    assert weighted_error(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool), torch.ones(4)) == 0


def test_weighted_error_changes_neither_weight_nor_mask() -> None:
    weight, keep, rms = torch.randn(4, 8).to(torch.float64), torch.rand(4, 8) < 0.5, torch.rand(8).to(torch.float64)
    before = weight.clone(), keep.clone(), rms.clone()
    weighted_error(weight, keep, rms)
    assert all(torch.equal(one, other) for one, other in zip((weight, keep, rms), before, strict=True))


def test_stable_sum_is_exactly_rounded() -> None:
    assert stable_sum(torch.tensor([1e100, 1.0, -1e100, 1.0], dtype=torch.float64)) == 2
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert stable_sum(values) == stable_sum(values.flip(0)) == math.fsum(values.tolist())
    assert stable_sum(torch.empty(0)) == 0
