"""The source's blocks, read ahead of the one that is worked on."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from streamprune.checkpoint.reader import tensor_digest
from streamprune.pipeline.block_pruning import FoldedPermutation
from streamprune.pipeline.job import Job
from streamprune.pipeline.residual import reordered


@dataclass(frozen=True)
class SourceBlock:
    """A block's parameters as the source stores them, by its names, and their digests."""

    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]


def source_blocks(job: Job, indices: Iterable[int]) -> Generator[SourceBlock, None, None]:
    """The blocks of `indices` in order; while one is worked on, as many as the plan allows are read.

    The thread that reads makes no arithmetic but checksums.
    """
    ahead = job.plan.memory.blocks_ahead
    if not ahead:
        yield from (read_source(job, index) for index in indices)
        return
    left = deque(indices)
    upcoming: deque[Future[SourceBlock]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        try:
            while left or upcoming:
                while left and len(upcoming) <= ahead:
                    upcoming.append(reader.submit(read_source, job, left.popleft()))
                yield upcoming.popleft().result()  # no name here holds it longer than the one who asked
        finally:
            reader.shutdown(cancel_futures=True)


def read_source(job: Job, index: int) -> SourceBlock:
    """One block, its digests taken, its values not looked at."""
    tensors = job.checkpoint.read_unchecked(job.names[name] for name in job.skeleton.block_parameters(index))
    return SourceBlock(tensors, {name: tensor_digest(tensor) for name, tensor in tensors.items()})


def parameters_of(
    job: Job, index: int, source: SourceBlock, residual: FoldedPermutation | None
) -> dict[str, torch.Tensor]:
    """A block's parameters by name, checked, on the job's device, the residual stream in the job's order."""
    job.checkpoint.check_finite(source.tensors)
    device = job.arithmetic.device
    names = job.skeleton.block_parameters(index)
    return reordered({name: source.tensors[job.names[name]].to(device) for name in names}, residual)
