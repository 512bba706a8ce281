"""Mask refinement on a GPU, run on the CPU from text and from PTX: the masks of the plain function, q to rounding."""

import math

import pytest
import torch
from cuda_tools import runners
from cuda_tools.stand_in import standing_in
from refinement_problems import Problem, clone, random_problem, whole_problem

from streamprune.config import NMPattern
from streamprune_kernels import reference, refine_rows
from streamprune_kernels.launch import Run
from streamprune_kernels.refine import refine_rows_cuda

# 8:16 has too many patterns and goes by exchanges, as does 32:64, whose places fill a word; rows fill no block.
CASES = (("2:4", 7, 3), ("2:4", 9, 48), ("4:8", 8, 3), ("1:4", 3, 5), ("3:12", 2, 2), ("8:16", 5, 2))
SLOW_CASES = (("1:64", 2, 2), ("32:64", 2, 2))


def assert_same(plain: Problem, other: Problem, exact: bool) -> None:
    assert torch.equal(other[0], plain[0])
    assert torch.equal(other[1], plain[1])
    assert torch.equal(other[3], plain[3])
    if exact:
        assert torch.equal(other[2], plain[2])
    else:
        scale = float(plain[3].diagonal().max()) * plain[4].shape[1]
        torch.testing.assert_close(other[2], plain[2], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_give_the_plain_masks_and_q_bit_for_bit(case: tuple[str, int, int], run: Run) -> None:
    text, rows, groups = case
    plain = whole_problem(NMPattern.parse(text), rows, groups)
    other = clone(plain)
    count = reference.refine_rows(*plain, 1.0, 0.0)
    assert refine_rows_cuda(*other, 1.0, 0.0, run=run) == count
    assert count > 0
    assert_same(plain, other, exact=True)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("off", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_numbers_give_the_plain_masks(case: tuple[str, int, int], off: float, run: Run) -> None:
    text, rows, groups = case
    for seed, tokens in enumerate((5, 300)):
        plain = random_problem(NMPattern.parse(text), rows, groups, tokens, seed, off)
        other = clone(plain)
        count = reference.refine_rows(*plain, off, 1e-6)
        assert refine_rows_cuda(*other, off, 1e-6, run=run) == count
        assert_same(plain, other, exact=False)


@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_groups_as_wide_as_a_word(case: tuple[str, int, int]) -> None:
    text, rows, groups = case
    plain = random_problem(NMPattern.parse(text), rows, groups, 100, 0)
    other = clone(plain)
    count = reference.refine_rows(*plain, 0.8, 1e-6)
    assert refine_rows_cuda(*other, 0.8, 1e-6, run=runners.PLAIN["host"]) == count
    assert count > 0
    assert_same(plain, other, exact=False)


def test_the_same_bits_by_both_tools_and_in_any_order() -> None:
    start = random_problem(NMPattern(2, 4), 11, 12, 40, 3)
    results = []
    for run in runners.ALL.values():
        problem = clone(start)
        results.append((refine_rows_cuda(*problem, 0.8, 1e-6, run=run), problem))
    for count, problem in results[1:]:
        assert count == results[0][0] > 0
        for one, other in zip(problem, results[0][1], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("text", ["2:4", "8:16"])
def test_a_group_whose_change_is_no_number_is_left_alone(text: str, run: Run) -> None:
    start = random_problem(NMPattern.parse(text), 3, 2, 50, 0)
    start[2][1, 0] = math.nan
    plain, other = clone(start), clone(start)
    reference.refine_rows(*plain, 0.8, 1e-6)
    refine_rows_cuda(*other, 0.8, 1e-6, run=run)
    m = NMPattern.parse(text).group_size
    assert torch.equal(other[1][1, :m], start[1][1, :m])
    for row in (0, 2):
        assert torch.equal(other[1][row], plain[1][row])


def test_the_function_takes_the_kernel_where_one_runs() -> None:
    launched = []
    plain = random_problem(NMPattern(2, 4), 3, 4, 50, 0)
    other = clone(plain)

    def run(launch: object) -> None:
        launched.append(launch)
        runners.PLAIN["host"](launch)  # type: ignore[arg-type]

    with standing_in(run):
        count = refine_rows(*other, 0.8, 1e-6)
    assert len(launched) == 1
    assert count == refine_rows(*plain, 0.8, 1e-6)
    assert len(launched) == 1
    assert_same(plain, other, exact=False)


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight, keep, q, moments, places = random_problem(NMPattern(2, 4), 3, 4, 50, 0)

    def refused(words: str, *problem: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=words):
            refine_rows_cuda(*problem, 0.8, 1e-6, run=lambda launch: None)  # type: ignore[misc]

    refused("contiguous", weight, keep, q.T.contiguous().T, moments, places)
    refused("keep torch.uint8", weight, keep.to(torch.uint8), q, moments, places)
    refused(r"moments torch.float32 \[16, 8\]", weight, keep, q, moments[:, :8], places)
    refused("16 columns in groups of 3", weight, keep, q, moments, places[:, :3])
    wide = random_problem(NMPattern(2, 4), 1, 400, 2, 0)
    refused("not 1600 columns", *wide)
