"""Names of what decides how results round, the trial of it, and two OpenMP runtimes in one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from thread_count import threads

from streamprune.model import machine
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.machine import bfloat16_features, file_at, processor_name, rounding
from streamprune_kernels import library

CPU = torch.device("cpu")
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\nbugs\t\t: amx_bf16\n"
OLDER = "vendor_id\t: GenuineIntel\nmodel name\t: amx_bf16\nflags\t\t: fpu avx512f avx512_vbmi2\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\nCPU implementer\t: 0x41\n"
CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("text", "features", "vendor"),
    [
        (INTEL, ["amx_bf16", "avx512_bf16"], "GenuineIntel"),
        (AMD, ["avx512_bf16"], "AuthenticAMD"),
        (OLDER, [], "GenuineIntel"),
        (ARM, ["bf16"], "0x41"),
        ("", [], "some-machine"),
        (None, [], "some-machine"),
    ],
)
def test_a_processor_by_name(
    text: str | None, features: list[str], vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What multiplies bfloat16 counts only in bfloat16; the vendor always, as libraries choose by it."""
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(machine.platform, "machine", lambda: "some-machine")
    assert bfloat16_features(path) == features
    assert processor_name(torch.float32, path) == f"{vendor} {CAPABILITY}"
    assert processor_name(torch.bfloat16, path) == " ".join([vendor, CAPABILITY, *features])


@pytest.mark.parametrize(
    ("changes", "reason", "expected"),
    [
        ({}, None, ("NVIDIA H100, sm_90, 132 multiprocessors", "compiled")),
        ({"multi_processor_count": 114}, None, ("NVIDIA H100, sm_90, 114 multiprocessors", "compiled")),
        ({"name": "NVIDIA A100", "major": 8}, "no CuPy", ("NVIDIA A100, sm_80, 132 multiprocessors", "plain")),
    ],
)
def test_a_gpu_by_name(
    changes: dict[str, Any], reason: str | None, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(**{"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, **changes})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(machine, "unsupported_reason", lambda device: reason)
    identity = Arithmetic(torch.device("cuda"), torch.bfloat16).identity
    assert (identity["gpu"], identity["gpu_kernels"]) == expected
    assert identity["processor"] == processor_name(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_the_same_every_time_and_another_where_something_rounds_differently(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rounding(CPU, dtype, 64)
    assert len(first) == 16
    with threads(1):
        one = rounding(CPU, dtype, 64)
    with threads(1):
        assert rounding(CPU, dtype, 64) == one
    assert rounding(CPU, dtype, 64) == first
    for module, name in ((machine.functional, "linear"), (machine, "packed_linear"), (torch, "cos")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, one_step_off(getattr(module, name)))
            assert rounding(CPU, dtype, 64) != first, name


def one_step_off(function: Any) -> Any:
    """The function with its first result rounded to the next number."""

    def changed(*arguments: Any, **settings: Any) -> torch.Tensor:
        result = function(*arguments, **settings).clone()
        integers = result.view(-1).view(torch.int16 if result.itemsize == 2 else torch.int32)
        integers[0] += 1
        return result

    return changed


def test_rounding_takes_any_number_of_rows() -> None:
    found = {rows: rounding(CPU, torch.float32, rows) for rows in (1, 7, 1024, 5000)}
    assert len(set(found.values())) == 3
    assert found[1024] == found[5000]


MAPS = """\
1000-2000 r--p 00000000 fe:00 26723                      /v/bin/python3.11
2000-3000 rw-p 00000000 00:00 0
3000-5000 r-xp 00000000 fe:00 77                         /v/torch/lib/libgomp.so.1
5000-6000 r-xp 00000000 fe:00 78                         /usr/lib/with space/libgomp.so.1
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]
"""
TORCHS, OTHER = "/v/torch/lib/libgomp.so.1", "/usr/lib/with space/libgomp.so.1"


@pytest.mark.parametrize(
    ("address", "file"), [(0, ""), (0x2800, ""), (0x3000, TORCHS), (0x4FFF, TORCHS), (0x5000, OTHER), (0x9000, "")]
)
def test_the_file_at_an_address(address: int, file: str) -> None:
    assert file_at(address, MAPS) == file


@pytest.mark.parametrize(
    ("ours", "torchs", "said"),
    [(0x3100, 0x4100, None), (0, 0, None), (0x5100, 0x3100, (OTHER, TORCHS)), (0x5100, 0, (OTHER, "none"))],
    ids=["one", "none", "two", "one alone"],
)
def test_two_runtimes_are_told_in_one_line_once(
    ours: int,
    torchs: int,
    said: tuple[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "maps").write_text(MAPS)
    monkeypatch.setattr(machine, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(machine, "openmp_address", lambda loaded: ours if loaded is library() else torchs)
    machine.warn_of_two_runtimes.cache_clear()
    for _ in range(2):
        machine.warn_of_two_runtimes()
    machine.warn_of_two_runtimes.cache_clear()
    lines = [] if said is None else [f"compiled kernels run on the threads of {said[0]}, torch on those of {said[1]}, "]
    assert len(caplog.messages) == len(lines)
    assert all(line in message for line, message in zip(lines, caplog.messages, strict=True))


def test_here_kernels_have_torchs_though_others_are_loaded(caplog: pytest.LogCaptureFixture) -> None:
    """sentencepiece brings one along, which nobody else calls."""
    import sentencepiece  # noqa: F401

    compiled = library()
    assert compiled is not None
    assert "/torch/lib/" in file_at(machine.openmp_address(compiled), machine.MAPS.read_text())
    machine.warn_of_two_runtimes.__wrapped__()
    assert caplog.messages == []
