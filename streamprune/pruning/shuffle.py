"""Channel shuffles: which input channels share a group of M (E-Sparse, global naive and local block shuffle).

A permutation p, int64 [in], puts source channel p[j] at place j. The order of channels inside a group changes nothing,
so every permutation returned has ascending channels inside its groups; with it, "the lower place" and "the lower source
channel" are the same on ties.

The local search rests on one identity. For one output row let t_i be the N-th best score of place i's group without
i. Putting channel b in i's place changes the row's retained score by max(0, s_b - t_i) - max(0, s_i - t_i); summed over
rows that is G[i, b] - G[i, i] with G[i, b] = sum_rows max(0, s_b - t_i), and G comes from an L1 distance:
sum |s - t| = 2 sum max(0, s - t) - sum s + sum t.
"""

import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.pruning.selection import retained_score, select

MAX_ROUNDS = 32  # of the local search; it ends by itself when no swap gains, in practice after 10 to 20
MIN_RELATIVE_GAIN = 1e-6  # a swap must gain this share of its group's score: below lies float32's noise
BATCH_ELEMENTS = 1 << 23  # scores searched at once, 32 MB in float32


def search_permutation(scores: torch.Tensor, config: PruneConfig) -> torch.Tensor:
    """A permutation int64 [in] that raises the retained score of `scores` [rows, in], or the identity.

    Never ends with less retained score than the identity's: the best of the stages is returned.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    if config.shuffle == "none":
        return identity
    best = _better(scores, identity, global_shuffle(scores, config.pattern), config.pattern)
    if config.shuffle == "global+local":
        best = _better(scores, best, local_shuffle(scores, best, config.pattern, config.shuffle_block), config.pattern)
    return best


def global_shuffle(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Deal the channels, ordered by their mean score, out to the groups in turn (E-Sparse, global naive shuffle).

    Every other round runs backwards ("snake"), so that no group always gets the better card.
    """
    channels = scores.shape[1]
    order = torch.argsort(scores.mean(dim=0, dtype=torch.float64), descending=True, stable=True)
    rounds = order.view(pattern.group_size, channels // pattern.group_size).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return ascending_in_groups(rounds.T.reshape(-1), pattern)


def local_shuffle(scores: torch.Tensor, start: torch.Tensor, pattern: NMPattern, block: int) -> torch.Tensor:
    """Greedy swaps inside blocks of `block` places, from the permutation `start` (E-Sparse, local block shuffle).

    In each round every block makes its best swaps at once, at most one for each group, so that their gains add up
    exactly; a block is done when no swap gains.
    """
    channels, m = scores.shape[1], pattern.group_size
    size = max(2 * m, block // m * m)
    permutation = start.clone()
    whole = channels // size
    pieces = [(i * size, size) for i in range(whole)]
    if channels - whole * size >= 2 * m:
        pieces.append((whole * size, channels - whole * size))
    batch = max(1, BATCH_ELEMENTS // (scores.shape[0] * size))
    for first in range(0, len(pieces), batch):
        group = pieces[first : first + batch]
        for length in sorted({length for _, length in group}, reverse=True):
            places = torch.stack(
                [torch.arange(begin, begin + n, device=scores.device) for begin, n in group if n == length]
            )
            permutation[places] = _search_blocks(scores, permutation[places], pattern)
    return ascending_in_groups(permutation, pattern)


def ascending_in_groups(permutation: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The same groups, each with its channels in ascending order."""
    return permutation.view(-1, pattern.group_size).sort(dim=1).values.reshape(-1)


def _better(scores: torch.Tensor, one: torch.Tensor, other: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    retained = []
    for permutation in (one, other):
        permuted = scores[:, permutation]
        retained.append(retained_score(permuted, select(permuted, pattern)))
    return other if retained[1] > retained[0] else one


def _search_blocks(scores: torch.Tensor, channels: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Swap channels int64 [blocks, size] inside each block until no swap gains."""
    blocks, size = channels.shape
    m = pattern.group_size
    s = scores.T[channels].contiguous()  # [blocks, size, rows]
    group_of = torch.arange(size, device=s.device) // m
    same_group = group_of[:, None] == group_of[None, :]
    gain = torch.empty(blocks, size, size, dtype=torch.float32, device=s.device)
    stale = torch.ones(blocks, size // m, dtype=torch.bool, device=s.device)
    for _ in range(MAX_ROUNDS):
        _update_gain(gain, s, stale, pattern)
        own = gain.diagonal(dim1=1, dim2=2)
        change = gain - own[:, :, None]
        swap = (change + change.transpose(1, 2)).masked_fill_(same_group, -1)
        threshold = MIN_RELATIVE_GAIN * (own[:, :, None] + own[:, None, :])
        swap = torch.where(swap > threshold, swap, -1)
        pairs = _disjoint_swaps(swap, m)
        if pairs.numel() == 0:
            break
        block, i, j = pairs.unbind(1)
        for tensor in (channels, s):
            tensor[block, i], tensor[block, j] = tensor[block, j], tensor[block, i]
        for place in (i, j):
            stale[block, place // m] = True
        columns = gain[block, :, i], gain[block, :, j]
        gain[block, :, j], gain[block, :, i] = columns
    return channels


def _update_gain(gain: torch.Tensor, s: torch.Tensor, stale: torch.Tensor, pattern: NMPattern) -> None:
    """Compute the rows G[i, :] of the places whose group is stale, and clear the marks."""
    m = pattern.group_size
    for block in stale.any(dim=1).nonzero()[:, 0].tolist():
        groups = stale[block].nonzero()[:, 0]
        places = (groups[:, None] * m + torch.arange(m, device=s.device)).reshape(-1)
        members = s[block, places].view(len(groups), m, -1)
        t = _threshold_without_self(members, pattern.kept).reshape(len(places), -1)
        distance = torch.cdist(t, s[block], p=1)
        sums = s[block].sum(dim=1)[None, :] - t.sum(dim=1)[:, None]
        gain[block, places] = (distance + sums) / 2
    stale.zero_()


def _threshold_without_self(members: torch.Tensor, kept: int) -> torch.Tensor:
    """N-th best score of a group without each of its members; members [groups, M, rows]."""
    ordered = members.sort(dim=1, descending=True).values
    nth, next_best = ordered[:, kept - 1 : kept], ordered[:, kept : kept + 1]
    return torch.where(members >= nth, next_best, nth)


def _disjoint_swaps(swap: torch.Tensor, m: int) -> torch.Tensor:
    """Swaps [n, 3] (block, i, j) with i < j: best first, each group of a block in at most one. swap < 0: no gain."""
    blocks, size, _ = swap.shape
    groups = size // m
    by_group = swap.view(blocks, groups, m, groups, m).permute(0, 1, 3, 2, 4).reshape(blocks, groups, groups, m * m)
    best, at = by_group.max(dim=3)
    best_rows, at_rows = best.tolist(), at.tolist()
    pairs = []
    for block in range(blocks):
        values = best_rows[block]
        candidates = sorted(
            (-values[a][b], a, b) for a in range(groups) for b in range(a + 1, groups) if values[a][b] > 0
        )
        used: set[int] = set()
        for _, a, b in candidates:
            if a not in used and b not in used:
                used |= {a, b}
                where = at_rows[block][a][b]
                pairs.append((block, a * m + where // m, b * m + where % m))
    return torch.tensor(pairs, dtype=torch.int64, device=swap.device).reshape(-1, 3)
