"""The files beside a checkpoint's weights: tokenizer, chat templates, licences, model card, and whatever else there is.

They belong to the model and are copied, at any depth, except weights, code (which is never run) and leftovers of tools.
Contents are copied, modes are not. Files are named by their relative paths, with / between the parts.
"""

import os
import stat
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from streamprune.checkpoint.untrusted import MAX_TOKENIZER_BYTES, read_bounded
from streamprune.checkpoint.writer import output_errors, sync_folder, write_atomically
from streamprune.errors import CheckpointError, OutputError

MAX_FILE_BYTES = MAX_TOKENIZER_BYTES
MAX_ENTRIES = 2000  # looked at: a large repository has some hundred, most of them shards
MAX_DEPTH = 8
MAX_NAME_BYTES, MAX_PART_BYTES = 500, 255  # so that the manifest of so many names stays within the limits on JSON

WEIGHTS = (
    "safetensors", "bin", "pt", "pth", "ckpt", "pkl", "pickle", "gguf", "ggml", "msgpack", "h5", "hdf5", "npy", "npz",
    "ot", "tflite", "nemo", "pb", "distcp", "engine", "keras", "mlmodel", "pdparams", "torchscript",
)  # fmt: skip
CODE = (
    "py", "pyc", "pyi", "pyx", "ipynb", "so", "so.*", "dll", "dylib", "exe", "sh", "bash", "zsh", "bat", "cmd", "ps1",
    "js", "ts", "c", "cc", "cpp", "cu", "cuh", "h", "hpp", "rs", "go", "java", "jar", "rb", "pl", "php", "lua", "wasm",
    "whl",
)  # fmt: skip
LEFT_OUT = {  # why, by patterns of names in lower case
    "hidden": (".*",),
    "weights": (
        *(f"*.{suffix}{rest}" for suffix in WEIGHTS for rest in ("", ".index.json", ".index.*.json")),
        "*.onnx*",
        "consolidated.*",
    ),
    "about other weights": ("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    "code": tuple(f"*.{suffix}" for suffix in CODE),
    "temporary": ("*.lock", "*.incomplete", "*.tmp", "*.temp", "*.part", "*.partial", "*.sw[op]", "*~"),
    "a log": ("*.log", "events.out.tfevents.*"),
    "of the system": ("thumbs.db", "desktop.ini"),
}
LEFT_OUT_FOLDERS = {"hidden": (".*",), "code": ("__pycache__",), "of the file system": ("lost+found",)}
OURS = ("config.json", "timings.json", "streamprune*")  # at the top of an output
README, SOURCE_README = "README.md", "README.source.md"  # the first is the output's own card


@dataclass(frozen=True)
class Beside:
    """Names of the files to copy, and of those left out, each with the reason; folders end in /."""

    copied: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def placed(self) -> dict[str, str]:
        """Where each copied file goes: to its own name, but a README makes room for the output's."""
        return {name: SOURCE_README if name == README else name for name in self.copied}


def list_beside(folder: Path, known: Collection[str] = ()) -> Beside:
    """The files beside the weights in a folder, in order, and those left out, with reasons.

    `known` are files that the caller handles itself: they are in neither list. Links to files are followed, as the
    caches of model hubs consist of them; links to folders are not. Raises CheckpointError where the folder cannot be
    read or holds more than MAX_ENTRIES.
    """
    copied: list[str] = []
    left_out: dict[str, str] = {}
    waiting, seen = deque([""]), 0  # folders near the top first, so that the limit on entries leaves out deep ones
    while waiting:
        inside = waiting.popleft()
        entries, fault = _entries(folder / inside, MAX_ENTRIES - seen)
        if fault and not inside:
            raise CheckpointError(f"{folder}: {fault}; give a folder with the checkpoint alone")
        if fault:
            left_out[inside] = fault
        seen += len(entries)
        for entry in entries:
            name = inside + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if name in known:
                continue
            if reason := _left_out(entry, name, is_folder):
                left_out[_shown(name) + "/" * is_folder] = reason
            elif is_folder:
                waiting.append(f"{name}/")
            else:
                copied.append(name)
    if {README, SOURCE_README} <= {*copied}:
        copied.remove(SOURCE_README)
        left_out[SOURCE_README] = "the output has its own"
    return Beside(tuple(sorted(copied)), dict(sorted(left_out.items())))


def copy_beside(source: Path, names: Mapping[str, str], out: Path, temporary: Path) -> None:
    """Copy the contents of files of `source`, each to its name in `out`, whole or absent.

    `temporary` is a folder on the file system of `out`. Raises CheckpointError where a file cannot be read any more,
    OutputError where one cannot be written.
    """
    for name, target in names.items():
        for inner in reversed(PurePosixPath(target).parents[:-1]):
            _make_folder(out / inner, temporary)
        content = read_bounded(source / name, MAX_FILE_BYTES)
        write_atomically(out / target, temporary, partial(_write, content=content))


def file_inside(folder: Path, name: str) -> Path | None:
    """A file of a folder by its relative name; None if it is missing, outside the folder, or behind a linked folder.

    The file itself may be a link.
    """
    if not is_inside(name):
        return None
    behind_link = any((folder / inner).is_symlink() for inner in PurePosixPath(name).parents[:-1])
    return folder / name if not behind_link and (folder / name).is_file() else None


def is_inside(name: str) -> bool:
    """Whether a name is a plain relative path of usual length, which leaves the folder only if a link in it does."""
    parts = [part.encode("utf-8", "surrogateescape") for part in name.split("/")]
    return len(b"/".join(parts)) <= MAX_NAME_BYTES and all(
        part not in (b"", b".", b"..") and b"\0" not in part and len(part) <= MAX_PART_BYTES for part in parts
    )


def _entries(folder: Path, most: int) -> tuple[list[os.DirEntry[str]], str | None]:
    """The entries of a folder by name; none, with why, where it cannot be read or has more than `most`."""
    try:
        with os.scandir(folder) as listed:
            entries = list(islice(listed, most + 1))
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    if len(entries) > most:
        return [], f"holds too many files: at most {MAX_ENTRIES} are looked at"
    return sorted(entries, key=lambda entry: entry.name), None


def _left_out(entry: os.DirEntry[str], name: str, is_folder: bool) -> str | None:
    """The reason to leave out a file or folder; None to copy it."""
    if not name.isprintable():
        return "its name cannot be printed"
    if not is_inside(name):
        return f"its path has more than {MAX_NAME_BYTES} bytes"
    if "/" not in name and any(fnmatchcase(name, pattern) for pattern in OURS):
        return "the output has its own"
    for reason, patterns in (LEFT_OUT_FOLDERS if is_folder else LEFT_OUT).items():
        if any(fnmatchcase(entry.name.lower(), pattern) for pattern in patterns):
            return reason
    if is_folder:
        return f"more than {MAX_DEPTH} folders deep" if name.count("/") >= MAX_DEPTH else None
    try:
        about = entry.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(about.st_mode):
        return "a link to a folder"
    if not stat.S_ISREG(about.st_mode):
        return "not a regular file"
    if about.st_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES >> 20} MiB"
    return None if os.access(entry.path, os.R_OK) else "cannot be read (Permission denied)"


def _shown(name: str) -> str:
    """A name as text, with escapes for what cannot be printed or decoded."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _make_folder(folder: Path, temporary: Path) -> None:
    """Make a folder where it is missing: beside its place, then renamed, as only the holder of `temporary` can."""
    with output_errors(folder):
        refuse_link(folder)
        if not folder.is_dir():
            made = temporary / "folder"
            made.mkdir(exist_ok=True)
            made.replace(folder)
            sync_folder(folder.parent)


def refuse_link(path: Path) -> None:
    """Raise OutputError for a link in an output folder: writing or removing behind it would touch other files."""
    if path.is_symlink():
        raise OutputError(f"{path}: is a symbolic link in an output folder, which holds none; remove it and run again")


def _write(target: Path, content: bytes) -> None:
    target.write_bytes(content)
