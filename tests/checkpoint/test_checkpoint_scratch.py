"""Hidden states on disk: what is read is what was written, or an error; at once, and by threads as beside a GPU."""

import errno
import os
from pathlib import Path

import pytest
import torch

from streamprune.checkpoint import scratch
from streamprune.checkpoint.buffers import Buffers
from streamprune.checkpoint.scratch import HiddenStates
from streamprune.errors import CheckpointError, OutputError

SEQUENCES, TOKENS, HIDDEN = 3, 5, 8
CHUNK_BYTES = TOKENS * HIDDEN * 4


@pytest.fixture(autouse=True, params=["at once", "by threads"])
def by_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test with both; memory is page-locked by a GPU's driver alone."""
    threads = bool(request.param == "by threads")
    monkeypatch.setitem(HiddenStates.__init__.__kwdefaults__, "for_gpu", threads)
    monkeypatch.setattr(scratch, "Buffers", lambda pinned: Buffers())
    return threads


def chunks(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype) for _ in range(SEQUENCES)]


def filled(path: Path) -> HiddenStates:
    states = HiddenStates(path, SEQUENCES, TOKENS, HIDDEN, torch.float32)
    for index, chunk in enumerate(chunks()):
        states.write(index, chunk)
    states.sync()
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_are_read_back_bit_for_bit_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, dtype)
    for index in (2, 0, 1):
        states.write(index, chunks(dtype)[index])
    assert len(states) == SEQUENCES
    for index in (1, 2, 0, 1):
        read = states.read(index)
        assert read.dtype == dtype
        assert read.shape == (1, TOKENS, HIDDEN)
        assert torch.equal(read, chunks(dtype)[index])
    assert (tmp_path / "h.bin").stat().st_size == SEQUENCES * TOKENS * HIDDEN * dtype.itemsize
    states.close()


def test_chunk_lies_at_its_place_in_row_major_bytes(tmp_path: Path) -> None:
    states = filled(tmp_path / "h.bin")
    content = (tmp_path / "h.bin").read_bytes()
    for index, chunk in enumerate(chunks()):
        assert content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES] == chunk.numpy().tobytes()
    states.close()


def test_states_are_stored_in_the_files_dtype_and_layout(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "h.bin", 1, TOKENS, HIDDEN, torch.bfloat16)
    strided = torch.randn(1, HIDDEN, TOKENS).transpose(1, 2)
    states.write(0, strided)
    assert torch.equal(states.read(0), strided.to(torch.bfloat16))
    states.close()


def test_overwritten_chunk_is_the_new_one(tmp_path: Path) -> None:
    states = filled(tmp_path / "h.bin")
    states.write(1, chunks()[1] + 1)
    assert torch.equal(states.read(1), chunks()[1] + 1)
    assert torch.equal(states.read(0), chunks()[0])
    assert torch.equal(states.read(2), chunks()[2])
    states.close()


@pytest.mark.parametrize("byte", [0, CHUNK_BYTES - 1])
def test_damaged_chunk_is_noticed_and_the_others_are_not_blamed(byte: int, tmp_path: Path) -> None:
    states = filled(tmp_path / "h.bin")
    with (tmp_path / "h.bin").open("rb+") as file:
        file.seek(CHUNK_BYTES + byte)
        old = file.read(1)[0]
        file.seek(CHUNK_BYTES + byte)
        file.write(bytes([old ^ 1]))
    assert torch.equal(states.read(0), chunks()[0])
    assert torch.equal(states.read(2), chunks()[2])
    with pytest.raises(CheckpointError, match=r"h\.bin: hidden states of sequence 1 are damaged"):
        states.read(1)
    states.close()


def test_truncated_file_is_noticed(tmp_path: Path) -> None:
    states = filled(tmp_path / "h.bin")
    os.truncate(tmp_path / "h.bin", SEQUENCES * CHUNK_BYTES - 1)
    assert torch.equal(states.read(1), chunks()[1])
    with pytest.raises(CheckpointError, match=r"h\.bin: ends before byte 480; the file is truncated"):
        states.read(2)
    states.close()


def test_chunk_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)
    with pytest.raises(CheckpointError, match="sequence 0 are damaged"):
        states.read(0)
    states.close()


def test_reopened_with_its_checksums_it_goes_on(tmp_path: Path) -> None:
    first = filled(tmp_path / "h.bin")
    first.sync()
    first.close()
    again = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)
    again.checksums = list(first.checksums)
    for index, chunk in enumerate(chunks()):
        assert torch.equal(again.read(index), chunk)
    again.close()


def test_file_that_was_cut_while_closed_is_noticed_chunk_by_chunk(tmp_path: Path) -> None:
    first = filled(tmp_path / "h.bin")
    first.close()
    os.truncate(tmp_path / "h.bin", CHUNK_BYTES + 4)
    again = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)
    again.checksums = list(first.checksums)
    assert torch.equal(again.read(0), chunks()[0])
    for index in (1, 2):
        with pytest.raises(CheckpointError, match="damaged"):
            again.read(index)
    again.close()


def test_the_umask_says_who_reads_the_file(tmp_path: Path) -> None:
    """A colleague may go on with a job where its other files let him."""
    for umask in (0o077, 0o022, 0o002):
        before = os.umask(umask)
        try:
            filled(tmp_path / f"{umask}.bin").close()
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}.bin").stat().st_mode & 0o777 == 0o666 & ~umask


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)
    for shape in ((TOKENS, HIDDEN), (1, HIDDEN, TOKENS), (2, TOKENS, HIDDEN)):
        with pytest.raises(ValueError, match="hidden states of shape"):
            states.write(0, torch.zeros(shape))
    states.close()


def test_full_disk_is_told_at_once_with_the_bytes_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_fallocate", lambda descriptor, count: errno.ENOSPC)
    with pytest.raises(
        OutputError, match=r"h\.bin: no room for 480 bytes of hidden states \(No space left on device\)"
    ):
        HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_reserve(reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS 3: the file is as long, and holds what is written; nothing is written to make it so."""
    answers = iter([errno.EINTR, reason])
    monkeypatch.setattr(scratch, "_fallocate", lambda descriptor, count: next(answers))
    states = HiddenStates(tmp_path / "h.bin", 64, 64, 64, torch.float32)
    status = (tmp_path / "h.bin").stat()
    assert (status.st_size, scratch.allocated_bytes(status)) == (64 * 64 * 64 * 4, 0)
    states.write(63, torch.ones(1, 64, 64))
    assert torch.equal(states.read(63), torch.ones(1, 64, 64))
    states.close()


def test_space_is_reserved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files take turns, block after block: the second time nothing is asked for, but where more is needed."""
    asked = []
    original = scratch._fallocate

    def noted(descriptor: int, count: int) -> int:
        asked.append(count)
        return original(descriptor, count)

    monkeypatch.setattr(scratch, "_fallocate", noted)
    for sequences in (64, 64, 32, 128):
        HiddenStates(tmp_path / "h.bin", sequences, 64, 64, torch.float32).close()
        assert scratch.allocated_bytes((tmp_path / "h.bin").stat()) >= sequences * 64 * 64 * 4
    assert asked == [64 * 64 * 64 * 4, 128 * 64 * 64 * 4]


def test_absent_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        HiddenStates(tmp_path / "absent" / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_sync_that_fails_is_an_error_of_the_output(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may find only then that there is no room."""

    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    states = HiddenStates(tmp_path / "hidden.bin", 1, 2, 4, torch.float32)
    states.write(0, torch.ones(1, 2, 4))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OutputError, match=rf"hidden.bin: cannot be written \({os.strerror(number)}\)"):
            states.sync()
    states.close()


def test_a_write_that_fails_is_an_error_by_the_next_sync_at_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states = HiddenStates(tmp_path / "h.bin", SEQUENCES, TOKENS, HIDDEN, torch.float32)

    def write_and_sync() -> None:
        states.write(0, chunks()[0])
        states.sync()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"h\.bin"):
            write_and_sync()
    states.close()


def test_what_follows_is_read_ahead_and_forgotten_once_written_anew(tmp_path: Path, by_threads: bool) -> None:
    states = filled(tmp_path / "h.bin")
    asked: list[int] = []
    load = states._load
    states._load = lambda index: (asked.append(index), load(index))[1]  # type: ignore[method-assign]
    assert torch.equal(states.read(0), chunks()[0])
    states.write(1, chunks()[1] + 1)
    states.sync()
    assert asked == ([0, 1] if by_threads else [0])
    assert torch.equal(states.read(1), chunks()[1] + 1)
    assert torch.equal(states.read(2), chunks()[2])
    assert asked == ([0, 1, 1, 2] if by_threads else [0, 1, 2])
    states.close()
