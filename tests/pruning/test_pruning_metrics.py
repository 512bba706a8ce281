"""Each score against its formula in float64 numpy."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.metrics import (
    amplitude,
    channel_factor,
    esparse_factor,
    ria_score,
    score,
)
from streamprune.pruning.selection import select
from streamprune.pruning.statistics import ChannelStatistics

SEQUENCES, TOKENS, IN, OUT = 4, 96, 16, 12


def activations() -> numpy.ndarray:
    """[sequences, tokens, in], channels of different spread and offset."""
    random = numpy.random.default_rng(5)
    x = random.standard_normal((SEQUENCES, TOKENS, IN)) * numpy.exp(random.standard_normal(IN))
    return (x + random.standard_normal(IN)).astype(numpy.float32)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(numpy.random.default_rng(6).standard_normal((OUT, IN)).astype(numpy.float32)).to(dtype)


def exact_entropy(x: numpy.ndarray, bins: int) -> numpy.ndarray:
    """Entropy in nats of each channel's histogram between its least and greatest value; x [tokens, in]."""
    entropies = []
    for channel in x.T.astype(numpy.float64):
        counts, _ = numpy.histogram(channel, bins=bins)
        p = counts[counts > 0] / counts.sum()
        entropies.append(-(p * numpy.log(p)).sum())
    return numpy.array(entropies)


def statistics() -> ChannelStatistics:
    x = activations().reshape(-1, IN)
    square_sum = (x.astype(numpy.float64) ** 2).sum(axis=0)
    return ChannelStatistics(
        torch.from_numpy(square_sum), torch.from_numpy(exact_entropy(x, 100)), None, SEQUENCES * TOKENS, SEQUENCES
    )


def norm() -> numpy.ndarray:
    return numpy.linalg.norm(activations().reshape(-1, IN).astype(numpy.float64), axis=0)


def magnitude_reference(w: numpy.ndarray) -> numpy.ndarray:
    return numpy.abs(w)


def wanda_reference(w: numpy.ndarray) -> numpy.ndarray:
    return numpy.abs(w) * norm()


def ria_reference(w: numpy.ndarray) -> numpy.ndarray:
    m = numpy.abs(w)
    return (m / m.sum(axis=1, keepdims=True) + m / m.sum(axis=0, keepdims=True)) * norm() ** 0.5


def esparse_reference(w: numpy.ndarray) -> numpy.ndarray:
    return numpy.abs(w) * (exact_entropy(activations().reshape(-1, IN), 100) + 1.0 * norm())


REFERENCES: dict[str, Callable[[numpy.ndarray], numpy.ndarray]] = {
    "magnitude": magnitude_reference,
    "wanda": wanda_reference,
    "ria": ria_reference,
    "esparse": esparse_reference,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", REFERENCES)
def test_score_is_the_formula_in_float64(metric: Any, dtype: torch.dtype) -> None:
    w = weight(dtype)
    scores = score(w, statistics(), PruneConfig(metric=metric))
    expected = REFERENCES[metric](w.to(torch.float64).numpy())
    assert scores.dtype == torch.float32
    assert scores.shape == (OUT, IN)
    numpy.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6, atol=0)


def test_plain_functions_in_float64_are_exact_to_rounding() -> None:
    w = weight().to(torch.float64)
    n, entropy = torch.from_numpy(norm()), statistics().entropy
    assert entropy is not None
    for computed, metric in (
        (ria_score(w, n), "ria"),
        (w.abs() * esparse_factor(entropy, n, 1.0), "esparse"),
    ):
        numpy.testing.assert_allclose(computed.numpy(), REFERENCES[metric](w.numpy()), rtol=1e-14)


def test_scores_by_hand() -> None:
    w = torch.tensor([[3.0, -4.0], [-1.0, 0.0]])
    n = torch.tensor([4.0, 9.0])
    seen = ChannelStatistics(n.double().square(), None, None, 4, 1)
    assert score(w, seen, PruneConfig(metric="magnitude")).tolist() == [[3, 4], [1, 0]]
    assert score(w, seen, PruneConfig(metric="wanda")).tolist() == [[12, 36], [4, 0]]
    # Rows sum to 7 and 1, columns to 4 and 4; square roots of the norms are 2 and 3.
    expected = [[(3 / 7 + 3 / 4) * 2, (4 / 7 + 4 / 4) * 3], [(1 / 1 + 1 / 4) * 2, 0]]
    numpy.testing.assert_allclose(ria_score(w, n).numpy(), expected, rtol=1e-6)
    assert (w.abs() * esparse_factor(torch.tensor([1.0, 2.0]), n, 0.5)).tolist() == [[9, 26], [3, 0]]


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "esparse"])
def test_a_score_is_the_magnitude_times_the_channels_factor(metric: Any) -> None:
    config = PruneConfig(metric=metric)
    factor = channel_factor(statistics(), config)
    assert factor is not None
    assert torch.equal(score(weight(), statistics(), config), weight().to(torch.float32).abs() * factor)
    assert channel_factor(statistics(), PruneConfig(metric="ria")) is None


@pytest.mark.parametrize("alpha", [0.0, 0.25, 4.0])
def test_alpha_weighs_amplitude_beside_entropy(alpha: float) -> None:
    scores = score(weight(), statistics(), PruneConfig(alpha=alpha))
    entropy = exact_entropy(activations().reshape(-1, IN), 100)
    expected = numpy.abs(weight().to(torch.float64).numpy()) * (entropy + alpha * norm())
    numpy.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "divisor"), [("l2", 1.0), ("wanda", SEQUENCES**0.5), ("rms", (SEQUENCES * TOKENS) ** 0.5)]
)
def test_amplitude_normalisations(normalisation: Any, divisor: float) -> None:
    numpy.testing.assert_allclose(amplitude(statistics(), normalisation).numpy(), norm() / divisor, rtol=1e-14)
    scores = score(weight(), statistics(), PruneConfig(amplitude=normalisation))
    entropy = exact_entropy(activations().reshape(-1, IN), 100)
    expected = numpy.abs(weight().to(torch.float64).numpy()) * (entropy + norm() / divisor)
    numpy.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 2)], ids=str)
def test_wandas_masks_equal_an_independent_wanda(pattern: NMPattern) -> None:
    """As in Wanda's published script: per sequence a running mean of squared norms, then the least of each group go."""
    scaler_row = numpy.zeros(IN)
    for number, sequence in enumerate(activations().astype(numpy.float64)):
        scaler_row = scaler_row * number / (number + 1) + (sequence**2).sum(axis=0) / (number + 1)
    metric = numpy.abs(weight().numpy().astype(numpy.float64)) * numpy.sqrt(scaler_row)
    zeroed = numpy.zeros((OUT, IN), dtype=bool)
    for group in range(0, IN, pattern.group_size):
        order = metric[:, group : group + pattern.group_size].argsort(axis=1, kind="stable")
        for row in range(OUT):
            zeroed[row, group + order[row, : pattern.group_size - pattern.kept]] = True
    keep = select(score(weight(), statistics(), PruneConfig(metric="wanda", pattern=pattern)), pattern)
    assert numpy.array_equal(keep.numpy(), ~zeroed)


def test_ria_of_zero_rows_and_columns_is_zero_not_nan() -> None:
    w = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    scores = ria_score(w, torch.tensor([1.0, 4.0]))
    assert scores.tolist() == [[0, 0], [0, 4]]


def test_scores_of_zero_weights_are_zero_for_every_metric() -> None:
    for metric in REFERENCES:
        scores = score(torch.zeros(OUT, IN), statistics(), PruneConfig(metric=metric))  # type: ignore[arg-type]
        assert scores.count_nonzero() == 0, metric


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("metric", REFERENCES)
def test_score_that_is_not_finite_is_refused(metric: Any, value: float) -> None:
    w = weight()
    w[3, 7] = value
    with pytest.raises(NumericsError, match=f"^{metric} scores hold NaN or infinity$"):
        score(w, statistics(), PruneConfig(metric=metric))


def test_norm_that_float32_cannot_hold_is_refused() -> None:
    huge = ChannelStatistics(torch.full((IN,), 1e80, dtype=torch.float64), None, None, 1, 1)
    with pytest.raises(NumericsError, match="wanda scores"):
        score(weight(), huge, PruneConfig(metric="wanda"))
    assert torch.isfinite(score(weight(), huge, PruneConfig(metric="magnitude"))).all()


def test_esparse_without_entropy_is_a_programming_error() -> None:
    without = ChannelStatistics(statistics().square_sum, None, None, 1, 1)
    with pytest.raises(ValueError, match="needs statistics with entropy"):
        score(weight(), without, PruneConfig(metric="esparse"))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_relative_terms_are_divided_by_their_means(alpha: float) -> None:
    """Then a unit of the amplitude, or of the entropy, changes nothing."""
    entropy, n = exact_entropy(activations().reshape(-1, IN), 100), norm()
    w = numpy.abs(weight().to(torch.float64).numpy())
    scores = score(weight(), statistics(), PruneConfig(relative=True, alpha=alpha))
    numpy.testing.assert_allclose(scores.numpy(), w * (entropy / entropy.mean() + alpha * n / n.mean()), rtol=1e-6)
    scaled = score(weight(), statistics(), PruneConfig(relative=True, alpha=alpha, amplitude="rms"))
    numpy.testing.assert_allclose(scaled.numpy(), scores.numpy(), rtol=1e-6)


def test_relative_terms_that_are_zero_stay_zero() -> None:
    zeros = torch.zeros(4)
    n = torch.tensor([1.0, 2.0, 3.0, 2.0])
    assert esparse_factor(zeros, n, 2.0, relative=True).tolist() == [1.0, 2.0, 3.0, 2.0]
    assert esparse_factor(zeros, zeros, 2.0, relative=True).count_nonzero() == 0
