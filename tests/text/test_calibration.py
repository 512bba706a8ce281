"""Calibration tokens: kinds of texts, windows, and what is refused."""

import gzip
import hashlib
import importlib.resources
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from streamprune.errors import CalibrationError, SettingsError
from streamprune.pipeline.compress import CompressResult
from streamprune.text.calibration import Calibration, calibration_tokens, tokens_digest
from streamprune.text.tokenizers import load_tokenizer, tokenize

TEXT = tiny.text(4_000, seed=7)
DOCUMENTS = [TEXT[start : start + 400] for start in range(0, 4_000, 400)]


@pytest.fixture(scope="module")
def llama(sources: Callable[[str], Path]) -> Path:
    return sources("llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One text as .txt, and as documents in .jsonl, as C4 comes, in .parquet and a data set's folder."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "whole.txt").write_text(TEXT)
    (folder / "joined.txt").write_text("\n\n".join(DOCUMENTS))
    (folder / "documents.jsonl").write_text(
        "\n".join(json.dumps({"text": document, "id": 1}) for document in DOCUMENTS)
    )
    packed = gzip.compress((folder / "documents.jsonl").read_bytes())
    (folder / "c4-train.00000-of-01024.json.gz").write_bytes(packed)
    datasets.Dataset.from_dict({"text": DOCUMENTS, "id": range(10)}).to_parquet(folder / "documents.parquet")
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text((folder / "documents.jsonl").read_text())
    (folder / "set" / "test.jsonl").write_text(json.dumps({"text": TEXT[::-1]}) + "\n")
    return folder


def decoded(tokens: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in tokens.tolist()]


def test_windows_are_pieces_of_the_text_that_do_not_overlap(llama: Path, texts: Path) -> None:
    tokens = calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=20, sequence_length=50))
    assert (tokens.shape, tokens.dtype) == ((20, 50), torch.int64)
    pieces = [TEXT[start : start + 50] for start in range(0, 4_000, 50)]
    places = [pieces.index(window) for window in decoded(tokens)]
    assert len(set(places)) == 20
    assert places != sorted(places)


def test_all_windows_when_all_are_asked_for(llama: Path, texts: Path) -> None:
    tokens = calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=80, sequence_length=50, seed=3))
    assert sorted(decoded(tokens)) == sorted(TEXT[start : start + 50] for start in range(0, 4_000, 50))


def test_the_seed_draws_the_windows(llama: Path, texts: Path) -> None:
    draws = [
        calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=4, sequence_length=50, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert tokens_digest(draws[0]) == tokens_digest(draws[1]) != tokens_digest(draws[2])


def test_digest_is_stable() -> None:
    """sha256 of the ids as little-endian int64: it is written into outputs, so it must not change."""
    tokens = torch.arange(6).view(2, 3)
    expected = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in range(6))).hexdigest()
    assert tokens_digest(tokens) == tokens_digest(tokens.to(torch.int32)) == expected


@pytest.mark.parametrize(
    "name", ["documents.jsonl", "c4-train.00000-of-01024.json.gz", "documents.parquet", "set", "set::train"]
)
def test_documents_are_joined_by_blank_lines(name: str, llama: Path, texts: Path) -> None:
    expected = calibration_tokens(llama, Calibration(str(texts / "joined.txt"), samples=8, sequence_length=100))
    assert torch.equal(
        calibration_tokens(llama, Calibration(str(texts / name), samples=8, sequence_length=100)), expected
    )


@pytest.mark.parametrize("text", ["word " * 250_000, " " * 1_250_000])
def test_reading_stops_when_there_is_enough(text: str, llama: Path, tmp_path: Path) -> None:
    """What comes behind, here a cut, is not looked at; a tokenizer that makes nothing of spaces is not fed for ever."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    value = tiny.read_json(folder / "tokenizer.json")
    value["normalizer"] = {"type": "Replace", "pattern": {"Regex": "  +"}, "content": "  "}
    tiny.write_json(folder / "tokenizer.json", value)
    content = gzip.compress(f"{tiny.text(1_000)}\n{text}".encode() + random.Random(0).randbytes(100_000))
    (tmp_path / "text.txt.gz").write_bytes(content[:-50_000])
    assert calibration_tokens(
        folder, Calibration(str(tmp_path / "text.txt.gz"), samples=2, sequence_length=100)
    ).shape == (2, 100)
    with pytest.raises(CalibrationError, match=r"text\.txt\.gz: "):
        calibration_tokens(folder, Calibration(str(tmp_path / "text.txt.gz"), samples=2_000, sequence_length=1_000))


def test_the_job_is_the_same_whatever_its_tokens_lay_in(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    """Kind of file, name and column are no part of what a job is."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(json.dumps({"body": TEXT, "text": 5}).encode()))
    prune("llama", tmp_path / "out", calibration=str(tmp_path / "text.txt"))
    again = {"calibration": str(tmp_path / "packed.json.gz"), "text_column": "body"}
    assert prune("llama", tmp_path / "out", **again).status == "already finished"
    with pytest.raises(CalibrationError, match="line 1 is not a JSON object with a string 'text'"):
        prune("llama", tmp_path / "other", **{**again, "text_column": "text"})


def test_a_job_on_tokenizer_model_alone(
    prune: Callable[..., CompressResult], llama: Path, texts: Path, tmp_path: Path
) -> None:
    """The output's tokenizer is the source's."""
    folder = Path(shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    written = io.BytesIO()
    lines = iter(TEXT.lower().splitlines())
    settings = {"vocab_size": 100, "model_type": "bpe", "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **settings)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    prune(folder, tmp_path / "out", calibration=str(texts / "whole.txt"))
    ids = SentencePieceProcessor(model_proto=written.getvalue()).encode(TEXT)
    assert tokenize(load_tokenizer(tmp_path / "out"), TEXT) == ids
    tokens = calibration_tokens(folder, Calibration(str(texts / "whole.txt"), samples=4, sequence_length=48))
    manifest = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)
    assert manifest["identity"]["calibration"]["tokens"] == tokens_digest(tokens)
    windows = [ids[start : start + 48] for start in range(0, len(ids), 48)]
    assert all(window in windows for window in tokens.tolist())


def test_a_data_sets_other_split(llama: Path, texts: Path) -> None:
    tokens = calibration_tokens(llama, Calibration(f"{texts / 'set'}::test", samples=2, sequence_length=2_000))
    assert sorted(decoded(tokens)) == sorted([TEXT[::-1][:2_000], TEXT[::-1][2_000:]])


def test_the_shipped_text(llama: Path) -> None:
    """Works offline; long enough for the command's defaults, 128 x 2,048 tokens of a subword tokenizer."""
    shipped = gzip.decompress(
        (importlib.resources.files("streamprune.data") / "calibration.txt.gz").read_bytes()
    ).decode()
    assert len(shipped) > 4 * 128 * 2_048
    tokens = calibration_tokens(llama, Calibration(None, samples=3, sequence_length=100))
    ascii_only = "".join(character if ord(character) < 127 else chr(127) for character in shipped)
    assert all(window in ascii_only for window in decoded(tokens))


def test_too_short_says_by_how_much(llama: Path, texts: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"whole\.txt: 4000 tokens make 40 windows of 100, 41 are asked for; give a longer text"
    ):
        calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=41, sequence_length=100))
    assert len(calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=40, sequence_length=100))) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n" * 9 + b"\xff\xfe bad", r"a\.txt: line 10 is not UTF-8"),
        ("a.txt", b"", r"a\.txt: 0 tokens make 0 windows"),
        ("a.jsonl", b'{"text": "one"}\n{"words": 1}\n', r"a\.jsonl: line 2 is not a JSON object with a string 'text'"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl: line 1 "),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl: line 1 "),
        ("a.jsonl", b"not json\n", r"a\.jsonl: line 1 "),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: line 1 is not UTF-8"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: is not a parquet file"),
        ("a.docx", b"text", r"a\.docx: unknown kind of file; use \.txt, \.jsonl, "),
    ],
)
def test_what_is_not_text_is_refused(name: str, content: bytes, message: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as error:
        calibration_tokens(llama, Calibration(str(tmp_path / name), samples=1, sequence_length=10))
    assert error.value.exit_code == 4


def test_a_parquet_file_without_the_column_is_refused(llama: Path, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"words": ["one"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=r"a\.parquet: .* column 'text'"):
        calibration_tokens(llama, Calibration(str(tmp_path / "a.parquet"), samples=1, sequence_length=10))


def test_what_is_missing_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"missing\.txt: no such file"):
        calibration_tokens(llama, Calibration(str(tmp_path / "missing.txt"), samples=1, sequence_length=10))
    with pytest.raises(CalibrationError, match="no-such-set: is neither a file nor a data set that can be loaded"):
        calibration_tokens(llama, Calibration("no-such-set", samples=1, sequence_length=10))


@pytest.mark.parametrize(("samples", "length"), [(0, 10), (-1, 10), (1, 1), (1, 0)])
def test_no_tokens_are_refused(samples: int, length: int, llama: Path, texts: Path) -> None:
    with pytest.raises(SettingsError, match="whole number from"):
        calibration_tokens(llama, Calibration(str(texts / "whole.txt"), samples=samples, sequence_length=length))
