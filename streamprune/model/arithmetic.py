"""The device and dtype that a job computes in, resolved and recorded: they are part of what decides the bytes."""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from streamprune.errors import SettingsError
from streamprune.model.machine import bfloat16_features, gpu_identity, processor_name, warn_of_two_runtimes
from streamprune_kernels import library, unsupported_reason

logger = logging.getLogger("streamprune")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """A resolved device and the dtype that blocks compute in; stored values keep the source's dtype."""

    device: torch.device
    dtype: torch.dtype

    @property
    def identity(self) -> dict[str, str]:
        """What of it decides the bytes, by name. On a GPU the processor counts too: it runs what precedes blocks."""
        return {
            "device": self.device.type,
            "dtype": name_of(self.dtype),
            "processor": processor_name(self.dtype),
            "kernels": "compiled" if library() is not None else "plain",
            **(gpu_identity(self.device) if self.device.type == "cuda" else {}),
        }

    @property
    def kernel_tolerance(self) -> float:
        """Largest kernel_error that arithmetic explains.

        Two products of the same numbers summed in another order differ by about sqrt(in) roundings of the accumulator
        (float32: 1e-6 at 20,000 inputs) and one of the output (2^-9 in bfloat16, 2^-12 in float16).
        """
        return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[self.dtype]


def resolve_arithmetic(device: str, dtype: str, source: torch.dtype) -> Arithmetic:
    """`device` auto, cpu or cuda; `dtype` auto, float32, bfloat16 or float16.

    auto is the source's dtype on a GPU. On a CPU it is bfloat16 where the source is and the processor has instructions
    for it, else float32: bfloat16 products without them are slower than float32's, fp16 products about 100 times, and
    bfloat16 would take three bits of mantissa from an fp16 source. Raises SettingsError as `check_arithmetic`.
    """
    resolved = check_arithmetic(device, dtype)
    if resolved.type == "cuda" and (reason := unsupported_reason(resolved)):
        logger.warning("%s (plain ones run in place of them, slower)", reason)
    if dtype == "auto":
        kept = source in DTYPES.values() if resolved.type == "cuda" else source == torch.bfloat16 and has_bfloat16()
        return Arithmetic(resolved, source if kept else torch.float32)
    return Arithmetic(resolved, DTYPES[dtype])


def check_arithmetic(device: str, dtype: str) -> torch.device:
    """The device that is meant, with nothing opened yet. Raises SettingsError for what is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"device {device!r} is none of auto, cpu, cuda")
    if dtype != "auto" and dtype not in DTYPES:
        raise SettingsError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise SettingsError("device cuda: torch sees no GPU on this machine; use --device cpu")
    resolved = torch.device("cuda" if device != "cpu" and has_gpu else "cpu")
    if dtype == "float16" and resolved.type == "cpu":
        raise SettingsError("dtype float16 is about 100 times slower than float32 on a CPU; use float32 or bfloat16")
    return resolved


def has_bfloat16() -> bool:
    """Does the processor multiply bfloat16?"""
    return bool(bfloat16_features())


@cache
def warn_without_kernels() -> None:
    """Say in one line, once in a process, that the package was built without its compiled kernels, where it was, or
    that they have an OpenMP runtime beside torch's.
    """
    if library() is not None:
        warn_of_two_runtimes()
    else:
        logger.warning(
            "streamprune was built without its compiled kernels: search, refinement and packed products take "
            "several times longer; install a C++ compiler and then streamprune again"
        )


def against_overflow(dtype: torch.dtype) -> str:
    """What to do about weights whose products a dtype does not hold."""
    return "mend the weights" if dtype == torch.float32 else "try --dtype float32"


def name_of(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
