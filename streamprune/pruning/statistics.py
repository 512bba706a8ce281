"""What is known of a layer's input channels after the calibration text has passed: energy, range, histogram.

The unit of reduction is one sequence, and partial results are combined in the order of the sequences, so that nothing
depends on micro-batches or threads. Histogram counts are integers and do not depend on the order at all.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from streamprune.errors import NumericsError

LEAST_EXPONENT = -126  # of a bin's width: float32 scales by its inverse without overflow
FINE_BINS = 4096  # 16 KB a channel; the observed range fills 2048 or more. Errors measured: docs/method.md
CHANNELS_AT_ONCE = 1024  # bounds the memory of moving and reading counts


@dataclass(frozen=True)
class ChannelStatistics:
    """Of the input channels of one layer, over all calibration tokens.

    square_sum  float64 [in], sum of x^2
    entropy     float64 [in], nats, or None where the metric does not use it
    tokens, sequences  how many were seen
    """

    square_sum: torch.Tensor
    entropy: torch.Tensor | None
    tokens: int
    sequences: int

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square of each channel, float32 [in]."""
        return (self.square_sum / self.tokens).sqrt().to(torch.float32)


class StatisticsAccumulator:
    """Takes a layer's inputs one sequence at a time; state that grows with channels, never with tokens."""

    def __init__(self, channels: int, entropy_bins: int | None, device: torch.device) -> None:
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.histogram = StreamingHistogram(channels, device) if entropy_bins is not None else None
        self.entropy_bins = entropy_bins
        self.tokens = 0
        self.sequences = 0

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence's inputs [tokens, in]."""
        channels_first = x.T.to(torch.float32).contiguous()
        self.square_sum += channels_first.square().sum(dim=1, dtype=torch.float64)
        if self.histogram is not None:
            self.histogram.add(channels_first)
        self.tokens += x.shape[0]
        self.sequences += 1

    def result(self) -> ChannelStatistics:
        """The statistics so far. Raises NumericsError where an activation was not finite."""
        if not bool(torch.isfinite(self.square_sum).all()):
            raise NumericsError("a layer's input holds NaN or infinity")
        entropy = None
        if self.histogram is not None and self.entropy_bins is not None:
            entropy = histogram_entropy(self.histogram.coarse(self.entropy_bins))
        return ChannelStatistics(self.square_sum, entropy, self.tokens, self.sequences)


class StreamingHistogram:
    """Histograms [channels, FINE_BINS] of float32 values whose range is not known beforehand, in one pass.

    Bin i of a channel covers [i w, (i + 1) w) on an absolute grid, with a width w = 2^e of the channel's own: the least
    power of two for which the window from the minimum's bin to the maximum's holds at most FINE_BINS bins (and at which
    bin numbers stay below 2^24). A wider range doubles w and merges bins in pairs, which is exact: the final counts
    depend on the set of values, not on their order.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.counts = torch.zeros(channels, FINE_BINS, dtype=torch.int32, device=device)
        self.minimum = torch.full((channels,), math.inf, device=device)
        self.maximum = torch.full((channels,), -math.inf, device=device)
        self.exponent = torch.full((channels,), LEAST_EXPONENT, dtype=torch.int32, device=device)
        self.first_bin = torch.zeros(channels, dtype=torch.int32, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Count values [channels, n]. Raises NumericsError where one is not finite."""
        minimum, maximum = torch.minimum(self.minimum, x.amin(dim=1)), torch.maximum(self.maximum, x.amax(dim=1))
        if not bool(torch.isfinite(maximum - minimum).all()):
            raise NumericsError("a layer's input holds NaN or infinity")
        self._widen(minimum, maximum)
        bins = _bins_of(x, self.exponent[:, None]).sub_(self.first_bin[:, None])
        self.counts.scatter_add_(1, bins.long(), torch.ones_like(bins, dtype=torch.int32))

    def _widen(self, minimum: torch.Tensor, maximum: torch.Tensor) -> None:
        """Make the windows hold a new range, moving the counts so far."""
        self.minimum, self.maximum = minimum, maximum
        exponent = torch.maximum(self.exponent, _least_exponent(minimum, maximum))
        first = _bins_of(minimum, exponent).to(torch.int32)
        moved = ((exponent != self.exponent) | (first != self.first_bin)).nonzero()[:, 0]
        for rows in moved.split(CHANNELS_AT_ONCE):
            old = self.first_bin[rows, None] + torch.arange(FINE_BINS, dtype=torch.int32, device=rows.device)
            shift = (exponent[rows] - self.exponent[rows]).clamp(max=31)[:, None]
            # Bins without counts may fall outside the new window; they have nothing to move.
            target = ((old >> shift) - first[rows, None]).clamp_(0, FINE_BINS - 1).long()
            self.counts[rows] = torch.zeros_like(old).scatter_add_(1, target, self.counts[rows])
        self.exponent, self.first_bin = exponent, first

    def coarse(self, bins: int) -> torch.Tensor:
        """Counts float64 [channels, bins] over each channel's minimum..maximum in equal bins, as numpy.histogram.

        A fine bin that an edge cuts is divided in proportion: that, and nothing else, is approximate.
        """
        starts = range(0, len(self.counts), CHANNELS_AT_ONCE)
        return torch.cat([self._coarse(slice(start, start + CHANNELS_AT_ONCE), bins) for start in starts])

    def _coarse(self, rows: slice, bins: int) -> torch.Tensor:
        low, high = self.minimum[rows, None].to(torch.float64), self.maximum[rows, None].to(torch.float64)
        edges = low + (high - low) * torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=low.device)
        width = torch.exp2(self.exponent[rows, None].to(torch.float64))
        position = (edges / width - self.first_bin[rows, None]).clamp_(0, FINE_BINS)
        cumulative = functional.pad(self.counts[rows].cumsum(dim=1, dtype=torch.int32), (1, 0))
        index = position.floor().clamp_(max=FINE_BINS - 1).long()
        below = cumulative.gather(1, index)
        at_edge = below + (cumulative.gather(1, index + 1) - below) * (position - index)
        at_edge[:, 0], at_edge[:, -1] = 0, cumulative[:, -1]
        counts = at_edge.diff(dim=1)
        single = torch.zeros_like(counts)
        single[:, 0] = cumulative[:, -1]
        return torch.where(low == high, single, counts)


def histogram_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, float64 [channels], of histograms [channels, bins] (E-Sparse, the metric's first term).

    -sum_k p_k log p_k with 0 log 0 = 0; a channel whose values are all equal has entropy 0.
    """
    p = counts / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=1)


def _least_exponent(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Least e, int32, for which low and high lie within FINE_BINS bins of width 2^e, and within 2^24 of bin 0."""
    tiny = 2.0**LEAST_EXPONENT  # frexp(0) would give exponent 0: a channel that is dead so far would get wide bins
    _, span = torch.frexp((high - low).clamp(min=tiny) / FINE_BINS)  # high - low < FINE_BINS * 2^span
    _, reach = torch.frexp(torch.maximum(low.abs(), high.abs()).clamp(min=tiny))
    exponent = torch.maximum(span - 1, reach - 24).clamp(LEAST_EXPONENT, -LEAST_EXPONENT)
    for _ in range(2):  # the window starts on the grid, so it may need a width more, and float32's span was rounded
        exponent = exponent + (_bins_of(high, exponent) - _bins_of(low, exponent) >= FINE_BINS).to(exponent.dtype)
    return exponent


def _bins_of(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Bin numbers, float32: scaling by a power of two is exact, so bins at width 2w are pairs of bins at w."""
    return (x * torch.exp2(-exponent.to(torch.float32))).floor_()
