"""Writing: the same bytes in every process, whole files or none, the umask's modes."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from streamprune.checkpoint.reader import read_about
from streamprune.checkpoint.writer import (
    Pieces,
    canonical_json,
    file_digest,
    write_atomically,
    write_json,
    write_safetensors,
    write_text,
)
from streamprune.errors import OutputError

WRITE_ONE = """
import sys, torch
from pathlib import Path
from streamprune.checkpoint.writer import write_safetensors
folder = Path(sys.argv[1])
(folder / "temporary").mkdir(parents=True)
tensors = {f"layers.{i}.{part}": torch.arange(i + 1, dtype=dtype) for i in range(6)
           for part, dtype in (("weight", torch.float32), ("weight_mask", torch.uint8), ("bias", torch.float16))}
about = [{"permutation": f"p{i}", "reorders": [["t", 0], ["u", 1]], "set": sorted({"x", "y", "z"})} for i in range(6)]
write_safetensors(folder / "one.safetensors", tensors, folder / "temporary", about)
"""


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def test_ten_processes_write_the_same_bytes(tmp_path: Path) -> None:
    def write(number: int) -> bytes:
        folder = tmp_path / f"{number}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": f"{number}"}
        subprocess.run([sys.executable, "-c", WRITE_ONE, folder], check=True, env=environment)
        return (folder / "one.safetensors").read_bytes()

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(write, range(10)))
    assert len(written[0]) > 1000
    assert set(written) == {written[0]}


def test_exact_bytes_of_a_file(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_safetensors(path, {"a": torch.tensor([1.0, -0.0]), "b": torch.tensor([7], dtype=torch.uint8)}, temporary, [1])
    header = (
        b'{"__metadata__":{"streamprune":"[1]"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}'
    )
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f\0\0\0\x80\x07"


def test_tensors_and_about_are_read_back(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "one.safetensors"
    tensors = {"w": torch.randn(3, 4).to(torch.bfloat16), "p": torch.arange(5, dtype=torch.int32)}
    about = [{"permutation": "p", "reorders": [["w", 0]]}]
    write_safetensors(path, tensors, temporary, about)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert read_about(path) == about
    write_safetensors(path, tensors, temporary)
    assert read_about(path) is None


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_have_the_modes_that_the_umask_gives(umask: int, tmp_path: Path, temporary: Path) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, temporary)
        write_json(tmp_path / "b.json", {}, temporary)
        write_text(tmp_path / "c.txt", "", temporary)
    finally:
        os.umask(before)
    for name in ("a.safetensors", "b.json", "c.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, temporary: Path) -> None:
    write_json(tmp_path / "b.json", {"a": 1}, temporary)
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, temporary)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError), (RuntimeError("a fault"), RuntimeError)],
    ids=["disk full", "fault in the code"],
)
def test_failing_write_leaves_the_old_file(
    failure: Exception, expected: type[Exception], tmp_path: Path, temporary: Path
) -> None:
    path = tmp_path / "one.bin"
    write_text(path, "the old content", temporary)

    def write_half(target: Path) -> None:
        target.write_bytes(b"half")
        raise failure

    with pytest.raises(expected) as caught:
        write_atomically(path, temporary, write_half)
    assert path.read_text() == "the old content"
    if expected is OutputError:
        assert str(caught.value) == f"{path}: cannot be written (No space left on device); mend that and run again"


def test_failing_sync_leaves_the_old_file(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    write_json(path, {"old": True}, temporary)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_json(path, {"old": False}, temporary)
    assert json.loads(path.read_text()) == {"old": True}


def test_file_is_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.json"
    steps: list[str] = []
    real_fsync = os.fsync

    def record(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: PTH112
        steps.append(f"sync {kind}, renamed {path.exists()}")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_json(path, {}, temporary)
    assert steps == ["sync file, renamed False", "sync folder, renamed True"]


def test_unusable_folders_are_output_errors(tmp_path: Path, temporary: Path) -> None:
    absent = tmp_path / "absent"
    writes: list[Any] = [
        lambda: write_json(tmp_path / "a.json", {}, absent),
        lambda: write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, absent),
        lambda: write_json(absent / "a.json", {}, temporary),
        lambda: write_json(temporary, {}, tmp_path / "temporary"),
    ]
    for write in writes:
        with pytest.raises(OutputError, match="cannot be written") as caught:
            write()
        assert "\n" not in str(caught.value)


def test_json_bytes(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5], "a": {"d": None, "c": "ü"}}, temporary)
    assert path.read_bytes() == (
        b'{\n  "a": {\n    "c": "\\u00fc",\n    "d": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    )
    write_text(path, "ü\n", temporary)
    assert path.read_bytes() == b"\xc3\xbc\n"
    assert canonical_json({"b": [1, 2.5], "a": "x y"}) == '{"a":"x y","b":[1,2.5]}'


def test_nan_has_no_place_in_json(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"error": float("nan")}, temporary)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([float("inf")])
    assert not (tmp_path / "a.json").exists()


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_tensor_made_in_pieces_is_the_tensor(tmp_path: Path) -> None:
    """Same bytes as written at once, whose sha256 is returned; and only one piece is asked for at a time."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    whole = {"a": torch.randn(7, 3), "b": torch.arange(11, dtype=torch.uint8), "c": torch.randn(2, 2).bfloat16()}
    digest = write_safetensors(tmp_path / "whole.safetensors", whole, temporary)
    made: list[int] = []

    def pieces() -> Iterator[torch.Tensor]:
        for number, rows in enumerate(whole["a"].split(2)):
            made.append(number)
            yield rows

    lazy = {**whole, "a": Pieces(torch.float32, (7, 3), pieces)}
    assert write_safetensors(tmp_path / "pieces.safetensors", lazy, temporary) == digest
    assert made == [0, 1, 2, 3]
    assert (tmp_path / "pieces.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert hashlib.sha256((tmp_path / "whole.safetensors").read_bytes()).hexdigest() == digest
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(tmp_path / "whole.safetensors").items())


def test_pieces_of_another_size_are_refused(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    short = {"a": Pieces(torch.float32, (3, 2), lambda: [torch.zeros(2, 2)])}
    with pytest.raises(ValueError, match="not of the sizes announced"):
        write_safetensors(tmp_path / "a.safetensors", short, temporary)
    assert not (tmp_path / "a.safetensors").exists()
