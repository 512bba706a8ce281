"""Packing on a processor and its reverse: bit for bit the plain versions, by every path, on any number of threads."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_count import threads

from streamprune_kernels import native, packing, reference

PATHS = ("portable", "avx512")  # the others run the portable code
SIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value, and its bits as integers
TYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64)
EDGES = tuple(edge + more for edge in (8, 16, 32, 64, 128, 192) for more in (-1, 0, 1))  # of bytes, vectors and words

pytestmark = pytest.mark.usefixtures("compiled")
repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)
widths = st.one_of(st.integers(1, 300), st.sampled_from(EDGES))
paths = pytest.mark.parametrize("path", PATHS)
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def only_paths_of_this_processor(request: pytest.FixtureRequest) -> None:
    path = request.node.callspec.params.get("path") if hasattr(request.node, "callspec") else None
    if path is not None and path not in native.paths():
        pytest.skip(f"this processor lacks {path}")


def on_one_and_two_threads(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    with threads(1):
        one = compute()
    with threads(2):
        two = compute()
    assert torch.equal(bits(one), bits(two))
    return one


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(SIZES[tensor.itemsize])


def random_keep(rows: int, width: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    """Any `kept` columns of each row, not by groups."""
    return torch.rand(rows, width, generator=generator).argsort(dim=1) < kept


def random_bits(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits: subnormal numbers, infinities, and NaN with payloads among them; a fifth are -0."""
    integers = SIZES[dtype.itemsize]
    ends = torch.iinfo(integers).min, torch.iinfo(integers).max
    numbers = torch.randint(*ends, (rows, width), dtype=integers, generator=generator)
    negative_zero = torch.full((1,), -0.0, dtype=torch.float64).to(dtype)
    numbers[torch.rand(numbers.shape, generator=generator) < 0.2] = bits(negative_zero)
    return numbers.view(dtype)


def set_padding(mask: torch.Tensor, width: int) -> None:
    """Set the bits beyond the columns, which count for nothing."""
    mask[:, -1] |= (0xFF << (width - 1) % 8 + 1) & 0xFF


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return alike and found.is_contiguous() and torch.equal(bits(found), bits(expected))


@paths
@given(st.integers(1, 20), widths, st.sampled_from([0.0, 0.1, 0.5, 1.0]), seeds)
@repeatable
def test_masks(path: str, rows: int, width: int, density: float, seed: int) -> None:
    """Rows that keep different numbers of columns; padding bits that are set are ignored."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, width, generator=generator) < density
    expected = reference.pack_mask(keep)
    mask = on_one_and_two_threads(lambda: packing.pack_mask(keep, path=path))
    assert same(mask, expected)
    set_padding(mask, width)
    assert same(on_one_and_two_threads(lambda: packing.unpack_mask(mask, width, path=path)), keep)


@paths
@given(st.integers(1, 20), widths, st.floats(0, 1), st.sampled_from(TYPES), st.booleans(), seeds)
@repeatable
def test_values(
    path: str, rows: int, width: int, density: float, dtype: torch.dtype, permuted: bool, seed: int
) -> None:
    kept = max(1, round(density * width))
    generator = torch.Generator().manual_seed(seed)
    keep, weight = random_keep(rows, width, kept, generator), random_bits(rows, width, dtype, generator)
    order = torch.randperm(width, generator=generator).to(torch.int32) if permuted else None
    packed = on_one_and_two_threads(lambda: packing.pack_values(weight, keep, path=path))
    assert same(bits(packed), reference.pack_values(bits(weight), keep))
    mask = reference.pack_mask(keep)
    set_padding(mask, width)
    dense = on_one_and_two_threads(lambda: packing.expand(packed, mask, width, order, path=path))
    assert same(bits(dense), reference.expand(bits(packed), mask, width, order))
    assert dense.dtype == dtype


@paths
@pytest.mark.parametrize("byte", [2, 0x80, 0xFF])
def test_a_byte_of_a_mask_that_is_not_0_counts_once(path: str, byte: int) -> None:
    """torch makes bools of any bytes without looking."""
    keep = random_keep(3, 75, 31, torch.Generator().manual_seed(0))
    odd = (keep.to(torch.uint8) * byte).view(torch.bool)
    weight = torch.arange(225, dtype=torch.float32).view(3, 75)
    assert torch.equal(packing.pack_mask(odd, path=path), reference.pack_mask(keep))
    # the first row, which is counted by torch, as it should be
    odd[0] = keep[0]
    assert torch.equal(packing.pack_values(weight, odd, path=path), reference.pack_values(weight, keep))


@paths
@pytest.mark.parametrize("row", [0, 1, 2, 6])
@pytest.mark.parametrize("more", [-50, -1, 1, 50])
def test_rows_that_keep_another_number_are_refused(path: str, row: int, more: int) -> None:
    keep = random_keep(7, 100, 50, torch.Generator().manual_seed(row))
    weight = torch.ones(7, 100)
    values, wrong = packing.pack_values(weight, keep, path=path), keep.clone()
    wrong[row] = torch.arange(100) < 50 + more
    if row or more > -50:
        with pytest.raises(ValueError, match=rf"do not all keep the {50 if row else 50 + more} values that the first"):
            packing.pack_values(weight, wrong, path=path)
    for order in (None, torch.arange(100).flip(0)):
        with pytest.raises(ValueError, match="does not keep 50 values in every row"):
            packing.expand(values, reference.pack_mask(wrong), 100, order, path=path)


@pytest.mark.parametrize("module", [packing, reference], ids=lambda module: module.__name__.rpartition(".")[2])
def test_masks_that_do_not_fit_are_refused(module: Any) -> None:
    """Whatever a file says, no value beyond a row's own is read and none is written beyond its room."""
    keep = torch.tensor([[True, True, False, False], [True, True, True, False]])
    with pytest.raises(ValueError, match="do not all keep the 2 values"):
        module.pack_values(torch.ones(2, 4), keep)
    for found in (0b0111, 0b0001, 0b0000):
        mask = torch.tensor([[0b0011], [found]], dtype=torch.uint8)
        with pytest.raises(ValueError, match="does not keep 2 values in every row"):
            module.expand(torch.ones(2, 2), mask, 4)
    with pytest.raises(ValueError, match="does not fit 2 rows of 12 channels"):
        packing.expand(torch.ones(2, 2), torch.tensor([[3], [3]], dtype=torch.uint8), 12)
    with pytest.raises(ValueError, match="does not fit a weight"):
        packing.pack_values(torch.ones(2, 8), keep)


@pytest.mark.parametrize("order", [[0, 1, 2, 9], [0, 1, 2, -1], [0, 1, 1, 2], [0, 1, 2], [[0, 1, 2, 3]], []], ids=str)
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="the permutation of a packed layer is not one"):
        packing.expand(torch.ones(1, 2), torch.tensor([[3]], dtype=torch.uint8), 4, torch.tensor(order))


def test_a_path_that_is_not_there_is_refused() -> None:
    keep = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="no compiled path avx1024 here; there are: portable"):
        packing.pack_mask(keep, path="avx1024")


@paths
def test_views_are_packed_by_their_values(path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keep, weight = random_keep(40, 24, 9, generator), torch.rand(24, 40, generator=generator).T
    spread = torch.zeros(40, 48, dtype=torch.bool)
    spread[:, ::2] = keep
    assert torch.equal(packing.pack_values(weight, spread[:, ::2], path=path), reference.pack_values(weight, keep))
    mask = packing.pack_mask(spread[:, ::2], path=path)
    assert torch.equal(mask, reference.pack_mask(keep))
    assert torch.equal(packing.unpack_mask(mask.repeat(1, 2)[:, :3], 24, path=path), keep)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_nothing_is_packed_of_nothing(shape: tuple[int, int]) -> None:
    mask = packing.pack_mask(torch.ones(shape, dtype=torch.bool))
    assert mask.shape == (shape[0], -(-shape[1] // 8))
    assert packing.unpack_mask(mask, shape[1]).shape == shape


def test_a_mask_of_another_width_is_unpacked_as_by_the_plain_version() -> None:
    mask = torch.tensor([[0b1010, 0b1]], dtype=torch.uint8)
    for in_features in (3, 8, 20):
        assert torch.equal(packing.unpack_mask(mask, in_features), reference.unpack_mask(mask, in_features))


def test_tensors_of_large_pages() -> None:
    """More than 32 MiB, which begin and end anywhere in a page of 2 MiB; every other column of each row is kept."""
    rows, width = 33, (1 << 20) + 6
    keep = (torch.arange(width)[None] + torch.arange(rows)[:, None]) % 2 == 0
    weight = torch.rand(rows, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values, mask = packing.pack_values(weight, keep), packing.pack_mask(keep)
    assert values.nbytes > 32 << 20
    assert torch.equal(values[0], weight[0, ::2])
    assert torch.equal(values[1], weight[1, 1::2])
    assert torch.equal(packing.unpack_mask(mask, width), keep)
    assert torch.equal(packing.expand(values, mask, width), weight.masked_fill(~keep, 0))


def test_nothing_beyond_the_tensors_is_touched() -> None:
    """Tensors that begin or end where memory that may not be touched begins, in a process of its own."""
    code = """
import ctypes, itertools, mmap, torch
from streamprune_kernels import native, packing, reference
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
def guarded(tensor, at_the_end):
    size = -(-tensor.nbytes // PAGE) * PAGE
    room = mmap.mmap(-1, size + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for page in (start, start + PAGE + size):
        assert libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    offset = PAGE + (size - tensor.nbytes if at_the_end else 0)
    return torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
def given(tensor, at_the_end):
    return guarded(tensor, at_the_end).copy_(tensor)
compiled, empty = native.library(), torch.empty
sizes = (4, 1), (4, 3), (7, 2), (33, 1), (36, 2), (64, 2), (100, 5), (257, 2), (1000, 3)
for (width, rows), end in itertools.product(sizes, (False, True)):
    torch.empty = empty
    keep = torch.rand(rows, width).argsort(dim=1) < width // 2
    order = given(torch.randperm(width, dtype=torch.int32), end)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        weight = torch.randint(1, 100, (rows, width), dtype=dtype)
        values, mask = reference.pack_values(weight, keep), reference.pack_mask(keep)
        dense = [reference.expand(values, mask, width, places) for places in (None, order)]
        # what the launchers write to is guarded too
        torch.empty = lambda *shape, dtype: guarded(empty(*shape, dtype=dtype), end)
        arguments = [given(tensor, end) for tensor in (weight, keep, values, mask)]
        hostile = [given(bits, end) for bits in (mask | 0xFF, mask & 0)]
        for path in native.paths():
            weights, kept, packed, bits = arguments
            assert torch.equal(packing.pack_values(weights, kept, path=path), values)
            assert torch.equal(packing.pack_mask(kept, path=path), mask)
            assert torch.equal(packing.unpack_mask(bits, width, path=path), keep)
            for places, expected in zip((None, order), dense, strict=True):
                assert torch.equal(packing.expand(packed, bits, width, places, path=path), expected)
                for wrong in hostile:
                    try:
                        packing.expand(packed, wrong, width, places, path=path)
                        raise SystemExit("a mask that is wrong was taken")
                    except ValueError:
                        pass
            more = kept.clone()
            more[-1] = True
            if rows > 1:
                try:
                    packing.pack_values(weights, given(more, end), path=path)
                    raise SystemExit("a row that keeps more was taken")
                except ValueError:
                    pass
        torch.empty = empty
print("touched nothing else")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "touched nothing else\n", done.stderr
