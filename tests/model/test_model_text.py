"""Texts: every kind of file, the shipped text, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from streamprune.errors import CalibrationError, CheckpointError
from streamprune.model import text
from streamprune.model.text import documents, load_tokenizer, tokenize

DOCUMENTS = ["First document.\nIt has two lines.", "Zweites, mit Umlaut: ü.", "third"]


def test_text_file_is_read_whole_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    content = "".join(f"line {number} ü\n" for number in range(500)) + "no line break at the end"
    path.write_text(content, encoding="utf-8")
    assert "".join(documents(str(path))) == content
    monkeypatch.setattr(text, "BATCH_CHARACTERS", 100)
    pieces = [piece for piece in documents(str(path)) if piece]
    assert len(pieces) > 10
    assert "".join(pieces) == content
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_jsonl_and_parquet_give_their_text_column(tmp_path: Path) -> None:
    lines = [json.dumps({"id": number, "text": document}) for number, document in enumerate(DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"))) == DOCUMENTS
    table = pyarrow.table({"text": DOCUMENTS, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == DOCUMENTS


def test_shipped_text_is_there_without_a_network() -> None:
    shipped = list(documents(None))
    assert len(shipped) == 1
    assert len(shipped[0]) > 100_000
    assert shipped[0].isprintable() is False  # lines, not one long word
    assert "\ufffd" not in shipped[0]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "unknown suffix": ("a.csv", b"text\n", "unknown kind of file; use .txt, .jsonl or .parquet"),
    "text that is not UTF-8": ("a.txt", b"abc\xff", "is not UTF-8 text"),
    "lines that are not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8 text"),
    "line that is not JSON": (
        "a.jsonl",
        b'{"text": "a"}\n{"text"\n',
        "line 2 is not a JSON object with a string 'text'",
    ),
    "line without text": ("a.jsonl", b'{"content": "a"}\n', "line 1 is not"),
    "line of a list": ("a.jsonl", b'["a"]\n', "line 1 is not"),
    "text of a number": ("a.jsonl", b'{"text": 5}\n', "line 1 is not"),
    "no parquet": ("a.parquet", b"PAR1 but no more", "is not a parquet file with a column 'text'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_file_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[fault]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        list(documents(str(path)))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_text_column_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": DOCUMENTS}), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a\.parquet: is not a parquet file with a column 'text'"):
        list(documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet"])
def test_absent_file_is_not_looked_for_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no such file$"):
        list(documents(str(tmp_path / name)))


def test_tokenizer_is_the_checkpoints_and_adds_nothing(models: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(models("llama"))
    assert tokenize(tokenizer, "Ab\n ü") == [65, 98, 10, 32, 127]
    assert tokenize(tokenizer, "") == []


def test_absent_tokenizer_is_a_checkpoint_error_in_one_line(models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(models("llama") / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
