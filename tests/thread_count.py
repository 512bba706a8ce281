"""Computing on a number of threads, for tests that results do not depend on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads, and so the kernels', for a while."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def on_threads(count: int, compute: Callable[[], Any]) -> Any:
    with threads(count):
        return compute()
