"""State of a block of the PTX interpreter and of the gangs that run it, and how instructions read and write it.

A register is an array of unsigned words, one a lane, or of bool, and is never changed in place.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cuda_tools.ptx_arithmetic import NUMPY
from cuda_tools.ptx_memory import SHARED_START, UNSIGNED, Memory, shared_memory
from cuda_tools.ptx_text import Address, Immediate, Kernel, Operand, PtxError, Register, Special, Symbol
from streamprune_kernels.launch import Launch

WARP = 32
GENERIC_SHARED = 1 << 56  # added to a shared address, it is an address of the generic space
DYNAMIC_ALIGNMENT = 16  # of dynamic shared memory behind static
LANE_REGISTERS = ("%laneid", "%warpid", *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")))
SPECIAL_REGISTERS = {
    *LANE_REGISTERS,
    *(f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"),
}

Source = Callable[["Gang"], np.ndarray]
Write = Callable[["Gang", "Lanes", np.ndarray], None]


class Lanes:
    """Some of a gang's lanes: a mask, and what is often asked of it."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.any, self.all = bool(mask.any()), bool(mask.all())

    def without(self, other: "Lanes") -> "Lanes":
        return Lanes(self.mask & ~other.mask)

    @functools.cached_property
    def whole_warps(self) -> bool:
        warps = self.mask.reshape(-1, WARP)
        return bool((warps.all(axis=1) == warps.any(axis=1)).all())


class Block:
    """What all threads of a block share."""

    def __init__(
        self, kernel: Kernel, launch: Launch, index: tuple[int, int, int], memory: Memory, arguments: dict[str, int]
    ) -> None:
        self.launch, self.index, self.arguments = launch, index, arguments
        self.memory = memory
        self.shared = shared_memory(_dynamic_offset(kernel) + launch.shared_bytes)


class Gang:
    """Lanes that run together, by their next instruction: in `paths` they may go on, in `parked` they are at an
    instruction of whole warps and others of their warp are not there yet, in `waiting` they are behind a barrier."""

    def __init__(self, block: Block, threads: np.ndarray) -> None:
        self.block = block
        self.registers: dict[str, np.ndarray] = {}
        self.special = _special_registers(block, threads)
        self.paths: dict[int, Lanes] = {0: Lanes(np.ones(len(threads), bool))}
        self.parked: dict[int, Lanes] = {}
        self.waiting: dict[int, Lanes] = {}
        self.ended = np.zeros(len(threads), bool)
        self.copies: list[Copy] = []
        self.groups = np.zeros(len(threads), np.int64)  # of copies that each lane has committed

    @property
    def size(self) -> int:
        return len(self.ended)

    def take_lowest(self) -> tuple[int, Lanes]:
        at = min(self.paths)
        return at, self.paths.pop(at)

    def put(self, at: int, lanes: Lanes) -> None:
        _merge(self.paths, at, lanes)

    def park(self, at: int, lanes: Lanes) -> None:
        _merge(self.parked, at, lanes)

    def wait(self, at: int, lanes: Lanes) -> None:
        _merge(self.waiting, at, lanes)

    def together(self, lanes: Lanes) -> bool:
        """Whether of each warp that takes part all lanes do that have not ended."""
        if lanes.all:
            return True
        here, left = lanes.mask.reshape(-1, WARP), ~self.ended.reshape(-1, WARP)
        return bool((here == left)[here.any(axis=1)].all())

    def unpark(self) -> tuple[int, Lanes]:
        """Parked lanes that are together by now; if none are, the lowest, whose instruction has to judge."""
        at = min(self.parked, key=lambda at: (not self.together(self.parked[at]), at))
        return at, self.parked.pop(at)

    def pass_barrier(self) -> None:
        """Go on behind the barrier. Raises PtxError where a part of a warp is at another one."""
        if not all(lanes.whole_warps for lanes in self.waiting.values()):
            raise PtxError("a barrier is reached by a part of a warp")
        self.paths, self.waiting = self.waiting, {}

    def guarded(self, lanes: Lanes, guard: tuple[Register, bool]) -> Lanes:
        register, negated = guard
        truth = self.registers[register.name]
        return Lanes(lanes.mask & (~truth if negated else truth))


def _merge(paths: dict[int, Lanes], at: int, lanes: Lanes) -> None:
    if lanes.any:
        other = paths.get(at)
        paths[at] = lanes if other is None else Lanes(lanes.mask | other.mask)


@dataclass(frozen=True)
class Copy:
    """One cp.async of several lanes: who, in which group of each, from where to where."""

    lanes: np.ndarray
    groups: np.ndarray
    source: np.ndarray
    target: np.ndarray
    read: np.ndarray  # whether the source is read; else the target becomes zero
    size: int


def _special_registers(block: Block, threads: np.ndarray) -> dict[str, np.ndarray]:
    width, height, _ = block.launch.block
    indices = {"x": threads % width, "y": threads // width % height, "z": threads // (width * height)}
    lane = (threads % WARP).astype(np.uint32)
    special = {"%laneid": lane, "%warpid": (threads // WARP).astype(np.uint32)}
    for number, axis in enumerate("xyz"):
        special[f"%tid.{axis}"] = indices[axis].astype(np.uint32)
        for name, value in (("ctaid", block.index), ("ntid", block.launch.block), ("nctaid", block.launch.grid)):
            special[f"%{name}.{axis}"] = np.full(len(threads), value[number], np.uint32)
    bit = np.uint32(1) << lane
    special["%lanemask_eq"], special["%lanemask_lt"] = bit, bit - np.uint32(1)
    special["%lanemask_le"] = bit | (bit - np.uint32(1))
    special["%lanemask_gt"], special["%lanemask_ge"] = ~special["%lanemask_le"], ~special["%lanemask_lt"]
    return special


def _dynamic_offset(kernel: Kernel) -> int:
    return -(-kernel.shared_bytes // DYNAMIC_ALIGNMENT) * DYNAMIC_ALIGNMENT


def source(operand: Operand | None, kind: str) -> Source:
    """Reads an operand as a type: of a wider register the low part, a narrower one is refused."""
    dtype = np.dtype(NUMPY[kind])
    if isinstance(operand, Special):
        if operand.name not in SPECIAL_REGISTERS:
            raise PtxError(f"the register {operand.name} is not understood")
        name = operand.name
        return lambda gang: gang.special[name].view(dtype)
    if isinstance(operand, Register):
        name, width = operand.name, operand.width
        if kind == "pred" or width == dtype.itemsize:
            return (
                (lambda gang: _written(gang, name))
                if kind == "pred"
                else (lambda gang: _written(gang, name).view(dtype))
            )
        if width > dtype.itemsize:
            narrow = UNSIGNED[dtype.itemsize]
            return lambda gang: _written(gang, name).astype(narrow).view(dtype)
    if isinstance(operand, Immediate):
        if kind == "pred":
            constant = np.asarray(operand.bits != 0)
        elif operand.width in (None, dtype.itemsize):
            constant = np.asarray(operand.bits & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(dtype)
        else:
            raise PtxError(f"a constant of {operand.width} bytes where {kind} is needed")
        return lambda gang: constant
    raise PtxError(f"an operand is not understood as {kind}: {operand}")


def _written(gang: Gang, name: str) -> np.ndarray:
    values = gang.registers.get(name)
    if values is None:
        raise PtxError(f"{name} is read before it is written")
    return values


def target(operand: Operand | None) -> Write:
    """Writes a register of some lanes; narrower values are extended by their own sign, if they have one."""
    if operand is None:
        return lambda gang, lanes, values: None
    if not isinstance(operand, Register):
        raise PtxError(f"a result cannot go to {operand}")
    name, width = operand.name, operand.width

    def write(gang: Gang, lanes: Lanes, values: np.ndarray) -> None:
        if values.dtype != bool:
            if values.itemsize != width:
                values = values.astype(f"{values.dtype.kind}{width}")
            values = values.view(UNSIGNED[width])
        if values.ndim == 0:
            values = np.broadcast_to(values, gang.size)
        if not lanes.all:
            old = gang.registers.get(name)
            values = np.where(lanes.mask, values, ~np.zeros_like(values) if old is None else old)
        gang.registers[name] = values

    return write


def addresses(kernel: Kernel, operand: Operand | None) -> Source:
    """Addresses int64, one a lane, of an operand [base + offset]."""
    if not isinstance(operand, Address):
        raise PtxError(f"an address is not understood: {operand}")
    offset = operand.offset
    if isinstance(operand.base, Symbol):
        fixed = address_of(kernel, operand.base.name) + offset
        return lambda gang: np.full(gang.size, fixed, np.int64)
    base = source(operand.base, "u64" if isinstance(operand.base, Register) and operand.base.width == 8 else "u32")
    return lambda gang: np.broadcast_to(base(gang).astype(np.int64) + offset, gang.size)


def address_of(kernel: Kernel, name: str) -> int:
    if name in kernel.dynamic:
        return SHARED_START + _dynamic_offset(kernel)
    if name not in kernel.shared:
        raise PtxError(f"{name} is no shared variable of {kernel.name}: other variables are not understood")
    return SHARED_START + kernel.shared[name][0]
