"""CUDA C++ to PTX and machine code without a GPU, a driver or a toolkit: NVRTC of the package nvidia-cuda-nvrtc.

One compilation gives the PTX, the cubin and what each kernel of it uses of a multiprocessor. Results are kept in a
folder of the temporary directory under a digest of all that goes in, so that a source is compiled once.
"""

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

PACKAGE = "nvidia-cuda-nvrtc"
OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--warning-as-error=all-warnings")
CACHE = Path(tempfile.gettempdir()) / f"streamprune-nvrtc-{os.getuid()}"


class CompilationError(Exception):
    """The source does not compile; the message is the compiler's log."""


@dataclass(frozen=True)
class Resources:
    """What a kernel uses, as ptxas reports it. Bytes are of one thread, but for `shared_bytes`, which are of a block's
    static shared memory."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A source compiled for one architecture; `kernels` by name, in the order of ptxas's log."""

    ptx: str
    cubin: bytes
    kernels: dict[str, Resources]


def package_file(package: str, name: str) -> Path:
    """Path of the first file of an installed distribution whose name begins with `name`."""
    files = distribution(package).files or []
    return Path(next(str(file.locate()) for file in files if file.name.startswith(name)))


def compile_source(source: str, architecture: int, maximum_registers: int | None = None) -> Compiled:
    """Compile CUDA C++ for sm_<architecture>. Raises CompilationError."""
    limit = () if maximum_registers is None else (f"--maxrregcount={maximum_registers}",)
    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS, *limit)
    digest = hashlib.sha256("\0".join((version(PACKAGE), *options, source)).encode()).hexdigest()
    stored = CACHE / digest[:32]
    if not stored.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            for part, content in _compile(source, options).items():
                (Path(name) / part).write_bytes(content)
            try:  # a folder that another process has renamed into place meanwhile is as good
                Path(name).rename(stored)
            except OSError:
                if not stored.exists():
                    raise
            else:
                Path(name).mkdir()  # for the context manager to remove
    ptx, log = ((stored / part).read_text(encoding="utf-8") for part in ("ptx", "log"))
    return Compiled(ptx, (stored / "cubin").read_bytes(), resources(log))


def resources(log: str) -> dict[str, Resources]:
    """What ptxas -v says of each kernel."""
    found = {}
    for name, properties in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):

        def number(pattern: str, text: str = properties) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        registers = re.search(r"Used (\d+) registers", properties)
        if registers is None or "bytes stack frame" not in properties:
            raise CompilationError(f"ptxas says nothing of what {name} uses:\n{log}")
        stack, shared = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem")
        found[name] = Resources(int(registers[1]), shared, stack, spills)
    return found


def _compile(source: str, options: tuple[str, ...]) -> dict[str, bytes]:
    """PTX, cubin and log of NVRTC (its documentation: docs.nvidia.com/cuda/nvrtc)."""
    nvrtc = _library()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        log = _read(program, "ProgramLog")
        if failed:
            raise CompilationError(log.decode())
        return {"ptx": _read(program, "PTX"), "cubin": _read(program, "CUBIN"), "log": log}
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(package_file(PACKAGE, "libnvrtc.so")))


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC failed with code {code}")


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    """One result of a compilation; text without the zero that ends it."""
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw if what == "CUBIN" else buffer.raw.rstrip(b"\0")
