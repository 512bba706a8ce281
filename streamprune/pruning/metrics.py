"""Scores: which weights of a group matter most. Each formula is one function; weights and scores are [out, in].

Sources: E-Sparse (arXiv 2310.15929), Wanda (arXiv 2306.11695), RIA (Plug-and-Play, ICLR 2024).
"""

import math

import torch

from streamprune.config import PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.statistics import ChannelStatistics


def ria_score(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^0.5 (RIA, relative importance and activations)."""
    magnitude = weight.abs()
    tiny = torch.finfo(magnitude.dtype).tiny
    of_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
    of_column = magnitude / magnitude.sum(dim=0, keepdim=True).clamp(min=tiny)
    return (of_row + of_column) * norm.sqrt()


def esparse_factor(
    entropy: torch.Tensor, amplitude: torch.Tensor, alpha: float, relative: bool = False
) -> torch.Tensor:
    """entropy_j + alpha * amplitude_j (E-Sparse, the metric, over |W_ij|); entropy in nats and amplitude [in].

    With `relative` each term is divided by its mean over the channels first; a mean of 0 leaves it 0.
    """
    if relative:
        tiny = torch.finfo(entropy.dtype).tiny
        entropy, amplitude = (term / term.mean().clamp(min=tiny) for term in (entropy, amplitude))
    return entropy + alpha * amplitude


def amplitude(statistics: ChannelStatistics, normalisation: str) -> torch.Tensor:
    """||X_j||_2 over all calibration tokens, float64 [in]: as it is ("l2"), per sequence ("wanda") or token ("rms")."""
    divisor = {"l2": 1, "wanda": statistics.sequences, "rms": statistics.tokens}[normalisation]
    return statistics.square_sum.sqrt() / math.sqrt(divisor)


def channel_factor(statistics: ChannelStatistics, config: PruneConfig) -> torch.Tensor | None:
    """What the configured metric multiplies |W_ij| by, float32 [in]; None for ria, whose factor has rows.

    1 for magnitude, ||X_j||_2 for Wanda (eq. 1), `esparse_factor` for E-Sparse.
    """
    if config.metric == "ria":
        return None
    if config.metric == "magnitude":
        return torch.ones_like(statistics.square_sum, dtype=torch.float32)
    if config.metric == "wanda":
        return amplitude(statistics, "l2").to(torch.float32)
    if statistics.entropy is None:
        raise ValueError("esparse needs statistics with entropy")
    scaled = amplitude(statistics, config.amplitude).to(torch.float32)
    return esparse_factor(statistics.entropy.to(torch.float32), scaled, config.alpha, config.relative)


def score(weight: torch.Tensor, statistics: ChannelStatistics, config: PruneConfig) -> torch.Tensor:
    """Scores float32 [out, in] of a weight by the configured metric. Raises NumericsError where one is not finite."""
    factor = channel_factor(statistics, config)
    if factor is None:
        scores = ria_score(weight.to(torch.float32), amplitude(statistics, "l2").to(torch.float32))
    else:
        scores = weight.to(torch.float32, copy=True).abs_().mul_(factor)
    check_scores(float(scores.amax()), config)
    return scores


def check_scores(whole: float, config: PruneConfig) -> None:
    """Raise NumericsError if the greatest of some scores, or the sum of the greatest, is not finite."""
    if not math.isfinite(whole):
        raise NumericsError(f"{config.metric} scores hold NaN or infinity")
