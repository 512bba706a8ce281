"""Mask refinement, compiled, against its plain version, for any thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refinement_problems import clone, random_problem, whole_problem
from thread_count import on_threads

from streamprune.config import NMPattern
from streamprune.pruning.refinement import group_patterns
from streamprune_kernels import reference, refine_rows

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32)
REFINED = ["2:4", "4:8", "1:4", "1:3", "3:4", "2:8", "1:2", "5:6", "1:64", "8:16"]


@pytest.mark.parametrize("text", REFINED)
@pytest.mark.parametrize("off", [1.0, 0.8, 0.3])
def test_refine_rows(text: str, off: float) -> None:
    """The same masks, and q to rounding; 8:16 has too many patterns and goes by exchanges."""
    pattern = NMPattern.parse(text)
    assert (len(group_patterns(pattern)) == 0) is (text == "8:16")
    for seed, (rows, groups, tokens) in enumerate([(1, 1, 5), (7, 3, 9), (24, 4, 300)]):
        start = random_problem(pattern, rows, groups, tokens, seed, off)
        plain, one, two = clone(start), clone(start), clone(start)
        counts = [reference.refine_rows(*plain, off, 1e-6)]
        counts += [on_threads(n, lambda n=n, p=p: refine_rows(*p, off, 1e-6)) for n, p in ((1, one), (2, two))]
        assert counts[0] == counts[1] == counts[2]
        assert torch.equal(plain[1], one[1])
        for field in (1, 2):
            assert torch.equal(one[field], two[field])
        scale = float(start[3].diagonal().max()) * pattern.group_size
        torch.testing.assert_close(one[2], plain[2], rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(one[0], start[0])
        assert torch.equal(one[3], start[3])
        in_groups = one[1].view(rows, groups, -1).sum(dim=2)
        assert (in_groups == pattern.kept).all()
        changed = (one[1] != start[1]).view(rows, groups, -1).any(dim=2).sum()
        assert counts[0] == int(changed)
        dropped, before = (torch.where(p[1], 0, start[0]) for p in (one, start))
        torch.testing.assert_close(one[2], start[2] + off * (dropped - before) @ start[3], rtol=1e-4, atol=1e-5 * scale)
    assert counts[0] > 0


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_refine_rows_of_whole_numbers(text: str) -> None:
    """Exact, with many candidates that cost the same."""
    plain = whole_problem(NMPattern.parse(text), 2048, 192 // NMPattern.parse(text).group_size)
    compiled = clone(plain)
    assert reference.refine_rows(*plain, 0.5, 1e-6) == refine_rows(*compiled, 0.5, 1e-6) > 0
    for field in (1, 2):
        assert torch.equal(plain[field], compiled[field])


@given(st.sampled_from(REFINED), st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.3, 1.0]), seeds)
@repeatable
def test_refine_rows_on_random_problems(text: str, rows: int, groups: int, off: float, seed: int) -> None:
    start = random_problem(NMPattern.parse(text), rows, groups, 64, seed, off)
    plain, compiled = clone(start), clone(start)
    assert reference.refine_rows(*plain, off, 1e-6) == refine_rows(*compiled, off, 1e-6)
    assert torch.equal(plain[1], compiled[1])


def test_refine_rows_leaves_numbers_that_are_not_finite() -> None:
    """A cost that is NaN is less than nothing: no group changes, and nothing is read outside a table."""
    for text in ("2:4", "8:16"):
        start = random_problem(NMPattern.parse(text), 3, 2, 50, 0)
        start[2].fill_(float("nan"))
        before = start[1].clone()
        assert refine_rows(*start, 0.8, 1e-6) == 0
        assert torch.equal(start[1], before)


@pytest.mark.parametrize("field", range(4), ids=["weight", "keep", "q", "moments"])
def test_refine_rows_refuses_what_is_not_contiguous(field: int) -> None:
    problem = list(random_problem(NMPattern(2, 4), 8, 4, 50, 0))
    wide = torch.cat([problem[field], problem[field]], dim=1)
    problem[field] = wide[:, : problem[field].shape[1]]
    with pytest.raises(ValueError, match="contiguous"):
        refine_rows(*problem, 0.8, 1e-6)  # type: ignore[arg-type]


def test_refine_rows_refuses_more_patterns_than_it_has_room_for() -> None:
    problem = random_problem(NMPattern(2, 4), 2, 4, 50, 0)
    places = torch.zeros(257, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="257 patterns are too many"):
        refine_rows(*problem[:4], places, 0.8, 1e-6)
