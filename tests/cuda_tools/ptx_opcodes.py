"""PTX instructions that are not plain arithmetic, as a table by first word.

A step is one instruction made ready: it reads and writes the registers of a gang for some of its lanes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cuda_tools.ptx_arithmetic import NUMPY, operation
from cuda_tools.ptx_matrix import matrix_rows, multiply
from cuda_tools.ptx_memory import UNSIGNED, Memory
from cuda_tools.ptx_state import (
    GENERIC_SHARED,
    WARP,
    Copy,
    Gang,
    Lanes,
    Source,
    Write,
    address_of,
    addresses,
    source,
    target,
)
from cuda_tools.ptx_text import (
    WIDTHS,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    PtxError,
    Register,
    Symbol,
    Vector,
)

Operands = tuple[Operand | None, ...]
Step = Callable[[Gang, Lanes], None]


def step_of(kernel: Kernel, instruction: Instruction) -> Step:
    """An instruction made ready. Raises PtxError for one that is not understood."""
    opcode, operands = instruction.opcode, instruction.operands
    words = opcode.split(".")
    special = SPECIAL.get(words[0])
    if words[0] == "mov" and any(isinstance(operand, Vector | Symbol) for operand in operands):
        special = _move_parts
    if special is not None:
        return special(kernel, words, operands)
    found = operation(opcode)
    if found is None or len(operands) != len(found[0]) + 1:
        raise PtxError(f"the instruction is not understood: {instruction.text}")
    kinds, result, function = found
    sources = [source(operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
    write = target(operands[0])
    if result != "pred" and isinstance(operands[0], Register) and operands[0].width < np.dtype(NUMPY[result]).itemsize:
        raise PtxError(f"the result does not fit its register: {instruction.text}")
    return lambda gang, lanes: write(gang, lanes, function(*(read(gang) for read in sources)))


def _in_space(space: str | None, gang: Gang, at: np.ndarray) -> tuple[Memory, np.ndarray]:
    """Memory that addresses of a space lie in; generic ones (None) must all be shared or all be global."""
    if space is None:
        is_shared = at >= GENERIC_SHARED
        if is_shared.any() and not is_shared.all():
            raise PtxError("lanes access shared and global memory in one instruction")
        return _in_space("shared" if is_shared.any() else "global", gang, np.where(is_shared, at - GENERIC_SHARED, at))
    return (gang.block.shared if space == "shared" else gang.block.memory), at


@dataclass(frozen=True)
class _Access:
    space: str | None
    kind: str
    count: int


def _access(words: list[str]) -> _Access:
    """ld.global.nc.v4.b32: space, type and number of neighbours. Hints for caches change nothing here."""
    space, count = None, 1
    for word in words[1:-1]:
        if word in ("global", "shared", "param"):
            space = word
        elif word in ("v2", "v4"):
            count = int(word[1])
        elif word not in (
            "nc",
            "volatile",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
            "L1::no_allocate",
            "L1::evict_last",
        ):
            raise PtxError(f"{'.'.join(words)} is not understood")
    return _Access(space, words[-1], count)


def _parts(operand: Operand | None, count: int) -> Operands:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise PtxError(f"{len(parts)} registers where {count} are needed")
    return parts


def _load(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    access = _access(words)
    dtype = np.dtype(NUMPY[access.kind])
    writes = [target(part) for part in _parts(operands[0], access.count)]
    if access.space == "param":
        return _load_parameter(writes[0], operands[1], dtype)
    where = addresses(kernel, operands[1])

    def step(gang: Gang, lanes: Lanes) -> None:
        memory, at = _in_space(access.space, gang, where(gang)[lanes.mask])
        loaded = memory.load(at, dtype, access.count)
        for number, write in enumerate(writes):
            values = np.zeros(gang.size, dtype)
            values[lanes.mask] = loaded[:, number]
            write(gang, lanes, values)

    return step


def _load_parameter(write: Write, operand: Operand | None, dtype: np.dtype) -> Step:
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.offset:
        raise PtxError(f"a parameter is not understood: {operand}")
    name = operand.base.name

    def step(gang: Gang, lanes: Lanes) -> None:
        write(gang, lanes, np.asarray(gang.block.arguments[name], UNSIGNED[dtype.itemsize]).view(dtype))

    return step


def _store(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    access = _access(words)
    where = addresses(kernel, operands[0])
    reads = [source(part, access.kind) for part in _parts(operands[1], access.count)]

    def step(gang: Gang, lanes: Lanes) -> None:
        memory, at = _in_space(access.space, gang, where(gang)[lanes.mask])
        values = [np.broadcast_to(read(gang), gang.size)[lanes.mask] for read in reads]
        memory.store(at, np.stack(values, axis=1))

    return step


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


def _reduce(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """red: integers only, as sums of floating-point numbers depend on the order."""
    space, function, kind = words[1], REDUCTIONS.get(words[-2]), words[-1]
    if function is None or space not in ("global", "shared") or kind not in ("u32", "s32", "u64", "s64", "b32"):
        raise PtxError(f"{'.'.join(words)} is not understood")
    where, read = addresses(kernel, operands[0]), source(operands[1], kind)

    def step(gang: Gang, lanes: Lanes) -> None:
        memory, at = _in_space(space, gang, where(gang)[lanes.mask])
        memory.update(at, np.broadcast_to(read(gang), gang.size)[lanes.mask], function)

    return step


def _atomic(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """atom. Of several lanes the old values depend on the order: nobody may read them then; blocks run in turn."""
    result, reduce = operands[0], _reduce(kernel, words, operands[1:])
    if not isinstance(result, Register):
        return reduce
    mentions = sum(bool(re.search(rf"{re.escape(result.name)}\b", one.text)) for one in kernel.instructions)
    if mentions == 1:
        return reduce
    where, write, dtype = addresses(kernel, operands[1]), target(result), np.dtype(NUMPY[words[-1]])

    def step(gang: Gang, lanes: Lanes) -> None:
        if lanes.mask.sum() > 1:
            raise PtxError("atom whose result several lanes read is not understood: it depends on the order")
        memory, at = _in_space(words[1], gang, where(gang)[lanes.mask])
        former = np.zeros(gang.size, dtype)
        former[lanes.mask] = memory.load(at, dtype)[:, 0]
        reduce(gang, lanes)
        write(gang, lanes, former)

    return step


def _move_parts(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """mov of a variable's address, or between a register and its parts, the lowest first."""
    result, given = operands
    if isinstance(given, Symbol):
        address, write = address_of(kernel, given.name), target(result)
        dtype = NUMPY[words[-1]]
        return lambda gang, lanes: write(gang, lanes, np.asarray(address, dtype))
    whole = UNSIGNED[WIDTHS[words[-1]]]
    if isinstance(given, Vector):
        part = UNSIGNED[WIDTHS[words[-1]] // len(given.parts)]
        reads = [source(one, f"u{8 * np.dtype(part).itemsize}") for one in given.parts]
        write = target(result)

        def join(gang: Gang, lanes: Lanes) -> None:
            parts = [np.broadcast_to(read(gang), gang.size) for read in reads]
            write(gang, lanes, np.stack(parts, axis=1).view(whole)[:, 0])

        return join
    assert isinstance(result, Vector)
    read = source(given, words[-1])
    part = UNSIGNED[WIDTHS[words[-1]] // len(result.parts)]
    writes = [target(one) for one in result.parts]

    def split(gang: Gang, lanes: Lanes) -> None:
        values = np.ascontiguousarray(np.broadcast_to(read(gang), gang.size)).view(part).reshape(gang.size, -1)
        for number, write in enumerate(writes):
            write(gang, lanes, np.ascontiguousarray(values[:, number]))

    return split


def _convert_address(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """cvta: global addresses are generic as they are."""
    spaces = {("to", "global"): 0, ("global",): 0, ("to", "shared"): -GENERIC_SHARED, ("shared",): GENERIC_SHARED}
    difference = spaces.get(tuple(words[1:-1]))
    if difference is None or words[-1] != "u64":
        raise PtxError(f"{'.'.join(words)} is not understood")
    read, write = source(operands[1], "s64"), target(operands[0])
    return lambda gang, lanes: write(gang, lanes, read(gang) + np.int64(difference))


def _copy_async(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """cp.async: 4, 8 or 16 bytes from global to shared memory, or zeros; its groups are each thread's own."""
    if words[2] == "commit_group":
        return _commit_copies
    if words[2] in ("wait_group", "wait_all"):
        kept = operands[0].bits if words[2] == "wait_group" and isinstance(operands[0], Immediate) else None
        return lambda gang, lanes: _finish_copies(gang, lanes, kept)
    if words[2] not in ("cg", "ca") or words[3:5] != ["shared", "global"] or not isinstance(operands[2], Immediate):
        raise PtxError(f"{'.'.join(words)} is not understood")
    to, origin, size = addresses(kernel, operands[0]), addresses(kernel, operands[1]), operands[2].bits
    read_bytes = source(operands[3] if len(operands) > 3 else Immediate(size, None), "u32")

    def step(gang: Gang, lanes: Lanes) -> None:
        amount = np.broadcast_to(read_bytes(gang), gang.size)[lanes.mask]
        if ((amount != 0) & (amount != size)).any():
            raise PtxError("cp.async of a part of its bytes is not understood")
        copy = Copy(np.flatnonzero(lanes.mask), gang.groups[lanes.mask], origin(gang)[lanes.mask],
                    to(gang)[lanes.mask], amount != 0, size)  # fmt: skip
        if copy.read.any():
            gang.block.memory.check(copy.source[copy.read], size)
        gang.block.shared.fill(copy.target, size)
        gang.copies.append(copy)

    return step


def _commit_copies(gang: Gang, lanes: Lanes) -> None:
    gang.groups = gang.groups + lanes.mask


def _finish_copies(gang: Gang, lanes: Lanes, kept: int | None) -> None:
    """Carry out the lanes' copies, but for those of their `kept` latest groups (None: all, committed or not)."""
    left = []
    for copy in gang.copies:
        done = lanes.mask[copy.lanes]
        if kept is not None:
            done &= copy.groups < gang.groups[copy.lanes] - kept
        if done.any():
            words = np.zeros((int(done.sum()), copy.size), np.uint8)
            read = copy.read[done]
            if read.any():
                words[read] = gang.block.memory.load(copy.source[done][read], np.uint8, copy.size)
            gang.block.shared.store(copy.target[done], words)
        if not done.all():
            rest = ~done
            left.append(Copy(copy.lanes[rest], copy.groups[rest], copy.source[rest], copy.target[rest],
                             copy.read[rest], copy.size))  # fmt: skip
    gang.copies = left


def _need_whole_warps(lanes: Lanes, what: str) -> None:
    if not lanes.whole_warps:
        raise PtxError(f"{what} is reached by a part of a warp")


def _load_matrix(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    counts = {"x1": 1, "x2": 2, "x4": 4}
    if words[1:4] != ["sync", "aligned", "m8n8"] or words[5:] != ["shared", "b16"] or words[4] not in counts:
        raise PtxError(f"{'.'.join(words)} is not understood")
    count = counts[words[4]]
    where, writes = addresses(kernel, operands[1]), [target(part) for part in _parts(operands[0], count)]

    def step(gang: Gang, lanes: Lanes) -> None:
        _need_whole_warps(lanes, "ldmatrix")
        at = where(gang)
        rows = at[lanes.mask].reshape(-1, WARP)[:, : 8 * count]
        gang.block.shared.check(rows.ravel(), 16)
        for row_addresses, write in zip(matrix_rows(at, count), writes, strict=True):
            values = np.zeros(gang.size, np.uint32)
            values[lanes.mask] = gang.block.shared.load(row_addresses[lanes.mask], np.uint32)[:, 0]
            write(gang, lanes, values)

    return step


def _multiply(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """mma, and mma.sp with its metadata and selector."""
    sparse = words[1] != "sync"
    if len(operands) != (6 if sparse else 4):
        raise PtxError(f"{'.'.join(words)} is not understood")
    d, *fragments = (operand.parts for operand in operands[:4] if isinstance(operand, Vector))
    reads = [[source(part, "b32") for part in parts] for parts in fragments]
    metadata = source(operands[4], "b32") if sparse else None
    selector = operands[5].bits if sparse and isinstance(operands[5], Immediate) else 0
    writes, opcode = [target(part) for part in d], ".".join(words)

    def step(gang: Gang, lanes: Lanes) -> None:
        _need_whole_warps(lanes, "mma")
        a, b, c = ([np.broadcast_to(read(gang), gang.size)[lanes.mask] for read in parts] for parts in reads)
        words_of = None if metadata is None else np.broadcast_to(metadata(gang), gang.size)[lanes.mask]
        for write, values in zip(writes, multiply(opcode, a, b, c, words_of, selector), strict=True):
            whole = np.zeros(gang.size, np.uint32)
            whole[lanes.mask] = values
            write(gang, lanes, whole)

    return step


def _members(gang: Gang, lanes: Lanes, read: Source) -> None:
    """The member mask of each lane that takes part names exactly the lanes of its warp that do."""
    taking_part = (lanes.mask.reshape(-1, WARP) << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    named = np.broadcast_to(read(gang), gang.size)
    if (named != np.repeat(taking_part, WARP))[lanes.mask].any():
        raise PtxError("lanes that the member mask names do not take part")


def _shuffle(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """shfl.sync, as the PTX manual's pseudocode has it."""
    mode = words[2]
    if words[1] != "sync" or mode not in ("up", "down", "bfly", "idx") or words[3:] != ["b32"]:
        raise PtxError(f"{'.'.join(words)} is not understood")
    write, write_inside = target(operands[0]), target(operands[1] if len(operands) == 6 else None)
    given, by, clamp, members = (source(operand, "b32") for operand in operands[-4:])
    lane = np.arange(WARP, dtype=np.int64)

    def step(gang: Gang, lanes: Lanes) -> None:
        _members(gang, lanes, members)
        rows = gang.size // WARP, WARP
        b, c = (np.broadcast_to(read(gang), gang.size).astype(np.int64).reshape(rows) for read in (by, clamp))
        b, bound, segment = b & 31, c & 31, c >> 8 & 31
        first, last = lane & segment, (lane & segment) | (bound & ~segment)
        origin = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = origin >= last if mode == "up" else origin <= last
        origin = np.where(inside, origin, lane)
        if not np.take_along_axis(lanes.mask.reshape(rows), origin, axis=1)[lanes.mask.reshape(rows)].all():
            raise PtxError("shfl reads a lane that does not take part")
        values = np.broadcast_to(given(gang), gang.size).reshape(rows)
        write(gang, lanes, np.take_along_axis(values, origin, axis=1).ravel())
        write_inside(gang, lanes, inside.ravel())

    return step


def _vote(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """vote.sync: a bit of every lane, or whether all or any are set."""
    mode = words[2]
    if words[1] != "sync" or mode not in ("ballot", "any", "all"):
        raise PtxError(f"{'.'.join(words)} is not understood")
    write, vote, members = target(operands[0]), source(operands[1], "pred"), source(operands[2], "b32")

    def step(gang: Gang, lanes: Lanes) -> None:
        _members(gang, lanes, members)
        taking_part = lanes.mask.reshape(-1, WARP)
        votes = (np.broadcast_to(vote(gang), gang.size).reshape(-1, WARP)) & taking_part
        if mode == "ballot":
            result = (votes << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            result = votes.any(axis=1) if mode == "any" else (votes | ~taking_part).all(axis=1)
        write(gang, lanes, np.repeat(result, WARP))

    return step


def _warp_barrier(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """bar.warp.sync: lanes that went apart have met again."""
    members = source(operands[0], "b32")
    return lambda gang, lanes: _members(gang, lanes, members)


def _fence(kernel: Kernel, words: list[str], operands: Operands) -> Step:
    """Memory is always in order here."""
    return lambda gang, lanes: None


SPECIAL: dict[str, Callable[[Kernel, list[str], Operands], Step]] = {
    "ld": _load,
    "st": _store,
    "red": _reduce,
    "atom": _atomic,
    "cvta": _convert_address,
    "cp": _copy_async,
    "ldmatrix": _load_matrix,
    "mma": _multiply,
    "shfl": _shuffle,
    "vote": _vote,
    "bar": _warp_barrier,
    "membar": _fence,
    "fence": _fence,
}
