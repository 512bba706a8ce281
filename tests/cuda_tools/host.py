"""Kernels on the CPU: the .cu text compiled by g++ over host_shim.h, which says what is checked.

`run` is a `streamprune_kernels.launch.Run` for tensors on the CPU. Tensors are copied between margins of NaN, so that a
read past an end shows in the result and a write past it fails.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from streamprune_kernels.launch import FOLDER, Launch, joined_source

SHIM = Path(__file__).with_name("host_shim.h")
COMPILER = ("g++", "-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas")
CACHE = Path(tempfile.gettempdir()) / f"streamprune-host-{os.getuid()}"
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\))?\s*(\w+)\(')
MARGIN_BYTES = 4096
ALIGNMENT = 256  # of memory that CUDA allocates
POISON = 0xFF
FAILURE_BYTES = 600
LAUNCHING = threading.Lock()  # the shim's state is one for all threads; a job prunes and packs in two

LAUNCHER = """
static const shim::Kernel KERNELS[] = {{{kernels}}};
extern "C" int launch(const char* name, const u32* shape, u32 shared_bytes, u32 schedule, void** arguments,
                      u64 argument_count, const u64* ranges, u64 range_count, u64* counts, char* failure) {{
    shim::Settings settings = {{{{shape[0], shape[1], shape[2]}}, {{shape[3], shape[4], shape[5]}},
                               shared_bytes, schedule, {{}}, nullptr, arguments}};
    for (u64 i = 0; i < range_count; i++) settings.global.push_back({{ranges[2 * i], ranges[2 * i + 1]}});
    std::string problem = "there is no such kernel";
    for (const shim::Kernel& kernel : KERNELS) {{
        if (strcmp(kernel.name, name)) continue;
        settings.kernel = kernel.invoke;
        problem = kernel.parameters == argument_count ? shim::launch(settings, *(shim::Counts*)counts)
                                                      : "has " + std::to_string(kernel.parameters) + " parameters";
    }}
    snprintf(failure, {failure_bytes}, "%s", problem.c_str());
    return !problem.empty();
}}
"""


class HostFault(Exception):
    """A kernel did what no kernel may, or its text does not compile; the message says what."""


@dataclass(frozen=True)
class Counts:
    """What a launch did, over all its blocks; bank conflicts are extra turns of ldmatrix."""

    switches: int
    barriers: int
    copies: int
    ldmatrix: int
    bank_conflicts: int
    mma_sparse: int
    mma_dense: int


def run(launch: Launch, schedule: int = 0) -> None:
    """Run a launch on the CPU under a schedule (host_shim.h). Raises HostFault."""
    measure(launch, schedule)


def measure(launch: Launch, schedule: int = 0) -> Counts:
    """`run` that tells what was counted."""
    return run_text(host_source(launch.source), launch, schedule)


@functools.cache
def host_source(stem: str) -> str:
    """The text of a .cu file over the shim."""
    return joined_source(f"{stem}.cu", read_over_shim)


def read_over_shim(name: str) -> str:
    return (SHIM if name == "device.cuh" else FOLDER / name).read_text()


def run_text(source: str, launch: Launch, schedule: int = 0) -> Counts:
    """Run a launch whose kernel stands in the text `source`. Raises HostFault."""
    library = ctypes.CDLL(str(compiled(source)))
    copies = [Margins(tensor) for tensor in launch.tensors]
    waiting = iter(copies)
    values: list[ctypes._SimpleCData] = []
    for argument in launch.arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            values.append(ctypes.c_uint64(0 if argument is None else next(waiting).address))
        else:
            values.append(ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    ranges = [bound for copy in copies for bound in (copy.address, copy.address + copy.size)]
    shape = (ctypes.c_uint32 * 6)(*launch.grid, *launch.block)
    counts = (ctypes.c_uint64 * len(fields(Counts)))()
    failure = ctypes.create_string_buffer(FAILURE_BYTES)
    sizes = ctypes.c_uint32(launch.shared_bytes), ctypes.c_uint32(schedule)
    global_memory = (ctypes.c_uint64 * len(ranges))(*ranges), ctypes.c_uint64(len(copies))
    arguments = pointers, ctypes.c_uint64(len(values)), *global_memory, counts, failure
    with LAUNCHING:
        failed = library.launch(launch.kernel.encode(), shape, *sizes, *arguments)
    if failed:
        raise HostFault(f"{launch.kernel}: {failure.value.decode()}")
    for copy in copies:
        copy.take_back(launch.kernel)
    return Counts(*counts)


class Margins:
    """A copy of a CPU tensor between margins, gaps between its rows included."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu":
            raise HostFault(f"a tensor is not on the CPU: {list(tensor.shape)} on {tensor.device}")
        self.tensor = tensor
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        elements = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))
        self.size = elements.numel() * tensor.itemsize
        self.buffer = torch.full((self.size + 2 * MARGIN_BYTES + ALIGNMENT,), POISON, dtype=torch.uint8)
        self.begin = MARGIN_BYTES + -self.buffer.data_ptr() % ALIGNMENT
        self.before = elements.view(torch.uint8)
        self.inside.copy_(self.before)

    @property
    def inside(self) -> torch.Tensor:
        return self.buffer[self.begin : self.begin + self.size]

    @property
    def address(self) -> int:
        return self.buffer.data_ptr() + self.begin

    def take_back(self, kernel: str) -> None:
        """Write what changed to the tensor. Raises HostFault where a margin did."""
        margins = self.buffer[: self.begin], self.buffer[self.begin + self.size :]
        if any(bool((margin != POISON).any()) for margin in margins):
            raise HostFault(f"{kernel}: writes outside of a tensor {list(self.tensor.shape)}")
        if not torch.equal(self.inside, self.before):
            self.before.copy_(self.inside)


def compiled(source: str) -> Path:
    """The shared library of a source with its launcher, kept under a digest of all that goes in. Raises HostFault."""
    kernels = ", ".join(f'shim::describe<{name}>("{name}")' for name in KERNEL.findall(source))
    text = source + LAUNCHER.format(kernels=kernels, failure_bytes=FAILURE_BYTES)
    digest = hashlib.sha256("\0".join((platform.node(), *COMPILER, text)).encode()).hexdigest()
    library = CACHE / f"{digest[:32]}.so"
    if not library.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            (Path(folder) / "kernels.cpp").write_text(text)
            command = (*COMPILER, "kernels.cpp", "-o", "kernels.so")
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if result.returncode:
                raise HostFault(f"does not compile:\n{result.stderr}")
            (Path(folder) / "kernels.so").replace(library)
    return library
