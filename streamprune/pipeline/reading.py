"""The source's blocks, read ahead of the one that is worked on."""

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.reader import Empty, new_tensor, tensor_digest
from streamprune.model.folding import FoldedPermutation
from streamprune.model.skeleton import Block
from streamprune.model.source import Source
from streamprune.pipeline.ahead import ahead
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.residual import reordered


@dataclass(frozen=True)
class BlockTensors:
    """A block's parameters as the source stores them, by its names, their digests, and the seconds that both took."""

    block: Block
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]
    seconds: float


def read_ahead(job: Job, blocks: Iterable[Block]) -> Generator[BlockTensors, None, None]:
    """The tensors of blocks' parts in order; while one is worked on, as many as the plan allows are read.

    The thread that reads makes no arithmetic but checksums. Its memory is used again where a block soon leaves it, for
    a GPU or for the disk; between two passes over a text it would lie idle.
    """
    on_gpu = job.arithmetic.device.type == "cuda"
    empty = Buffers(pinned=on_gpu).empty if on_gpu or not job.config.validate else new_tensor
    parts = (part for block in blocks for part in block.parts)
    return ahead(map(partial(read_part, job, empty=empty), parts), job.plan.memory.blocks_ahead, "read-ahead")


def read_part(job: Job, part: Block, empty: Empty = new_tensor) -> BlockTensors:
    """One block or part, its digests taken, its values not looked at; `empty` makes the tensors that are read into."""
    start = time.perf_counter()
    source = job.source
    following = _following(source, part)
    if following is not None and job.plan.memory.blocks_ahead:
        source.checkpoint.will_read(source.stored_names(following.parameters))
    tensors = source.checkpoint.read_unchecked(source.stored_names(part.parameters), empty)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return BlockTensors(part, tensors, digests, time.perf_counter() - start)


def _following(source: Source, part: Block) -> Block | None:
    """The part that is read after this one."""
    parts = [one for block in source.blocks[part.index : part.index + 2] for one in block.parts]
    place = next(place for place, one in enumerate(parts) if one.name == part.name)
    return parts[place + 1] if place + 1 < len(parts) else None


def parameters_of(job: Job, read: BlockTensors, residual: FoldedPermutation | None) -> dict[str, torch.Tensor]:
    """A block's parameters by name, checked, on the job's device, the residual stream in the job's order."""
    job.source.checkpoint.check_finite(read.tensors)
    device, names = job.arithmetic.device, job.source.names
    return reordered({name: read.tensors[names[name]].to(device) for name in read.block.parameters}, residual)
