"""2:4 weights as sparse tensor cores want them: kept values as they lie packed, and metadata made from the mask.

A 4-bit group of metadata is first place | second place << 2, first < second. Word i of lane 4g + t of the 64 rows and
64 columns at [row // 64, column // 64] holds in its low half the four groups of row 16i + g, columns 16t to 16t + 15,
and in its high half those of row 16i + g + 8 (PTX ISA, "Matrix multiply-accumulate with sparse matrix A", m16n8k32).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from streamprune_kernels.launch import Launch, Run, on_device
from streamprune_kernels.reference import unpack_mask

BLOCK = 64  # rows, and columns, that one metadata chunk of each lane covers
PADDING = 0x4444  # places 0 and 1: metadata of rows past the end, where 0 would be undefined behaviour
THREADS = 256
PLACES = {0b0011: 0x4, 0b0101: 0x8, 0b0110: 0x9, 0b1001: 0xC, 0b1010: 0xD, 0b1100: 0xE}  # of the kept bits of a group


@dataclass(frozen=True)
class SparseWeight:
    """A 2:4 weight [out, in]: values float16 or bfloat16 [out, in/2], metadata int32 [ceil(out/64), in/64, 32, 4]."""

    values: torch.Tensor
    metadata: torch.Tensor

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.values.shape[1]


def sparse_unsuitable(kept: int, group_size: int, in_features: int) -> str | None:
    """Why weights of a pattern cannot run on sparse tensor cores, in one line; None where they can."""
    if (kept, group_size) not in ((2, 4), (1, 4)):
        return f"sparse tensor cores know 2:4, and 1:4 padded, not {kept}:{group_size}: use nm_linear_cuda"
    if in_features % BLOCK:
        return f"the 2:4 product needs in_features in multiples of {BLOCK}, not {in_features}: use nm_linear_cuda"
    return None


def sparse_weight(values: torch.Tensor, mask: torch.Tensor, *, run: Run = on_device) -> SparseWeight:
    """A weight for sparse tensor cores from its packed values [out, kept] and mask uint8 [out, in/8], 2:4 or 1:4.

    1:4 gets a zero beside each value, which doubles their memory. Raises ValueError for other patterns and shapes.
    """
    out_features, in_features = mask.shape[0], 8 * mask.shape[1]
    kept = 4 * values.shape[1] // max(in_features, 1)
    reason = sparse_unsuitable(kept, 4, in_features)
    if reason:
        raise ValueError(reason)
    if values.shape != (out_features, in_features // 4 * kept) or not out_features:
        raise ValueError(f"values {list(values.shape)} do not fit a mask {list(mask.shape)} of {kept}:4")
    if kept == 1:
        values, mask = padded_to_pairs(values, mask)
    return SparseWeight(values.contiguous(), make_metadata(mask, run=run))


def metadata_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Blocks of 64 rows, blocks of 64 columns, lanes, words of a lane."""
    return -(-out_features // BLOCK), in_features // BLOCK, 32, 4


def make_metadata(mask: torch.Tensor, *, run: Run = on_device) -> torch.Tensor:
    """Metadata int32 [ceil(out/64), in/64, 32, 4] of a 2:4 mask uint8 [out, in/8], by the CUDA kernel.

    Raises ValueError where a group of 4 does not keep two.
    """
    out_features, in_features = _checked_shape(mask)
    mask = mask.contiguous()
    if mask.data_ptr() % 2:  # the kernel reads 16 columns at once
        mask = mask.clone()
    metadata = torch.empty(metadata_shape(out_features, in_features), dtype=torch.int32, device=mask.device)
    faulty = torch.zeros(1, dtype=torch.int32, device=mask.device)
    grid = (-(-metadata.numel() // 4 // THREADS), 1, 1)
    arguments = (mask, metadata, faulty, out_features, in_features)
    run(Launch("metadata", "sparse_metadata", grid, (THREADS, 1, 1), 0, arguments))
    if faulty.item():
        raise ValueError("a mask does not keep two values in every group of four")
    return metadata


def metadata_of_mask(mask: torch.Tensor) -> torch.Tensor:
    """`make_metadata` in plain torch, on any device: the definition that the kernel is held against."""
    out_features, in_features = _checked_shape(mask)
    table = torch.zeros(16, dtype=torch.int32, device=mask.device)
    for kept, nibble in PLACES.items():
        table[kept] = nibble
    groups = torch.stack([mask & 15, mask >> 4], dim=2).long().view(out_features, -1, 4)
    places = table[groups]
    if not bool(places.all()):
        raise ValueError("a mask does not keep two values in every group of four")
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=mask.device)
    halves = (places << shifts).sum(dim=2, dtype=torch.int32)  # [out, in/16]: 16 columns each
    halves = functional.pad(halves, (0, 0, 0, -out_features % BLOCK), value=PADDING)
    # rows: block, 16 rows, low or high 8, g; columns: block, t
    halves = halves.view(-1, 4, 2, 8, in_features // BLOCK, 4)
    words = halves[:, :, 0] | halves[:, :, 1] << 16  # [row block, i, g, column block, t]
    return words.permute(0, 3, 2, 4, 1).reshape(len(words), in_features // BLOCK, 32, 4).contiguous()


def padded_to_pairs(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [out, in/4] and mask uint8 [out, in/8] of 1:4 as 2:4: a group also keeps a zero.

    The zero is in the group's last place, or in its first where the last is kept. Raises ValueError where a group of 4
    does not keep one.
    """
    if not bool((unpack_mask(mask, 8 * mask.shape[1]).view(len(mask), -1, 4).sum(dim=2) == 1).all()):
        raise ValueError("a mask does not keep one value in every group of four")
    nibbles = torch.stack([mask & 15, mask >> 4], dim=2)
    last_kept = (nibbles & 8) != 0
    nibbles = nibbles | torch.where(last_kept, 1, 8).to(torch.uint8)
    zero = torch.zeros_like(values)
    last = last_kept.view(values.shape)
    pairs = torch.stack([torch.where(last, zero, values), torch.where(last, values, zero)], dim=2).flatten(1)
    return pairs, nibbles[:, :, 0] | nibbles[:, :, 1] << 4


def _checked_shape(mask: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a mask. Raises ValueError unless it is uint8 with rows of whole 64 columns."""
    if mask.dtype != torch.uint8 or mask.dim() != 2 or mask.shape[1] % (BLOCK // 8) or not mask.numel():
        raise ValueError(f"metadata needs a mask uint8 [out, in/8], in a multiple of {BLOCK}, not {list(mask.shape)}")
    return mask.shape[0], 8 * mask.shape[1]
