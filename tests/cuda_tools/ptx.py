"""Runs a launch's kernel on CPU tensors with numpy, from the PTX that NVRTC really emits, inline assembly included.

    run(launch)                 as a `Run` of streamprune_kernels.launch, for sm_80
    run(launch, schedule=2)     the same kernel, its warps and blocks in another order

An instruction runs for many lanes at once. A gang is the lanes that run together: a whole block in schedule 0, one warp
in the others. Of lanes that went apart those with the lowest instruction go first, until they meet again.

Checked: every access lies inside a tensor of the launch or the block's shared memory, and is aligned; `.sync`
instructions have the lanes they name; barriers are reached by all threads. What was never written is NaN. A copy by
cp.async makes its destination unwritten, and arrives when its own thread waits for it. What is unknown raises PtxError.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cuda_tools.nvrtc import compile_source
from cuda_tools.ptx_memory import global_memory
from cuda_tools.ptx_opcodes import Step, step_of
from cuda_tools.ptx_state import Block, Gang, Lanes
from cuda_tools.ptx_text import Instruction, Kernel, PtxError, Symbol, parse
from streamprune_kernels.launch import Launch, cuda_source

ARCHITECTURE = 80
SCHEDULES = (0, 1, 2)
LONGEST_TURN = 60  # instructions a warp runs before another may, in schedule 2

ENDS = ("ret", "exit")
COLLECTIVE = ("shfl.sync", "vote.sync", "bar.warp.sync", "ldmatrix", "mma")
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")


@dataclass(frozen=True)
class Program:
    """A kernel ready to run: for each instruction a step, or a target to branch to, or neither to wait or end; and
    whether the lanes of a warp execute it together."""

    kernel: Kernel
    steps: tuple[Step | None, ...]
    targets: tuple[int | None, ...]
    collective: tuple[bool, ...]


def run(launch: Launch, schedule: int = 0, source: str | None = None) -> None:
    """Run a launch on CPU tensors in place; `source` replaces the text of the launch's .cu file.

    Raises PtxError for what no kernel may do and for PTX that is not understood.
    """
    kernels = _programs(cuda_source(launch.source) if source is None else source)
    if launch.kernel not in kernels:
        raise PtxError(f"{launch.source}.cu has no kernel {launch.kernel}, it has {', '.join(kernels)}")
    run_program(kernels[launch.kernel], launch, schedule)


def run_ptx(ptx: str, launch: Launch, schedule: int = 0) -> None:
    """The same for a kernel given as PTX."""
    run_program(_decode(parse(ptx)[launch.kernel]), launch, schedule)


def run_program(program: Program, launch: Launch, schedule: int) -> None:
    arguments = _argument_bits(program.kernel, launch)
    memory = global_memory(launch.tensors)
    blocks = [(x, y, z) for z in range(launch.grid[2]) for y in range(launch.grid[1]) for x in range(launch.grid[0])]
    order = random.Random(schedule)
    if schedule == 1:
        blocks.reverse()
    elif schedule == 2:
        order.shuffle(blocks)
    with np.errstate(all="ignore"):
        for index in blocks:
            block = Block(program.kernel, launch, index, memory, arguments)
            try:
                _run_block(program, block, schedule, order)
            except PtxError as error:
                raise PtxError(f"{launch.kernel}, block {index}: {error}") from None


@functools.cache
def _programs(source: str) -> "_Decoded":
    return _Decoded(parse(compile_source(source, ARCHITECTURE).ptx))


class _Decoded(dict[str, Program]):
    """Programs by name, decoded when first asked for: a module has many kernels, a test runs few."""

    def __init__(self, kernels: dict[str, Kernel]) -> None:
        super().__init__()
        self.kernels = kernels

    def __missing__(self, name: str) -> Program:
        self[name] = _decode(self.kernels[name])
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.kernels

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)


def _decode(kernel: Kernel) -> Program:
    steps, targets = [], []
    for instruction in kernel.instructions:
        step, target = None, None
        if instruction.opcode in ("bra", "bra.uni"):
            label = instruction.operands[0]
            assert isinstance(label, Symbol)
            target = kernel.labels[label.name]
        elif instruction.opcode not in (*ENDS, *BARRIERS):
            step = step_of(kernel, instruction)
        steps.append(step)
        targets.append(target)
    collective = tuple(instruction.opcode.startswith(COLLECTIVE) for instruction in kernel.instructions)
    return Program(kernel, tuple(steps), tuple(targets), collective)


def _argument_bits(kernel: Kernel, launch: Launch) -> dict[str, int]:
    """What each parameter holds, as the bits of its type."""
    if len(kernel.parameters) != len(launch.arguments):
        raise PtxError(f"{kernel.name} takes {len(kernel.parameters)} arguments, {len(launch.arguments)} were given")
    bits = {}
    for (name, kind), argument in zip(kernel.parameters.items(), launch.arguments, strict=True):
        is_pointer = argument is None or isinstance(argument, torch.Tensor)
        expected = "u64" if is_pointer else "f32" if isinstance(argument, float) else "u32"
        if kind != expected:
            raise PtxError(f"{kernel.name}: {name} is {kind}, the launch passes {expected}")
        if is_pointer:
            bits[name] = argument.data_ptr() if isinstance(argument, torch.Tensor) else 0
        elif isinstance(argument, float):
            bits[name] = int(np.float32(argument).view(np.uint32))
        else:
            bits[name] = int(argument) & 0xFFFFFFFF
    return bits


def _run_block(program: Program, block: Block, schedule: int, order: random.Random) -> None:
    """Let the gangs take turns until all have ended; who waits at a barrier goes on when all wait."""
    lanes = np.arange(block.launch.threads)
    gangs = [Gang(block, lanes)] if schedule == 0 else [Gang(block, warp) for warp in np.split(lanes, len(lanes) // 32)]
    if schedule == 1:
        gangs.reverse()
    budget: Callable[[], int] = (lambda: order.randint(1, LONGEST_TURN)) if schedule == 2 else (lambda: 1 << 60)
    while True:
        ready = [gang for gang in gangs if gang.paths]
        if not ready:
            if all(gang.ended.all() for gang in gangs):
                return
            if any(gang.ended.any() for gang in gangs):
                raise PtxError("a barrier is not reached by all threads: some have ended")
            for gang in gangs:
                gang.pass_barrier()
            continue
        _advance(program, order.choice(ready) if schedule == 2 else ready[0], budget())


def _advance(program: Program, gang: Gang, budget: int) -> None:
    """Run a gang until all its lanes wait or have ended, or for `budget` instructions."""
    at, active = gang.take_lowest()
    while budget:
        budget -= 1
        instruction, step = program.kernel.instructions[at], program.steps[at]
        if program.collective[at] and not gang.together(active):
            gang.park(at, active)
            if gang.paths:
                at, active = gang.take_lowest()
                continue
            at, active = gang.unpark()
            instruction, step = program.kernel.instructions[at], program.steps[at]
        lanes = active if instruction.guard is None else gang.guarded(active, instruction.guard)
        if step is None:
            _leave(program, gang, at, lanes)
            at += 1
            active = active.without(lanes)
        else:
            _execute(gang, step, instruction, lanes)
            at += 1
        if not active.any or (gang.paths and min(gang.paths) <= at):
            gang.put(at, active)
            if not gang.paths and gang.parked:
                gang.put(*gang.unpark())
            if not gang.paths:
                return
            at, active = gang.take_lowest()
    gang.put(at, active)


def _execute(gang: Gang, step: Step, instruction: Instruction, lanes: Lanes) -> None:
    if lanes.any:
        try:
            step(gang, lanes)
        except PtxError as error:
            raise PtxError(f"{error}, at `{instruction.text}`") from None


def _leave(program: Program, gang: Gang, at: int, lanes: Lanes) -> None:
    """Lanes that branch, end, or wait at a barrier."""
    target = program.targets[at]
    if target is not None:
        gang.put(target, lanes)
    elif program.kernel.instructions[at].opcode in ENDS:
        gang.ended |= lanes.mask
    else:
        gang.wait(at + 1, lanes)
