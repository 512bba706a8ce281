"""Small files of unknown origin: memory is bounded regardless of claimed sizes or nesting.

Only regular files are opened (a pipe or a device might never end). A file's size is checked against a limit before it
is read, and the values in a JSON text are counted before it is parsed: an empty list takes two characters, and thirty
times their room when parsed.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from streamprune.errors import CheckpointError

MAX_JSON_BYTES = 8 << 20  # the index of a model with 1,000 tensors has 100 KB; a wide character quadruples a text
MAX_JSON_VALUES = 200_000  # in an object each takes some 200 bytes, while it is parsed
MAX_JSON_DEPTH = 64
MAX_KEY_CHARACTERS = 1000
TOO_DEEP = f"it is nested more than {MAX_JSON_DEPTH} deep"
MAX_TOKENIZER_BYTES = 64 << 20  # of each of its files; large vocabularies take 35 MB


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """A regular file, opened without buffer, and its size in bytes; links are followed.

    Raises CheckpointError for anything else. Never waits, as opening a pipe would.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
        about = os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(about.st_mode):
        file.close()
        raise CheckpointError(f"{path}: cannot be read (it is not a regular file)")
    return file, about.st_size


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """All bytes of a regular file. Raises CheckpointError where it cannot be read or is larger than the limit."""
    file, size_bytes = open_regular(path)
    with file:
        if size_bytes > limit_bytes:
            raise CheckpointError(
                f"{path}: has {size_bytes} bytes where at most {limit_bytes} are read; it is not what its name says"
            )
        return read_exactly(file, size_bytes, path)


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """The next `count` bytes of an unbuffered file. Raises CheckpointError where it ends or fails before."""
    pieces: list[bytes] = []
    try:
        while count:
            piece = file.read(count)
            if not piece:
                raise CheckpointError(f"{path}: became shorter while it was read; run again when it is whole")
            pieces.append(piece)
            count -= len(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return b"".join(pieces)


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ValueError, with what is wrong in one line, for anything else. Also refused are: a key that appears twice
    (readers differ on its meaning) or is longer than MAX_KEY_CHARACTERS, more than MAX_JSON_VALUES values, nesting
    deeper than MAX_JSON_DEPTH, and strings that are no text (half a surrogate pair).
    """
    marks = sum(content.count(mark) for mark in (b",", b"[", b"{"))  # a value needs one, but for the first
    if marks > MAX_JSON_VALUES:
        raise ValueError(f"up to {marks} values where at most {MAX_JSON_VALUES} are read")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            break
    else:
        raise ValueError(TOO_DEEP)
    if b"\\u" in content:  # the one way to half a surrogate pair
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    longest = max(map(len, keys), default=0)
    if longest > MAX_KEY_CHARACTERS:
        raise ValueError(f"a key has {longest} characters where at most {MAX_KEY_CHARACTERS} are read")
    if len(keys) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return keys


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError where it is missing, too large, or is not one."""
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__} where a JSON object belongs")
    return value
