"""Plain torch versions: the definition that every faster kernel is held against. They run on any device.

Packed layer (docs/format.md): `values` [out, in*N/M] in ascending input channel, `mask` uint8 [out, ceil(in/8)] with
the bit j % 8, little end first, of byte j // 8 set where channel j is kept.
"""

import torch
from torch.nn import functional


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
