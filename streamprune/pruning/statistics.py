"""Statistics of a layer's input channels over the calibration text: energy, histogram, second moments.

One sequence is reduced at a time, and partial results are combined in the order of the sequences, so nothing depends on
micro-batches or threads. Histogram counts are integers and do not depend on the order at all.
"""

import math
from dataclasses import dataclass

import torch

from streamprune.config import PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.selection import stable_product
from streamprune_kernels import MIN_EXPONENT, add_range, count_values
from streamprune_kernels.statistics import Windows, add_tokens_on_gpu

FINE_BINS = 4096  # 16 KB a channel; the observed range fills 2048 or more. Errors measured: docs/method.md
ROW_GAP = 80  # unused bins after a channel's: at a power of two apart, many channels' hot bins share few cache lines
CHANNELS_AT_ONCE = 128  # read at once: 16 KB of running sums each, while all histograms are still held
STRIP_WIDTH = 192  # channels of a strip of second moments; what lies below the diagonal strips is mirrored


@dataclass(frozen=True)
class LayerTokens:
    """One sequence at a layer: inputs [tokens, in], and outputs [tokens, out] where they are compared."""

    inputs: torch.Tensor
    outputs: torch.Tensor | None

    def at(self, places: torch.Tensor) -> "LayerTokens":
        """Those of its tokens that are at places int64 [n]."""
        return LayerTokens(self.inputs[places], None if self.outputs is None else self.outputs[places])


@dataclass(frozen=True)
class ChannelStatistics:
    """Of the input channels of one layer, over all calibration tokens.

    square_sum    float64 [in], sum of x^2
    entropy       float64 [in], nats, or None where the metric does not use it
    moments       second moments, or None where nothing uses them
    tokens, sequences  how many were seen
    output_cross  (Y_dense - Y)^T X float32 [out, in], in place of the moments' cross where the layer's outputs Y are
                  fewer than its inputs; or None
    """

    square_sum: torch.Tensor
    entropy: torch.Tensor | None
    moments: "SecondMoments | None"
    tokens: int
    sequences: int
    output_cross: torch.Tensor | None = None

    @classmethod
    def unseen(cls, channels: int, device: torch.device) -> "ChannelStatistics":
        """Statistics of inputs that were not observed: all channels are equal."""
        return cls(torch.ones(channels, dtype=torch.float64, device=device), None, None, 1, 1)

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square of each channel, float32 [in]."""
        return (self.square_sum / self.tokens).sqrt().to(torch.float32)

    @property
    def moments_bytes(self) -> int:
        """Memory of all second moments."""
        tensors = [] if self.output_cross is None else [self.output_cross]
        if self.moments is not None:
            tensors += [*self.moments.halves[0], *self.moments.halves[1], *(self.moments.cross or ())]
        return sum(tensor.nbytes for tensor in tensors)


class StatisticsAccumulator:
    """Takes a layer's inputs one sequence at a time; its memory grows with channels, not with tokens."""

    def __init__(
        self,
        channels: int,
        config: PruneConfig,
        device: torch.device,
        unit: int | None = None,
        outputs: int | None = None,
    ) -> None:
        """`unit`: channels that blocks of second moments do not divide (default: a group of M).

        `outputs`: output features of the layer that takes these inputs; None if several layers do. If they are few, a
        reference is compared by outputs, which costs less time and memory.
        """
        self.config = config
        self.low = torch.full((channels,), math.inf, device=device)
        self.high = torch.full((channels,), -math.inf, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.histogram = StreamingHistogram(channels, device) if config.metric == "esparse" else None
        self.moments: SecondMoments | None = None
        self.output_cross: torch.Tensor | None = None
        if config.needs_moments:
            if config.correction and outputs is not None and outputs <= channels:
                self.output_cross = torch.zeros(outputs, channels, device=device)
            cross = bool(config.correction) and self.output_cross is None
            unit = unit or config.pattern.group_size
            self.moments = SecondMoments.zeros(channels, config, device, unit, cross=cross)
        self.tokens = 0
        self.reference_tokens = 0
        self.sequences = 0

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence's inputs [tokens, in]. Raises NumericsError where one is not finite."""
        windows = None if self.histogram is None else self.histogram.windows
        by_kernel = add_tokens_on_gpu(x, self.low, self.high, self.square_sum, windows)
        x = x.to(torch.float32)
        if not by_kernel:
            add_range(x, self.low, self.high, self.square_sum)
        if not math.isfinite(float(self.square_sum.sum())):
            raise NumericsError("a layer's input holds NaN or infinity")
        if self.histogram is not None:
            if by_kernel:
                self.histogram.see_range(self.low, self.high)
            else:
                self.histogram.add(x, self.low, self.high)
        if self.moments is not None:
            self.moments.add(x, half=self.sequences % 2)
        self.tokens += x.shape[0]
        self.sequences += 1

    def to_compare(self, x: torch.Tensor, y: torch.Tensor) -> LayerTokens:
        """The part of one sequence's inputs [tokens, in] and outputs [tokens, out] that `add_reference` needs."""
        return LayerTokens(x, None if self.output_cross is None else y)

    def add_reference(self, dense: LayerTokens, pruned: LayerTokens) -> None:
        """Add one sequence as the layer sees it after dense blocks, beside what it sees after pruned ones."""
        if self.moments is None:
            raise ValueError("a reference needs second moments")
        x = pruned.inputs.to(torch.float32)
        if self.output_cross is not None:
            assert dense.outputs is not None
            assert pruned.outputs is not None
            difference = dense.outputs.to(torch.float32) - pruned.outputs.to(torch.float32)
            stable_product(difference.T, x, into=self.output_cross)
        else:
            self.moments.add_cross(dense.inputs.to(torch.float32) - x, x)
        self.reference_tokens += x.shape[0]

    def result(self) -> ChannelStatistics:
        """The statistics so far; nothing may be added afterwards."""
        entropy = None
        if self.histogram is not None:
            shared = self.config.entropy_range == "layer"
            entropy = histogram_entropy(self.histogram.coarse(self.config.entropy_bins, shared))
        if self.moments is not None:
            self.moments.mirror()
            by_output = [] if self.output_cross is None else [self.output_cross]
            for cross in (*(self.moments.cross or ()), *by_output):
                cross *= self.tokens / max(self.reference_tokens, 1)
        totals = self.tokens, self.sequences
        return ChannelStatistics(self.square_sum, entropy, self.moments, *totals, self.output_cross)


@dataclass(frozen=True)
class SecondMoments:
    """X^T X of a layer's inputs in diagonal blocks, apart for sequences of even and of odd number.

    halves  halves[h][b] is float32 [width, width] of block b's channels. The halves serve to judge on one what was
            chosen on the other; their sum is the whole
    cross   (X_dense - X)^T X likewise, over the sequences that have a reference, scaled up to all; or None
    bounds  each block's first channel and the one after its last
    """

    halves: tuple[list[torch.Tensor], list[torch.Tensor]]
    cross: list[torch.Tensor] | None
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def zeros(
        cls, channels: int, config: PruneConfig, device: torch.device, unit: int, *, cross: bool
    ) -> "SecondMoments":
        bounds = moment_blocks(channels, config.moments_width, unit)

        def zeros() -> list[torch.Tensor]:
            return [torch.zeros(end - begin, end - begin, device=device) for begin, end in bounds]

        return cls((zeros(), zeros()), zeros() if cross else None, bounds)

    def add(self, x: torch.Tensor, half: int) -> None:
        """Add a sequence's inputs float32 [tokens, in]; entries right of the diagonal strips only, until `mirror`."""
        for moments, (begin, end) in zip(self.halves[half], self.bounds, strict=True):
            for first in range(begin, end, STRIP_WIDTH):
                strip = x[:, first : min(first + STRIP_WIDTH, end)]
                rows = slice(first - begin, first - begin + STRIP_WIDTH)
                stable_product(strip.T, x[:, first:end], into=moments[rows, first - begin :])

    def add_cross(self, difference: torch.Tensor, x: torch.Tensor) -> None:
        """Add (X_dense - X)^T X of one sequence; both float32 [tokens, in]."""
        for cross, (begin, end) in zip(self.cross or (), self.bounds, strict=True):
            stable_product(difference[:, begin:end].T, x[:, begin:end], into=cross)

    def mirror(self) -> None:
        """Fill what lies left of the diagonal strips."""
        for moments in (*self.halves[0], *self.halves[1]):
            for first in range(STRIP_WIDTH, len(moments), STRIP_WIDTH):
                moments[first : first + STRIP_WIDTH, :first] = moments[:first, first : first + STRIP_WIDTH].T

    def take_whole(self) -> list[torch.Tensor]:
        """The moments of all samples, block by block. They take over the memory of the halves, which are then gone."""
        even, odd = self.halves
        for index in range(len(odd)):
            even[index] += odd[index]
        odd.clear()
        return even


def moment_blocks(channels: int, most: int, unit: int) -> tuple[tuple[int, int], ...]:
    """Blocks of at most `most` channels, as equal as whole units allow; a wider unit is a block by itself."""
    count = -(-channels // max(most // unit * unit, unit))
    width = -(-channels // (count * unit)) * unit
    return tuple((begin, min(begin + width, channels)) for begin in range(0, channels, width))


class StreamingHistogram:
    """Histograms [channels, FINE_BINS] of float32 values whose range is not known beforehand, in one pass.

    Bin i of a channel covers [i w, (i + 1) w) on an absolute grid, with a width w = 2^e of the channel's own: the least
    power of two for which the window from the minimum's bin to the maximum's holds at most FINE_BINS bins (and at which
    bin numbers stay below 2^24). A wider range doubles w and merges bins in pairs, which is exact: the final counts
    depend on the set of values, not on their order.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        room = torch.zeros(channels, FINE_BINS + ROW_GAP, dtype=torch.int32, device=device)
        self.counts = room[:, :FINE_BINS]
        self.minimum = torch.full((channels,), math.inf, device=device)
        self.maximum = torch.full((channels,), -math.inf, device=device)
        self.exponent = torch.full((channels,), MIN_EXPONENT, dtype=torch.int32, device=device)
        self.first_bin = torch.zeros(channels, dtype=torch.int32, device=device)

    @property
    def windows(self) -> Windows:
        """Where the counts lie, for a kernel that finds the range and counts in one pass."""
        return Windows(self.exponent, self.first_bin, self.counts)

    def see_range(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Record bounds [channels] of all values so far. Raises NumericsError if a range is beyond float32."""
        if not math.isfinite(float((high - low).amax())):
            raise NumericsError("a layer's input spans more than float32 holds")
        self.minimum, self.maximum = low, high

    def add(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Count finite values [n, channels]; low and high [channels] bound all values so far, these included.

        Raises NumericsError where a range is beyond float32.
        """
        self.see_range(low, high)
        count_values(x, low, high, self.exponent, self.first_bin, self.counts)

    def coarse(self, bins: int, shared: bool = False) -> torch.Tensor:
        """Counts float64 [channels, bins] over each channel's minimum..maximum in equal bins, as numpy.histogram.

        With `shared` the range is that of all channels. A fine bin that an edge cuts is divided in proportion: only
        that is approximate.
        """
        low, high = self.minimum.to(torch.float64), self.maximum.to(torch.float64)
        if shared:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        starts = range(0, len(self.counts), CHANNELS_AT_ONCE)
        pieces = [slice(start, start + CHANNELS_AT_ONCE) for start in starts]
        return torch.cat([self._coarse(rows, low[rows, None], high[rows, None], bins) for rows in pieces])

    def _coarse(self, rows: slice, low: torch.Tensor, high: torch.Tensor, bins: int) -> torch.Tensor:
        edges = low + (high - low) * torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=low.device)
        width = torch.exp2(self.exponent[rows, None].to(torch.float64))
        position = edges / width
        counts = self.counts[rows]
        cumulative = counts.new_zeros(len(counts), FINE_BINS + 1)
        torch.cumsum(counts, dim=1, dtype=torch.int32, out=cumulative[:, 1:])
        index = (position.floor().long() - self.first_bin[rows, None]).clamp_(0, FINE_BINS - 1)
        below = cumulative.gather(1, index)
        part = (position - (index + self.first_bin[rows, None])).clamp_(0, 1)
        at_edge = below + (cumulative.gather(1, index + 1) - below) * part
        at_edge[:, 0], at_edge[:, -1] = 0, cumulative[:, -1]
        coarse = at_edge.diff(dim=1)
        single = torch.zeros_like(coarse)
        single[:, 0] = cumulative[:, -1]
        return torch.where(low == high, single, coarse)


def histogram_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, float64 [channels], of histograms [channels, bins] (E-Sparse, the metric's first term).

    -sum_k p_k log p_k with 0 log 0 = 0; a channel whose values are all equal has entropy 0.
    """
    p = counts / counts.sum(dim=1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(dim=1)
