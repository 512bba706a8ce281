"""The manifest of an output: every field that anything relies on is checked. docs/format.md says what they mean."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.checkpoint.untrusted import read_json
from streamprune.errors import CheckpointError


@dataclass(frozen=True)
class Items:
    """A list whose items are all of one kind, `least` to `most` of them."""

    kind: Any
    least: int = 0
    most: float = math.inf


@dataclass(frozen=True)
class Entries:
    """An object with any keys whose values are all of one kind."""

    kind: Any


# A kind is a type, a union of types, Items, Entries, or a dict of the keys that must be there with their kinds.
# Integers are counts: 0 to 2^63. Numbers are finite.
NUMBER = int | float
STEP = {"name": str, "retained_score": NUMBER, "output_error": NUMBER | None, "corrected_error": NUMBER | None}
LAYER = {
    "name": str,
    "pattern": str,
    "shape": Items(int, 2, 2),
    "dense_bytes": int,
    "packed_bytes": int,
    "permutation_bytes": int,
    "steps": Items(STEP, 1),
    "shrinkage": Items(NUMBER),
    "weighted_error": NUMBER,
    "kernel_error": NUMBER | None,
    "layer_error": NUMBER | None,
}
BLOCK = {
    "name": str,
    "outcome": str,
    "block_error": NUMBER | None,
    "moments": {"bytes": int, "layers_in_blocks": Items(str)},
    "layers": Items(LAYER),
}
MANIFEST = {
    "format_version": int,
    "identity": {"settings": {"validate": bool, "reconstruct": bool}},
    "blocks": Items(BLOCK, 1),
    "dense_layers": Entries(str),
    "source_bytes": int,
    "source_tensors": Entries(str),
    "files": Entries({"sha256": str, "bytes": int}),
}
MEASURED = ("kernel_error", "layer_error")  # by running text; null where none was run
TIMINGS = {"seconds": NUMBER, "peak_memory_bytes": int}


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose fields are of their kinds. Raises CheckpointError naming the first that is not."""
    manifest = read_checked(path, MANIFEST)
    if manifest["identity"]["settings"]["validate"]:
        for block in manifest["blocks"]:
            measured = [block["block_error"], *(layer[key] for layer in block["layers"] for key in MEASURED)]
            if None in measured:
                raise CheckpointError(f"{path}: is malformed (errors of {block['name']} are null, though it validated)")
    return manifest


def read_checked(path: Path, kind: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object of a kind. Raises CheckpointError naming the first field that is not of its kind."""
    value = read_json(path)
    if fault := next(_faults(value, kind, ""), None):
        raise CheckpointError(f"{path}: is malformed ({fault}); run streamprune verify, or take another copy")
    return value


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted names of the entries in which two nested objects differ, with both values in short."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, _short(old), _short(new)


def _faults(value: Any, kind: Any, where: str) -> Iterator[str]:
    container = list if isinstance(kind, Items) else dict if isinstance(kind, Entries | dict) else None
    if container is not None and not isinstance(value, container):
        yield f"{where or 'it'} is {_shown(value)}, no {'list' if container is list else 'object'}"
    elif isinstance(kind, Items):
        if not kind.least <= len(value) <= kind.most:
            yield f"{where} has {len(value)} items"
        for place, item in enumerate(value):
            yield from _faults(item, kind.kind, f"{where}[{place}]")
    elif isinstance(kind, Entries):
        for name, item in value.items():
            yield from _faults(item, kind.kind, f"{where}.{name:.80}")
    elif isinstance(kind, dict):
        for name, inner in kind.items():
            if name not in value:
                yield f"{where}.{name} is missing".lstrip(".")
            else:
                yield from _faults(value[name], inner, f"{where}.{name}".lstrip("."))
    elif not _is_of(value, kind):
        yield f"{where} is {_shown(value)}"


def _is_of(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    if isinstance(value, int) and not isinstance(value, bool):
        return 0 <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = "other entries" if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 else f"{text[:8]}..."  # a digest
