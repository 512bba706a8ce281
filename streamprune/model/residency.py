"""A model run with some of its blocks in memory and the others read from disk in every pass.

The model is transformers' own, called as it is; in the place of a block that is not in memory stands a module that
reads it when it is called, while the next one is already on its way.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.packed import check_contents, layer_from_tensors, tensor_names
from streamprune.checkpoint.spans import Layout, Reader, Reading, aligned_memory, lay_out
from streamprune.config import NMPattern
from streamprune.errors import UnsupportedModelError
from streamprune.model.arithmetic import Arithmetic
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Block
from streamprune.model.source import Source
from streamprune.model.stand_in import StandIn

SLOTS = 2  # of streamed blocks: one computes while the next is read
READINGS = 4  # experts on their way at once, where what is read is not what they compute with
LEAST_EXPERTS = 2  # that must find room
RATE_SECONDS = 1.0  # at most, to measure the disk's pace


@dataclass(frozen=True)
class StoredBlock:
    """A block on disk: its module without weights, and what of its tensors, by the module's names, becomes what.

    stored   the checkpoint's names
    dtypes   what each is computed in
    packed   patterns of its packed layers, by full names
    experts  its experts, each as if it were a block; what else is here leaves them out
    """

    block: Block
    module: nn.Module
    layout: Layout
    stored: dict[str, str]
    dtypes: dict[str, torch.dtype]
    packed: dict[str, NMPattern]
    experts: tuple["StoredBlock", ...] = ()

    @property
    def converted_bytes(self) -> int:
        """Of those tensors that are computed in another dtype than they are stored in."""
        sources = {local: self.layout.tensors[name] for local, name in self.stored.items()}
        changed = [local for local, source in sources.items() if source.dtype != self.dtypes[local]]
        return sum(sources[local].size_bytes // sources[local].dtype.itemsize * self.dtypes[local].itemsize
                   for local in changed)  # fmt: skip

    @property
    def resident_bytes(self) -> int:
        """Once it is in memory: what was read stays only where some of it is used as it is."""
        return self.converted_bytes + (self.layout.size_bytes if self.as_it_is else 0)

    @property
    def as_it_is(self) -> bool:
        """Whether some of what is read is used as it is."""
        return any(self.layout.tensors[name].dtype == self.dtypes[local] for local, name in self.stored.items())


def stored_blocks(source: Source, arithmetic: Arithmetic) -> list[StoredBlock]:
    """All blocks of a model; only headers are looked at."""
    return [_stored_block(source, block, arithmetic) for block in source.blocks]


def _stored_block(source: Source, block: Block, arithmetic: Arithmetic) -> StoredBlock:
    rest, *parts = block.parts
    experts = (replace(part, name=f"{block.experts}.{number}") for number, part in enumerate(parts))
    stored = tuple(_stored_part(source, expert, arithmetic) for expert in experts)
    return replace(_stored_part(source, rest, arithmetic), experts=stored)


def _stored_part(source: Source, block: Block, arithmetic: Arithmetic) -> StoredBlock:
    packed = {name: source.packed[name] for name in block.layers if name in source.packed}
    pruned = {block.layers[name].parameter for name in packed}
    stored = {block.local(name): source.names[name] for name in block.parameters if name not in pruned}
    dtypes = dict.fromkeys(stored, arithmetic.dtype)
    module = source.skeleton.module(block)
    for name, pattern in packed.items():
        parts = tensor_names(source.checkpoint, name)
        out_features, in_features = block.layers[name].shape
        biased = f"{name}.bias" in block.parameters
        layer = PackedLinear(in_features, out_features, pattern, biased, len(parts) == 3, device="meta")
        module.set_submodule(block.local(name), layer)
        stored |= {block.local(part): part for part in parts}
        as_stored = [*parts, *([f"{name}.bias"] if biased else [])]
        dtypes |= {block.local(part): _for_kernels(source.checkpoint.tensors[part].dtype) for part in as_stored}
    layout = lay_out(source.checkpoint, stored.values())
    return StoredBlock(block, module, layout, stored, dtypes, packed)


def _for_kernels(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


def place_blocks(blocks: Sequence[StoredBlock], budget_bytes: int) -> tuple[list[bool], int]:
    """Which blocks stay in memory, as many as the budget holds, spread evenly; and how many others it holds at once.

    (all, 0) where everything fits. Where not even one fits: (none, 0).
    """
    count = len(blocks)
    for staying in range(count, -1, -1):
        resident = [(number + 1) * staying // count > number * staying // count for number in range(count)]
        slots = 0 if staying == count else SLOTS
        if needed_bytes(blocks, resident, slots) <= budget_bytes:
            return resident, slots
    return [False] * count, int(needed_bytes(blocks, [False] * count, 1) <= budget_bytes)


def needed_bytes(blocks: Sequence[StoredBlock], resident: Sequence[bool], slots: int) -> int:
    """What blocks take at most: those that stay, and beside them one that is loaded, or the streamed ones' room."""
    staying = [block for block, stays in zip(blocks, resident, strict=True) if stays]
    streamed = [block for block, stays in zip(blocks, resident, strict=True) if not stays]
    room = max((block.layout.size_bytes for block in streamed), default=0) * slots
    room += max((block.converted_bytes for block in streamed), default=0)
    loaded = max((block.layout.size_bytes for block in staying if block.converted_bytes), default=0)
    return sum(block.resident_bytes for block in staying) + max(room, loaded)


def expert_bytes(blocks: Sequence[StoredBlock], on_gpu: bool) -> tuple[int, int]:
    """What an expert takes while it is there, and what reading them takes of the host's memory beside that."""
    experts = [expert for block in blocks for expert in block.experts]
    apart = on_gpu or not any(expert.as_it_is for expert in experts)
    largest = max((expert.layout.size_bytes for expert in experts), default=0)
    return max((expert.resident_bytes for expert in experts), default=0), apart * READINGS * largest


class BlockStream:
    """Streamed blocks, read in a cycle into memory that stays; each is checked when it is first there."""

    def __init__(self, source: Source, blocks: Sequence[StoredBlock], slots: int, reader: Reader, device: torch.device):
        self.blocks, self.device = blocks, device
        self._source, self._reader, self._buffers = source, reader, Buffers()
        self._order = itertools.cycle(range(len(blocks)))
        self._coming: deque[tuple[int, Reading]] = deque()
        self._unchecked = set(range(len(blocks)))
        size = max(block.layout.size_bytes for block in blocks)
        for _ in range(slots):
            self._start(aligned_memory(size))

    @property
    def pass_bytes(self) -> int:
        """Read from disk for each pass of the model."""
        return sum(block.layout.read_bytes for block in self.blocks)

    @contextmanager
    def next(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """The next block's tensors, by its module's names, for as long as the context lasts."""
        expected, reading = self._coming.popleft()
        if number != expected:
            raise UnsupportedModelError(f"{self.blocks[number].block.name}: is not called in the order of the blocks")
        try:
            tensors, block = reading.finish(), self.blocks[number]
            if number in self._unchecked:
                check_block(self._source, block, tensors)
                self._unchecked.remove(number)
            yield computed(block, tensors, self.device, self._buffers)
        finally:
            self._start(reading.memory)

    def bytes_per_second(self) -> float:
        """The pace of the same reading where nothing computes meanwhile, measured over at most one pass."""
        for _ in self._coming.copy():  # these were read while something else went on
            self._skip()
        begin, count = time.perf_counter(), 0
        for _ in self.blocks:
            count += self._skip()
            if time.perf_counter() - begin > RATE_SECONDS:
                break
        return count / (time.perf_counter() - begin)

    def end(self) -> None:
        """Read no more, and leave the memory to the system."""
        for _, reading in self._coming:
            wait([piece for piece in reading.pieces if not piece.cancel()])
        self._coming.clear()

    def _skip(self) -> int:
        number, reading = self._coming.popleft()
        reading.finish()
        self._start(reading.memory)
        return self.blocks[number].layout.read_bytes

    def _start(self, memory: torch.Tensor) -> None:
        number = next(self._order)
        self._coming.append((number, self._reader.start(self.blocks[number].layout, memory)))


class StreamedBlock(StandIn):
    """Takes a block's place and has its weights only while it computes."""

    def __init__(self, stream: BlockStream, number: int) -> None:
        super().__init__(stream.blocks[number].module)
        self.stream, self.number = stream, number

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        with self.stream.next(self.number) as tensors:
            return functional_call(self.__dict__["block"], tensors, arguments, settings, tie_weights=False)


def load_resident(
    source: Source, block: StoredBlock, reader: Reader, device: torch.device, with_experts: bool = True
) -> nn.Module:
    """A block, with or without its experts, with its weights in memory of its own."""
    for part in (block, *block.experts) if with_experts else (block,):
        tensors = reader.start(part.layout, aligned_memory(part.layout.size_bytes)).finish()
        check_block(source, part, tensors)
        part.module.load_state_dict(computed(part, tensors, device, Buffers()), strict=False, assign=True)
    return block.module


def check_block(source: Source, block: StoredBlock, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NumericsError for weights that are not finite, CheckpointError for masks or permutations that are none."""
    source.checkpoint.check_finite(tensors)
    for name, pattern in block.packed.items():
        check_contents(name, layer_from_tensors(name, tensors), pattern)


def computed(
    block: StoredBlock, tensors: Mapping[str, torch.Tensor], device: torch.device, buffers: Buffers
) -> dict[str, torch.Tensor]:
    """A block's tensors by its module's names, in the dtypes and on the device where they are computed."""
    return {
        local: _converted(tensors[name], block.dtypes[local], buffers).to(device)
        for local, name in block.stored.items()
    }


def _converted(tensor: torch.Tensor, dtype: torch.dtype, buffers: Buffers) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else buffers.empty(tuple(tensor.shape), dtype).copy_(tensor)
