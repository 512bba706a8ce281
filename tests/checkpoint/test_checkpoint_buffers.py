"""Memory that is lent, and used again when nobody holds what was lent."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamprune.checkpoint import buffers
from streamprune.checkpoint.buffers import MIN_BYTES, Buffers
from streamprune.checkpoint.reader import open_checkpoint

SHAPE = (MIN_BYTES // 1024, 512)  # the least that is lent, of 16 bits


def test_memory_is_lent_again_when_nobody_holds_it() -> None:
    lent = Buffers()
    one, other = lent.empty(SHAPE, torch.bfloat16), lent.empty(SHAPE, torch.bfloat16)
    places = {one.data_ptr(), other.data_ptr()}
    assert len(places) == 2
    assert (one.dtype, tuple(one.shape), one.is_contiguous()) == (torch.bfloat16, SHAPE, True)
    del one, other
    again = [lent.empty((SHAPE[1], SHAPE[0]), torch.float16) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} == places


class Snatched(list[Any]):
    """A list whose last item another thread takes between a look at it and the taking."""

    def __len__(self) -> int:
        return 1


def test_another_thread_may_take_the_last_piece() -> None:
    lent = Buffers()
    lent._free[MIN_BYTES] = Snatched()
    assert bool(lent._free[MIN_BYTES])
    assert lent.empty(SHAPE, torch.bfloat16).shape == SHAPE


def test_a_view_of_it_holds_it() -> None:
    lent = Buffers()
    whole = lent.empty(SHAPE, torch.bfloat16).fill_(1)
    row = whole[3].view(torch.int16)
    del whole
    assert lent.empty(SHAPE, torch.bfloat16).fill_(2).data_ptr() != row.data_ptr() - 3 * SHAPE[1] * 2
    assert torch.equal(row.view(torch.bfloat16), torch.ones(SHAPE[1], dtype=torch.bfloat16))


def test_no_more_is_made_than_was_in_use_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = torch.empty

    def counted(size: Any, **settings: Any) -> torch.Tensor:
        made.append(size)
        return original(size, **settings)

    monkeypatch.setattr(buffers.torch, "empty", counted)
    lent = Buffers()
    held: list[torch.Tensor] = []
    for turn in range(20):
        held.append(lent.empty(SHAPE, torch.bfloat16))
        if len(held) == 3:
            del held[turn % 3]
    assert len(made) == 3


def test_threads_may_give_it_back() -> None:
    lent = Buffers()
    held = [lent.empty(SHAPE, torch.bfloat16) for _ in range(8)]
    places = {tensor.data_ptr() for tensor in held}
    workers = [threading.Thread(target=held.pop) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {tensor.data_ptr() for tensor in [lent.empty(SHAPE, torch.bfloat16) for _ in range(8)]} == places


def test_small_tensors_have_memory_of_their_own() -> None:
    lent = Buffers()
    small = lent.empty((MIN_BYTES // 2 - 1,), torch.bfloat16)
    del small
    assert lent._free == {}
    assert lent.empty((), torch.float32).shape == ()


@pytest.mark.parametrize("source", ["llama", "llama-sharded", "opt-bin"])
def test_what_is_read_into_it_is_the_same(
    source: str, sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "MIN_BYTES", 1)
    checkpoint, lent = open_checkpoint(sources(source)), Buffers()
    names = list(checkpoint.tensors)
    expected = checkpoint.read_unchecked(names)
    for _ in range(3):  # into memory that holds the others' bytes
        found = checkpoint.read_unchecked(names, lent.empty)
        assert all(torch.equal(found[name], expected[name]) for name in names)
        names.reverse()
        del found
    assert sum(map(len, lent._free.values())) == len(names)
