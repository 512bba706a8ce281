"""Whole programs on a CPU that takes the launches of CUDA kernels, as a GPU would."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from streamprune_kernels import launch
from streamprune_kernels.launch import Run


@contextmanager
def standing_in(run: Run) -> Iterator[None]:
    """While open, `run` takes the launches for tensors on the CPU; of two the inner one does."""
    outer = launch.runner_for

    def runner_for(tensor: torch.Tensor) -> Run | None:
        return run if tensor.device.type == "cpu" else outer(tensor)

    with mock.patch.object(launch, "runner_for", runner_for):
        yield
