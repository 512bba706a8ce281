"""Channel shuffles: which input channels share a group of M.

A permutation p, int64 [in], puts source channel p[j] at place j. The order of channels inside a group changes nothing,
so every permutation returned has ascending channels inside its groups; with it, "the lower place" and "the lower source
channel" are the same on ties.

The searches rest on one identity. For one output row let t_i be the N-th best score of place i's group without i.
Putting channel b in i's place changes the row's retained score by max(0, s_b - t_i) - max(0, s_i - t_i); summed over
rows that is G[i, b] - G[i, i] with G[i, b] = sum_rows max(0, s_b - t_i). So one matrix G holds the gain of every
exchange, and of every channel as the last one of every group.

Sources: E-Sparse (arXiv 2310.15929) for the global and the local shuffle; RIA (Plug-and-Play, ICLR 2024) for linear
assignment.
"""

import math

import torch

from streamprune.config import NMPattern, PruneConfig
from streamprune.pruning.selection import select, stable_sum
from streamprune.stopping import safe_point
from streamprune_kernels import hinge_sums, kept_sums, local_swaps, nth_best

ROWS_AT_ONCE = 2048  # whose kept score is summed
MAX_ROUNDS = 32  # of the local search; it ends by itself when no swap gains, in practice after 10 to 20
MIN_RELATIVE_GAIN = 1e-6  # a swap must gain this share of its group's score: below lies float32's noise
ASSIGNMENT_ROUNDS = 8  # each goes once through the places of the groups
ASSIGNMENT_GROUPS = 96  # in one assignment
MAX_SCORE_EXPONENT = 40  # of two, of the greatest score
MIN_ROUND_GAIN = 1e-3  # share of what all places add that a round must gain for another to follow


def search_permutation(scores: torch.Tensor, config: PruneConfig) -> torch.Tensor:
    """A permutation int64 [in] that raises the retained score of `scores` [rows, in], or the identity.

    The stages of `config.shuffle` follow each other; one that does not raise the objective is left out. Objective
    "energy" is the sum of squared retained scores, whose counterpart is the sum of squared pruned ones.
    """
    scores = _of_middling_size(scores)
    objective = scores.square() if config.objective == "energy" else scores
    best = torch.arange(scores.shape[1], device=scores.device)
    retained = _retained(objective, best, config.pattern)
    for stage in config.search_stages:
        if stage == "local":
            found = local_shuffle(objective, best, config.pattern, config.shuffle_block)
        elif stage == "assignment":
            found = assignment_shuffle(objective, best, config.pattern)
        else:
            found = global_shuffle(objective, config.pattern, snake=stage == "global")
        now = _retained(objective, found, config.pattern)
        if now > retained:
            best, retained = found, now
    return best


def search_in_heads(scores: torch.Tensor, heads: tuple[int, int, int], config: PruneConfig) -> torch.Tensor:
    """As `search_permutation`, inside heads: one order for each KV head, serving all of its query heads.

    heads: query heads, KV heads, size of a head. The query heads' columns are searched as stacked rows.
    """
    query_heads, kv_heads, head_dim = heads
    share = query_heads // kv_heads
    by_head = scores.view(-1, kv_heads, share, head_dim).permute(1, 0, 2, 3)
    inside = [search_permutation(by_head[head].reshape(-1, head_dim), config) for head in range(kv_heads)]
    return torch.cat([head * head_dim + inside[head // share] for head in range(query_heads)])


def global_shuffle(scores: torch.Tensor, pattern: NMPattern, snake: bool = True) -> torch.Tensor:
    """Deal the channels, ordered by their mean score, out to the groups in turn (E-Sparse, global naive shuffle).

    With `snake` every other round runs backwards, so that no group always gets the better channel.
    """
    channels = scores.shape[1]
    order = torch.argsort(scores.mean(dim=0, dtype=torch.float64), descending=True, stable=True)
    rounds = order.view(pattern.group_size, channels // pattern.group_size).clone()
    if snake:
        rounds[1::2] = rounds[1::2].flip(1)
    return ascending_in_groups(rounds.T.reshape(-1), pattern)


def assignment_shuffle(scores: torch.Tensor, start: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Linear assignment of one channel of every group at a time, from the permutation `start` (RIA's way).

    For each place of the groups in turn the channels there are taken out and dealt again, one to each group, so that
    they add the greatest possible sum to the retained score. Rounds end when one gains little. Many groups are assigned
    in parts, drawn anew each time, because the cost of one assignment grows with the cube of the groups.
    """
    from scipy.optimize import linear_sum_assignment  # when it is used: importing it takes a third of a second

    channels_first = scores.T.contiguous()
    groups = start.view(-1, pattern.group_size).clone()
    count = len(groups)
    parts = -(-count // ASSIGNMENT_GROUPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(ASSIGNMENT_ROUNDS):
        gained = total = 0.0
        for place in range(pattern.group_size):
            order = torch.randperm(count, generator=generator) if parts > 1 else torch.arange(count)
            for part in order.to(groups.device).tensor_split(parts):
                safe_point()
                gain = _gain_of_place(channels_first, groups[part], place, pattern)
                _, chosen = linear_sum_assignment(gain.numpy(), maximize=True)
                taken = torch.from_numpy(chosen)
                now = float(gain.diagonal().sum(dtype=torch.float64))
                gained += float(gain.gather(1, taken[:, None]).sum(dtype=torch.float64)) - now
                total += now
                groups[part, place] = groups[part[taken.to(part.device)], place]
        if gained <= MIN_ROUND_GAIN * total:
            break
    return ascending_in_groups(groups.reshape(-1), pattern)


def _gain_of_place(channels_first: torch.Tensor, groups: torch.Tensor, place: int, pattern: NMPattern) -> torch.Tensor:
    """What each candidate adds to each group [groups, candidates]: the candidates are the groups' channels at a place.

    On the CPU, where assignments are solved.
    """
    others = [channels_first[groups[:, i]] for i in range(pattern.group_size) if i != place]
    return hinge_sums(channels_first[groups[:, place]], nth_best(others, pattern.kept)).cpu()


def local_shuffle(scores: torch.Tensor, start: torch.Tensor, pattern: NMPattern, block: int) -> torch.Tensor:
    """Greedy swaps inside blocks of `block` places, from the permutation `start` (E-Sparse, local block shuffle).

    In each round a block makes its best swaps at once, at most one for each group, so that their gains add up exactly;
    a block is done when no swap gains.
    """
    m = pattern.group_size
    size = max(2 * m, block // m * m)
    found = local_swaps(scores.T, start, size, pattern.kept, m, MAX_ROUNDS, MIN_RELATIVE_GAIN)
    return ascending_in_groups(found, pattern)


def _of_middling_size(scores: torch.Tensor) -> torch.Tensor:
    """Scores scaled by a power of two if they are so large or small that their squares and sums leave float32."""
    _, exponent = math.frexp(float(scores.amax()))
    return scores if abs(exponent) <= MAX_SCORE_EXPONENT else scores.ldexp(torch.tensor(-exponent))


def ascending_in_groups(permutation: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The same groups, each with its channels in ascending order."""
    return permutation.view(-1, pattern.group_size).sort(dim=1).values.reshape(-1)


def _retained(scores: torch.Tensor, permutation: torch.Tensor, pattern: NMPattern) -> float:
    """The kept score in an order of channels, exact over rows."""
    sums = []
    for rows in scores.split(ROWS_AT_ONCE):
        safe_point()
        permuted = rows.index_select(1, permutation)
        sums.append(kept_sums(permuted, select(permuted, pattern)))
    return stable_sum(torch.cat(sums))
