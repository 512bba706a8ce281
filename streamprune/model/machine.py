"""What of a machine decides how results round, by name and by trial; and whose threads share its processors."""

import ctypes
import hashlib
import logging
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from streamprune_kernels import (
    library,
    pack_mask,
    pack_values,
    packed_linear,
    packed_metadata,
    select_groups,
    unsupported_reason,
)

CPU_INFO, MAPS = Path("/proc/cpuinfo"), Path("/proc/self/maps")
BFLOAT16_FEATURES = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # x86's two, and Arm's
OPENMP_FUNCTION = "GOMP_parallel"  # that compiled loops call
# Of the products that are tried: MKL may divide as many inputs among its threads.
INPUTS, OUTPUTS, MAX_ROWS = 4096, 256, 1024
logger = logging.getLogger("streamprune")


def bfloat16_features(cpu_info: Path = CPU_INFO) -> list[str]:
    """The instructions that multiply bfloat16 (AMX, AVX-512 BF16, Arm's bf16), of those that Linux lists."""
    features = (_field(cpu_info, "flags") or _field(cpu_info, "features")).split()
    return sorted(BFLOAT16_FEATURES.intersection(features))


def processor_name(dtype: torch.dtype, cpu_info: Path = CPU_INFO) -> str:
    """Vendor and vector instructions: libraries choose by both. In bfloat16 also what multiplies it."""
    vendor = _field(cpu_info, "vendor_id") or _field(cpu_info, "cpu implementer") or platform.machine()
    pairs = bfloat16_features(cpu_info) if dtype == torch.bfloat16 else []
    return " ".join([vendor, torch.backends.cpu.get_cpu_capability(), *pairs])


def former_instruction_set(device: torch.device, dtype: torch.dtype) -> str:
    """What manifests of format version 1 have in place of the processor's and the GPU's names."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    pairs = ["BF16"] if dtype == torch.bfloat16 and bfloat16_features() else []
    return " ".join([torch.backends.cpu.get_cpu_capability(), *pairs])


def _field(cpu_info: Path, name: str) -> str:
    """The first value of that name in a list of /proc/cpuinfo's form, empty where there is none."""
    if not cpu_info.exists():
        return ""
    lines = (line.partition(":") for line in cpu_info.read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip().lower() == name), "")


def gpu_identity(device: torch.device) -> dict[str, str]:
    """What of a GPU decides bits: libraries and kernels choose by its kind, and by how many multiprocessors it has."""
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors",
        "gpu_kernels": "compiled" if unsupported_reason(device) is None else "plain",
    }


def gpu_versions(device: torch.device) -> dict[str, str]:
    """Versions of CUDA, and where it compiles the kernels of CuPy and its compiler."""
    versions = {"cuda": str(torch.version.cuda)}
    if unsupported_reason(device) is None:
        import cupy

        versions["cupy"] = str(cupy.__version__)
        versions["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return versions


def rounding(device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """16 hexadecimal digits that are the same where libraries and kernels round alike, with these threads and settings.

    A trial, because names say little of the paths that libraries take: a digest of products of so many `rows`, plain
    and packed, of attention and of vector functions, on the device that blocks run on; the functions on the host too.
    """
    digest = hashlib.sha256()
    with torch.inference_mode():
        for result in _trials(device, dtype, max(1, min(rows, MAX_ROWS))):
            digest.update(result.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _trials(device: torch.device, dtype: torch.dtype, rows: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, INPUTS, generator=generator) for count in (rows, OUTPUTS))
    for name in ("cos", "sin", "exp", "rsqrt", "sigmoid", "erf"):
        yield getattr(torch, name)(x[:1].abs() * 100)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    yield functional.linear(x, weight)
    keep = select_groups(weight.to(torch.float32).abs(), 2, 4)
    values, mask = pack_values(weight, keep), pack_mask(keep)
    metadata = packed_metadata(values, mask, INPUTS, 4)
    for some in (x, x[:1]):
        yield packed_linear(some, values, mask, None, None, 4, metadata)
    heads = x[:, :512].view(1, rows, 8, 64).transpose(1, 2)
    yield functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    yield functional.silu(x)
    yield x.to(torch.float32).softmax(dim=-1)


def file_at(address: int, maps: str) -> str:
    """The file that an address is mapped from, by the text of a /proc/PID/maps; empty where it is none."""
    for line in maps.splitlines():
        bounds, *about = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < last:
            return about[4] if len(about) == 5 else ""
    return ""


def openmp_address(loaded: ctypes.CDLL) -> int:
    """Where the OpenMP runtime of a loaded library lies, 0 without one: what is loaded for everyone comes first, then
    what it needs itself. That another library brought a runtime of its own along does not matter.
    """
    found = (getattr(place, OPENMP_FUNCTION, None) for place in (ctypes.CDLL(None), loaded))
    return next((ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found if function is not None), 0)


@cache
def warn_of_two_runtimes() -> None:
    """Say in one line, once in a process, that the compiled kernels have another OpenMP runtime than torch, where they
    do: a team of threads would wait busily while the other works. Results are the same.
    """
    compiled = library()
    if compiled is None or not MAPS.exists():
        return
    maps = MAPS.read_text()
    ours, torchs = (file_at(openmp_address(loaded), maps) for loaded in (compiled, ctypes.CDLL(torch._C.__file__)))
    if ours != torchs:
        logger.warning(
            "compiled kernels run on the threads of %s, torch on those of %s, which slow each other down; set "
            "OMP_WAIT_POLICY=passive",
            *(ours or "none", torchs or "none"),
        )
