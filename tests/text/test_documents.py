"""Documents: every kind of file as users have it, and what is refused."""

import codecs
import gzip
import itertools
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from streamprune import cli
from streamprune.errors import CalibrationError, SettingsError
from streamprune.text import documents as module
from streamprune.text.documents import KINDS, documents

DOCUMENTS = ["First document.\nIt has two lines.", "Zweites, mit Umlaut: ü.", "third"]
ROWS: list[dict[str, Any]] = [{"url": str(number), "text": document} for number, document in enumerate(DOCUMENTS)]
BOM = codecs.BOM_UTF8
TEXT = "\n".join(DOCUMENTS).encode()
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
FORMS: dict[str, tuple[bytes, list[str]]] = {
    ".txt": (TEXT, ["\n".join(DOCUMENTS)]),
    ".txt of CRLF": (TEXT.replace(b"\n", b"\r\n"), ["\n".join(DOCUMENTS)]),
    ".jsonl": (LINES, DOCUMENTS),
    ".jsonl of CRLF": (LINES.replace(b"\n", b"\r\n"), DOCUMENTS),
    ".jsonl with blank lines and no last line break": (LINES.replace(b"\n", b"\n\n").strip(), DOCUMENTS),
    ".ndjson": (LINES, DOCUMENTS),
    ".json of lines": (LINES, DOCUMENTS),
    ".json of a line": (json.dumps(ROWS[0]).encode(), DOCUMENTS[:1]),
    ".json of an array": (ARRAY, DOCUMENTS),
    ".json of an array in lines": (json.dumps(ROWS, indent=2).encode(), DOCUMENTS),
    ".json of an object in lines": (json.dumps(ROWS[0], indent=2).encode(), DOCUMENTS[:1]),
    ".json of an empty array": (b"\n[ ]\n", []),
    ".jsonl of nothing": (b"", []),
    ".json of nothing": (b"", []),
    ".txt of nothing": (b"", [""]),
}


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content).to_pybytes())


PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".gz of several members": lambda content: gzip.compress(content[:40]) + gzip.compress(content[40:]),
    ".zst of several frames": lambda content: zstd(content[:40]) + zstd(content[40:]),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_packed_or_not_gives_the_same_documents(form: str, packed: str, tmp_path: Path) -> None:
    """Also with a BOM, which is no part of the text, and with an ending in capital letters."""
    content, expected = FORMS[form]
    name = f"a{form.partition(' ')[0]}{packed.partition(' ')[0]}"
    for path, start in ((tmp_path / name, b""), (tmp_path / name.upper(), BOM)):
        path.write_bytes(PACKED[packed](start + content))
        assert list(documents(str(path))) == expected


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
def test_parquet_of_each_kind_of_string(kind: pyarrow.DataType, tmp_path: Path) -> None:
    is_dictionary = pyarrow.types.is_dictionary(kind)
    column = pyarrow.array([*DOCUMENTS[:2], None, "", DOCUMENTS[2]], kind.value_type if is_dictionary else kind)
    column = column.dictionary_encode() if is_dictionary else column
    assert column.type == kind
    try:
        pyarrow.parquet.write_table(pyarrow.table({"id": range(5), "text": column}), tmp_path / "a.PARQUET")
    except pyarrow.ArrowNotImplementedError as error:
        pytest.skip(f"pyarrow {pyarrow.__version__} does not write {kind}: {error}")
    assert list(documents(str(tmp_path / "a.PARQUET"))) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.parquet", "folder"])
def test_another_column(name: str, tmp_path: Path) -> None:
    """`folder`: a data set."""
    path = tmp_path / name
    rows = [{"text": 5, "the.body": document} for document in DOCUMENTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "folder":
        path.mkdir()
        (path / "train.jsonl").write_bytes(lines)
    elif name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    assert list(documents(str(path), "the.body")) == DOCUMENTS
    with pytest.raises(CalibrationError) as caught:
        list(documents(str(path), "words"))
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("'words' (it has 'text', 'the.body'; name one by --text-column)")


def test_a_text_without_columns_has_none_to_choose(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT))
    for text, what in ((str(tmp_path / "a.txt.gz"), "a.txt.gz"), (None, "the shipped text")):
        with pytest.raises(SettingsError, match=rf"{re.escape(what)}: has no columns; leave out --text-column 'body'"):
            list(documents(text, "body"))


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"{'x' * 900}{number}": 0 for number in range(1000)}))
    with pytest.raises(CalibrationError, match=r", \.\.\.; name one by --text-column\)$") as caught:
        list(documents(str(tmp_path / "a.jsonl")))
    assert len(str(caught.value)) < 1200


def test_text_file_is_read_whole_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    content = "".join(f"line {number} ü\n" for number in range(500)) + "no line break at the end"
    path.write_text(content, encoding="utf-8")
    assert "".join(documents(str(path))) == content
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    pieces = [piece for piece in documents(str(path)) if piece]
    assert len(pieces) > 10
    assert "".join(pieces) == content
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_shipped_text_is_there_without_a_network() -> None:
    shipped = list(documents(None))
    assert len(shipped) == 1
    assert len(shipped[0]) > 100_000
    assert shipped[0].isprintable() is False  # lines, not one long word
    assert "\ufffd" not in shipped[0]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_packed_file_is_unpacked_as_it_is_read(kind: str, packed: str, tmp_path: Path) -> None:
    """Memory follows what is read, not the 200 MB that come of a small file; and damage is found where it is met."""
    line = "word " * 2000 if kind == ".txt" else json.dumps({"text": "word " * 2000})
    content = PACKED[packed](f"{line}\n".encode() * 20_000)
    assert len(content) < 1_000_000
    path = tmp_path / f"bomb{kind}{packed}"
    path.write_bytes(content[:-100])
    tracemalloc.start()
    read = list(itertools.islice(documents(str(path)), 5))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(piece.startswith("word word ") for piece in read)
    assert most_bytes < 40_000_000
    with pytest.raises(CalibrationError, match=rf"{path.name}: is damaged, cut short, or no (gzip|zstd) file \("):
        for _ in documents(str(path)):
            pass


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "unknown ending": ("a.csv", b"text\n", f"unknown kind of file; use {KINDS}"),
    "packed parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), "unknown kind of file; use"),
    "packed file of no kind": ("c4.gz", gzip.compress(b"text"), "unknown kind of file; use"),
    "text that is not UTF-8": ("a.txt", b"abc\n\nx\xff", "line 3 is not UTF-8 text"),
    "text that is not UTF-8 far behind": ("a.txt", b"abc\r\n" * 5000 + b"\xff", "line 5001 is not UTF-8 text"),
    "lines that are not UTF-8": ("a.jsonl", b'\n{"text": "\xff"}\n', "line 2 is not UTF-8 text"),
    "JSON that is not UTF-8": ("a.json", b'[{"text": "\xff"}]\n', "is not UTF-8 text"),
    "line that is not JSON": (
        "a.jsonl",
        b'{"text": "a"}\n{"text"\n',
        "line 2 is not a JSON object with a string 'text'",
    ),
    "line without text": ("a.jsonl", b'{"content": "a"}\n', "(it has 'content'; name one by --text-column)"),
    "line without anything": ("a.jsonl", b"{}\n", "line 1 is not a JSON object with a string 'text' (it has nothing;"),
    "line of a list": ("a.jsonl", b'["a"]\n', "line 1 is not a JSON object with a string 'text' (it is list)"),
    "text of a number": ("a.jsonl", b'{"text": 5}\n', "with a string 'text' (it holds int there)"),
    "JSON of neither": ("a.json", b"hello\nworld\n", "is not a JSON object with a string 'text' (Expecting value"),
    "JSON of a number": ("a.json", b"5", "item 1 is not a JSON object with a string 'text' (it is int)"),
    "array of strings": ("a.json", b'["a", "b"]', "item 1 is not a JSON object with a string 'text' (it is str)"),
    "array without text": ("a.json", b'[{"text": "a"},\n {"body": "a"}]', "item 2 is not a JSON object"),
    "lines of JSON, the second broken": ("a.json", LINES[: len(LINES) // 2], "line 2 is not a JSON object"),
    "array that is too large": (
        "a.json",
        b'[\n{"text": "' + b"x" * (9 << 20) + b'"}]',
        "has no JSON object in its first line (Expecting value",
    ),
    "array in a line that is too large": ("a.json", b"[" + b" " * (9 << 20), "line 1 is not one of at most 8388608"),
    "no parquet": ("a.parquet", b"PAR1 but no more", "is not a parquet file with a column 'text'"),
    "no gzip": ("a.txt.gz", b"plain text", "is damaged, cut short, or no gzip file (Not a gzipped file"),
    "no zstd": ("a.jsonl.zst", LINES, "is damaged, cut short, or no zstd file (ZSTD decompress failed"),
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


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(DOCUMENTS)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"with a column 'text' \(it has several of that name\)"):
        list(documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("name", ["absent.txt", "absent.JSONL", "absent.json.gz", "absent.txt.zst", "absent.parquet"])
def test_absent_file_is_not_looked_for_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=rf"{name}: no such file; give {re.escape(KINDS)}$"):
        list(documents(str(tmp_path / name)))


def test_folder_named_as_a_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(CalibrationError, match=r"a\.txt: is a folder; give a file"):
        list(documents(str(tmp_path / "a.txt")))


def test_help_names_the_same_kinds() -> None:
    """The command line's own text: to import this one would take seconds."""
    assert cli.TEXT_FILES == KINDS
