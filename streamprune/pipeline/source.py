"""The source's blocks, read ahead of the one that is worked on."""

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.reader import Empty, new_tensor, tensor_digest
from streamprune.pipeline.ahead import ahead
from streamprune.pipeline.block_pruning import FoldedPermutation
from streamprune.pipeline.job import Job
from streamprune.pipeline.residual import reordered


@dataclass(frozen=True)
class SourceBlock:
    """A block's parameters as the source stores them, by its names, their digests, and the seconds that both took."""

    index: int
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]
    seconds: float


def source_blocks(job: Job, indices: Iterable[int]) -> Generator[SourceBlock, None, None]:
    """The blocks of `indices` in order; while one is worked on, as many as the plan allows are read.

    The thread that reads makes no arithmetic but checksums. Its memory is used again where a block soon leaves it, for
    a GPU or for the disk; between two passes over a text it would lie idle.
    """
    on_gpu = job.arithmetic.device.type == "cuda"
    empty = Buffers(pinned=on_gpu).empty if on_gpu or not job.config.validate else new_tensor
    return ahead(map(partial(read_source, job, empty=empty), indices), job.plan.memory.blocks_ahead, "read-ahead")


def read_source(job: Job, index: int, empty: Empty = new_tensor) -> SourceBlock:
    """One block, its digests taken, its values not looked at; `empty` makes the tensors that are read into."""
    start = time.perf_counter()
    if index + 1 < len(job.skeleton.blocks) and job.plan.memory.blocks_ahead:
        job.checkpoint.will_read(_stored_names(job, index + 1))
    tensors = job.checkpoint.read_unchecked(_stored_names(job, index), empty)
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return SourceBlock(index, tensors, digests, time.perf_counter() - start)


def _stored_names(job: Job, index: int) -> list[str]:
    return [job.names[name] for name in job.skeleton.block_parameters(index)]


def parameters_of(job: Job, source: SourceBlock, residual: FoldedPermutation | None) -> dict[str, torch.Tensor]:
    """A block's parameters by name, checked, on the job's device, the residual stream in the job's order."""
    job.checkpoint.check_finite(source.tensors)
    device = job.arithmetic.device
    names = job.skeleton.block_parameters(source.index)
    return reordered({name: source.tensors[job.names[name]].to(device) for name in names}, residual)
