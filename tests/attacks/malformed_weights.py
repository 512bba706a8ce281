"""Weights that are none: safetensors, and indexes."""

import functools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from attacks.catalogue import Catalogue, Make
from attacks.malformed_headers import MALFORMED
from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, MAX_JSON_VALUES

CATALOGUE = Catalogue()
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def single(content: Callable[[], bytes]) -> Make:
    return lambda case: (case / "model" / SINGLE).write_bytes(content())


for fault, content in MALFORMED.items():
    CATALOGUE.put(f"header: {fault}", "llama", "plan", 3, SINGLE, single(content), "a file of one tensor, one fault")

# The same faults inside a real header, where the other tensors are right, at its start, its middle and its end.
CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a dimension more": lambda e: {"shape": [*e["shape"], 2]},
    "a dimension of 0": lambda e: {"shape": [*e["shape"], 0]},
    "a dimension of -1": lambda e: {"shape": [-1, *e["shape"]]},
    "a dimension of 2^40": lambda e: {"shape": [2**40, *e["shape"]]},
    "a dimension of 1.5": lambda e: {"shape": [*e["shape"], 1.5]},
    "a dimension of true": lambda e: {"shape": [*e["shape"], True]},
    "a wider dtype": lambda e: {"dtype": "F32"},
    "a dtype that is none": lambda e: {"dtype": "BF17"},
    "an end beyond the file": lambda e: {"data_offsets": [e["data_offsets"][0], 2**40]},
    "an end before its start": lambda e: {"data_offsets": e["data_offsets"][::-1]},
    "its start moved by two": lambda e: {"data_offsets": [at + 2 for at in e["data_offsets"]]},
    "its offsets as text": lambda e: {"data_offsets": [str(at) for at in e["data_offsets"]]},
}


def changed_entry(case: Path, place: float, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = case / "model" / SINGLE
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    name = names[round(place * (len(names) - 1))]
    header[name] = {**header[name], **change(header[name])}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


for where, place in (("first", 0.0), ("middle", 0.5), ("last", 1.0)):
    for fault, change in CHANGES.items():
        make = functools.partial(changed_entry, place=place, change=change)
        CATALOGUE.put(f"{where} tensor: {fault}", "llama", "plan", 3, SINGLE, make, "one entry of a real header")


@CATALOGUE.entry("llama", "plan", 3, "truncated or not safetensors")
def a_terabyte_that_is_not_there(case: Path) -> None:
    """The header's length and the file's size are claims: a sparse file has as many bytes as it likes."""
    path = case / "model" / SINGLE
    path.write_bytes(struct.pack("<Q", 2**39))
    os.truncate(path, 2**38)


@CATALOGUE.entry("llama", "plan", 3, "its header has 1000000000 bytes")
def a_header_of_a_gigabyte(case: Path) -> None:
    """The file is as large as it says, of zeros that take no disk; to read them would take memory."""
    path = case / "model" / SINGLE
    path.write_bytes(struct.pack("<Q", 10**9))
    os.truncate(path, 2 * 10**9)


@CATALOGUE.entry("llama", "plan", 3, "is not a regular file")
def weights_that_are_a_pipe(case: Path) -> None:
    """Opening a pipe that nobody writes to never returns."""
    (case / "model" / SINGLE).unlink()
    os.mkfifo(case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "cannot be read (Is a directory)")
def weights_that_are_a_folder(case: Path) -> None:
    """A name says nothing about what it names."""
    (case / "model" / SINGLE).unlink()
    (case / "model" / SINGLE).mkdir()


@CATALOGUE.entry("llama", "plan", 3, "is not a regular file")
def weights_that_are_a_device(case: Path) -> None:
    """A link to /dev/zero never ends."""
    (case / "model" / SINGLE).unlink()
    (case / "model" / SINGLE).symlink_to("/dev/zero")


@CATALOGUE.entry("llama", "plan", 3, "holds neither model.safetensors nor pytorch_model.bin")
def weights_that_are_a_dangling_link(case: Path) -> None:
    """A download that left its links and not its files."""
    (case / "model" / SINGLE).unlink()
    (case / "model" / SINGLE).symlink_to("nowhere")


@CATALOGUE.entry("llama", "plan", 3, "no such folder")
def no_model_at_all(case: Path) -> None:
    """A mistyped path."""
    shutil.rmtree(case / "model")


@CATALOGUE.entry("llama", "compress", 3, "tensors are missing, first model.layers.1.mlp.up_proj.weight")
def a_tensor_less(case: Path) -> None:
    """A checkpoint that lost one."""
    tensors = load_file(case / "model" / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "is of a block beyond the 3 of config.json")
def a_block_more(case: Path) -> None:
    """Weights of four blocks and a config of three: a model cut short, if nobody looks."""
    tensors = load_file(case / "model" / SINGLE)
    fourth = {n.replace(".2.", ".3."): t.clone() for n, t in tensors.items() if n.startswith("model.layers.2.")}
    save_file(tensors | fourth, case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "is torch.int8; the source must be unquantized")
def quantised_weights(case: Path) -> None:
    """The right shape, and numbers that mean something else."""
    tensors = load_file(case / "model" / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "has shape [160, 32], config.json makes it [160, 64]")
def a_weight_of_another_shape(case: Path) -> None:
    """Half of a tensor."""
    tensors = load_file(case / "model" / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "\\x1b")
def a_name_that_a_terminal_obeys(case: Path) -> None:
    """Names of tensors are printed; escape sequences and line breaks in them must not be."""
    tensors = load_file(case / "model" / SINGLE)
    tensors["model.layers.9.\x1b[2J\nDone."] = torch.ones(1)
    save_file(tensors, case / "model" / SINGLE)


@CATALOGUE.entry("llama", "plan", 3, "a key has 1000015 characters where at most 1000 are read")
def a_name_of_a_megabyte(case: Path) -> None:
    """One line need not be a long one."""
    tensors = load_file(case / "model" / SINGLE)
    tensors["model.layers.9." + "x" * 1_000_000] = torch.ones(1)
    save_file(tensors, case / "model" / SINGLE)


def filled(case: Path, name: str, value: float) -> None:
    tiny.edit_tensor(case / "model" / SINGLE, name, lambda tensor: tensor.view(-1)[7:8].fill_(value))


for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
    for value in ("nan", "inf", "-inf"):
        make = functools.partial(filled, name=name, value=float(value))
        inside = name.startswith("model.layers")
        for command in ("compress", "evaluate"):
            CATALOGUE.put(
                f"{value} in {name}", "llama", command, 6, f"tensor {name} holds NaN or infinity", make,
                "one number in all", journal=command == "compress",
            )  # fmt: skip


@CATALOGUE.entry("llama", "compress", 6, "model.layers.0: its output holds NaN or infinity", journal=True)
def weights_whose_products_overflow(case: Path) -> None:
    """Finite numbers whose sums are not."""
    tiny.edit_tensor(case / "model" / SINGLE, "model.layers.0.mlp.down_proj.weight", lambda w: w.fill_(3e38))


@CATALOGUE.entry("llama", "compress", 0)
def channels_and_layers_of_zeros(case: Path) -> None:
    """Dead channels are common; all scores tie, nothing may divide by them."""
    path = case / "model" / SINGLE
    tiny.edit_tensor(path, "model.layers.1.post_attention_layernorm.weight", lambda weight: weight[::3].zero_())
    tiny.edit_tensor(path, "model.layers.1.self_attn.o_proj.weight", lambda weight: weight.zero_())


@CATALOGUE.entry("llama", "evaluate", 0)
def zeros_everywhere(case: Path) -> None:
    """A model of zeros predicts every token alike."""
    tensors = load_file(case / "model" / SINGLE)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, case / "model" / SINGLE)


# The index.
INDEXES: dict[str, tuple[Any, str]] = {
    "outside the folder": ({"weight_map": {"a": "../model.safetensors"}}, "is not the name of a file in the folder"),
    "absolute path": ({"weight_map": {"a": "/etc/passwd"}}, "is not the name of a file in the folder"),
    "in a subfolder": ({"weight_map": {"a": "sub/model.safetensors"}}, "is not the name of a file in the folder"),
    "parent folder": ({"weight_map": {"a": ".."}}, "is not the name of a file in the folder"),
    "the folder itself": ({"weight_map": {"a": ""}}, "cannot be read (Is a directory)"),
    "a hidden file": ({"weight_map": {"a": ".model.safetensors"}}, "is not the name of a file in the folder"),
    "a zero byte": ({"weight_map": {"a": "model\0.safetensors"}}, "is not the name of a file in the folder"),
    "a missing shard": ({"weight_map": {"a": "model-00009-of-00009.safetensors"}}, "cannot be read (No such file"),
    "a shard that is text": ({"weight_map": {"a": "tokenizer.json"}}, "truncated or not safetensors"),
    "a missing tensor": ({"weight_map": {"b": "model-00001-of-00003.safetensors"}}, "where the index has it"),
    "a name too long": ({"weight_map": {"a": "x" * 300}}, "cannot be read (File name too long)"),
    "a number": ({"weight_map": {"a": 1}}, "has no weight_map"),
    "null": ({"weight_map": {"a": None}}, "has no weight_map"),
    "a list": ({"weight_map": ["a"]}, "has no weight_map"),
    "text": ({"weight_map": "a"}, "has no weight_map"),
    "no map": ({"metadata": {}}, "has no weight_map"),
    "an empty map": ({"weight_map": {}}, "beyond the largest dimension of any tensor"),
    "no object": (["weight_map"], "holds list where a JSON object belongs"),
}
for fault, (value, message) in INDEXES.items():
    make = functools.partial(lambda case, value: (case / "model" / INDEX).write_text(json.dumps(value)), value=value)
    message = "too few" if fault == "an empty map" else message
    CATALOGUE.put(f"index: {fault}", "llama-sharded", "plan", 3, message, make, "an index by itself")

TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "cut short": (b'{"weight_map": {"a"', "is not valid JSON"),
    "not UTF-8": (b'{"weight_map": {"\xff": "a"}}', "is not valid JSON"),
    "UTF-16": ('{"weight_map": {}}'.encode("utf-16"), "is not valid JSON"),
    "half a surrogate pair": (b'{"weight_map": {"\\ud800": "a"}}', "is not valid JSON"),
    "a key twice": (b'{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' stands twice"),
    "deep": (b'{"a":' * 100_000, "it is nested more than 64 deep"),
    "65 deep": (b"[" * 65 + b"]" * 65, "it is nested more than 64 deep"),
    "a number of 5,000 digits": (b'{"weight_map": %s}' % (b"9" * 5000), "is not valid JSON"),
    "two million values": (
        b'{"a": [' + b"[]," * 2_000_000 + b"0]}",
        f"values where at most {MAX_JSON_VALUES} are read",
    ),
    "a byte too many": (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', f"bytes where at most {MAX_JSON_BYTES} are read"),
    "as many keys as are read": (
        b'{"weight_map": {' + b",".join(b'"%d": ""' % i for i in range(MAX_JSON_VALUES - 3)) + b"}}",
        "",
    ),
    "as many bytes as are read, one a wide character": (
        b'{"model_type": "' + b"x" * (MAX_JSON_BYTES - 100) + "\N{PILE OF POO}".encode() + b'"}',
        "",
    ),
}
for fault, (content_bytes, message) in TEXTS.items():
    for base, file in (("llama-sharded", INDEX), ("llama", "config.json"), ("opt-bin", BIN_INDEX)):
        make = functools.partial(
            lambda case, file, b: (case / "model" / file).write_bytes(b), file=file, b=content_bytes
        )
        CATALOGUE.put(f"{file}: {fault}", base, "plan", 3, message, make, "JSON that is none, or too much")


def claimed_gigabyte(case: Path, file: str) -> None:
    (case / "model" / file).write_bytes(b"{")
    os.truncate(case / "model" / file, 10**9)


def piped(case: Path, file: str) -> None:
    (case / "model" / file).unlink()
    os.mkfifo(case / "model" / file)


for base, file in (("llama-sharded", INDEX), ("llama", "config.json"), ("opt-bin", BIN_INDEX)):
    make = functools.partial(claimed_gigabyte, file=file)
    CATALOGUE.put(f"{file}: a gigabyte", base, "plan", 3, "has 1000000000 bytes where", make, "a sparse file")
    make = functools.partial(piped, file=file)
    CATALOGUE.put(f"{file}: a pipe", base, "plan", 3, "is not a regular file", make, "would never end")


@CATALOGUE.entry("llama-sharded", "plan", 3, "tensors are missing")
def an_index_that_forgets_a_shard(case: Path) -> None:
    """The shards are all there; the index lists two of three."""
    index = tiny.read_json(case / "model" / INDEX)
    shard = sorted(index["weight_map"].values())[-1]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    tiny.write_json(case / "model" / INDEX, index)


@CATALOGUE.entry("llama-sharded", "plan", 3, "where the index has it")
def an_index_that_exchanges_two_shards(case: Path) -> None:
    """Shards and index disagree on what lies where."""
    index = tiny.read_json(case / "model" / INDEX)
    files = sorted(set(index["weight_map"].values()))
    exchanged = dict(zip(files, [files[1], files[0], files[2]], strict=True))
    index["weight_map"] = {name: exchanged[file] for name, file in index["weight_map"].items()}
    tiny.write_json(case / "model" / INDEX, index)


@CATALOGUE.entry("llama-sharded", "plan", 3, "cannot be read (No such file")
def a_shard_that_is_missing(case: Path) -> None:
    """A download that stopped."""
    (case / "model" / "model-00002-of-00003.safetensors").unlink()


@CATALOGUE.entry("llama-sharded", "plan", 3, "truncated or padded")
def a_shard_that_is_cut_short(case: Path) -> None:
    """A download that stopped in the middle of a file."""
    path = case / "model" / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def with_tensor(case: Path, name: str, tensor: torch.Tensor) -> None:
    path = case / "model" / SINGLE
    save_file({**load_file(path), name: tensor}, path)


QUANTISED = "the source is quantised"
UP = "model.layers.1.mlp.up_proj"
for part in (
    "weight_scale",
    "weight_scale_inv",
    "scales",
    "weight_packed",
    "weight.absmax",
    "lora_A.weight",
    "act_scale",
):
    make = functools.partial(with_tensor, name=f"{UP}.{part}", tensor=torch.ones(1))
    CATALOGUE.put(f"a weight's {part}", "llama", "compress", 3, f"{UP}.{part} is a part", make, QUANTISED)
for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
    make = functools.partial(with_tensor, name=f"{UP}.weight", tensor=torch.zeros(160, 64).to(kind))
    CATALOGUE.put(f"a weight of {kind}", "llama", "plan", 3, f"tensor '{UP}.weight' is F8_", make, QUANTISED)
CATALOGUE.put(
    "a block beyond those for multi-token prediction", "llama", "plan", 3, "is of a block beyond the 3 of config.json",
    functools.partial(with_tensor, name="model.layers.3.mlp.up_proj.weight", tensor=torch.ones(2)), "one too many",
)  # fmt: skip
