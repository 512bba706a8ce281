"""Text and its tokens: files, data sets, the text that ships with the package, and the checkpoint's own tokenizer."""

import gzip
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from streamprune.errors import CalibrationError, CheckpointError

SHIPPED_TEXT = "calibration.txt.gz"
BATCH_CHARACTERS = 1 << 20  # read and tokenised at once


def load_tokenizer(model: Path) -> Any:
    """The checkpoint's own tokenizer, without remote code."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{model}: its tokenizer cannot be loaded ({reason})") from error


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; no warning about the model's length, windows are cut afterwards."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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
            raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
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
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= BATCH_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    yield "".join(lines)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _text_of(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise CalibrationError(f"{path}: line {number} is not a JSON object with a string 'text'") from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)
    except (pyarrow.ArrowException, KeyError) as error:
        raise CalibrationError(f"{path}: is not a parquet file with a column 'text' ({error})") from error


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(f"{name}: is neither a file nor a data set that can be loaded ({reason})") from error


def _text_of(row: Any) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError("text is not a string")
    return text
