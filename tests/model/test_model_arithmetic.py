"""Device and dtype as resolved, and the table of architectures."""

import ctypes
import subprocess
import sys

import pytest
import torch

from streamprune.errors import SettingsError
from streamprune.model import arithmetic
from streamprune.model.arithmetic import Arithmetic, name_of, resolve_arithmetic
from streamprune.model.machine import processor_name

# In a process of its own, whose heap has no hole as large: a piece of 10 MB, after one of 30 MB was freed, from which
# glibc would learn to take it from the heap. Prints by how much what is mapped grows.
LARGE_PIECE = """
import ctypes
import torch
from streamprune.process import map_large_pieces

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
map_large_pieces()
torch.zeros(30_000_000, dtype=torch.uint8)
before = mallinfo2().hblkhd
held = torch.zeros(10_000_000, dtype=torch.uint8)
print(mallinfo2().hblkhd - before)
"""


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_auto_on_a_cpu_is_float32_but_for_bfloat16_that_it_multiplies(
    source: torch.dtype, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda: instructions)
    expected = torch.bfloat16 if instructions and source == torch.bfloat16 else torch.float32
    for device in ("auto", "cpu"):
        assert resolve_arithmetic(device, "auto", source) == Arithmetic(torch.device("cpu"), expected)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_auto_on_a_gpu_is_the_sources_dtype(
    source: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arithmetic, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda: False)
    assert resolve_arithmetic("auto", "auto", source) == Arithmetic(torch.device("cuda"), expected)
    assert resolve_arithmetic("cpu", "auto", source) == Arithmetic(torch.device("cpu"), torch.float32)
    assert resolve_arithmetic("cuda", "float32", source).dtype == torch.float32


def test_a_gpu_without_its_kernels_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arithmetic, "unsupported_reason", lambda device: f"no kernels on {device}")
    resolve_arithmetic("cpu", "auto", torch.float32)
    assert caplog.messages == []
    resolve_arithmetic("cuda", "auto", torch.float32)
    assert caplog.messages == ["no kernels on cuda (plain ones run in place of them, slower)"]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("tpu", "auto", "device 'tpu' is none of auto, cpu, cuda"),
        ("cpu", "int8", "dtype 'int8' is none of auto, float32, bfloat16, float16"),
        ("cuda", "auto", "device cuda: torch sees no GPU on this machine"),
        ("cpu", "float16", "dtype float16 is about 100 times slower"),
        ("auto", "float16", "dtype float16 is about 100 times slower"),
    ],
)
def test_what_is_not_there_is_refused(device: str, dtype: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve_arithmetic(device, dtype, torch.float16)


def test_identity_names_what_decides_the_bytes() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert Arithmetic(torch.device("cpu"), dtype).identity == {
            "device": "cpu",
            "dtype": name_of(dtype),
            "processor": processor_name(dtype),
            "kernels": "compiled",
        }
    assert name_of(torch.float32) == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_tolerance_lies_between_rounding_and_a_wrong_weight(dtype: torch.dtype) -> None:
    """Two orders of summation stay below it; one of 1,024 weights exchanged does not."""
    tolerance = Arithmetic(torch.device("cpu"), dtype).kernel_tolerance
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 1024, generator=generator).to(dtype), torch.randn(32, 1024, generator=generator).to(dtype)
    y, order = (x @ w.T).double(), torch.randperm(1024, generator=generator)
    reordered = (x[:, order] @ w[:, order].T).double()
    wrong = w.clone()
    wrong[:, [0, 1]] = wrong[:, [1, 0]]
    faulty = (x @ wrong.T).double()
    assert float((reordered - y).norm() / y.norm()) < tolerance
    assert float((faulty - y).norm() / y.norm()) > tolerance


def test_large_pieces_are_mapped_by_themselves_whatever_was_freed_before() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("the allocator is not glibc's")
    done = subprocess.run([sys.executable, "-c", LARGE_PIECE], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 10_000_000
