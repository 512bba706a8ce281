"""Products of packed weights on a processor: every set of instructions against float64, for any pattern and shape."""

import ctypes
import subprocess
import sys

import pytest
import torch
from thread_count import threads
from torch.nn import functional

from streamprune_kernels import expand, native, pack_mask, pack_values, packed_product, select_groups
from streamprune_kernels.native import PATHS, TYPES
from streamprune_kernels.packed_product import FEW_ROWS

PATTERNS = [(2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (3, 4), (5, 16), (1, 64), (63, 64)]
DTYPES = list(TYPES)
ROWS = [*range(1, 10), 16, 17, 24, 25, 70, 257]
product = packed_product.packed_product


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Without the library nothing here would run."""
    assert isinstance(native.library(), ctypes.CDLL), "the package was built without its compiled kernels"


def packed(
    out_features: int, groups: int, pattern: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, mask, and the dense weight that they stand for."""
    kept, group_size = pattern
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, groups * group_size, generator=generator).to(dtype)
    keep = select_groups(torch.rand(weight.shape, generator=generator), kept, group_size)
    return pack_values(weight, keep), pack_mask(keep), weight.masked_fill(~keep, 0)


def inputs(rows: int, in_features: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))


def error_over_plain(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """||y - exact||, over that of torch's own float32 product."""
    exact = x.to(torch.float64) @ weight.to(torch.float64).T
    plain = functional.linear(x, weight.to(torch.float32))
    return float((y - exact).norm() / (plain - exact).norm())


paths = pytest.mark.parametrize("path", PATHS)
kernels = pytest.mark.parametrize("many", [False, True], ids=["few", "many"])


@pytest.fixture(autouse=True)
def only_paths_of_this_processor(request: pytest.FixtureRequest) -> None:
    path = request.node.callspec.params.get("path") if hasattr(request.node, "callspec") else None
    if path is not None and path not in native.paths():
        pytest.skip(f"this processor lacks {path}")


def test_the_paths_of_a_processor_begin_with_the_portable_one() -> None:
    assert native.paths() == PATHS[: len(native.paths())]
    assert len(native.paths()) >= 1


@paths
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
def test_error_is_at_most_twice_that_of_plain_float32(
    pattern: tuple[int, int], dtype: torch.dtype, many: bool, path: str
) -> None:
    """Over enough sums that the ratio is no accident: 1,280 or 1,344 inputs."""
    values, mask, weight = packed(60, -(-1280 // pattern[1]), pattern, dtype)
    x = inputs(9, weight.shape[1])
    y = product(x, values, mask, path=path, many=many)
    assert (y.dtype, tuple(y.shape)) == (torch.float32, (9, 60))
    assert error_over_plain(y, x, weight) <= 2


@paths
@kernels
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows: int, many: bool, path: str) -> None:
    values, mask, weight = packed(37, 41, (2, 4), torch.bfloat16)
    x = inputs(rows, weight.shape[1])
    torch.testing.assert_close(
        product(x, values, mask, path=path, many=many), x @ weight.float().T, rtol=1e-4, atol=1e-4
    )


@paths
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [5, 10, 15, 20, 30, 35, 40, 60, 65, 95, 100, 160, 165])
@pytest.mark.parametrize("out_features", [1, 2, 3, 7, 33])
def test_ragged_shapes(out_features: int, in_features: int, dtype: torch.dtype, many: bool, path: str) -> None:
    """Inputs that 8, 32 and 64 do not divide, and so few rows that whole vectors reach beyond the last one."""
    values, mask, weight = packed(out_features, in_features // 5, (2, 5), dtype)
    x = inputs(3, in_features)
    y = product(x, values, mask, path=path, many=many)
    torch.testing.assert_close(y, x @ weight.float().T, rtol=1e-5, atol=1e-5)


@kernels
@paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads_nor_on_the_other_rows(dtype: torch.dtype, many: bool, path: str) -> None:
    values, mask, weight = packed(531, 70, (2, 4), dtype)
    x = inputs(300, weight.shape[1])
    with threads(1):
        one = product(x, values, mask, path=path, many=many)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(product(x, values, mask, path=path, many=many), one)
    for rows in (slice(0, 1), slice(5, 8), slice(100, 150), slice(40, 300)):
        assert torch.equal(product(x[rows], values, mask, path=path, many=many), one[rows])


def test_many_rows_have_the_same_bits_by_avx2_and_avx512() -> None:
    if native.paths() != PATHS:
        pytest.skip("this processor lacks one of them")
    values, mask, weight = packed(64, 100, (2, 4), torch.bfloat16)
    x = inputs(70, weight.shape[1])
    one, other = (product(x, values, mask, path=path, many=True) for path in ("avx2", "avx512"))
    assert torch.equal(one, other)


@paths
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permutation_gathers_the_inputs(dtype: torch.dtype, many: bool, path: str) -> None:
    values, mask, _ = packed(33, 25, (2, 4), dtype)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    x = inputs(10, 100)
    y = product(x, values, mask, order, path=path, many=many)
    assert torch.equal(y, product(x[:, order], values, mask, path=path, many=many))
    restored = expand(values, mask, 100, order).float()
    torch.testing.assert_close(y, x @ restored.T, rtol=1e-5, atol=1e-5)


@paths
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_dtype_is_converted_exactly(dtype: torch.dtype, many: bool, path: str) -> None:
    """One value a row times 1: all 65,536 patterns of bits, subnormal, infinite and NaN among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype) if dtype != torch.float32 else (bits.to(torch.int32) << 16 | 0x1234).view(dtype)
    mask = torch.full((len(values), 1), 0b0010, dtype=torch.uint8)
    y = product(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), values[:, None].contiguous(), mask, path=path, many=many)
    torch.testing.assert_close(y[0], values.float(), rtol=0, atol=0, equal_nan=True)


@paths
@kernels
@pytest.mark.parametrize("row", [0, 3, 39])
@pytest.mark.parametrize("bits", [0b0000, 0b0111, 0b1111])
def test_masks_that_keep_another_number_are_refused(bits: int, row: int, many: bool, path: str) -> None:
    values, mask, weight = packed(40, 2, (2, 4), torch.bfloat16)
    mask[row] = bits | bits << 4
    with pytest.raises(ValueError, match="a mask does not keep 4 values in every row"):
        product(inputs(2, weight.shape[1]), values, mask, path=path, many=many)


def test_bits_beyond_the_last_channel_are_not_read() -> None:
    values, mask, _ = packed(9, 3, (2, 4), torch.float32)
    assert tuple(mask.shape) == (9, 2)
    x = inputs(2, 12)
    expected = product(x, values, mask)
    assert torch.equal(product(x, values, mask | torch.tensor([0, 0xF0], dtype=torch.uint8)), expected)


@kernels
def test_views_are_multiplied_as_what_they_show(many: bool) -> None:
    values, mask, weight = packed(24, 20, (2, 4), torch.float16)
    x = inputs(11, weight.shape[1])
    order = torch.arange(weight.shape[1], dtype=torch.int32).flip(0)
    expected = product(x, values, mask, order, many=many)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (x, values, mask, order)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(product(*strided, many=many), expected)


def test_which_kernel_runs_follows_from_the_rows() -> None:
    values, mask, weight = packed(256, 150, (2, 4), torch.bfloat16)
    x = inputs(FEW_ROWS + 1, weight.shape[1])
    few, many = (product(x, values, mask, many=many) for many in (False, True))
    assert not torch.equal(few, many)
    assert torch.equal(product(x, values, mask), many)
    assert torch.equal(product(x[1:], values, mask), few[1:])


def test_no_rows_give_no_rows() -> None:
    values, mask, _ = packed(8, 4, (2, 4), torch.float32)
    assert tuple(product(inputs(0, 16), values, mask).shape) == (0, 8)


def test_pairs_are_refused_where_they_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask, _ = packed(8, 4, (2, 4), torch.bfloat16)
    x = inputs(1, 16)
    for one, other in ((x, values), (x.to(torch.bfloat16), values.float())):
        with pytest.raises(ValueError, match=r"no pairs here: they take bfloat16, not torch\.\w+ by torch\.\w+"):
            product(one, other, mask, pairs=True)
    monkeypatch.setattr(packed_product, "has_pairs", lambda: False)
    with pytest.raises(ValueError, match="no pairs here"):
        product(x.to(torch.bfloat16), values, mask, pairs=True)


def test_paths_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask, _ = packed(8, 4, (2, 4), torch.float32)
    with pytest.raises(ValueError, match="no compiled path avx1024 here; there are: portable"):
        product(inputs(1, 16), values, mask, path="avx1024")
    for module in (native, packed_product):
        monkeypatch.setattr(module, "library", lambda: None)
    assert native.paths() == ()
    with pytest.raises(ValueError, match="no compiled kernels here"):
        product(inputs(1, 16), values, mask)


def test_nothing_is_read_beyond_the_tensors() -> None:
    """Tensors that end where memory that may not be read begins, in a process of its own."""
    code = """
import ctypes, mmap, torch
from streamprune_kernels import native, packed_product
libc = ctypes.CDLL(None, use_errno=True)
def at_the_end(tensor):
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)
for in_features, rows in ((4, 1), (4, 3), (36, 1), (36, 2), (64, 17), (100, 5), (1000, 3)):
    values = at_the_end(torch.ones(rows, in_features // 2).to(torch.bfloat16))
    mask = torch.full((rows, -(-in_features // 8)), 0b00110011, dtype=torch.uint8)
    words = at_the_end(torch.ones(11, in_features).to(torch.bfloat16))
    for bits, number in ((mask, 1), (mask, 1 + 2**-12), (mask | 0xFF, 1)):
        x = at_the_end(torch.full((11, in_features), float(number)))
        ways = [{"path": path, "many": many} for path in native.paths() for many in (False, True)]
        for way in [*ways, *[{"pairs": True, "many": many} for many in (False, True) if packed_product.has_pairs()]]:
            try:
                given = words if "pairs" in way else x
                y = packed_product.packed_product(given, values, at_the_end(bits), **way)
                assert (y == in_features // 2 * (1 if "pairs" in way else number)).all()
            except ValueError:
                assert bits is not mask
print("read nothing else")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "read nothing else\n", done.stderr
