"""Scores: which weights of a group matter most. Each formula is one function; weights and scores are [out, in].

Sources: E-Sparse (arXiv 2310.15929), Wanda (arXiv 2306.11695), RIA (Plug-and-Play, ICLR 2024).
"""

import math

import torch

from streamprune.config import PruneConfig
from streamprune.errors import NumericsError
from streamprune.pruning.statistics import ChannelStatistics


def magnitude_score(weight: torch.Tensor) -> torch.Tensor:
    """|W_ij|."""
    return weight.abs()


def wanda_score(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2 (Wanda, eq. 1); norm [in]."""
    return weight.abs().mul_(norm)


def ria_score(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^0.5 (RIA, relative importance and activations)."""
    magnitude = weight.abs()
    tiny = torch.finfo(magnitude.dtype).tiny
    of_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp(min=tiny)
    of_column = magnitude / magnitude.sum(dim=0, keepdim=True).clamp(min=tiny)
    return (of_row + of_column) * norm.sqrt()


def esparse_score(
    weight: torch.Tensor, entropy: torch.Tensor, amplitude: torch.Tensor, alpha: float, relative: bool = False
) -> torch.Tensor:
    """|W_ij| * (entropy_j + alpha * amplitude_j) (E-Sparse, the metric); entropy in nats and amplitude [in].

    With `relative` each term is divided by its mean over the channels first; a mean of 0 leaves it 0.
    """
    if relative:
        tiny = torch.finfo(entropy.dtype).tiny
        entropy, amplitude = (term / term.mean().clamp(min=tiny) for term in (entropy, amplitude))
    return weight.abs().mul_(entropy + alpha * amplitude)


def amplitude(statistics: ChannelStatistics, normalisation: str) -> torch.Tensor:
    """||X_j||_2 over all calibration tokens, float64 [in]: as it is ("l2"), per sequence ("wanda") or token ("rms")."""
    divisor = {"l2": 1, "wanda": statistics.sequences, "rms": statistics.tokens}[normalisation]
    return statistics.square_sum.sqrt() / math.sqrt(divisor)


def score(weight: torch.Tensor, statistics: ChannelStatistics, config: PruneConfig) -> torch.Tensor:
    """Scores float32 [out, in] of a weight by the configured metric. Raises NumericsError where one is not finite."""
    dense = weight.to(torch.float32)
    norm = amplitude(statistics, "l2").to(torch.float32)
    if config.metric == "magnitude":
        scores = magnitude_score(dense)
    elif config.metric == "wanda":
        scores = wanda_score(dense, norm)
    elif config.metric == "ria":
        scores = ria_score(dense, norm)
    else:
        if statistics.entropy is None:
            raise ValueError("esparse needs statistics with entropy")
        scaled = amplitude(statistics, config.amplitude).to(torch.float32)
        scores = esparse_score(dense, statistics.entropy.to(torch.float32), scaled, config.alpha, config.relative)
    if not math.isfinite(float(scores.amax())):  # none is negative
        raise NumericsError(f"{config.metric} scores hold NaN or infinity")
    return scores
