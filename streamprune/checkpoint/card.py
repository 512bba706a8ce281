"""README.md of an output: a model card, made of its manifest. Equal manifests make equal bytes.

What comes from elsewhere (the source's name, its licence, a manifest that may be forged) reaches the card only as a
quoted string of its front matter or as a span of code, of a bounded length: nothing in it is markup.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.checkpoint.beside import SOURCE_README, Beside
from streamprune.checkpoint.manifest import Manifest
from streamprune.checkpoint.untrusted import open_regular, read_exactly
from streamprune.config import NMPattern, PruneConfig

MAX_CHARACTERS = 100  # of a name or a value
README_BYTES = 1 << 16  # of the source's, which begins with its front matter
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)[\w.-]{0,60}", re.ASCII | re.IGNORECASE)

PACKED = """\
The weights lie here packed, and stay so in memory. transformers loads them once streamprune is imported, and ends with
an error without it. With the folder of this file, or its name on the hub, for FOLDER:

    import streamprune
    from transformers import LOADER

    model = LOADER.from_pretrained("FOLDER")

What else there is, for the folder:

    streamprune verify FOLDER                       # every checksum, exactly N of M, every layer's product
    streamprune evaluate FOLDER --text TEXT.txt     # perplexity, block by block
    streamprune export FOLDER --out DENSE           # a plain checkpoint with zeros, as large as the source"""
DENSE = """\
It is a plain checkpoint with zeros in the dropped places. With the folder of this file for FOLDER:

    from transformers import LOADER

    model = LOADER.from_pretrained("FOLDER")"""


@dataclass(frozen=True)
class Licence:
    """What a source says of its licence: an identifier and a name in its card's front matter; a file with the text."""

    identifier: str | None
    name: str | None
    file: str | None


def source_name(folder: Path, config: Mapping[str, Any]) -> str:
    """What a source is called, printable: by the cache of a model hub or by its config OWNER/NAME, else its folder.

    The cache goes first: the config of a model that was made from another may still have the other's name.
    """
    given, repository = config.get("_name_or_path"), _cached(folder)
    if repository is None and isinstance(given, str) and _is_repository(given):
        return given
    name = repository or _named(folder).name
    return "".join(c if c.isprintable() else "?" for c in name) or "model"


def source_revision(folder: Path) -> str | None:
    """The commit of a source that lies in the cache of a model hub; None for any other."""
    name = _named(folder).name
    return name if _cached(folder) and COMMIT.fullmatch(name) else None


def _cached(folder: Path) -> str | None:
    """The name of the repository of which a folder is a snapshot in a hub's cache, by the layout of caches."""
    snapshots = _named(folder).parent
    repository = snapshots.parent.name
    if snapshots.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def _named(folder: Path) -> Path:
    return Path(os.path.abspath(folder))  # noqa: PTH100 - a link has its own name


def source_licence(folder: Path, beside: Beside) -> Licence:
    """What the card and the files that are copied from `folder` say. Raises CheckpointError for one gone meanwhile."""
    readme = next((name for name, target in beside.placed.items() if target == SOURCE_README), None)
    head = ""
    if readme is not None:
        file, size_bytes = open_regular(folder / readme)
        with file:
            content = read_exactly(file, min(size_bytes, README_BYTES), folder / readme)
        matter = re.match(r"---[ \t]*\r?\n(.*?)\n---", content.decode("utf-8-sig", "replace"), re.DOTALL)
        head = matter[1] if matter else ""

    def word_at(key: str) -> str | None:
        form = rf"^{key}:[ \t]*(['\"]?)([a-z0-9][\w.-]{{0,60}})\1[ \t\r]*$"
        found = re.search(form, head, re.MULTILINE | re.ASCII)
        return found[2] if found else None

    file_name = next((name for name in beside.placed.values() if LICENCE_FILE.fullmatch(name)), None)
    return Licence(word_at("license"), word_at("license_name"), file_name)


def model_card(
    manifest: Manifest,
    layers: Mapping[str, NMPattern],
    licence: Licence,
    beside: Beside,
    dense_bytes: int | None = None,
) -> str:
    """The card of a packed output with the pruned `layers`, or of its dense export, of `dense_bytes` in all."""
    name, made_by = manifest.source_name or "a model", manifest.made_by or "streamprune"
    dense, wraps = dense_bytes is not None, _wraps_text(manifest.identity)
    loader = "AutoModelForImageTextToText" if wraps else "AutoModelForCausalLM"
    commit = f" (commit {_code(manifest.source_revision)})" if manifest.source_revision else ""
    patterns = ", ".join(sorted({str(pattern) for pattern in layers.values()}))
    bits = "were fitted to the dense layers' outputs" if manifest.reconstructed else "have the source's bits"
    pruned = f"In its linear layers N of every M input channels of a row are kept ({patterns}), the others are zero."
    sections = [
        _front_matter(name, patterns, licence, dense, wraps),
        f"# {_code(name)}, pruned",
        f"{_code(name)}{commit}, pruned by {_code(made_by)} in one shot. {pruned} Kept weights {bits}.",
        "## How to load it",
        (DENSE if dense else PACKED).replace("LOADER", loader),
        "## Measured",
        _table(_figures(manifest, layers, manifest.weights_bytes if dense_bytes is None else dense_bytes)),
        "A block error is that of what a block adds to its inputs, relative to what it adds in the dense model "
        "(Frobenius norms, over the calibration text). No perplexity was measured."
        if manifest.validated
        else "No text has passed the model: what pruning costs is unknown.",
        "## Settings",
        _table(_settings(manifest.identity)),
        "## Licence",
        _licence_text(licence),
    ]
    if SOURCE_README in beside.placed.values():
        sections.append(f"The source's own card is `{SOURCE_README}`. What it says of quality, it says of the source.")
    return "\n\n".join(sections) + "\n"


def _wraps_text(identity: Mapping[str, Any]) -> bool:
    """Whether the model holds other parts than its language model."""
    source = identity.get("source")
    return isinstance(source, dict) and isinstance(source.get("config"), dict) and "text_config" in source["config"]


def _front_matter(name: Any, patterns: str, licence: Licence, dense: bool, wraps: bool) -> str:
    """YAML: each value is JSON in ASCII, which is YAML too."""
    values: dict[str, Any] = {
        "base_model": name if isinstance(name, str) and _is_repository(name) else None,
        "library_name": "transformers" if dense else "streamprune",
        "license": licence.identifier or ("other" if licence.file else None),
        "license_name": licence.name,
        "license_link": licence.file if licence.identifier in (None, "other") else None,
        "pipeline_tag": "image-text-to-text" if wraps else "text-generation",
        "tags": ["streamprune", "pruned", "sparse", *filter(None, patterns.split(", "))],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _figures(manifest: Manifest, layers: Mapping[str, NMPattern], weights_bytes: int) -> dict[str, str]:
    blocks, recorded = manifest.blocks, manifest.layers
    sizes = {layer.name: math.prod(layer.shape) for layer in recorded}
    dropped = sum(sizes.get(name, 0) * (1 - p.kept / p.group_size) for name, p in layers.items())
    kept_dense = sum(block.outcome == "kept dense" for block in blocks)
    errors = {b.name: b.block_error for b in blocks if b.layers and b.block_error is not None}
    worst = max(errors, key=lambda name: errors[name], default=None)
    mean = math.fsum(error / len(errors) for error in errors.values())
    return {
        "blocks": f"{len(blocks)}" + (f", {kept_dense} kept dense" if kept_dense else ""),
        "block error, worst": "unknown" if worst is None else f"{errors[worst]:.4g}, of {_code(worst)}",
        "block error, mean": "unknown" if worst is None else f"{mean:.4g}",
        "linear layers in the blocks": f"{len(layers)} pruned, {len(manifest.dense_layers)} dense",
        "zeros in pruned layers": f"{dropped / max(1, sum(sizes.values())):.2%} of their weights",
        "pruned layers, dense": _megabytes(sum(layer.dense_bytes for layer in recorded)),
        "pruned layers, packed": _megabytes(sum(layer.packed_bytes for layer in recorded)),
        "all weights of the source": _megabytes(manifest.source_bytes),
        "all weights here": _megabytes(weights_bytes),
    }


def _settings(identity: Mapping[str, Any]) -> dict[str, str]:
    settings = {field.name: identity["settings"].get(field.name) for field in dataclasses.fields(PruneConfig)}
    calibration, compute = identity.get("calibration"), identity.get("compute")
    for about, keys in (
        (calibration, ("samples", "sequence_length", "seed")),
        (compute, ("device", "dtype")),
    ):
        if isinstance(about, dict):
            settings |= {key: about.get(key) for key in keys}
    return {name: _code("none" if value is None else value) for name, value in settings.items()}


def _licence_text(licence: Licence) -> str:
    says = f"The source's card says {_code(licence.identifier)}." if licence.identifier else ""
    where = f"The source's licence is in `{licence.file}`." if licence.file else ""
    found = " ".join(filter(None, (says, where)))
    return found or "The source's files name no licence: look for it before this is passed on."


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _code(value: Any) -> str:
    """A span of code: in it nothing is markup but the mark that ends it and, in a table, the one that ends a cell."""
    text = str(value)[:MAX_CHARACTERS]
    return f"`{''.join(c if c.isprintable() and c not in '`|' else '?' for c in text).strip() or '?'}`"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _is_repository(name: str) -> bool:
    """Is it a name that a model hub could have? Only such a one may be a base model in a card."""
    return REPOSITORY.fullmatch(name) is not None and not re.search(r"--|\.\.|[-.](/|$)|\.git$", name)
