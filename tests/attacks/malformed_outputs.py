"""Outputs of ours that somebody damaged, or forged with every checksum right; and output folders with links in them."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attacks.catalogue import Catalogue, Make

CATALOGUE = Catalogue()
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
READERS = ("inspect", "verify", "evaluate", "export")


def code_of(command: str) -> int:
    """What an unreadable output is to a command: to verify a fault, to others no checkpoint."""
    return 1 if command.startswith("verify") else 3


def manifest_with(case: Path, edit: Callable[[Any], object]) -> None:
    """Edit the manifest and make its digest right again."""
    path = case / "model" / tiny.MANIFEST
    manifest = tiny.read_json(path)
    edit(manifest)
    tiny.write_json(path, manifest)
    (case / "model" / tiny.MANIFEST_DIGEST).write_text(f"{tiny.sha256(path)}  {tiny.MANIFEST}\n")


def at(manifest: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        manifest = manifest[key]
    return manifest


def set_at(case: Path, path: tuple[Any, ...], value: Any) -> None:
    manifest_with(case, lambda manifest: at(manifest, path[:-1]).__setitem__(path[-1], value))


def remove_at(case: Path, path: tuple[Any, ...]) -> None:
    manifest_with(case, lambda manifest: at(manifest, path[:-1]).__delitem__(path[-1]))


LAYER = ("blocks", 1, "layers", 0)
FIELDS: dict[tuple[Any, ...], tuple[Any, ...]] = {  # each with values of other types, or out of range
    ("blocks",): (None, {}, [], "x", [1]),
    ("blocks", 1): (None, [], "x"),
    ("blocks", 1, "name"): (None, 5, ["x"]),
    ("blocks", 1, "outcome"): (1, {}),
    ("blocks", 1, "block_error"): ("0.1", None, float("nan"), []),
    ("blocks", 1, "layers"): (None, {}, ["x"]),
    ("blocks", 1, "moments"): (None, 3, {}),
    (*LAYER, "name"): (None, "model.layers.9.mlp.up_proj", 7),
    (*LAYER, "pattern"): (None, 2, ["2:4"]),
    (*LAYER, "shape"): (None, 64, [64], [64, "64"], [64, 64, 64], [-1, 64]),
    (*LAYER, "packed_bytes"): (None, "9", -1, 1.5, True, 10**400, 2**63),
    (*LAYER, "steps"): (None, {}, [], [1], [{"name": "selection"}]),
    (*LAYER, "steps", 0, "retained_score"): (None, "x", float("inf")),
    (*LAYER, "steps", 0, "corrected_error"): (float("inf"), "x", float("nan")),
    (*LAYER, "shrinkage"): (None, 0.5, ["x"]),
    (*LAYER, "layer_error"): ("x", None),
    (*LAYER, "kernel_error"): ([], None),
    ("dense_layers",): (None, [], {"x": 1}),
    ("files",): (None, [], {"config.json": 1}, {"config.json": {"sha256": 1, "bytes": 2}}, {"x": {"bytes": 1}}),
    ("identity",): (None, [], {}),
    ("identity", "settings"): (None, "x", {}),
    ("identity", "settings", "validate"): (None, "yes", 1),
    ("identity", "settings", "reconstruct"): (None, 0),
    ("source_tensors",): (None, [], {"x": 1}),
    ("source_bytes",): (None, -1, "x"),
    ("format_version",): (None, "2", True, 2.0, [2]),
    ("source_name",): (None, 5, ["x"]),
    ("made_by",): (None, {}, 1),
    ("source_revision",): (5, ["x"]),
}
for path, values in FIELDS.items():
    shown = ".".join(map(str, path))
    for number, value in enumerate(values):
        command = ("inspect", "verify", "again")[number % 3]
        name, why = f"manifest: {shown} is {value!r:.50}", "a field of another kind, the digest right"
        message = "disagree" if value == "model.layers.9.mlp.up_proj" else "streamprune_manifest.json: is "
        make: Make = functools.partial(set_at, path=path, value=value)
        CATALOGUE.put(name, "packed", command, code_of(command), message, make, why)
    if path[-1] not in (1, "source_revision"):  # what may be missing
        make = functools.partial(remove_at, path=path)
        for command in ("inspect", "verify"):
            CATALOGUE.put(
                f"manifest without {shown}",
                "packed",
                command,
                code_of(command),
                "is m",
                make,
                "a field that is missing",
            )

JSON_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' * 100_000,
    "70 deep": b'{"a":' * 70 + b"1" + b"}" * 70,
    "a key twice": b'{"blocks": [], "blocks": []}',
    "many values": b'{"a": [' + b"[]," * 2_000_000 + b"0]}",
}


def file_with(case: Path, name: str, content: bytes) -> None:
    (case / "model" / name).write_bytes(content)


for fault, content in JSON_TEXTS.items():
    for name, commands in (
        (tiny.MANIFEST, ("inspect", "verify", "again")),
        ("config.json", ("evaluate", "export")),
        (tiny.INDEX, ("inspect", "evaluate")),
        ("timings.json", ("again",)),
    ):
        for command in commands:
            make = functools.partial(file_with, name=name, content=content)
            CATALOGUE.put(
                f"{name}: {fault}", "packed", command, code_of(command), name, make, "JSON that is none, or too much"
            )


def grown(case: Path, name: str) -> None:
    os.truncate(case / "model" / name, 10**9)


for name, command in (
    (tiny.MANIFEST, "inspect"),
    (tiny.MANIFEST, "verify"),
    (tiny.MANIFEST, "again"),
    (tiny.MANIFEST_DIGEST, "verify"),
    ("timings.json", "again"),
    ("config.json", "export"),
):
    make = functools.partial(grown, name=name)
    CATALOGUE.put(
        f"{name} of a gigabyte",
        "packed",
        command,
        code_of(command),
        "has 1000000000 bytes where",
        make,
        "a sparse file",
    )


def entry_with(case: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit config.json's quantization_config."""
    path = case / "model" / "config.json"
    config = tiny.read_json(path)
    edit(config["quantization_config"])
    tiny.write_json(path, config)
    tiny.reseal(case / "model")


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 3": (lambda e: e.update(format_version=3), "has packed format 3; this streamprune reads 1 and 2"),
    "version 0": (lambda e: e.update(format_version=0), "has packed format 0"),
    "version 2.0": (lambda e: e.update(format_version=2.0), "has packed format 2.0"),
    "version of 5,000 digits": (lambda e: e.update(format_version=[10**4] * 1000), "has packed format [10000, "),
    "version true": (lambda e: e.update(format_version=True), "has packed format True"),
    "version of text": (lambda e: e.update(format_version="2"), "has packed format 2"),
    "no version": (lambda e: e.pop("format_version"), "has packed format None"),
    "another method": (lambda e: e.update(quant_method="gptq"), ""),
    "layers of a list": (lambda e: e.update(layers=["x"]), "quantization_config is malformed"),
    "no layers": (lambda e: e.pop("layers"), "quantization_config is malformed"),
    "a layer of text": (lambda e: e["layers"].update({DOWN: "2:4"}), "quantization_config is malformed"),
    "a layer without pattern": (lambda e: e["layers"].update({DOWN: {}}), "quantization_config is malformed"),
    "a pattern of a number": (lambda e: e["layers"][DOWN].update(pattern=2), "quantization_config is malformed"),
    "a pattern of 4:2": (lambda e: e["layers"][DOWN].update(pattern="4:2"), "quantization_config is malformed"),
    "a pattern of 0:4": (lambda e: e["layers"][DOWN].update(pattern="0:4"), "quantization_config is malformed"),
    "a pattern of 2:999": (lambda e: e["layers"][DOWN].update(pattern="2:999"), "quantization_config is malformed"),
    "another pattern": (lambda e: e["layers"][DOWN].update(pattern="1:4"), "does not have 320 channels"),
    "another pattern of the same share": (lambda e: e["layers"][DOWN].update(pattern="4:8"), ""),
    "a layer that is not there": (
        lambda e: e["layers"].update({"no.such": {"pattern": "2:4"}}),
        "has no weight_values",
    ),
    "a layer less": (lambda e: e["layers"].pop(DOWN), DOWN),
    "dense layers of a list": (lambda e: e.update(dense_layers=[1]), "quantization_config is malformed"),
}
for fault, (edit, message) in ENTRIES.items():
    for command in READERS:
        if fault in ("another method", "a layer less", "another pattern of the same share") and command == "export":
            continue  # what is left there is a checkpoint in itself
        if fault == "another pattern of the same share" and command == "evaluate":
            continue  # every mask of 2:4 is one of 4:8
        if fault == "another method" and command == "verify":
            continue
        make = functools.partial(entry_with, edit=edit)
        CATALOGUE.put(
            f"quantization_config: {fault}", "packed", command, code_of(command), message, make, "checksums are right"
        )


def tensors_with(case: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor of a shard, or remove it, and make every checksum right again."""
    shard = tiny.shard_of(case / "model", name)
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    changed = edit(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, shard, metadata=metadata)
    tiny.reseal(case / "model")


def cleared(mask: torch.Tensor) -> torch.Tensor:
    mask[3, 2] = 0
    return mask


def filled(mask: torch.Tensor) -> torch.Tensor:
    return torch.full_like(mask, 255)


def moved(mask: torch.Tensor) -> torch.Tensor:
    """One bit from the first group of row 2 to the second: the row keeps as many as before."""
    low, high = int(mask[2, 0]) & 0xF, int(mask[2, 0]) >> 4
    low &= low - 1
    mask[2, 0] = low | (high | ~high & (high + 1)) << 4
    return mask


def repeated(order: torch.Tensor) -> torch.Tensor:
    order[0] = order[1]
    return order


def beyond(order: torch.Tensor) -> torch.Tensor:
    order[5] = 2**31 - 1
    return order


def negative(order: torch.Tensor) -> torch.Tensor:
    order[5] = -1
    return order


MASK, VALUES, ORDER = f"{DOWN}.weight_mask", f"{DOWN}.weight_values", f"{QUERY}.input_permutation"
TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "no values": (VALUES, lambda t: None, f"{VALUES} is not in"),
    "no mask": (MASK, lambda t: None, f"{MASK} is not in"),
    "values of int16": (VALUES, lambda t: t.view(torch.int16), "values and mask do not fit"),
    "values in one dimension": (VALUES, lambda t: t.reshape(-1).contiguous(), "values and mask do not fit"),
    "values of a row less": (VALUES, lambda t: t[1:].contiguous(), "values and mask do not fit"),
    "values of a column less": (VALUES, lambda t: t[:, 1:].contiguous(), "values and mask do not fit"),
    "values of a group less": (VALUES, lambda t: t[:, 2:].contiguous(), "down_proj"),
    "values of no columns": (VALUES, lambda t: t[:, :0].contiguous(), "does not have 0 channels"),
    "a mask of int8": (MASK, lambda t: t.view(torch.int8), "values and mask do not fit"),
    "a mask of bool": (MASK, lambda t: t.view(torch.bool), "values and mask do not fit"),
    "a mask of float16": (MASK, lambda t: t.to(torch.float16), "values and mask do not fit"),
    "a mask of a column more": (MASK, lambda t: torch.cat([t, t[:, :1]], 1), "does not have 160 channels"),
    "a mask of a row less": (MASK, lambda t: t[1:].contiguous(), "values and mask do not fit"),
    "a mask in three dimensions": (MASK, lambda t: t[None].contiguous(), "values and mask do not fit"),
    "an order of int64": (ORDER, lambda t: t.long(), "input_permutation is not int32 [64]"),
    "an order of float32": (ORDER, lambda t: t.float(), "input_permutation is not int32 [64]"),
    "an order of fewer": (ORDER, lambda t: t[:8].contiguous(), "input_permutation is not int32 [64]"),
    "an order in two dimensions": (ORDER, lambda t: t[None].contiguous(), "input_permutation is not int32 [64]"),
}
for number, (fault, (name, replace, message)) in enumerate(TENSORS.items()):
    for command in READERS[number % 2 :: 2]:
        make = functools.partial(tensors_with, name=name, edit=replace)
        CATALOGUE.put(
            f"packed layer: {fault}", "packed", command, code_of(command), message, make, "checksums are right"
        )

CONTENTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "a group that keeps none": (MASK, cleared, f"{DOWN}: row 3, group 4 keeps 0 of 4, not 2"),
    "every bit set": (MASK, filled, f"{DOWN}: row 0, group 0 keeps 4 of 4, not 2"),
    "a bit in the next group": (MASK, moved, f"{DOWN}: row 2, group 0 keeps 1 of 4, not 2"),
    "no bit set": (MASK, torch.zeros_like, f"{DOWN}: row 0, group 0 keeps 0 of 4, not 2"),
    "an order that names a channel twice": (ORDER, repeated, f"{QUERY}: its input_permutation is not a permutation"),
    "an order beyond its channels": (ORDER, beyond, f"{QUERY}: its input_permutation is not a permutation"),
    "an order below zero": (ORDER, negative, f"{QUERY}: its input_permutation is not a permutation"),
    "values of NaN": (VALUES, lambda t: torch.full_like(t, float("nan")), f"tensor {VALUES} holds NaN or infinity"),
    "infinite values": (VALUES, lambda t: torch.full_like(t, float("inf")), f"tensor {VALUES} holds NaN or infinity"),
}
for fault, (name, replace, message) in CONTENTS.items():
    for command in ("verify", "evaluate", "export"):
        make = functools.partial(tensors_with, name=name, edit=replace)
        code = 6 if "NaN" in message and command != "verify" else code_of(command)
        CATALOGUE.put(f"packed layer: {fault}", "packed", command, code, message, make, "headers are right")


def about_with(case: Path, content: str) -> None:
    """Other metadata of the folded permutations."""
    path = case / "model" / tiny.PERMUTATIONS
    save_file(load_file(path), path, metadata={"streamprune": content})
    tiny.reseal(case / "model")


ABOUT: dict[str, str] = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "many values": "[" + "[]," * 2_000_000 + "0]",
    "an object": '{"a": 1}',
    "text": '["text"]',
    "numbers": "[1, 2]",
    "a dimension of text": json.dumps([{"permutation": f"{DOWN}.input_permutation", "reorders": [["x", "0"]]}]),
    "a dimension of 9": json.dumps([{"permutation": f"{DOWN}.input_permutation", "reorders": [[f"{DOWN}.weight", 9]]}]),
    "a tensor of a list": json.dumps([{"permutation": f"{DOWN}.input_permutation", "reorders": [[["x"], 0]]}]),
    "a permutation that is not there": json.dumps([{"permutation": "nowhere", "reorders": []}]) + " ",
}
for fault, content in ABOUT.items():
    make = functools.partial(about_with, content=content)
    CATALOGUE.put(f"reordered tensors: {fault}", "packed", "verify --source", 1, "FAULT", make, "checksums are right")


@CATALOGUE.entry("packed", "verify", 1, "its sha256 is not the one in streamprune_manifest.sha256")
def a_digest_of_another_manifest(case: Path) -> None:
    """Of right form, and wrong."""
    (case / "model" / tiny.MANIFEST_DIGEST).write_text("0" * 64 + f"  {tiny.MANIFEST}\n")


@CATALOGUE.entry("packed", "verify", 1, "../text.txt: is missing")
def a_manifest_that_names_files_outside(case: Path) -> None:
    """What lies outside the folder is none of its."""
    files = {"../text.txt": {"sha256": tiny.sha256(case / "text.txt"), "bytes": 3000}}
    manifest_with(case, lambda manifest: manifest["files"].update(files))


ELSEWHERE = {
    "through a folder": "original/../../text.txt",
    "by its whole path": "/etc/passwd",
    "behind a link": "linked/text.txt",
    "a folder": "linked",
    "of no name": "",
    "with an empty part": "original//text.txt",
    "with a zero byte": "text\0.txt",
    "with an endless part": "x" * 900,
    "below a file": "config.json/text.txt",
    "that a terminal obeys": "\x1b[2J.txt",
}


def naming(case: Path, name: str) -> None:
    (case / "model" / "linked").symlink_to("..")
    files = {name: {"sha256": tiny.sha256(case / "text.txt"), "bytes": 3000}}
    manifest_with(case, lambda manifest: manifest["files"].update(files))


for what, name in ELSEWHERE.items():
    make = functools.partial(naming, name=name)
    CATALOGUE.put(f"a manifest's file {what}", "packed", "verify", 1, ": is missing", make, "it is not in the folder")


for version in (0, 3, 10**18):
    for command in ("verify", "inspect", "again", "export"):
        make = functools.partial(set_at, path=("format_version",), value=version)
        message = f"has packed format {version}; this streamprune reads 1 and 2"
        CATALOGUE.put(f"manifest of version {version}", "packed", command, code_of(command), message, make, "unknown")


def version_1_in(case: Path, where: str) -> None:
    """Of this version's files, all checksums right."""
    path = case / "model" / where
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    tiny.reseal(case / "model")


for where in ("config.json", tiny.MANIFEST):
    make = functools.partial(version_1_in, where=where)
    CATALOGUE.put(
        f"version 1 in {where}", "packed", "verify", 1, "config.json says format", make, "the other disagrees"
    )
for command in ("inspect", "evaluate", "export"):
    make = functools.partial(version_1_in, where="config.json")
    message = "model.safetensors.index.json: cannot be read"
    CATALOGUE.put("version 1 in config.json", "packed", command, 3, message, make, "the files have other names")


@CATALOGUE.entry("packed", "verify", 1, "model.safetensors: is not in streamprune_manifest.json")
def weights_that_a_plain_loader_takes(case: Path) -> None:
    """transformers would fill the pruned layers with random weights."""
    save_file({"a": torch.zeros(2)}, case / "model" / "model.safetensors")


@CATALOGUE.entry("packed", "export", 0)
def a_manifest_whose_words_are_markup(case: Path) -> None:
    """They are written into the card of the export."""
    text = "](https://x.example)<script>`|\n---\nlicense: mit\n---\n\x1b[2J" + "x" * 10_000
    settings = {"validate": True, "reconstruct": False, "metric": [[text] * 10] * 10, "pattern": {text[:500]: text}}
    manifest_with(
        case, lambda m: m.update(source_name=text, made_by=text, identity={**m["identity"], "settings": settings})
    )


@CATALOGUE.entry("packed", "inspect", 3, "disagree on ")
def a_layer_name_that_a_terminal_obeys(case: Path) -> None:
    """Names in the manifest are printed."""
    manifest_with(case, lambda manifest: at(manifest, LAYER).update(name="\x1b[2J\nlayer"))


@CATALOGUE.entry("packed", "inspect", 0)
def reasons_that_a_terminal_obeys(case: Path) -> None:
    """So are reasons."""
    manifest_with(case, lambda manifest: manifest.update(dense_layers={"a\x1b[2J\n": "b\x07\u202e"}))


@CATALOGUE.entry("packed", "verify", 1, "is not a finished output of streamprune")
def an_output_without_its_digest(case: Path) -> None:
    """What a killed job leaves."""
    (case / "model" / tiny.MANIFEST_DIGEST).unlink()


@CATALOGUE.entry("llama", "inspect", 3, "is not a finished streamprune output")
def a_source_for_an_output(case: Path) -> None:
    """Nothing of ours."""


@CATALOGUE.entry("packed", "compress", 3, "is already an output of streamprune")
def an_output_for_a_source(case: Path) -> None:
    """Pruned twice it would be pruned wrongly."""


# Links in an output folder, or where one is to be.
def linked(case: Path, name: str, target: str, unfinished: bool = True) -> None:
    """An output folder with the work of a job in it, and a link."""
    out = case / "out"
    (out / ".work" / "epoch-1-0").mkdir(parents=True)
    (case / "elsewhere").mkdir()
    (case / "elsewhere" / "thesis.tex").write_text("mine")
    if (out / name).is_dir():
        (out / ".work" / "epoch-1-0").rmdir()
        (out / ".work").rmdir()
    (out / name).symlink_to(target)


LINKS = {
    "a shard": ("streamprune-00001-of-00004.safetensors", "../elsewhere/thesis.tex"),
    "the config": ("config.json", "../elsewhere/thesis.tex"),
    "the manifest": (tiny.MANIFEST, "/etc/passwd"),
    "the digest": (tiny.MANIFEST_DIGEST, "nowhere"),
    "the work folder": (".work", "../elsewhere"),
    "hidden states": (".work/hidden-0.bin", "../../elsewhere/thesis.tex"),
    "a journal entry": (".work/block-00000.json", "../../elsewhere/thesis.tex"),
    "an epoch": (".work/epoch-2-0", "../../elsewhere"),
}
for what, (name, target) in LINKS.items():
    make = functools.partial(linked, name=name, target=target)
    CATALOGUE.put(
        f"a link for {what}", "llama", "compress", 5, f"{name}: is a symbolic link in an output folder", make,
        "what is written behind a link is another's",
    )  # fmt: skip


@CATALOGUE.entry("packed", "export", 5, "out: exists already")
def a_link_for_an_export(case: Path) -> None:
    """A dangling one, which does not exist to one who follows it."""
    (case / "out").symlink_to("nowhere")


@CATALOGUE.entry("packed", "export", 5, ".out.partial: is a symbolic link")
def a_link_where_an_export_is_made(case: Path) -> None:
    """Everything would be written behind it."""
    (case / "elsewhere").mkdir()
    (case / ".out.partial").symlink_to("elsewhere")


@CATALOGUE.entry("llama", "compress", 5, "is not empty and not an output of streamprune")
def a_folder_of_other_files(case: Path) -> None:
    """Somebody's work."""
    (case / "out").mkdir()
    (case / "out" / "thesis.tex").write_text("mine")


@CATALOGUE.entry("llama", "compress", 5, "cannot be used as output")
def an_output_that_is_a_file(case: Path) -> None:
    """A mistyped path."""
    (case / "out").write_text("mine")


@CATALOGUE.entry("llama", "compress", 0)
def a_holder_that_is_deep_json(case: Path) -> None:
    """What lies in an unfinished output may be as malformed as anything else: nobody holds it, and the job goes on."""
    epoch = case / "out" / ".work" / "epoch-1-0"
    epoch.mkdir(parents=True)
    (epoch / "holder-0.json").write_text("[" * 100_000)


@CATALOGUE.entry("llama", "compress", 0)
def a_journal_of_zeros(case: Path) -> None:
    """As a power loss leaves it."""
    (case / "out" / ".work" / "epoch-1-0").mkdir(parents=True)
    for name in ("identity.json", "block-00000.json", "block-00000.safetensors"):
        (case / "out" / ".work" / name).write_bytes(bytes(1000))
