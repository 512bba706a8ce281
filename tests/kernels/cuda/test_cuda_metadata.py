"""Metadata of sparse tensor cores: kernel and plain version against CUTLASS's converter in torch and the PTX manual."""

from functools import partial

import pytest
import torch
from cuda_tools import host, runners
from cuda_tools.layers import random_layer
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from streamprune_kernels import pack_mask, unpack_mask
from streamprune_kernels.metadata import make_metadata, metadata_of_mask, padded_to_pairs, sparse_weight

# The manual's figure for m16n8k32 with 16-bit types: who supplies the metadata of a row's dense columns, in which half
# of its register. Row of A: ((lane, first bit) of columns 0-15, the same of columns 16-31) for selector 0; selector 1
# takes the next two lanes of each four.
MANUAL = {
    0: ((0, 0), (1, 0)), 1: ((4, 0), (5, 0)), 2: ((8, 0), (9, 0)), 3: ((12, 0), (13, 0)),
    4: ((16, 0), (17, 0)), 5: ((20, 0), (21, 0)), 6: ((24, 0), (25, 0)), 7: ((28, 0), (29, 0)),
    8: ((0, 16), (1, 16)), 9: ((4, 16), (5, 16)), 10: ((8, 16), (9, 16)), 11: ((12, 16), (13, 16)),
    12: ((16, 16), (17, 16)), 13: ((20, 16), (21, 16)), 14: ((24, 16), (25, 16)), 15: ((28, 16), (29, 16)),
}  # fmt: skip


@pytest.mark.parametrize("run", runners.ALL.values(), ids=runners.ALL)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 64), (64, 64), (65, 192), (127, 640), (300, 128)])
def test_kernel_is_the_plain_version(out_features, in_features, run):
    mask = random_layer(out_features, in_features, 2, 4, torch.float16).mask
    assert torch.equal(make_metadata(mask, run=run), metadata_of_mask(mask))


def test_places_are_those_of_the_manual():
    """Every kept place of every row is found where the manual's figure has the hardware look."""
    rows, columns = 128, 192
    mask = random_layer(rows, columns, 2, 4, torch.float16, seed=3).mask
    metadata = metadata_of_mask(mask).long() & 0xFFFFFFFF
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for tile in range(rows // 16):
        for step in range(columns // 32):
            registers = metadata[tile // 4, step // 2, :, tile % 4]
            for row, halves in MANUAL.items():
                for half, (lane, first_bit) in enumerate(halves):
                    word = int(registers[lane + 2 * (step % 2)]) >> first_bit
                    for group in range(4):
                        column = 32 * step + 16 * half + 4 * group
                        places = [word >> 4 * group & 3, word >> 4 * group + 2 & 3]
                        assert places[0] < places[1]
                        found[16 * tile + row, column + torch.tensor(places)] = True
    assert torch.equal(found, unpack_mask(mask, columns))


def test_words_are_those_of_cutlass():
    """CUTLASS keeps 32-bit words in another order: column pairs, then 32 rows as 8 times (16 rows, parity of t)."""
    rows, columns = 128, 256
    layer = random_layer(rows, columns, 2, 4, torch.float16, seed=4)
    values, reordered = sparse_semi_structured_from_dense_cutlass(layer.dense.half())
    assert torch.equal(values, layer.values)
    words = (
        reordered.flatten().view(torch.int32).view(columns // 32, rows // 32, 8, 2, 2)
    )  # pair, rows, g, tile, parity
    words = words.view(
        columns // 64, 2, rows // 64, 2, 8, 2, 2
    )  # column block, t // 2, row block, tile // 2, g, tile, t
    ours = words.permute(2, 0, 4, 1, 6, 3, 5).reshape(rows // 64, columns // 64, 32, 4)
    assert torch.equal(ours, metadata_of_mask(layer.mask))


def test_rows_past_the_end_have_legal_places():
    metadata = metadata_of_mask(random_layer(3, 64, 2, 4, torch.float16).mask)
    assert metadata.shape == (1, 1, 32, 4)
    assert set(metadata[0, 0, 12:].flatten().tolist()) == {0x44444444}  # lanes of rows 3 to 7 of each eight


def test_one_of_four_becomes_two_of_four():
    layer = random_layer(9, 64, 1, 4, torch.bfloat16)
    values, mask = padded_to_pairs(layer.values, layer.mask)
    keep = unpack_mask(mask, 64)
    assert torch.equal(keep.view(9, 16, 4).sum(dim=2), torch.full((9, 16), 2))
    assert torch.equal(mask, pack_mask(keep))
    dense = torch.zeros(9, 64, dtype=torch.bfloat16).masked_scatter_(keep, values)
    assert torch.equal(dense.double(), layer.dense)


@pytest.mark.parametrize("make", [metadata_of_mask, partial(make_metadata, run=host.run)])
def test_masks_that_are_not_two_of_four_are_refused(make):
    mask = random_layer(20, 64, 2, 4, torch.float16).mask
    for wrong in (0x30, 0x31, 0x37, 0x3F, 0x07):
        broken = mask.clone()
        broken[19, 7] = wrong
        with pytest.raises(ValueError, match="two values in every group of four"):
            make(broken)
    for wrong_shape in (mask[:, :7], mask[:0], mask.int()):
        with pytest.raises(ValueError, match="multiple of 64"):
            make(wrong_shape)


def test_weights_that_sparse_tensor_cores_cannot_take_are_refused():
    for (kept, group_size, in_features), message in [
        ((3, 4, 64), "know 2:4, and 1:4 padded, not 3:4"),
        ((2, 4, 72), "multiples of 64, not 72"),
    ]:
        layer = random_layer(8, in_features, kept, group_size, torch.float16)
        with pytest.raises(ValueError, match=message):
            sparse_weight(layer.values, layer.mask, run=host.run)
    layer = random_layer(8, 64, 2, 4, torch.float16)
    with pytest.raises(ValueError, match="do not fit"):
        sparse_weight(layer.values[:7], layer.mask, run=host.run)
    pairs = random_layer(8, 64, 2, 4, torch.float16)
    with pytest.raises(ValueError, match="one value in every group of four"):
        sparse_weight(pairs.values[:, ::2], pairs.mask, run=host.run)
