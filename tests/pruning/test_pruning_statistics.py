"""Channel statistics in one pass against numpy, and their independence from order and chunking."""

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from streamprune.config import PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning import statistics
from streamprune.pruning.statistics import (
    FINE_BINS,
    STRIP_WIDTH,
    LayerTokens,
    SecondMoments,
    StatisticsAccumulator,
    StreamingHistogram,
    histogram_entropy,
    moment_blocks,
)

CPU = torch.device("cpu")
CHANNELS = 96
WITH_ENTROPY, WITHOUT = PruneConfig(refine=False), PruneConfig(metric="wanda", refine=False)
MOMENTS = PruneConfig(correction=0.5)


def entropy_by_numpy(x: torch.Tensor, bins: int = 100) -> numpy.ndarray:
    """x [channels, n]; numpy.histogram between a channel's least and greatest value."""
    entropies = []
    for channel in x.to(torch.float64).numpy():
        counts, _ = numpy.histogram(channel, bins=bins)
        p = counts[counts > 0] / counts.sum()
        entropies.append(-(p * numpy.log(p)).sum())
    return numpy.array(entropies)


def histogram_of(x: torch.Tensor, *lengths: int) -> StreamingHistogram:
    """Add x [channels, n] in chunks of these lengths; the rest as one."""
    histogram = StreamingHistogram(x.shape[0], CPU)
    low, high = torch.full((x.shape[0],), torch.inf), torch.full((x.shape[0],), -torch.inf)
    for chunk in x.to(torch.float32).split([*lengths, x.shape[1] - sum(lengths)], dim=1):
        low, high = torch.minimum(low, chunk.amin(dim=1)), torch.maximum(high, chunk.amax(dim=1))
        histogram.add(chunk.T, low, high)
    return histogram


def assert_same_state(one: StreamingHistogram, other: StreamingHistogram) -> None:
    for field in ("minimum", "maximum", "exponent"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert torch.equal(counts_from_minimum(one), counts_from_minimum(other))
    assert torch.equal(one.coarse(100), other.coarse(100))


def counts_from_minimum(histogram: StreamingHistogram) -> torch.Tensor:
    """Counts from the minimum's bin on: where the window begins may depend on the order, what it holds may not."""
    lowest = torch.floor(histogram.minimum.double() / torch.exp2(histogram.exponent.double())).long()
    columns = torch.arange(FINE_BINS) + (lowest - histogram.first_bin)[:, None]
    inside = columns < FINE_BINS
    counts = histogram.counts.gather(1, columns.clamp(max=FINE_BINS - 1)) * inside
    assert torch.equal(counts.sum(dim=1), histogram.counts.sum(dim=1))
    return counts


def _normal(n: int) -> torch.Tensor:
    return torch.randn(CHANNELS, n, generator=torch.Generator().manual_seed(n))


def _heavy_tailed(n: int) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    draws = torch.randn(3, CHANNELS, n, generator=torch.Generator().manual_seed(n + 1))
    return _normal(n) / draws.square().mean(dim=0).sqrt()


def _gated(n: int) -> torch.Tensor:
    up = torch.randn(CHANNELS, n, generator=torch.Generator().manual_seed(n + 2))
    return functional.silu(_normal(n)) * up


def _offset(n: int) -> torch.Tensor:
    return _normal(n) * 0.01 + 100 * torch.linspace(-1, 1, CHANNELS)[:, None]


CHANNEL_KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": _normal,
    "heavy-tailed": _heavy_tailed,
    "silu": lambda n: functional.silu(_normal(n)),
    "silu times up": _gated,
    "relu": lambda n: functional.relu(_normal(n)),
    "exponential": lambda n: _normal(n).exp(),
    "offset": _offset,
    "scales from 1e-12 to 1e12": lambda n: _normal(n) * torch.logspace(-12, 12, CHANNELS)[:, None],
    "one token three hundred times the rest": lambda n: torch.cat([_normal(n)[:, :1] * 300, _normal(n)[:, 1:]], dim=1),
    "bfloat16": lambda n: _normal(n).to(torch.bfloat16),
}


@pytest.mark.parametrize("tokens", [2048, 16384])
@pytest.mark.parametrize("kind", CHANNEL_KINDS)
def test_entropy_is_within_a_hundredth_nat_of_the_exact_histograms(kind: str, tokens: int) -> None:
    x = CHANNEL_KINDS[kind](tokens)
    computed = histogram_entropy(histogram_of(x, 100, 300, 200).coarse(100)).numpy()
    difference = numpy.abs(computed - entropy_by_numpy(x))
    assert difference.mean() <= 0.01
    assert difference.max() <= 0.05


@pytest.mark.parametrize("bins", [2, 10, 50, 100])
def test_coarse_counts_are_numpys_to_a_percent_of_the_values(bins: int) -> None:
    x = _normal(8192)
    coarse = histogram_of(x, 512).coarse(bins).numpy()
    exact = numpy.stack([numpy.histogram(channel.to(torch.float64), bins=bins)[0] for channel in x])
    assert coarse.shape == (CHANNELS, bins)
    assert coarse.dtype == numpy.float64
    assert numpy.abs(coarse - exact).max() <= 0.01 * 8192
    numpy.testing.assert_allclose(coarse.sum(axis=1), 8192, rtol=1e-12)
    assert coarse.min() >= 0


def test_counts_are_read_alike_however_many_channels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = histogram_of(torch.randn(CHANNELS, 300), 100)
    read = []
    for channels in (CHANNELS, 7, 1):
        monkeypatch.setattr(statistics, "CHANNELS_AT_ONCE", channels)
        read.append([histogram.coarse(100), histogram.coarse(100, shared=True)])
    for others in read[1:]:
        assert all(torch.equal(one, other) for one, other in zip(read[0], others, strict=True))


def test_entropy_of_uniform_counts_is_log_k_and_of_one_bin_zero() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [0, 9, 0, 0], [1, 1, 0, 0], [3, 1, 0, 0]], dtype=torch.float64)
    expected = [numpy.log(4), 0, numpy.log(2), -(0.75 * numpy.log(0.75) + 0.25 * numpy.log(0.25))]
    entropy = histogram_entropy(counts)
    assert entropy.dtype == torch.float64
    numpy.testing.assert_allclose(entropy.numpy(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.0, 5.0, -3.25, 1e-30, 3e38, -3e38])
def test_constant_channel_has_entropy_zero_and_all_values_in_one_bin(value: float) -> None:
    histogram = histogram_of(torch.full((3, 200), value), 50, 1)
    assert histogram.coarse(100).sum(dim=1).tolist() == [200] * 3
    assert histogram_entropy(histogram.coarse(100)).tolist() == [0, 0, 0]
    assert histogram.counts.sum(dim=1).tolist() == [200] * 3


def test_channel_of_zeros_among_others_has_entropy_zero() -> None:
    x = _normal(512)
    x[7] = 0
    entropy = histogram_entropy(histogram_of(x, 100).coarse(100))
    assert entropy[7] == 0
    assert (entropy[torch.arange(CHANNELS) != 7] > 3).all()


@pytest.mark.parametrize("kind", CHANNEL_KINDS)
def test_counts_do_not_depend_on_order_or_chunks(kind: str) -> None:
    x = CHANNEL_KINDS[kind](600)
    whole = histogram_of(x)
    shuffled = x[:, torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    by_value = x.sort(dim=1).values
    for other in (
        histogram_of(x, *[50] * 11),
        histogram_of(x, 2, 3, 5, 7, 11, 400),
        histogram_of(shuffled, 200, 200),
        histogram_of(by_value, *[20] * 29),
        histogram_of(by_value.flip(1), *[20] * 29),
    ):
        assert_same_state(other, whole)


def test_counts_do_not_depend_on_chunks_of_a_single_value() -> None:
    x = _normal(30)
    assert_same_state(histogram_of(x, *[1] * 29), histogram_of(x))


def test_channel_that_is_constant_at_first_is_counted_where_its_value_lies() -> None:
    x = torch.tensor([[5.0, 5.0, -3.0, 2.0], [-7.0, -7.0, 1.0, 1.0], [0.0, 0.0, 4.0, 1.0]])
    assert_same_state(histogram_of(x, 2), histogram_of(x))
    assert histogram_of(x, 2).coarse(4).round(decimals=6).tolist() == [[1, 0, 1, 2], [2, 0, 0, 2], [2, 1, 0, 1]]


def test_channel_that_is_dead_in_the_first_sequence_keeps_its_resolution() -> None:
    """As an input of OPT's fc2 behind its relu."""
    x = functional.relu(_normal(2000)) * 0.01
    x[:, :400] = 0
    computed = histogram_entropy(histogram_of(x, 400).coarse(100)).numpy()
    assert numpy.abs(computed - entropy_by_numpy(x)).max() <= 0.01


numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1.0])


@given(st.lists(numbers, min_size=2, max_size=40), st.randoms(use_true_random=False), st.integers(1, 39))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_counts_depend_on_the_set_of_values_alone(values: list[float], draw: random.Random, cut: int) -> None:
    shuffled = list(values)
    draw.shuffle(shuffled)
    one = histogram_of(torch.tensor([values]), min(cut, len(values) - 1))
    other = histogram_of(torch.tensor([shuffled]))
    assert_same_state(one, other)
    assert int(one.counts.sum()) == len(values)


@pytest.mark.parametrize("factor", [3.0, 100.0, 1e6, 1e30])
def test_range_grows_without_losing_a_value(factor: float) -> None:
    small = _normal(300)
    x = torch.cat([small, small * factor, -small * factor**0.5], dim=1)
    grown = histogram_of(x, 300, 300)
    assert_same_state(grown, histogram_of(x))
    assert grown.counts.sum(dim=1).tolist() == [900] * CHANNELS
    assert torch.equal(grown.minimum, x.amin(dim=1))
    assert torch.equal(grown.maximum, x.amax(dim=1))


def test_fine_bins_are_the_finest_powers_of_two_that_hold_the_range() -> None:
    x = _normal(2000) * torch.logspace(-3, 3, CHANNELS)[:, None]
    histogram = histogram_of(x, 1000)
    width = torch.exp2(histogram.exponent.to(torch.float64))
    low, high = x.amin(dim=1).to(torch.float64), x.amax(dim=1).to(torch.float64)
    assert (histogram.first_bin <= torch.floor(low / width)).all()
    assert (histogram.first_bin + FINE_BINS > torch.floor(high / width)).all()
    assert (torch.floor(high / width) - torch.floor(low / width) < FINE_BINS).all()
    narrower = width / 2
    assert (torch.floor(high / narrower) - torch.floor(low / narrower) >= FINE_BINS).all()
    # Each value lies in its bin, so counts equal numpy's over these very edges.
    edges = (histogram.first_bin[0] + torch.arange(FINE_BINS + 1)).to(torch.float64) * width[0]
    exact, _ = numpy.histogram(x[0].to(torch.float64).numpy(), bins=edges.numpy())
    assert histogram.counts[0].tolist() == exact.tolist()


@pytest.mark.parametrize("config", [WITH_ENTROPY, WITHOUT], ids=["histogram", "no histogram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("row", range(8))
@pytest.mark.parametrize("sequence", [0, 1])
def test_activation_that_is_not_finite_is_refused(sequence: int, row: int, value: float, config: PruneConfig) -> None:
    """Whatever stands before or after it, also in a channel whose vector is not full."""
    sequences = [torch.ones(8, 20), torch.ones(8, 20) * 2]
    sequences[sequence][row, [3, 17][row % 2]] = value
    accumulator = StatisticsAccumulator(20, config, CPU)
    for good in sequences[:sequence]:
        accumulator.add(good)
    with pytest.raises(NumericsError, match="a layer's input holds NaN or infinity"):
        accumulator.add(sequences[sequence])


def test_range_that_float32_cannot_hold_is_refused() -> None:
    accumulator = StatisticsAccumulator(4, WITH_ENTROPY, CPU)
    accumulator.add(torch.full((8, 4), 3e38))
    with pytest.raises(NumericsError, match="a layer's input spans more than float32 holds"):
        accumulator.add(torch.full((8, 4), -3e38))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_against_numpy(dtype: torch.dtype) -> None:
    sequences = [_normal(n).T.to(dtype) for n in (64, 128, 32)]
    accumulator = StatisticsAccumulator(CHANNELS, WITH_ENTROPY, CPU)
    for sequence in sequences:
        accumulator.add(sequence)
    result = accumulator.result()
    x = torch.cat(sequences).to(torch.float64).numpy()
    assert (result.tokens, result.sequences) == (224, 3)
    assert result.square_sum.dtype == torch.float64
    numpy.testing.assert_allclose(result.square_sum.numpy(), (x**2).sum(axis=0), rtol=1e-7)
    assert result.rms.dtype == torch.float32
    numpy.testing.assert_allclose(result.rms.numpy(), numpy.sqrt((x**2).mean(axis=0)), rtol=1e-6)
    assert result.entropy is not None
    assert result.entropy.dtype == torch.float64
    assert numpy.abs(result.entropy.numpy() - entropy_by_numpy(torch.cat(sequences).T)).max() <= 0.05


def test_square_sum_of_float16_does_not_overflow() -> None:
    accumulator = StatisticsAccumulator(1, WITHOUT, CPU)
    accumulator.add(torch.full((100, 1), 60000.0, dtype=torch.float16))
    assert accumulator.result().square_sum.tolist() == [100 * float(torch.tensor(60000.0).half()) ** 2]
    result = accumulator.result()
    assert result.entropy is None
    assert result.moments is None


def test_statistics_are_bit_equal_for_any_thread_count() -> None:
    sequences = [_normal(512).T, _heavy_tailed(512).T]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            accumulator = StatisticsAccumulator(CHANNELS, WITH_ENTROPY, CPU)
            for sequence in sequences:
                accumulator.add(sequence)
            results.append(accumulator.result())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].square_sum, results[1].square_sum)
    assert results[0].entropy is not None
    assert results[1].entropy is not None
    assert torch.equal(results[0].entropy, results[1].entropy)


def accumulate(sequences: list[torch.Tensor], config: PruneConfig, unit: int | None = None) -> SecondMoments:
    accumulator = StatisticsAccumulator(sequences[0].shape[1], config, CPU, unit)
    for sequence in sequences:
        accumulator.add(sequence)
    moments = accumulator.result().moments
    assert moments is not None
    return moments


def by_numpy(left: list[torch.Tensor], right: list[torch.Tensor]) -> numpy.ndarray:
    """L^T R in float64."""
    return sum(one.double().numpy().T @ other.double().numpy() for one, other in zip(left, right, strict=True))  # type: ignore[return-value]


def assert_near(computed: torch.Tensor, expected: numpy.ndarray) -> None:
    """To float32's rounding of sums whose terms are as large as the diagonal's."""
    scale = numpy.sqrt(numpy.abs(expected).max()) ** 2
    assert computed.dtype == torch.float32
    numpy.testing.assert_allclose(computed.numpy(), expected, rtol=1e-5, atol=2e-6 * scale)


def at_layer(x: torch.Tensor) -> LayerTokens:
    return LayerTokens(x, None)


def tokens_of(channels: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return [torch.randn(length, channels, generator=generator) + 0.3 for length in lengths]


@pytest.mark.parametrize("channels", [20, STRIP_WIDTH, 2 * STRIP_WIDTH + 76])
def test_second_moments_are_numpys_and_apart_by_parity(channels: int) -> None:
    """Also where they are computed in strips of which only the right side is a product."""
    sequences = tokens_of(channels, 40, 24, 33)
    moments = accumulate(sequences, MOMENTS)
    assert moments.bounds == ((0, channels),)
    for half, part in zip(moments.halves, (sequences[::2], sequences[1::2]), strict=True):
        assert_near(half[0], by_numpy(part, part))
        numpy.testing.assert_allclose(half[0].numpy(), half[0].numpy().T, rtol=1e-4, atol=1e-3)
    assert_near(moments.take_whole()[0], by_numpy(sequences, sequences))


@pytest.mark.parametrize(
    ("channels", "most", "unit", "expected"),
    [
        (160, 160, 4, ((0, 160),)),
        (160, 64, 4, ((0, 56), (56, 112), (112, 160))),
        (160, 80, 4, ((0, 80), (80, 160))),
        (64, 64, 16, ((0, 64),)),
        (128, 100, 32, ((0, 64), (64, 128))),
        (192, 64, 96, ((0, 96), (96, 192))),  # a unit that is wider than the most
        (70, 64, 5, ((0, 35), (35, 70))),
        (70, 64, 8, ((0, 40), (40, 70))),  # channels that are no multiple of the unit
    ],
)
def test_moment_blocks(channels: int, most: int, unit: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert moment_blocks(channels, most, unit) == expected


def test_second_moments_in_blocks_are_the_whole_ones_blocks() -> None:
    sequences = tokens_of(160, 40, 24)
    dense = [x + 0.1 * other for x, other in zip(sequences, tokens_of(160, 40, 24), strict=True)]
    config = PruneConfig(correction=0.5, moments_width=64)
    accumulator = StatisticsAccumulator(160, config, CPU)
    for x, reference in zip(sequences, dense, strict=True):
        accumulator.add(x)
        accumulator.add_reference(at_layer(reference), at_layer(x))
    moments = accumulator.result().moments
    assert moments is not None
    assert moments.cross is not None
    expected, cross = (
        by_numpy(sequences, sequences),
        by_numpy([d - x for d, x in zip(dense, sequences, strict=True)], sequences),
    )
    assert len(moments.bounds) == 3
    assert accumulator.result().moments_bytes == 4 * 3 * (56**2 + 56**2 + 48**2)
    whole = moments.take_whole()
    for block, (begin, end) in enumerate(moments.bounds):
        assert_near(whole[block], expected[begin:end, begin:end])
        assert_near(moments.cross[block], cross[begin:end, begin:end])


def test_cross_moments_of_a_part_of_the_sequences_count_for_all() -> None:
    """A reference for every second sequence stands for all of them: C is scaled up (to the tokens that X has)."""
    sequences = tokens_of(24, 32, 32, 32, 32)
    dense = [x * 1.25 for x in sequences]
    accumulator = StatisticsAccumulator(24, PruneConfig(correction=0.5, correction_stride=2), CPU)
    for number, (x, reference) in enumerate(zip(sequences, dense, strict=True)):
        accumulator.add(x)
        if number % 2 == 0:
            accumulator.add_reference(at_layer(reference), at_layer(x))
    moments = accumulator.result().moments
    assert moments is not None
    assert moments.cross is not None
    part = sequences[::2]
    assert_near(moments.cross[0], 2 * by_numpy([x * 0.25 for x in part], part))


@pytest.mark.parametrize(("outputs", "by_output"), [(7, True), (24, True), (25, False), (None, False)])
def test_a_reference_is_held_against_outputs_where_those_are_fewer(outputs: int | None, by_output: bool) -> None:
    """(Y_dense - Y)^T X is W C for the layer's weight W, bias or not; with blocks of moments too it is whole."""
    weight = torch.randn(outputs or 3, 24, generator=torch.Generator().manual_seed(1))
    sequences = tokens_of(24, 32, 32)
    dense = [x * 1.25 for x in sequences]
    config = PruneConfig(correction=0.5)
    accumulator = StatisticsAccumulator(24, config, CPU, outputs=outputs)
    for x, reference in zip(sequences, dense, strict=True):
        accumulator.add(x)
        compared = [accumulator.to_compare(t, t @ weight.T + 3.0) for t in (reference, x)]
        assert all((one.outputs is not None) is by_output for one in compared)
        accumulator.add_reference(*compared)
    found = accumulator.result()
    assert found.moments is not None
    assert (found.output_cross is not None) is by_output
    assert (found.moments.cross is None) is by_output
    if found.output_cross is not None:
        expected = weight.double().numpy() @ by_numpy([x * 0.25 for x in sequences], sequences)
        assert_near(found.output_cross, expected)


def test_a_reference_equal_to_the_inputs_leaves_zero() -> None:
    (x,) = tokens_of(24, 32)
    accumulator = StatisticsAccumulator(24, MOMENTS, CPU)
    accumulator.add(x)
    accumulator.add_reference(at_layer(x.clone()), at_layer(x))
    moments = accumulator.result().moments
    assert moments is not None
    assert moments.cross is not None
    assert moments.cross[0].count_nonzero() == 0


def test_a_reference_without_second_moments_is_a_programming_error() -> None:
    accumulator = StatisticsAccumulator(4, WITHOUT, CPU)
    with pytest.raises(ValueError, match="needs second moments"):
        accumulator.add_reference(at_layer(torch.ones(2, 4)), at_layer(torch.ones(2, 4)))


def test_entropy_range_of_the_layer_is_that_of_all_channels() -> None:
    x = torch.cat([_normal(4096)[:4] * scale for scale in (0.1, 1.0, 10.0)])
    histogram = histogram_of(x, 1000)
    low, high = float(x.min()), float(x.max())
    coarse = histogram.coarse(50, shared=True).numpy()
    exact = numpy.stack([numpy.histogram(c.double().numpy(), bins=50, range=(low, high))[0] for c in x])
    # a narrow channel lies in a bin or two of the layer's range: its fine bins are much finer than those
    assert numpy.abs(coarse - exact).max() <= 0.01 * 4096
    accumulator = StatisticsAccumulator(12, PruneConfig(refine=False, entropy_range="layer", entropy_bins=50), CPU)
    accumulator.add(x.T)
    entropy = accumulator.result().entropy
    assert entropy is not None
    p = exact / 4096
    expected = -(p * numpy.log(numpy.where(p > 0, p, 1))).sum(axis=1)
    assert numpy.abs(entropy.numpy() - expected).max() <= 0.05
    assert (entropy[:4] < entropy[8:] - 1).all()
