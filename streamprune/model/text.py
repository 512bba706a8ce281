"""Text and its tokens: files, data sets, the text that ships with the package, and the checkpoint's own tokenizer."""

import gzip
import importlib.resources
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from streamprune.checkpoint.untrusted import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES, open_regular, parse_json, read_json
from streamprune.errors import CalibrationError, CheckpointError, SettingsError
from streamprune.model.configuration import architecture_in, config_of, one_line

SHIPPED_TEXT = "calibration.txt.gz"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PARQUET_ROWS = 256  # made text at once
BATCH_CHARACTERS = 1 << 20  # read and tokenised at once
DEFAULT_LENGTH = 2048  # tokens of a sequence
logger = logging.getLogger("streamprune")


def fitting_length(asked: int | None, positions: int | None) -> int:
    """Tokens of a sequence: as many as asked for, or DEFAULT_LENGTH, or the model's positions where they are fewer.

    The last is said in one line. Raises SettingsError where more are asked for than the model has positions, and for a
    model of one position, whose token predicts nothing.
    """
    if positions is not None and max(asked or 0, 2) > positions:
        raise SettingsError(f"sequence length {max(asked or 0, 2)} is beyond the model's {positions} positions")
    if asked is not None:
        return asked
    if positions is not None and positions < DEFAULT_LENGTH:
        logger.warning("sequences of %d tokens: the model has no more positions", positions)
        return positions
    return DEFAULT_LENGTH


def load_tokenizer(model: Path) -> Any:
    """The checkpoint's own tokenizer, without remote code. Raises CheckpointError where it is none."""
    for pattern in TOKENIZER_FILES:
        for path in sorted(model.glob(pattern)):
            _check_size(path)
    configs = [read_json(model / name) for name in TOKENIZER_CONFIGS if (model / name).exists()]
    coded = " without Python code of its own (auto_map), which is never run" * any("auto_map" in c for c in configs)
    path = model / "config.json"
    values = read_json(path)
    architecture_in(path, values)
    config = config_of(path, values)
    config.name_or_path = str(model)
    with _tokenizer_errors(f"{model}: its tokenizer cannot be loaded{coded}"):
        return AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False)


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; no warning about the model's length, windows are cut afterwards.

    Raises CheckpointError where the tokenizer does not work.
    """
    with _tokenizer_errors(f"{tokenizer.name_or_path}: its tokenizer fails on the text"):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_size(path: Path) -> None:
    file, size_bytes = open_regular(path)
    file.close()
    if size_bytes > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: has {size_bytes} bytes where at most {MAX_TOKENIZER_BYTES} are read")


@contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Raise what the libraries raise, of many kinds, as CheckpointError; a panic of Rust code is no Exception there."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({one_line(error)}); give a folder whose tokenizer loads") from error


def documents(calibration: str | None) -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file, of a `datasets` data set, or of the shipped text.

    A data set is NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (split "train" if not given); .jsonl and .parquet and data sets
    have their text in the column "text".
    """
    if calibration is None:
        shipped = importlib.resources.files("streamprune.data") / SHIPPED_TEXT
        yield gzip.decompress(shipped.read_bytes()).decode()
        return
    path = Path(calibration)
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.is_file():
        if path.suffix not in readers:
            raise CalibrationError(f"{path}: unknown kind of file; use .txt, .jsonl or .parquet")
        try:
            yield from readers[path.suffix](path)
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    elif path.suffix in readers:
        raise CalibrationError(f"{path}: no such file")
    else:
        yield from _read_dataset(calibration)


def _read_text(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8") as file:
        while line := file.readline(BATCH_CHARACTERS):  # a file may be one line
            if "\0" in line:
                raise CalibrationError(f"{path}: is not text (it holds zero bytes); give UTF-8 text")
            lines.append(line)
            size += len(line)
            if size >= BATCH_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _read_jsonl(path: Path) -> Iterator[str]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_JSON_BYTES:
                    raise ValueError(f"at most {MAX_JSON_BYTES} bytes are read")
                if not line.strip():
                    continue
                yield _text_of(parse_json(line))
            except UnicodeDecodeError:
                raise
            except (ValueError, TypeError, KeyError) as error:
                raise CalibrationError(
                    f"{path}: line {number} is not a JSON object with a string 'text' ({error})"
                ) from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kind = file.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise CalibrationError(f"{path}: its column 'text' is of {kind}; give one of strings")
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                yield from (text for text in batch.column("text").to_pylist() if text)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        reason = one_line(error)
        raise CalibrationError(f"{path}: is not a parquet file with a column 'text' ({reason})") from error


def _read_dataset(name: str) -> Iterator[str]:
    import datasets

    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _text_of(row)
    except CalibrationError:
        raise
    except Exception as error:  # the library's errors are many: network, names, formats
        raise CalibrationError(
            f"{name}: is neither a file nor a data set that can be loaded ({one_line(error)})"
        ) from error


def _text_of(row: Any) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError("text is not a string")
    return text
