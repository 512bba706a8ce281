"""Launching the CUDA kernels of this folder: a launch as plain data, and the device that runs it through CuPy.

Launchers build a `Launch` and hand it to a `Run`. `on_device` is the one that users get; tests hand the same launches
to runners on the CPU. CuPy, the optional extra `gpu`, is imported only when a kernel is to run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
MIN_CAPABILITY = (8, 0)  # mma.sp for 16-bit types and cp.async
NO_POINTER = 0

Argument = torch.Tensor | int | float | None


class KernelUnavailable(RuntimeError):
    """A CUDA kernel cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel `kernel` (its extern "C" name) of `source` (the stem of a .cu file of this folder).

    Arguments in the kernel's order: a tensor passes its address, None a null pointer, an int a C int (32 bits), a
    float a C float. Raises ValueError for one that does not fit, or a block that is not whole warps.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if isinstance(argument, int) and not -(2**31) <= argument < 2**31:
                raise ValueError(f"{self.kernel}: {argument} does not fit a C int; split the product into parts")
        if min(self.grid + self.block) < 1:
            raise ValueError(f"{self.kernel}: a grid {self.grid} of blocks {self.block} has nothing to run")
        if self.threads % 32 or self.threads > 1024:
            raise ValueError(f"{self.kernel}: {self.threads} threads a block are not 1 to 32 whole warps")

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(argument for argument in self.arguments if isinstance(argument, torch.Tensor))


Run = Callable[[Launch], None]


def refuse_gradients(product: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError where a gradient is wanted of tensors: kernels have none, and it would be lost silently."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{product} has no gradient: its {name} must not require one; detach it")


def runner_for(tensor: torch.Tensor) -> Run | None:
    """What runs CUDA kernels on a tensor: its GPU; None where nothing does."""
    return on_device if _runs_kernels(tensor.device) else None


@cache
def cuda_source(stem: str) -> str:
    """The text of a .cu file with each `#include "..."` replaced by that file's text, at its first mention.

    CuPy's cache of compiled kernels knows the text alone: a header found by the compiler could change unnoticed.
    """
    return joined_source(f"{stem}.cu", lambda name: (FOLDER / name).read_text())


def joined_source(name: str, read: Callable[[str], str]) -> str:
    """Text of the file `name`, read by `read`, with its includes of quoted names replaced; each file once."""
    seen = {name}

    def join(text: str, file: str) -> str:
        parts, end = [f'#line 1 "{file}"\n'], 0
        for match in INCLUDE.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            if match[1] not in seen:
                seen.add(match[1])
                parts.append(join(read(match[1]), match[1]))
            parts.append(f'#line {text.count(chr(10), 0, end) + 1} "{file}"\n')
        return "".join([*parts, text[end:]])

    return join(read(name), name)


def on_device(launch: Launch) -> None:
    """Run a launch through CuPy on torch's current stream of the tensors' device, without copies; does not wait.

    Raises KernelUnavailable where it cannot run, ValueError where the tensors are not all on one device.
    """
    devices = {tensor.device for tensor in launch.tensors}
    if len(devices) != 1:
        raise ValueError(f"{launch.kernel}: its tensors are on {sorted(map(str, devices))}; move them to one device")
    device = devices.pop()
    if not _runs_kernels(device) and (reason := unsupported_reason(device)):
        raise KernelUnavailable(reason)
    import cupy

    with cupy.cuda.Device(device.index), _cupy_stream(torch.cuda.current_stream(device)):
        function = _function(launch.source, launch.kernel, device.index)
        if launch.shared_bytes > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = launch.shared_bytes
        function(launch.grid, launch.block, _values(launch.arguments), shared_mem=launch.shared_bytes)


def unsupported_reason(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a device and what to do, in one line; None where they can.

    Found out anew by each call, and what is launched from then on goes by it: CuPy may be installed, or mended, while
    the process lives. Between two calls the answer stays, so that it cannot change within a job.
    """
    _runs_kernels.cache_clear()
    return _find_reason(device)


def _find_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA kernels need tensors on a GPU, these are on {device}: move them or use the plain functions"
    if not torch.cuda.is_available():
        return "CUDA kernels need a GPU and a torch built for CUDA, neither is at hand: use the plain functions"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}"
        return f"CUDA kernels need sm_80 (Ampere) or later, {found}: use the plain functions"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"CUDA kernels are compiled by CuPy, which does not import ({error}): pip install 'streamprune[gpu]'"
    return None


@cache
def _runs_kernels(device: torch.device) -> bool:
    """Whether nothing speaks against a device. Asked once between two `unsupported_reason`: it takes as long as a
    launch."""
    return _find_reason(device) is None


@cache
def _cupy_stream(stream: torch.cuda.Stream) -> Any:
    """A stream of torch's as CuPy's. Torch hands out few streams, again and again."""
    import cupy

    return cupy.cuda.Stream.from_external(stream)


@cache
def _function(source: str, kernel: str, device_index: int) -> Any:
    """The compiled kernel, loaded on the current device, which is `device_index`."""
    import cupy

    module = cupy.RawModule(code=cuda_source(source), options=("--std=c++17",), backend="nvrtc")
    return module.get_function(kernel)


def _values(arguments: tuple[Argument, ...]) -> tuple[Any, ...]:
    """Arguments as numpy scalars, whose bytes CuPy passes by value."""
    import numpy

    values: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            values.append(numpy.uint64(NO_POINTER if argument is None else argument.data_ptr()))
        else:
            values.append(numpy.int32(argument) if isinstance(argument, int) else numpy.float32(argument))
    return tuple(values)
