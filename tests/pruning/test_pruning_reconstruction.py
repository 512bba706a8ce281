"""Reconstructed weights by float64 numpy: the least-squares solution on the mask, and never worse than the mask."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.config import NMPattern
from streamprune.pruning.reconstruction import DAMPING, reconstruct_weight
from streamprune.pruning.selection import select

repeatable = settings(max_examples=40, deadline=None, derandomize=True, database=None)
PATTERNS = [NMPattern.parse(text) for text in ("2:4", "4:8", "1:4", "1:2")]

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def problem(pattern: NMPattern, rows: int, groups: int, tokens: int, seed: int) -> Problem:
    """weight, mask, inputs [tokens, in], linear."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * pattern.group_size
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) + 0.5 * torch.randn(tokens, 1, generator=generator)
    keep = select(torch.rand(rows, width, generator=generator), pattern)
    return weight, keep, x, torch.randn(rows, width, generator=generator) * tokens * 0.1


def damped(x: torch.Tensor) -> numpy.ndarray:
    """H + damping in float64."""
    h = x.double().numpy().T @ x.double().numpy()
    return h + DAMPING * numpy.diag(h).mean() * numpy.eye(len(h))


def cost(difference: numpy.ndarray, h: numpy.ndarray, linear: torch.Tensor | None) -> numpy.ndarray:
    value = numpy.einsum("ri,ij,rj->r", difference, h, difference)
    return value if linear is None else value + 2 * (difference * linear.double().numpy()).sum(axis=1)


def exact(weight: torch.Tensor, keep: torch.Tensor, x: torch.Tensor, linear: torch.Tensor | None) -> numpy.ndarray:
    """The normal equations of each row's kept places, solved in float64."""
    h, w, solution = damped(x), weight.double().numpy(), numpy.zeros(weight.shape)
    for row, mask in enumerate(keep.numpy()):
        target = h[mask] @ w[row]
        if linear is not None:
            target = target + linear.double().numpy()[row, mask]
        solution[row, mask] = numpy.linalg.solve(h[numpy.ix_(mask, mask)], target)
    return solution


@given(
    st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(1, 4), st.sampled_from([3, 200]), st.booleans(),
    st.integers(0, 2**32),
)  # fmt: skip
@repeatable
def test_is_the_least_squares_solution(
    pattern: NMPattern, rows: int, groups: int, tokens: int, with_linear: bool, seed: int
) -> None:
    weight, keep, x, linear = problem(pattern, rows, groups, tokens, seed)
    slope = linear if with_linear else None
    fitted = reconstruct_weight(weight, keep, x.T @ x, slope)
    assert (fitted.dtype, fitted.shape) == (torch.float32, weight.shape)
    assert (fitted[~keep] == 0).all()
    expected, h = exact(weight, keep, x, slope), damped(x)
    numpy.testing.assert_allclose(fitted.numpy(), expected, rtol=0, atol=2e-3 * max(1.0, numpy.abs(expected).max()))
    w, masked = weight.double().numpy(), torch.where(keep, weight, 0).double().numpy()
    reached, start, best = (cost(w - v, h, slope) for v in (fitted.double().numpy(), masked, expected))
    size = cost(w, h, None)
    assert (reached <= start + 1e-5 * size).all()
    assert (reached <= best + 1e-4 * (start - best) + 1e-5 * size).all()


def test_equals_numpys_lstsq_row_by_row() -> None:
    """The damping as rows under X: ||X (w - v)||^2 + damping ||w - v||^2, v 0 where dropped."""
    weight, keep, x, _ = problem(NMPattern(2, 4), 9, 3, 80, 1)
    h = x.double().numpy().T @ x.double().numpy()
    stacked = numpy.concatenate([x.double().numpy(), (DAMPING * numpy.diag(h).mean()) ** 0.5 * numpy.eye(12)])
    fitted = reconstruct_weight(weight, keep, x.T @ x)
    for row in range(9):
        mask = keep[row].numpy()
        expected = numpy.linalg.lstsq(stacked[:, mask], stacked @ weight[row].double().numpy(), rcond=None)[0]
        numpy.testing.assert_allclose(fitted[row].numpy()[mask], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_linear", [False, True], ids=["plain", "linear"])
def test_the_gradient_on_kept_weights_vanishes(with_linear: bool) -> None:
    """At more channels than conjugate gradients have steps."""
    weight, keep, x, linear = problem(NMPattern(2, 4), 20, 60, 1000, 3)
    slope = linear if with_linear else None
    fitted = reconstruct_weight(weight, keep, x.T @ x, slope)
    h, mask = damped(x), keep.numpy()

    def gradient(v: torch.Tensor) -> float:
        towards = (weight - v).double().numpy() @ h + (0 if slope is None else slope.double().numpy())
        return float(numpy.linalg.norm(towards[mask]))

    start = gradient(torch.where(keep, weight, 0))
    assert gradient(fitted) <= 1e-3 * start
    w = weight.double().numpy()
    reached, masked = (cost(w - v.double().numpy(), h, slope) for v in (fitted, torch.where(keep, weight, 0)))
    assert (reached < masked).all()


def test_nothing_to_repair_leaves_the_weights_alone() -> None:
    """Dropped weights that are 0, and inputs that are uncorrelated: kept ones stay, to the bit."""
    weight, keep, x, _ = problem(NMPattern(2, 4), 6, 4, 60, 5)
    zeroed = torch.where(keep, weight, 0)
    assert torch.equal(reconstruct_weight(zeroed, keep, x.T @ x), zeroed)
    assert torch.equal(reconstruct_weight(weight, keep, torch.diag(x.square().sum(dim=0))), zeroed)


def test_dead_inputs_and_moments_of_zeros() -> None:
    weight, keep, x, _ = problem(NMPattern(2, 4), 6, 4, 60, 6)
    zeroed = torch.where(keep, weight, 0)
    assert torch.equal(reconstruct_weight(weight, keep, torch.zeros(16, 16)), zeroed)
    x[:, ::3] = 0
    fitted = reconstruct_weight(weight, keep, x.T @ x)
    assert torch.isfinite(fitted).all()
    assert torch.equal(fitted[:, ::3], zeroed[:, ::3])


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-20, 2.0**20, 2.0**60])
def test_a_scale_of_the_inputs_changes_nothing(factor: float) -> None:
    """As activations of 1e-9 or 1e9 would give it."""
    weight, keep, x, _ = problem(NMPattern(2, 4), 6, 4, 60, 7)
    expected = reconstruct_weight(weight, keep, x.T @ x)
    torch.testing.assert_close(reconstruct_weight(weight, keep, (x.T @ x) * factor), expected, rtol=1e-4, atol=1e-5)
