"""Packing on a GPU, run on the CPU from text and from PTX: bit for bit the plain functions."""

import pytest
import torch
from cuda_tools import runners

from streamprune_kernels import reference
from streamprune_kernels.launch import Launch, Run
from streamprune_kernels.packing import expand_cuda, pack_mask_cuda, pack_values_cuda, unpack_mask_cuda

# rows, columns, kept, group_size: rows that do not fill a block, columns of no whole byte, more than a warp's 256
CASES = ((1, 8, 2, 4), (3, 7, 1, 7), (8, 260, 2, 4), (9, 512, 4, 8), (17, 99, 3, 9), (5, 258, 1, 1))


def matrix(
    rows: int, columns: int, kept: int, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of any bits, NaNs among them, and which are kept."""
    generator = torch.Generator().manual_seed(rows * columns)
    bits = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, dtype=torch.int64).to(torch.int32)
    weight = bits.view(dtype) if dtype.itemsize == 4 else bits.to(torch.int16).view(dtype)
    return weight, reference.select_groups(torch.rand(rows, columns, generator=generator), kept, group_size)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks(case: tuple[int, int, int, int], run: Run) -> None:
    keep = matrix(*case, torch.float32)[1]
    mask = pack_mask_cuda(keep, run=run)
    assert torch.equal(mask, reference.pack_mask(keep))
    assert torch.equal(unpack_mask_cuda(mask, case[1], run=run), keep)


@pytest.mark.parametrize("run", runners.ALL.values(), ids=runners.ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple[int, int, int, int], dtype: torch.dtype, run: Run) -> None:
    weight, keep = matrix(*case, dtype)
    values = pack_values_cuda(weight, keep, run=run)
    assert torch.equal(bits(values), bits(reference.pack_values(weight, keep)))
    mask = reference.pack_mask(keep)
    permutation = torch.randperm(case[1], generator=torch.Generator().manual_seed(1))
    for places in (None, permutation, permutation.int()):
        dense = expand_cuda(values, mask, case[1], places, run=run)
        assert torch.equal(bits(dense), bits(reference.expand(values, mask, case[1], places)))


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
def test_padding_bits_of_a_mask_are_not_columns(run: Run) -> None:
    mask = torch.tensor([[0b11100101]], dtype=torch.uint8)
    assert unpack_mask_cuda(mask, 3, run=run).tolist() == [[True, False, True]]
    assert expand_cuda(torch.tensor([[1.5, 2.5]]), mask, 3, run=run).tolist() == [[1.5, 0, 2.5]]


@pytest.mark.parametrize("run", runners.PLAIN.values(), ids=runners.PLAIN)
def test_rows_that_keep_other_numbers_are_refused(run: Run) -> None:
    """More or fewer than the first row, and neither writes out of its row."""
    weight, keep = matrix(9, 260, 2, 4, torch.float16)
    values, mask = reference.pack_values(weight, keep), reference.pack_mask(keep)
    for changed in (keep[8].logical_not().nonzero()[0], keep[8].nonzero()[0]):
        broken = keep.clone()
        broken[8, changed] ^= True
        with pytest.raises(ValueError, match="rows of a mask do not all keep the 130 values that the first does"):
            pack_values_cuda(weight, broken, run=run)
        with pytest.raises(ValueError, match="a mask does not keep 130 values in every row"):
            expand_cuda(values, reference.pack_mask(broken), 260, run=run)
    assert torch.equal(bits(expand_cuda(values, mask, 260, run=run)), torch.where(keep, bits(weight), 0))


def nothing(launch: Launch) -> None:
    raise AssertionError(launch)


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight, keep = matrix(4, 16, 2, 4, torch.float16)
    values, mask = reference.pack_values(weight, keep), reference.pack_mask(keep)
    for function, arguments, message in [
        (pack_mask_cuda, (keep.int(),), "keep is torch.int32"),
        (pack_mask_cuda, (keep[0],), r"\[out, in\]"),
        (pack_mask_cuda, (keep.T,), "not contiguous: pass keep.contiguous"),
        (unpack_mask_cuda, (mask, 17), "does not fit rows of 17 channels"),
        (unpack_mask_cuda, (mask.int(), 16), "mask is torch.int32"),
        (pack_values_cuda, (weight, keep[:3]), "does not fit a weight"),
        (pack_values_cuda, (weight.double(), keep), "16 or 32 bits, not torch.float64"),
        (pack_values_cuda, (weight[:0], keep[:0]), r"\[0, 16\]"),
        (expand_cuda, (values[:3].clone(), mask, 16), "does not fit values"),
        (expand_cuda, (values, mask, 24), "does not fit rows of 24 channels"),
        (expand_cuda, (values, mask, 16, torch.zeros(16, dtype=torch.int64)), "is not one"),
        (expand_cuda, (values, mask, 16, torch.arange(15)), "is not one"),
        (expand_cuda, (values.double(), mask, 16), "16 or 32 bits, not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            function(*arguments, run=nothing)
        assert "\n" not in str(refusal.value)
