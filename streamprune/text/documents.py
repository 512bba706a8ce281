"""Documents: the texts in a file, in a data set, or in the text that ships with the package, read piece by piece."""

import codecs
import gzip
import importlib.resources
import io
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, parse_json
from streamprune.config import Texts, path_of
from streamprune.errors import CalibrationError, SettingsError
from streamprune.model.configuration import one_line

SHIPPED_TEXT = "calibration.txt.gz"
TEXT_COLUMN = "text"
KINDS = ".txt, .jsonl, .json (each also .gz or .zst) or .parquet"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_ROWS = 256  # made text at once
BATCH_CHARACTERS = 1 << 20  # read and tokenised at once
CHARACTERS_PER_TOKEN = 64  # a text that has more is none: mere spaces that a small file was unpacked to
NAMES_SHOWN = 20


def documents(text: Texts | None, column: str = TEXT_COLUMN) -> Iterator[str]:
    """The documents of a file (KINDS), of a `datasets` data set, of the shipped text (None), or those given, as read.

    A .txt is one document, in pieces of whole lines. In other files and data sets, `column` holds the texts. A data set
    is NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (split "train" if not given). Raises CalibrationError for what is missing
    or is not text, SettingsError for a column of a text that has none.
    """
    if text is None:
        _check_no_column("the shipped text", column)
        shipped = importlib.resources.files("streamprune.data") / SHIPPED_TEXT
        yield gzip.decompress(shipped.read_bytes()).decode()
        return
    if not isinstance(text, str | os.PathLike):
        _check_no_column(name_of_texts(text), column)
        yield from _given(text)
        return
    path = path_of("text", text)
    kind, compression = kind_of(path)
    check_named(path)
    if not path.is_file():
        yield from _read_dataset(str(text), column)
        return
    if kind == ".txt":
        _check_no_column(str(path), column)
    if kind == ".parquet":
        yield from _read_parquet(path, column)
    else:
        with _opened(path, compression) as file:
            yield from READERS[kind](path, file, column)


def name_of_texts(text: Texts | None) -> str:
    """What messages call it."""
    if text is None:
        return "the shipped text"
    return str(text) if isinstance(text, str | os.PathLike) else "the given texts"


def check_texts(text: Any) -> None:
    """Raise SettingsError for what is neither a path, nor a name, nor an iterable of strings; nothing is read."""
    if isinstance(text, str | os.PathLike):
        path_of("calibration", text)
    elif text is not None and (isinstance(text, bytes | Mapping) or not isinstance(text, Iterable)):
        raise SettingsError(f"calibration {text!r:.40} is no path, no name, and no iterable of strings")


def check_named(text: Texts | None) -> None:
    """Raise CalibrationError for a file that `documents` cannot read; nothing is read, and no data set looked for."""
    if isinstance(text, str | os.PathLike) and (Path(text).is_file() or kind_of(Path(text))[0]):
        check_file(Path(text))


def _given(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise SettingsError(f"the given texts: item {number} is {type(text).__name__}; give strings")
        yield text


def kind_of(path: Path) -> tuple[str, str]:
    """The kind of file that a name's ending tells, and its compression, in small letters; "" for none that is known."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kinds = READERS if compression else (*READERS, ".parquet")
    return next((ending for ending in kinds if name.removesuffix(compression).endswith(ending)), ""), compression


def check_file(path: Path) -> None:
    """Raises CalibrationError for what is no file that `documents` reads."""
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder; give a file, {KINDS}")
    if not path.is_file():
        raise CalibrationError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}; give {KINDS}")
    if not kind_of(path)[0]:
        raise CalibrationError(f"{path}: unknown kind of file; use {KINDS}")


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[io.BufferedReader]:
    """A file's bytes, unpacked as they are read. What fails while they are read is raised as CalibrationError."""
    try:
        with path.open("rb") as packed:
            if compression == ".zst":
                import pyarrow

                file = io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
            elif compression == ".gz":
                file = io.BufferedReader(gzip.GzipFile(fileobj=packed))
            else:
                file = packed
            with file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if compression and not getattr(error, "errno", None):
            name = COMPRESSIONS[compression]
            raise CalibrationError(f"{path}: is damaged, cut short, or no {name} file ({reason})") from error
        raise CalibrationError(f"{path}: cannot be read ({reason})") from error


def _read_text(path: Path, file: io.BufferedReader, _column: str) -> Iterator[str]:
    lines: list[str] = []
    size = whole = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            while line := text.readline(BATCH_CHARACTERS):  # a file may be one line
                if "\0" in line:
                    raise CalibrationError(f"{path}: is not text (it holds zero bytes); give UTF-8 text")
                lines.append(line)
                size += len(line)
                whole += line.endswith("\n")
                if size >= BATCH_CHARACTERS:
                    yield "".join(lines)
                    lines, size = [], 0
    except UnicodeDecodeError as error:
        number = whole + error.object[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{path}: line {number} is not UTF-8 text") from error
    yield "".join(lines)


def _lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each with its name. Raises CalibrationError for one that is too long."""
    for number in itertools.count(1):
        line = file.readline(MAX_JSON_BYTES + 1)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_JSON_BYTES:
            raise CalibrationError(f"{path}: line {number} is not one of at most {MAX_JSON_BYTES} bytes; cut it up")
        if not line:
            return
        if line.strip():
            yield f"{path}: line {number}", line


def _read_jsonl(path: Path, file: io.BufferedReader, column: str) -> Iterator[str]:
    return _parsed(_lines(path, file), column)


def _parsed(lines: Iterable[tuple[str, bytes]], column: str) -> Iterator[str]:
    for where, line in lines:
        with _row_errors(where, column):
            text = _text_of(parse_json(line), column)
        yield text


def _read_json(path: Path, file: io.BufferedReader, column: str) -> Iterator[str]:
    """Objects one a line, as C4 comes; or a small file that is one array of objects, or one object."""
    lines = _lines(path, file)
    where, first = next(lines, ("", b""))
    try:
        if not first or isinstance(parse_json(first), dict):
            yield from _parsed(itertools.chain([(where, first)] if first else [], lines), column)
            return
        reason = "no object"
    except ValueError as error:
        reason = str(error)
    content = first + file.read(MAX_JSON_BYTES + 1 - len(first))
    if len(content) > MAX_JSON_BYTES:
        raise CalibrationError(
            f"{path}: has no JSON object in its first line ({reason}), and as one JSON value it has more than "
            f"{MAX_JSON_BYTES} bytes; give one object a line"
        )
    with _row_errors(f"{path}:", column):
        value = parse_json(content)
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        with _row_errors(f"{path}: item {number}", column):
            text = _text_of(row, column)
        yield text


@contextmanager
def _row_errors(where: str, column: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where} is not UTF-8 text") from error
    except ValueError as error:
        raise CalibrationError(f"{where} is not a JSON object with a string {column!r} ({error})") from error


def _text_of(row: Any, column: str) -> str:
    """The text of a row. Raises ValueError, with what is there instead, where it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}")
    if column not in row:
        raise ValueError(_other_columns(row))
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"it holds {type(text).__name__} there")
    return text


def _other_columns(names: Iterable[str]) -> str:
    shown = [f"{name!r:.40}" for name in names]
    listed = ", ".join(shown[:NAMES_SHOWN]) + ", ..." * (len(shown) > NAMES_SHOWN)
    return f"it has {listed or 'nothing'}; name one by --text-column"


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    lacks = f"{path}: is not a parquet file with a column {column!r}"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if schema.names.count(column) != 1:
                twice = "it has several of that name" if column in schema.names else _other_columns(schema.names)
                raise CalibrationError(f"{lacks} ({twice})")
            kind = schema.field(column).type
            if not _is_string(kind.value_type if pyarrow.types.is_dictionary(kind) else kind):
                raise CalibrationError(f"{path}: its column {column!r} is of {kind}; give one of strings")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                yield from (text for text in batch.column(column).to_pylist() if text)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise CalibrationError(f"{lacks} ({one_line(error)})") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: its column {column!r} is not UTF-8 text") from error


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _read_dataset(name: str, column: str) -> Iterator[str]:
    import datasets

    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            try:
                text = _text_of(row, column)
            except ValueError as error:
                raise CalibrationError(f"{name}: row {number} has no string {column!r} ({error})") from error
            yield text
    except CalibrationError:
        raise
    except Exception as error:  # the library's errors are many: network, names, formats
        raise CalibrationError(
            f"{name}: is neither a file nor a data set that can be loaded ({one_line(error)})"
        ) from error


def _check_no_column(what: str, column: str) -> None:
    if column != TEXT_COLUMN:
        raise SettingsError(f"{what}: has no columns; leave out --text-column {column!r}")


READERS: dict[str, Callable[[Path, io.BufferedReader, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
}
