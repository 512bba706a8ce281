"""Reading checkpoint folders: bit for bit, all layouts alike, and nothing hostile is trusted."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from streamprune.checkpoint import reader
from streamprune.checkpoint.reader import (
    SAFETENSORS_INDEX,
    Checkpoint,
    open_checkpoint,
    open_file,
    read_about,
    tensor_digest,
)
from streamprune.checkpoint.safetensors_header import DTYPES
from streamprune.checkpoint.untrusted import read_json
from streamprune.errors import CheckpointError, NumericsError

BIN_INDEX = "pytorch_model.bin.index.json"


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same_bits(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].shape == tensor.shape, name
        assert bits(read[name]) == bits(tensor), name


def model_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors like a model's, in several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(32, 8, generator=generator),
        "layers.0.weight": torch.randn(8, 8, generator=generator).to(torch.bfloat16),
        "layers.0.bias": torch.randn(8, generator=generator).to(torch.float16),
        "layers.1.weight": torch.randn(8, 8, generator=generator).to(torch.bfloat16),
        "layers.1.zeros": torch.tensor([0.0, -0.0]),
        "scale": torch.randn((), generator=generator),
    }


def save_safetensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    return _save(folder, tensors, shards, "model", "safetensors", SAFETENSORS_INDEX, save_file)


def save_bin(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    return _save(folder, tensors, shards, "pytorch_model", "bin", BIN_INDEX, torch.save)


def _save(
    folder: Path, tensors: dict[str, torch.Tensor], shards: int, stem: str, suffix: str, index: str, save: Any
) -> Path:
    folder.mkdir()
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for shard in range(shards):
        file_name = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        names = list(tensors)[shard::shards]
        save({name: tensors[name] for name in names}, folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.tensors)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_is_read_as_the_library_wrote_it(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "before": torch.ones(3, dtype=torch.uint8),
        "tensor": (torch.randn(shape, generator=generator) * 50).to(DTYPES[dtype]),
    }
    path = tmp_path / "one.safetensors"
    save_file(tensors, path)
    checkpoint = open_file(path)
    assert checkpoint.tensors["tensor"].size_bytes == tensors["tensor"].nbytes
    assert_same_bits(checkpoint.read(["before", "tensor"]), tensors)
    assert_same_bits(load_file(path), tensors)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("save", [save_safetensors, save_bin], ids=["safetensors", "bin"])
def test_single_and_sharded_folders_are_read_bit_for_bit(save: Any, shards: int, tmp_path: Path) -> None:
    tensors = model_tensors()
    assert_same_bits(read_all(save(tmp_path / "model", tensors, shards)), tensors)


def test_all_layouts_of_one_model_have_the_same_headers(tmp_path: Path) -> None:
    tensors = model_tensors()
    opened = [
        open_checkpoint(save(tmp_path / f"{number}", tensors, shards))
        for number, (save, shards) in enumerate(
            [(save_safetensors, 1), (save_safetensors, 4), (save_bin, 1), (save_bin, 2)]
        )
    ]
    described = [{n: (s.dtype, s.shape, s.size_bytes) for n, s in c.tensors.items()} for c in opened]
    assert described[0] == {name: (t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    assert all(one == described[0] for one in described)


def test_bin_tensors_that_are_views_parameters_or_shared_are_read_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"transposed": base.T, "column": base[:, 1], "parameter": torch.nn.Parameter(base + 1), "base": base}
    folder = save_bin(tmp_path / "model", state)
    read = read_all(folder)
    assert_same_bits(read, {name: tensor.detach() for name, tensor in state.items()})
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("save", [save_safetensors, save_bin], ids=["safetensors", "bin"])
def test_what_is_read_is_in_memory_of_its_own(save: Any, tmp_path: Path) -> None:
    tensors = model_tensors()
    folder = save(tmp_path / "model", tensors)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for tensor in read_all(folder).values():
        tensor.fill_(7)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert_same_bits(read_all(folder), tensors)


def test_tensors_come_in_the_order_asked_for_and_only_those(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "model", model_tensors(), shards=2))
    assert list(checkpoint.read(["scale", "embed.weight", "layers.0.bias"])) == [
        "scale",
        "embed.weight",
        "layers.0.bias",
    ]
    assert checkpoint.read([]) == {}


@pytest.mark.parametrize("save", [save_safetensors, save_bin], ids=["safetensors", "bin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_that_is_not_finite_is_refused_by_name(
    save: Any, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    bad = torch.ones(4, 4, dtype=dtype)
    bad[2, 3] = value
    checkpoint = open_checkpoint(save(tmp_path / "model", {"good": torch.ones(2, dtype=dtype), "layer.bad": bad}))
    assert checkpoint.read(["good"])["good"].tolist() == [1, 1]
    with pytest.raises(NumericsError, match=r"tensor layer\.bad holds NaN or infinity"):
        checkpoint.read(["good", "layer.bad"])


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_safetensors(tmp_path / "model", model_tensors()))
    with pytest.raises(CheckpointError, match=r"tensor layers\.9\.weight is missing"):
        checkpoint.read(["scale", "layers.9.weight"])


def test_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "model", {"a": torch.ones(1000)})
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends before byte .* truncated"):
        checkpoint.read(["a"])


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_go_before_bin(shards: int, tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "model", model_tensors(seed=0), shards)
    bin_folder = save_bin(tmp_path / "other", model_tensors(seed=1))
    shutil.copy(bin_folder / "pytorch_model.bin", folder)
    assert_same_bits(read_all(folder), model_tensors(seed=0))


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in from_pretrained: both must see the same weights."""
    folder = save_safetensors(tmp_path / "model", model_tensors(seed=0), shards=2)
    save_file(model_tensors(seed=1), folder / "model.safetensors")
    assert_same_bits(read_all(folder), model_tensors(seed=1))


def test_absent_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_shape_that_no_tensor_can_have_is_refused_though_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        open_file(path).read(["a"])


BAD_INDEXES = {
    "outside the folder": {"weight_map": {"a": "../model.safetensors"}},
    "absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "in a subfolder": {"weight_map": {"a": "sub/model.safetensors"}},
    "parent folder": {"weight_map": {"a": ".."}},
    "the folder itself": {"weight_map": {"a": ""}},
    "hidden file": {"weight_map": {"a": ".model.safetensors"}},
    "missing shard": {"weight_map": {"a": "model-00002-of-00002.safetensors"}},
    "missing tensor": {"weight_map": {"b": "model-00001-of-00001.safetensors"}},
    "zero byte in the name": {"weight_map": {"a": "model\0.safetensors"}},
    "half a surrogate pair in the name": {"weight_map": {"a": "model\ud800.safetensors"}},
    "name too long for a file": {"weight_map": {"a": "x" * 300}},
    "file name of a number": {"weight_map": {"a": 1}},
    "map of a list": {"weight_map": ["a"]},
    "no map": {"metadata": {}},
    "a list": ["weight_map"],
}


@pytest.mark.parametrize("fault", BAD_INDEXES)
def test_bad_index_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "model", {"a": torch.ones(2)})
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub")
    shutil.copy(folder / "model.safetensors", folder / ".model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")  # a single file would go first
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(BAD_INDEXES[fault]))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_shard_and_tensor_are_named(tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "model", model_tensors(), shards=2)
    index = read_json(folder / SAFETENSORS_INDEX)
    index["weight_map"]["layers.7.weight"] = "model-00001-of-00002.safetensors"
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\.7\.weight is not in model-00001-of-00002\.safetensors"):
        open_checkpoint(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\ud7ff{"], ids=range(6))
def test_json_that_is_no_object_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_json_that_is_absent_or_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_json(tmp_path / "latin.json")


class _Payload:
    """Unpickles into a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickle_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    marker, payload = tmp_path / "made by the pickle", tmp_path / "payload"
    torch.save({"a": torch.ones(1), "b": _Payload(marker)}, payload)
    pickled = pickle.dumps(_Payload(marker))
    torch.load(payload, weights_only=False)  # the payload works where it is trusted
    marker.rmdir()
    for content in (payload.read_bytes(), pickled):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is not a \.bin of plain tensors") as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not a zip", b"\0" * 64], ids=["empty", "torn zip", "zeros"])
def test_bin_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is not a \.bin of plain tensors") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {"a": 1}], ids=["list", "deep", "int"])
def test_bin_that_is_no_state_dict_is_refused(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a state dict of tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("save", [save_safetensors, save_bin], ids=["safetensors", "bin"])
def test_fingerprint_tells_fine_tunes_with_equal_headers_apart(save: Any, tmp_path: Path) -> None:
    tensors = {"big": torch.zeros(1_000_000), "small": torch.zeros(3)}
    tuned = {**tensors, "big": tensors["big"].clone()}
    tuned["big"][500_000] = 1e-30
    one, other = (open_checkpoint(save(tmp_path / name, state)) for name, state in (("one", tensors), ("other", tuned)))
    assert {n: (s.dtype, s.shape) for n, s in one.tensors.items()} == {
        n: (s.dtype, s.shape) for n, s in other.tensors.items()
    }
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == open_checkpoint(one.folder).fingerprint()


def test_fingerprint_covers_names_shapes_and_every_tensor(tmp_path: Path) -> None:
    states = [
        {"a": torch.zeros(4), "b": torch.zeros(4)},
        {"a": torch.zeros(4), "c": torch.zeros(4)},
        {"a": torch.zeros(4), "b": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(4), "b": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.tensor([1.0, 0.0, 0.0, 0.0]), "b": torch.zeros(4)},
        {"a": torch.zeros(4)},
    ]
    prints = [
        open_checkpoint(save_safetensors(tmp_path / f"{i}", state)).fingerprint() for i, state in enumerate(states)
    ]
    assert len(set(prints)) == len(states)


def test_tensor_digest_is_sha256_of_the_row_major_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3)
    assert tensor_digest(tensor) == hashlib.sha256(bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])).hexdigest()
    assert tensor_digest(tensor.T) == hashlib.sha256(bytes([0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0])).hexdigest()
    assert tensor_digest(torch.empty(0, 3)) == hashlib.sha256(b"").hexdigest()
    assert tensor_digest(torch.tensor(True)) == hashlib.sha256(b"\1").hexdigest()


def test_read_about_returns_the_plain_data_or_none(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"streamprune": '[{"x":[1,null]}]'})
    assert read_about(path) == [{"x": [1, None]}]
    save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})
    assert read_about(path) is None
    save_file({"a": torch.ones(1)}, path)
    assert read_about(path) is None
    save_file({"a": torch.ones(1)}, path, metadata={"streamprune": "{"})
    with pytest.raises(CheckpointError, match="metadata is not valid JSON"):
        read_about(path)


def test_open_file_is_a_checkpoint_of_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    opened = open_file(tmp_path / "one.safetensors")
    assert isinstance(opened, Checkpoint)
    assert opened.folder == tmp_path
    assert opened.tensors["a"].path == tmp_path / "one.safetensors"


@pytest.mark.parametrize("source", ["opt", "opt-bin", "llama-sharded"])
def test_rows_and_pieces_are_those_of_the_whole_tensor(
    source: str, sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any rows in any order, also twice; pieces of whole rows that make up the tensor."""
    checkpoint = open_checkpoint(sources(source))
    name = next(name for name in checkpoint.tensors if name.endswith("embed_tokens.weight"))
    whole = checkpoint.read([name])[name]
    rows = torch.tensor([7, 0, len(whole) - 1, 7, 3])
    assert torch.equal(checkpoint.row_reader(name)(rows), whole[rows])
    assert [len(piece) for piece in checkpoint.pieces(name)] == [len(whole)]
    monkeypatch.setattr(reader, "PIECE_BYTES", 5 * whole.shape[1] * whole.itemsize + 1)
    pieces = list(checkpoint.pieces(name))
    assert {len(piece) for piece in pieces[:-1]} == {5}
    assert torch.equal(torch.cat(pieces), whole)
    monkeypatch.setattr(reader, "PIECE_BYTES", 1)
    assert torch.equal(torch.cat(list(checkpoint.pieces(name))), whole)


def test_rows_and_pieces_with_nan_are_refused(
    sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources("opt"), tmp_path / "source"))
    name = next(name for name in open_checkpoint(folder).tensors if name.endswith("embed_tokens.weight"))
    tiny.edit_tensor(folder / "model.safetensors", name, lambda tensor: tensor[9].fill_(float("nan")))
    checkpoint = open_checkpoint(folder)
    checkpoint.row_reader(name)(torch.tensor([8, 10]))
    with pytest.raises(NumericsError, match=name):
        checkpoint.row_reader(name)(torch.tensor([8, 9]))
    monkeypatch.setattr(reader, "PIECE_BYTES", 1024)
    with pytest.raises(NumericsError, match=name):
        list(checkpoint.pieces(name))


def test_what_will_be_read_is_named_to_the_system(
    sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its place in the file; it is a hint, so that what cannot be had is nobody's error before it is read."""
    told: list[tuple[str, int, int, int]] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        told.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, length, advice))

    folder = Path(shutil.copytree(sources("llama-sharded"), tmp_path / "source"))
    checkpoint = open_checkpoint(folder)
    monkeypatch.setattr(os, "posix_fadvise", note)
    names = [name for name in checkpoint.tensors if ".layers.1." in name]
    checkpoint.will_read([*names, "of.no.checkpoint"])
    places = [(checkpoint.tensors[name].path.name, checkpoint.tensors[name].entry) for name in names]
    assert len(told) == len(names) > 0
    assert sorted(told) == sorted(
        (path, entry.offset_bytes, entry.size_bytes, os.POSIX_FADV_WILLNEED) for path, entry in places if entry
    )
    shutil.rmtree(folder)
    checkpoint.will_read(names)
    told.clear()
    open_checkpoint(sources("opt-bin")).will_read(open_checkpoint(sources("opt-bin")).tensors)
    assert told == []
