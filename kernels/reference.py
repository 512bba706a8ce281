"""Plain torch versions: the definition that every faster kernel is held against. They run on any device.

Packed layer (docs/format.md): `values` [out, in*N/M] in ascending input channel, `mask` uint8 [out, ceil(in/8)] with
the bit j % 8, little end first, of byte j // 8 set where channel j is kept.
"""

import torch
from torch.nn import functional

CHANNELS_AT_ONCE = 1024  # bounds the memory of moving counts


def pack_mask(keep: torch.Tensor) -> torch.Tensor:
    """bool [out, in] to uint8 [out, ceil(in/8)], little end first; padding bits are 0."""
    padded = functional.pad(keep, (0, -keep.shape[1] % 8)).view(keep.shape[0], -1, 8)
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=keep.device)
    for bit in range(8):
        packed |= padded[:, :, bit].to(torch.uint8) << bit
    return packed


def unpack_mask(mask: torch.Tensor, in_features: int) -> torch.Tensor:
    """uint8 [out, ceil(in/8)] to bool [out, in]."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).to(torch.bool).flatten(1)[:, :in_features]


def pack_values(weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Kept values of a weight [out, in] in ascending channel, bits untouched; every row keeps equally many."""
    return weight[keep].view(weight.shape[0], -1)


def expand(
    values: torch.Tensor, mask: torch.Tensor, in_features: int, permutation: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense weight [out, in] in the values' dtype; dropped weights are +0.

    With `permutation` [in] (place j holds source channel p[j]) the columns are put back in the source's order.
    """
    dense = torch.zeros(values.shape[0], in_features, dtype=values.dtype, device=values.device)
    dense.masked_scatter_(unpack_mask(mask, in_features), values)
    return dense if permutation is None else torch.empty_like(dense).index_copy_(1, permutation.long(), dense)


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x W^T + b for a packed W; x [..., in] in permuted channel order, computed in x's dtype."""
    return functional.linear(x, expand(values, mask, x.shape[-1]).to(x.dtype), bias)


def excess_sums(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Sum over rows of max(0, s_b - t_i), float32 [n_t, n_s]; s [n_s, rows] and t [n_t, rows] float32.

    From an L1 distance: sum |s - t| = 2 sum max(0, s - t) - sum s + sum t.
    """
    return (torch.cdist(t, s, p=1) + s.sum(dim=1)[None, :] - t.sum(dim=1)[:, None]) / 2


def add_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, square_sum: torch.Tensor) -> None:
    """Update float32 `low` and `high` and float64 `square_sum`, all [channels], by x float32 [tokens, channels].

    A NaN in x leaves the sum of squares NaN.
    """
    torch.minimum(low, x.amin(dim=0), out=low)
    torch.maximum(high, x.amax(dim=0), out=high)
    square_sum += x.to(torch.float64).square_().sum(dim=0)


def count_bins(x: torch.Tensor, inverse_width: torch.Tensor, first_bin: torch.Tensor, counts: torch.Tensor) -> None:
    """counts[c, floor(x * inverse_width[c]) - first_bin[c]] += 1 for x float32 [tokens, channels].

    inverse_width float32, first_bin int32 [channels]; counts int32 [channels, bins]. Every value must fall in a bin.
    """
    bins = ((x * inverse_width).floor_().to(torch.int64) - first_bin).T
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.int32))


def move_windows(counts: torch.Tensor, before: torch.Tensor, shift: torch.Tensor, first: torch.Tensor) -> None:
    """Move counts int32 [channels, bins], in place, from windows at bin `before` to windows at bin `first`.

    The new bins are 2^shift times as wide; all three int32 [channels]. Bins with counts must lie in the new window.
    """
    bins = counts.shape[1]
    moved = ((shift > 0) | (before != first)).nonzero()[:, 0]
    for rows in moved.split(CHANNELS_AT_ONCE):
        old = before[rows, None] + torch.arange(bins, dtype=torch.int32, device=counts.device)
        # Bins without counts may fall outside the new window; they have nothing to move.
        target = ((old >> shift[rows, None]) - first[rows, None]).clamp_(0, bins - 1).long()
        counts[rows] = torch.zeros_like(old).scatter_add_(1, target, counts[rows])


def select_groups(scores: torch.Tensor, kept: int, group_size: int) -> torch.Tensor:
    """Mask bool [out, in] of the `kept` highest of every group of scores [out, in]; of equal ones the lower.

    Ranks are counted by comparisons: topk's order among ties is not specified.
    """
    groups = scores.view(len(scores), -1, group_size)
    columns = [groups[:, :, i].contiguous() for i in range(group_size)]
    ranks = [torch.zeros(columns[0].shape, dtype=torch.int8, device=scores.device) for _ in columns]
    for i in range(group_size):
        for j in range(i + 1, group_size):
            i_first = columns[i] >= columns[j]
            ranks[j] += i_first
            ranks[i] += ~i_first
    return torch.stack([rank < kept for rank in ranks], dim=2).view(scores.shape)


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
    float32 [width, width]; places bool [patterns, M], or [0, M] for all exchanges of one kept place for a dropped one.
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
        options = places.expand(len(w), -1, -1) if len(places) else _exchanges(kept)
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
