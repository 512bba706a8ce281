"""Weight reconstruction: kept weights fitted so that the pruned layer's outputs come near the dense layer's.

This changes kept weights, which nothing else here does; it is off by default.
"""

import torch

from streamprune.pruning.selection import stable_product

DAMPING = 0.01  # share of the mean diagonal that is added to H, as SparseGPT does
ITERATIONS = 48  # of conjugate gradients; not tuned


def reconstruct_weight(
    weight: torch.Tensor, keep: torch.Tensor, moments: torch.Tensor, linear: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights V [out, in], 0 where not kept, that minimise d (H + damping) d^T + 2 d l^T, d = w - v, row by row.

    The least-squares problem of SparseGPT (arXiv 2301.00774, eq. 1) on a given mask, solved for all rows at once by
    conjugate gradients, preconditioned by the diagonal, from the masked weights as start. weight and linear l (None:
    0; see refinement.py) float32 [out, in], moments H float32 [in, in], in the mask's order of channels.
    """
    diagonal = moments.diagonal()
    damping = DAMPING * diagonal.mean()
    inverse = torch.where(keep, 1 / (diagonal + damping).clamp(min=torch.finfo(torch.float32).tiny), 0)
    fitted = torch.where(keep, weight, 0)
    missing = weight - fitted
    slope = stable_product(missing, moments) + damping * missing
    residual = torch.where(keep, slope if linear is None else slope + linear, 0)
    scaled = inverse * residual
    direction = scaled
    energy = (residual * scaled).sum(dim=1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(ITERATIONS):
        product = torch.where(keep, stable_product(direction, moments) + damping * direction, 0)
        step = energy / (direction * product).sum(dim=1, keepdim=True).clamp(min=tiny)
        fitted = fitted + step * direction
        residual = residual - step * product
        scaled = inverse * residual
        following = (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled + following / energy.clamp(min=tiny) * direction
        energy = following
    return fitted
