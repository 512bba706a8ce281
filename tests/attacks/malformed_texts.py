"""Texts that are none or too short, and tokenizers that are broken."""

import functools
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tiny

from attacks.catalogue import Catalogue, Make

CATALOGUE = Catalogue()


def text_of(name: str, content: bytes) -> Make:
    return lambda case: (case / name).write_bytes(content)


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content).to_pybytes())


def harmed(content: bytes) -> bytes:
    """Other bytes behind the headers of what is packed."""
    return content[:20] + b"\xff" * 40 + content[60:]


JSONL = "".join(json.dumps({"text": line}) + "\n" for line in tiny.text(3000).splitlines()).encode()
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("text.txt", b"", "tokens"),
    "one byte": ("text.txt", b"x", "1 tokens"),
    "shorter than asked": ("text.txt", b"x" * 47, "47 tokens"),
    "spaces": ("text.txt", b"", "tokens"),
    "not UTF-8": ("text.txt", b"caf\xe9 " * 200, "line 1 is not UTF-8 text"),
    "UTF-16": ("text.txt", "word ".encode("utf-16") * 200, "is not UTF-8 text"),
    "zero bytes": ("text.txt", b"word\0" * 200, "is not text (it holds zero bytes)"),
    "an executable": ("text.txt", b"\x7fELF\x02\x01\x01\0" + bytes(range(256)) * 20, "is not"),
    "a picture": ("text.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "is not UTF-8 text"),
    "unknown suffix": ("text.pdf", b"%PDF-1.4", "unknown kind of file; use .txt, .jsonl, "),
    "a packed parquet": ("text.parquet.gz", gzip.compress(b"PAR1"), "unknown kind of file"),
    "a gzip bomb of zero bytes": ("text.txt.gz", gzip.compress(bytes(10_000_000)) * 20, "holds zero bytes"),
    "a gzip bomb of a line": ("text.jsonl.gz", gzip.compress(b" " * 10_000_000) * 20, "line 1 is not one of at most"),
    "a gzip bomb of an array": (
        "text.json.gz",
        gzip.compress(b"[\n" * 5_000_000) * 20,
        "as one JSON value it has more than",
    ),
    "a gzip bomb of blank lines": ("text.jsonl.gz", gzip.compress(b"\n" * 2_000_000), "tokens"),
    "a zstd bomb": ("text.json.zst", zstd(b" " * 10_000_000) * 20, "line 1 is not one of at most"),
    "gzip cut short": ("text.txt.gz", gzip.compress(tiny.text(3000).encode())[:-20], "cut short, or no gzip file"),
    "gzip with other bytes": ("text.jsonl.gz", harmed(gzip.compress(JSONL)), "no gzip file"),
    "gzip that is none": ("text.jsonl.gz", JSONL, "no gzip file"),
    "gzip of gzip": ("text.txt.gz", gzip.compress(gzip.compress(b"x" * 3000)), "line 1 is not UTF-8 text"),
    "zstd cut short": ("text.txt.zst", zstd(tiny.text(3000).encode())[:-20], "cut short, or no zstd file"),
    "zstd with other bytes": ("text.jsonl.zst", harmed(zstd(JSONL)), "no zstd file"),
    "zstd that is none": ("text.jsonl.zst", gzip.compress(JSONL), "no zstd file"),
    "zstd that asks for 2 GB": ("text.txt.zst", b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(100), "no zstd file"),
    "json of text": ("text.json", b"hello\n", "is not a JSON object with a string 'text'"),
    "json of a number": ("text.json", b"5", "item 1 is not"),
    "json of an array of text": ("text.json", b'["text"]', "item 1 is not"),
    "json of an object of columns": ("text.json", b'{"text": ["x", "y"]}', "line 1 is not"),
    "json of an array cut short": ("text.json", b'[\n{"text": "x"},\n{"text": "y"}', "is not a JSON object"),
    "json of an array of many values": ("text.json", b"[\n" + b"[]," * 2_000_000 + b"0]", "values where at most"),
    "json of an array of 17 MB": (
        "text.json",
        b'[\n"' + b"x" * (17 << 20) + b'"]',
        "has no JSON object in its first line",
    ),
    "deep json": ("text.json", b"[\n" * 100_000, "is not a JSON object"),
    "json of a key that a terminal obeys": ("text.json", b'{"\\u001b[2J": 1}', "it has '"),
    "gzip by another name": ("text.txt", gzip.compress(tiny.text(3000).encode()), "is not UTF-8 text"),
    "broken gzip by another name": ("text.jsonl", b"\x1f\x8b\x08" + b"\xff" * 100, "is not"),
    "an empty jsonl": ("text.jsonl", b"", "tokens"),
    "blank jsonl": ("text.jsonl", b"\n\n  \n", "tokens"),
    "jsonl of text": ("text.jsonl", b"hello\n", "line 1 is not a JSON object with a string 'text'"),
    "jsonl of a list": ("text.jsonl", b'["text"]\n', "line 1 is not"),
    "jsonl of null": ("text.jsonl", b"null\n", "line 1 is not"),
    "jsonl of numbers": ("text.jsonl", b'{"text": "x"}\n{"text": 1}\n', "line 2 is not"),
    "jsonl of null texts": ("text.jsonl", b'{"text": null}\n', "line 1 is not"),
    "jsonl of lists": ("text.jsonl", b'{"text": ["x"]}\n', "line 1 is not"),
    "jsonl of another column": ("text.jsonl", b'{"content": "x"}\n', "line 1 is not"),
    "jsonl cut short": ("text.jsonl", b'{"text": "x"}\n{"text": "x', "line 2 is not"),
    "deep jsonl": ("text.jsonl", b"[" * 100_000 + b"\n", "line 1 is not"),
    "deep jsonl beside its text": (
        "text.jsonl",
        b'{"text": "x", "y": ' + b"[" * 90 + b"]" * 90 + b"}",
        "line 1 is not",
    ),
    "jsonl with a key twice": ("text.jsonl", b'{"text": "x", "text": "y"}\n', "line 1 is not"),
    "jsonl of half a surrogate pair": ("text.jsonl", b'{"text": "\\ud800"}\n', "line 1 is not"),
    "jsonl not UTF-8": ("text.jsonl", b'{"text": "\xff"}\n', "is not UTF-8 text"),
    "jsonl of many values": ("text.jsonl", b'{"text": [' + b"[]," * 2_000_000 + b"0]}\n", "line 1 is not"),
    "a jsonl line of 17 MB": ("text.jsonl", b'{"text": "' + b"x" * (17 << 20), "line 1 is not"),
    "a jsonl line of nothing": ("text.jsonl", b"\x20" * (40 << 20), "line 1 is not"),
    "an empty parquet": ("text.parquet", b"", "is not a parquet file"),
    "parquet of text": ("text.parquet", b"hello", "is not a parquet file"),
    "parquet of its marks alone": ("text.parquet", b"PAR1PAR1", "is not a parquet file"),
    "parquet with a footer of 2 GB": ("text.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "is not a parquet file"),
    "parquet with a footer of zeros": (
        "text.parquet",
        b"PAR1" + bytes(64) + b"\x40\0\0\0PAR1",
        "is not a parquet file",
    ),
}
for number, (fault, (name, content, message)) in enumerate(FILES.items()):
    command = ("evaluate", "compress")[number % 2]
    CATALOGUE.put(f"text: {fault}", "llama", command, 4, message, text_of(name, content), "a text by itself", text=name)


def parquet(case: Path, columns: dict[str, Any], harm: Callable[[bytes], bytes] = bytes) -> None:
    path = case / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    path.write_bytes(harm(path.read_bytes()))


LINES = tiny.text(3000).splitlines()
PARQUETS: dict[str, tuple[dict[str, Any], Callable[[bytes], bytes], str]] = {
    "of another column": ({"content": LINES}, bytes, "is not a parquet file with a column 'text'"),
    "of numbers": ({"text": [1, 2, 3]}, bytes, "its column 'text' is of int64; give one of strings"),
    "of lists": ({"text": [["x"], ["y"]]}, bytes, "its column 'text' is of list"),
    "of strings not UTF-8": ({"text": pyarrow.array([b"\xff"]).view(pyarrow.string())}, bytes, "is not UTF-8 text"),
    "of bytes": ({"text": [b"\xff", b"y"]}, bytes, "its column 'text' is of binary"),
    "without rows": ({"text": pyarrow.array([], pyarrow.string())}, bytes, "tokens"),
    "of nulls": ({"text": pyarrow.array([None, None], pyarrow.string())}, bytes, "tokens"),
    "cut in half": ({"text": LINES}, lambda content: content[: len(content) // 2], "is not a parquet file"),
    "without its first half": ({"text": LINES}, lambda content: content[len(content) // 2 :], "is not a parquet file"),
    "with harmed pages": ({"text": LINES}, harmed, "is not a parquet file"),
}
for fault, (columns, harm, message) in PARQUETS.items():
    make = functools.partial(parquet, columns=columns, harm=harm)
    CATALOGUE.put(f"parquet {fault}", "llama", "evaluate", 4, message, make, "a table by itself", text="text.parquet")


@CATALOGUE.entry("llama", "evaluate", 4, "no such file")
def no_text(case: Path) -> None:
    """A mistyped path."""
    (case / "text.txt").unlink()


@CATALOGUE.entry("llama", "evaluate", 4, "is a folder")
def a_text_that_is_a_folder(case: Path) -> None:
    """A folder of texts is no text."""
    (case / "text.txt").unlink()
    (case / "text.txt").mkdir()


@CATALOGUE.entry("llama", "compress", 4, "is not a regular file")
def a_text_that_is_a_pipe(case: Path) -> None:
    """Reading a pipe that nobody writes to never returns."""
    (case / "text.txt").unlink()
    os.mkfifo(case / "text.txt")


@CATALOGUE.entry("llama", "evaluate", 0, text="text.parquet")
def a_parquet_with_some_nulls(case: Path) -> None:
    """Rows without text are passed over."""
    parquet(case, {"text": [*LINES, None, "", *LINES]})


@CATALOGUE.entry("llama", "evaluate", 0)
def one_line_of_a_megabyte(case: Path) -> None:
    """A text need not have lines."""
    (case / "text.txt").write_text("word " * 200_000)


@CATALOGUE.entry("llama", "evaluate", 0, text="text.txt.gz")
def a_bomb_of_words(case: Path) -> None:
    """Reading stops when there are enough tokens."""
    (case / "text.txt.gz").write_bytes(gzip.compress(b"word " * 2_000_000) * 20)


# Tokenizers.
def tokenizer_file(name: str, content: bytes) -> Make:
    return lambda case: (case / "model" / name).write_bytes(content)


def tokenizer_with(case: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = case / "model" / "tokenizer.json"
    value = tiny.read_json(path)
    edit(value)
    path.write_text(json.dumps(value))


TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "empty": ("tokenizer.json", b""),
    "no JSON": ("tokenizer.json", b"{"),
    "an empty object": ("tokenizer.json", b"{}"),
    "a list": ("tokenizer.json", b"[]"),
    "null": ("tokenizer.json", b"null"),
    "deep": ("tokenizer.json", b"[" * 100_000),
    "not UTF-8": ("tokenizer.json", b'{"version": "\xff"}'),
    "a config that is no JSON": ("tokenizer_config.json", b"{"),
    "a config of a list": ("tokenizer_config.json", b"[]"),
    "a deep config": ("tokenizer_config.json", b'{"a":' * 100_000),
    "a class of a number": ("tokenizer_config.json", b'{"tokenizer_class": 7}'),
    "code of its own": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", null]}}',
    ),
    "special tokens of a list": ("special_tokens_map.json", b"[]"),
    "added tokens that are deep": ("added_tokens.json", b"[" * 100_000),
}
for fault, (name, content) in TOKENIZERS.items():
    CATALOGUE.put(
        f"tokenizer: {fault}", "llama", "evaluate", 3, "", tokenizer_file(name, content), "a file of the tokenizer's"
    )


def only_sentencepiece(case: Path, content: bytes) -> None:
    for path in (case / "model").glob("tokenizer*"):
        path.unlink()
    (case / "model" / "tokenizer.model").write_bytes(content)


def sentencepiece_model(*pieces: tuple[str, int]) -> bytes:
    """The bytes of a model with pieces of these types: 1 normal, 2 unknown; fewer than 64 bytes each."""
    written = b""
    for piece, kind in pieces:
        field = b"\x0a" + bytes([len(piece)]) + piece.encode() + b"\x15" + bytes(4) + b"\x18" + bytes([kind])
        written += b"\x0a" + bytes([len(field)]) + field
    return written


SENTENCEPIECES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no whole sentencepiece model"),
    "text": (b"hello\n", "is no whole sentencepiece model"),
    "of tiktoken's": (b"IQ== 0\nIg== 1\n" * 100, "is no whole sentencepiece model"),
    "of ones": (b"\xff" * 4000, "is no whole sentencepiece model"),
    "that claims a piece of 2 GB": (b"\x0a\xff\xff\xff\xff\x07" + bytes(100), "is no whole sentencepiece model"),
    "without an unknown piece": (sentencepiece_model(("a", 1)), "is no whole sentencepiece model"),
    "of a piece twice": (sentencepiece_model(("<unk>", 2), ("a", 1), ("a", 1)), "is no whole sentencepiece model"),
    "of an empty piece": (sentencepiece_model(("<unk>", 2), ("", 1)), "is no whole sentencepiece model"),
}
for fault, (content, message) in SENTENCEPIECES.items():
    make = functools.partial(only_sentencepiece, content=content)
    CATALOGUE.put(f"tokenizer.model {fault}", "llama", "evaluate", 3, message, make, "the file stands alone")

EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a model that is none": lambda t: t.update(model={"type": "NoSuchModel"}),
    "a model of null": lambda t: t.update(model=None),
    "a vocabulary of a list": lambda t: t["model"].update(vocab=[1, 2]),
    "a vocabulary of text": lambda t: t["model"].update(vocab={"a": "b"}),
    "ids below zero": lambda t: t["model"].update(vocab={"a": -1}),
    "ids beyond 2^32": lambda t: t["model"].update(vocab={"a": 2**40}),
    "ids beyond the model's vocabulary": lambda t: t["model"]["vocab"].update({"e": 100_000}),
    "no unknown token": lambda t: t["model"].update(vocab={"a": 0}, unk_token="[NONE]"),
    "a BPE of merges that are none": lambda t: t.update(
        model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a z"]}
    ),
    "a BPE of merges of numbers": lambda t: t.update(model={"type": "BPE", "vocab": {"a": 0}, "merges": [1]}),
    "a Unigram without pieces": lambda t: t.update(model={"type": "Unigram", "unk_id": 5, "vocab": []}),
    "a pattern that is none": lambda t: t["pre_tokenizer"].update(pattern={"Regex": "("}),
    "a pattern that backtracks without end": lambda t: t["pre_tokenizer"].update(pattern={"Regex": "(("}),
    "added tokens of text": lambda t: t.update(added_tokens=["x"]),
    "a normalizer that is none": lambda t: t.update(normalizer={"type": "NoSuch"}),
}
for fault, edit in EDITS.items():
    make = functools.partial(tokenizer_with, edit=edit)
    CATALOGUE.put(f"tokenizer: {fault}", "llama", "evaluate", 3, "tokenizer", make, "one entry of tokenizer.json")


@CATALOGUE.entry("llama", "evaluate", 3, "has 1000000000 bytes where at most")
def a_tokenizer_of_a_gigabyte(case: Path) -> None:
    """A sparse file."""
    os.truncate(case / "model" / "tokenizer.json", 10**9)


@CATALOGUE.entry("llama", "evaluate", 3, "has 1000000000 bytes where at most")
def a_tokenizer_model_of_a_gigabyte(case: Path) -> None:
    """A sparse file, alone."""
    only_sentencepiece(case, b"")
    os.truncate(case / "model" / "tokenizer.model", 10**9)


@CATALOGUE.entry("llama", "compress", 3, "is not a regular file")
def a_tokenizer_that_is_a_pipe(case: Path) -> None:
    """It would never end."""
    (case / "model" / "tokenizer.json").unlink()
    os.mkfifo(case / "model" / "tokenizer.json")


@CATALOGUE.entry("llama", "compress", 3, "its tokenizer cannot be loaded")
def no_tokenizer(case: Path) -> None:
    """Weights and config alone."""
    for path in (case / "model").glob("tokenizer*"):
        path.unlink()


@CATALOGUE.entry("llama", "compress", 3, "is not a regular file")
def a_chat_template_that_is_a_pipe(case: Path) -> None:
    """Whatever a tokenizer reads would never end."""
    os.mkfifo(case / "model" / "chat_template.jinja")


@CATALOGUE.entry("llama", "evaluate", 3, "is not a regular file")
def another_chat_template_that_is_a_pipe(case: Path) -> None:
    """The folder of those that are asked for by name."""
    (case / "model" / "additional_chat_templates").mkdir()
    os.mkfifo(case / "model" / "additional_chat_templates" / "rag.jinja")


# What lies beside the weights and the tokenizer, and is copied or left out.
@CATALOGUE.entry("llama", "compress", 0)
def a_folder_that_holds_itself(case: Path) -> None:
    """Nothing of a source is walked without end, waited for or written out of the output."""
    model = case / "model"
    (model / "again").symlink_to(".")
    (model / "loop.md").symlink_to("loop.md")
    (model / "null.md").symlink_to("/dev/null")
    os.mkfifo(model / "pipe.md")
    (model / "\x1b[2J\n.md").write_text("a name that a terminal obeys")
    (model / ("d/" * 60)).mkdir(parents=True)
    (model / ("d/" * 60) / "deep.md").write_text("deep")


@CATALOGUE.entry("llama", "compress", 3, "holds too many files: at most 2000 are looked at; give a folder with")
def a_folder_of_many_files(case: Path) -> None:
    """A manifest would have to name them all."""
    for number in range(2000):
        (case / "model" / f"{number}.md").touch()


READMES: dict[str, bytes] = {
    "no text": b"\xff\x00" * 10_000,
    "endless front matter": b"---\n" + b"license: \n" * 1_000_000,
    "line breaks": b"---" + b"\n" * 10_000_000,
    "anchors": b"---\na: &a [x,x]\n" + b"".join(b"b%d: [*a,*a]\n" % n for n in range(1000)) + b"license: *a\n---\n",
    "markup for a licence": b"---\nlicense: ](x)<script>\n---\n",
}
for what, content in READMES.items():
    CATALOGUE.put(
        f"a card of {what}",
        "llama",
        "compress",
        0,
        "",
        text_of("model/README.md", content),
        "only a word of its front matter is looked for",
    )


@CATALOGUE.entry("llama", "compress", 0)
def a_card_that_is_a_pipe(case: Path) -> None:
    """It is left out, and not waited for."""
    os.mkfifo(case / "model" / "README.md")


@CATALOGUE.entry("llama", "compress", 0)
def a_licence_of_a_gigabyte(case: Path) -> None:
    """A sparse file."""
    (case / "model" / "LICENSE").touch()
    os.truncate(case / "model" / "LICENSE", 10**9)
