"""Plain torch versions: the definition that every faster kernel is held against. They run on any device.

Packed layer (docs/format.md): `values` [out, in*N/M] in ascending input channel, `mask` uint8 [out, ceil(in/8)] with
the bit j % 8, little end first, of byte j // 8 set where channel j is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

CHANNELS_AT_ONCE = 1024  # bounds the memory of moving counts
ROWS_AT_ONCE = 256  # bounds that of float64 copies
MIN_EXPONENT = -126  # of a bin's width: float32 scales by its inverse without overflow


def pack_mask(keep: torch.Tensor) -> torch.Tensor:
    """bool [out, in] to uint8 [out, ceil(in/8)], little end first; padding bits are 0."""
    padded = functional.pad(keep, (0, -keep.shape[1] % 8))
    padded = padded.view(len(keep), padded.shape[1] // 8, 8)
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=keep.device)
    for bit in range(8):
        packed |= padded[:, :, bit].to(torch.uint8) << bit
    return packed


def unpack_mask(mask: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 [out, ceil(in/8)] to bool [out, in]."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).to(torch.bool).flatten(1)[:, :in_features]


def pack_values(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Kept values of a weight [out, in] in ascending channel, bits untouched.

    Raises ValueError where rows keep different numbers of them.
    """
    counts = keep.sum(dim=1)
    if not bool((counts == counts[:1]).all()):
        raise ValueError(f"rows of a mask do not all keep the {int(counts[0])} values that the first does")
    return weight[keep].view(weight.shape[0], -1)


def expand(
    values: torch.Tensor, mask: torch.Tensor, in_features: int, permutation: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense weight [out, in] in the values' dtype; dropped weights are +0.

    With `permutation` [in] (place j holds source channel p[j]) the columns are put back in the source's order. Raises
    ValueError where a row of the mask does not keep as many as there are values.
    """
    keep = unpack_mask(mask, in_features)
    if not bool((keep.sum(dim=1) == values.shape[1]).all()):
        raise ValueError(f"a mask does not keep {values.shape[1]} values in every row")
    dense = torch.zeros(values.shape[0], in_features, dtype=values.dtype, device=values.device)
    dense.masked_scatter_(keep, values)
    return dense if permutation is None else torch.empty_like(dense).index_copy_(1, permutation.long(), dense)


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T + b for a packed W; x [..., in] in permuted channel order, computed in x's dtype."""
    return functional.linear(x, expand(values, mask, x.shape[-1]).to(x.dtype), bias)


def hinge_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Sum over rows of max(0, s_b - t_i), float32 [n_t, n_s]; s [n_s, rows] and t [n_t, rows] float32.

    From an L1 distance: sum |s - t| = 2 sum max(0, s - t) - sum s + sum t.
    """
    return (torch.cdist(t, s, p=1) + s.sum(dim=1)[None, :] - t.sum(dim=1)[:, None]) / 2


def nth_best(columns: Sequence[torch.Tensor], n: int) -> torch.Tensor:
    """N-th greatest of several tensors, element by element; -inf where there are fewer than n of them."""
    left = list(columns)
    for _ in range(n - 1):  # carry the greatest out, leave the rest
        greatest, rest = left[0], []
        for column in left[1:]:
            rest.append(torch.minimum(greatest, column))
            greatest = torch.maximum(greatest, column)
        left = rest
    best = left[0]
    for column in left[1:]:
        best = torch.maximum(best, column)
    return best


def local_swaps(
    s: torch.Tensor, start: torch.Tensor, block: int, kept: int, group_size: int, rounds: int, least_gain: float
) -> torch.Tensor:
    """Swap channels of different groups inside each `block` of places while the kept score rises.

    s float32 [channels, rows], scores by channel; start int64 [channels], the channel at each place. A round takes in
    each block its best swaps at once, at most one for each group, so that their gains add up exactly; one must gain
    more than `least_gain` of what its two channels add to their groups. Returns the channel at each place.
    """
    order = start.clone()
    for begin in range(0, len(order), block):
        places = slice(begin, min(begin + block, len(order)))
        if places.stop - begin >= 2 * group_size:
            channels = order[places]
            order[places] = _search_block(s[channels], channels, kept, group_size, rounds, least_gain)
    return order


def _search_block(
    s: torch.Tensor, channels: torch.Tensor, kept: int, m: int, rounds: int, least_gain: float
) -> torch.Tensor:
    """Swap channels int64 [size], whose scores are s [size, rows], until no swap gains."""
    size = len(channels)
    channels = channels.clone()
    group_of = torch.arange(size, device=s.device) // m
    same_group = group_of[:, None] == group_of[None, :]
    gain = torch.empty(size, size, dtype=torch.float32, device=s.device)
    stale = torch.ones(size // m, dtype=torch.bool, device=s.device)
    for _ in range(rounds):
        _update_gain(gain, s, stale, kept, m)
        own = gain.diagonal()
        change = gain - own[:, None]
        swap = (change + change.T).masked_fill_(same_group, -1)
        threshold = least_gain * (own[:, None] + own[None, :])
        pairs = _disjoint_swaps(torch.where(swap > threshold, swap, -1), m)
        if pairs.numel() == 0:
            break
        i, j = pairs.unbind(1)
        for tensor in (channels, s):
            tensor[i], tensor[j] = tensor[j], tensor[i]
        gain[:, j], gain[:, i] = gain[:, i], gain[:, j]
        stale[i // m] = stale[j // m] = True
    return channels


def _update_gain(gain: torch.Tensor, s: torch.Tensor, stale: torch.Tensor, kept: int, m: int) -> None:
    """Compute the rows G[i, :] of the places whose group is stale, and clear the marks."""
    groups = stale.nonzero()[:, 0]
    members = [s[groups * m + i] for i in range(m)]
    for i in range(m):
        t = nth_best(members[:i] + members[i + 1 :], kept)
        gain[groups * m + i] = hinge_sums(s, t)
    stale.zero_()


def _disjoint_swaps(swap: torch.Tensor, m: int) -> torch.Tensor:
    """Swaps [n, 2] (i, j) with i < j: best first, each group in at most one. swap < 0: no gain."""
    groups = len(swap) // m
    by_group = swap.view(groups, m, groups, m).permute(0, 2, 1, 3).reshape(groups, groups, m * m)
    best, at = by_group.max(dim=2)
    values, where = best.tolist(), at.tolist()
    candidates = sorted((-values[a][b], a, b) for a in range(groups) for b in range(a + 1, groups) if values[a][b] > 0)
    used: set[int] = set()
    pairs = []
    for _, a, b in candidates:
        if a not in used and b not in used:
            used |= {a, b}
            pairs.append((a * m + where[a][b] // m, b * m + where[a][b] % m))
    return torch.tensor(pairs, dtype=torch.int64, device=swap.device).reshape(-1, 2)


def add_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor) -> None:
    """Update float32 `low` and `high` and float64 `square_sum`, all [channels], by x float32 [tokens, channels].

    A NaN in x leaves the sum of squares NaN.
    """
    torch.minimum(low, x.amin(dim=0), out=low)
    torch.maximum(high, x.amax(dim=0), out=high)
    square_sum += x.to(torch.float64).square_().sum(dim=0)


def count_values(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    exponent: torch.Tensor,
    first_bin: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Count x float32 [tokens, channels] in windows of bins, one a channel, that first widen where they must.

    counts int32 [channels, bins]; bin i of channel c covers (first_bin[c] + i + [0, 1)) * 2^exponent[c], both int32
    [channels]. low and high float32 [channels] are finite, as is their difference, and bound all values so far, these
    included. A window becomes as wide as needed and no wider, by merging bins in pairs; all but x, low and high are
    updated in place.
    """
    bins = counts.shape[1]
    wider = torch.maximum(exponent, _least_exponent(low, high, bins))
    lowest, highest = (_bins_of(bound, wider).to(torch.int32) for bound in (low, high))
    inside = (lowest >= first_bin) & (highest < first_bin + bins) & (wider == exponent)
    # Room on both sides, so that the next new extreme need not move the window.
    first = torch.where(inside, first_bin, lowest - (bins - 1 - (highest - lowest)) // 2)
    for rows in (~inside).nonzero()[:, 0].split(CHANNELS_AT_ONCE):
        shift = (wider[rows] - exponent[rows]).clamp(max=31)[:, None]
        old = first_bin[rows, None] + torch.arange(bins, dtype=torch.int32, device=x.device)
        # Bins without counts may fall outside the new window; they have nothing to move.
        target = ((old >> shift) - first[rows, None]).clamp_(0, bins - 1).long()
        counts[rows] = torch.zeros_like(old).scatter_add_(1, target, counts[rows])
    exponent.copy_(wider)
    first_bin.copy_(first)
    at = (_bins_of(x, wider).to(torch.int64) - first).T
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))


def _least_exponent(low: torch.Tensor, high: torch.Tensor, bins: int) -> torch.Tensor:
    """Least e, int32, for which low and high lie within `bins` bins of width 2^e, and within 2^24 of bin 0."""
    tiny = 2.0**MIN_EXPONENT  # frexp(0) would give exponent 0: a channel that is dead so far would get wide bins
    _, span = torch.frexp((high - low).clamp(min=tiny) / bins)  # high - low < bins * 2^span
    _, reach = torch.frexp(torch.maximum(low.abs(), high.abs()).clamp(min=tiny))
    exponent = torch.maximum(span - 1, reach - 24).clamp(MIN_EXPONENT, -MIN_EXPONENT)
    for _ in range(2):  # the window starts on the grid, so it may need a width more, and float32's span was rounded
        exponent = exponent + (_bins_of(high, exponent) - _bins_of(low, exponent) >= bins).to(exponent.dtype)
    return exponent


def _bins_of(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Bin numbers, float32: scaling by a power of two is exact, so bins at width 2w are pairs of bins at w."""
    return (x * torch.exp2(-exponent.to(torch.float32))).floor_()


def select_groups(scores: torch.Tensor, kept: int, group_size: int) -> torch.Tensor:
    """Mask bool [out, in] of the `kept` highest of every group of scores [out, in]; of equal ones the lower.

    Ranks are counted by comparisons: topk's order among ties is not specified.
    """
    groups = scores.reshape(len(scores), -1, group_size)
    columns = [groups[:, :, i].contiguous() for i in range(group_size)]
    ranks = [torch.zeros(columns[0].shape, dtype=torch.int8, device=scores.device) for _ in columns]
    for i in range(group_size):
        for j in range(i + 1, group_size):
            i_first = columns[i] >= columns[j]
            ranks[j] += i_first
            ranks[i] += ~i_first
    return torch.stack([rank < kept for rank in ranks], dim=2).reshape(scores.shape)


def select_weights(
    weight: torch.Tensor, factor: torch.Tensor, kept: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_groups` by the float32 scores |weight| * factor, and their `kept_sums`.

    weight [out, in]; factor float32 [in].
    """
    scores = weight.to(torch.float32, copy=True).abs_().mul_(factor)
    keep = select_groups(scores, kept, group_size)
    return keep, kept_sums(scores, keep)


def kept_sums(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Sum of the kept values of each row, float64 [rows]; x [rows, width], keep bool of its shape."""
    return torch.where(keep, x, 0).sum(dim=1, dtype=torch.float64)


def weighted_squares(x: torch.Tensor, keep: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of (x * scale)^2 of each row, float64 [rows]: over the dropped columns, and over all.

    x [rows, width], keep bool of its shape, scale [width].
    """
    sums = []
    for values, kept in zip(x.split(ROWS_AT_ONCE), keep.split(ROWS_AT_ONCE), strict=True):
        squares = (values.to(torch.float64) * scale.to(torch.float64)).square_()
        whole = squares.sum(dim=1)
        sums.append((squares.masked_fill_(kept, 0).sum(dim=1), whole))
    dropped, whole = (torch.cat(part) for part in zip(*sums, strict=True))
    return dropped, whole


def all_finite(x: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: extremes show both, at a tenth of isfinite's time."""
    return not x.numel() or math.isfinite(float(x.amax()) - float(x.amin()))


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||x - y||^2 of each row, float64 [rows]; x and y [rows, width]."""
    return (x.to(torch.float64) - y.to(torch.float64)).square_().sum(dim=1)


def refine_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    q: torch.Tensor,
    moments: torch.Tensor,
    places: torch.Tensor,
    off_diagonal: float,
    least_gain: float,
) -> int:
    """One pass of coordinate descent over the groups of every row; returns how many groups changed.

    weight, q, change float32 [rows, width] and keep bool [rows, width], the last three updated in place; moments
    float32 [width, width]; places bool [patterns, M] on any device, or [0, M] for all exchanges of one kept place for a
    dropped one.
    With D the dropped weights, off-diagonal H times `off_diagonal` and q = off_diagonal D H + a linear term, a group
    takes the pattern that costs least given the others, d H_gg d^T + 2 d (q_g - own part), where that saves more than
    `least_gain` of the group's sum of w^2 h.
    """
    m = places.shape[1]
    changed = 0
    for first in range(0, weight.shape[1], m):
        columns = slice(first, first + m)
        w, h, kept = weight[:, columns], moments[columns, columns], keep[:, columns]
        diagonal = h.diagonal()
        scaled = off_diagonal * h + (1 - off_diagonal) * torch.diag(diagonal)
        dropped = torch.where(kept, 0, w)
        linear = 2 * (q[:, columns] - off_diagonal * dropped @ h)
        options = places.to(w.device).expand(len(w), -1, -1) if len(places) else _exchanges(kept)
        d = torch.where(options, 0, w[:, None, :])  # [rows, options, M]
        cost = ((d @ scaled) * d).sum(dim=2) + (d * linear[:, None, :]).sum(dim=2)
        now = ((dropped @ scaled) * dropped).sum(dim=1) + (dropped * linear).sum(dim=1)
        least, best = cost.min(dim=1)
        gains = least < now - least_gain * (w.square() * diagonal).sum(dim=1)
        differs = (options[torch.arange(len(w), device=w.device), best] != kept).any(dim=1)
        rows = (gains & differs).nonzero()[:, 0]
        delta = d[rows, best[rows]] - dropped[rows]
        keep[rows, columns] = options[rows, best[rows]]
        q[rows] += off_diagonal * delta @ moments[columns]
        changed += len(rows)
    return changed


def _exchanges(kept: torch.Tensor) -> torch.Tensor:
    """Every mask that differs from bool [rows, M] by one kept place exchanged for a dropped one, [rows, N (M-N), M]."""
    rows = len(kept)
    inside = kept.nonzero()[:, 1].view(rows, -1, 1)
    outside = (~kept).nonzero()[:, 1].view(rows, 1, -1)
    pairs = inside.shape[1] * outside.shape[2]
    drop, restore = (places.expand(rows, inside.shape[1], outside.shape[2]).reshape(rows, pairs, 1)
                     for places in (inside, outside))  # fmt: skip
    return kept[:, None, :].repeat(1, pairs, 1).scatter_(2, drop, False).scatter_(2, restore, True)
