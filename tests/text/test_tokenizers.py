"""Tokenizers: the checkpoint's own, of each kind of file, with the ids that the model was trained on."""

import io
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from streamprune.errors import CheckpointError
from streamprune.model.library import warnings_heard
from streamprune.text.calibration import Calibration, calibration_tokens
from streamprune.text.tokenizers import CONVERTERS_PATTERN, load_tokenizer, prompt_ids, text_after, tokenize

# What mistral-common splits the text of large vocabularies by.
MISTRALS_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "Two  spaces, a\ttab, 1234, ü 漢 <s>\n\n" + tiny.text(2_000, seed=5)


def test_tokenizer_is_the_checkpoints_and_adds_nothing(sources: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(sources("llama"))
    assert tokenize(tokenizer, "Ab\n ü") == [65, 98, 10, 32, 127]
    assert tokenize(tokenizer, "") == []


def test_absent_tokenizer_is_a_checkpoint_error_in_one_line(sources: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(sources("llama") / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sentencepiece_files() -> dict[str, bytes]:
    """Models by kind: as LLaMA's is, and one of another algorithm that normalises, as OpenLLaMA's does."""
    settings: dict[str, dict[str, Any]] = {
        "bpe": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    }
    made = {}
    for name, setting in settings.items():
        written = io.BytesIO()
        setting.update(vocab_size=400, byte_fallback=True, minloglevel=2, model_writer=written)
        SentencePieceTrainer.train(sentence_iterator=iter(tiny.text(20_000, seed=1).splitlines()), **setting)
        made[name] = written.getvalue()
    return made


def only_sentencepiece(folder: Path, content: bytes, config: dict[str, Any] | None, model_type: str = "llama") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    tiny.write_json(folder / "config.json", {"model_type": model_type, "vocab_size": 400})
    if config is not None:
        tiny.write_json(folder / "tokenizer_config.json", config)
    return folder


LLAMA_2: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>",
    "model_max_length": 4096,
}  # fmt: skip


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "LlamaTokenizer"}, LLAMA_2], ids=["none", "class", "all"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_model_alone_gives_the_ids_of_sentencepiece(
    kind: str, model_type: str, config: dict[str, Any] | None, sentencepiece_files: dict[str, bytes], tmp_path: Path
) -> None:
    content = sentencepiece_files[kind]
    folder = only_sentencepiece(tmp_path, content, config, model_type)
    expected = SentencePieceProcessor(model_proto=content).encode(TEXT)
    assert tokenize(load_tokenizer(folder), TEXT) == expected
    (tmp_path / "text.txt").write_text(TEXT)
    windows = calibration_tokens(
        folder, Calibration(str(tmp_path / "text.txt"), samples=len(expected) // 50, sequence_length=50)
    ).tolist()
    assert sorted(windows) == sorted(expected[start : start + 50] for start in range(0, len(expected) - 49, 50))


def test_prompts_of_a_tokenizer_model_begin_as_its_config_says(
    sentencepiece_files: dict[str, bytes], tmp_path: Path
) -> None:
    content = sentencepiece_files["bpe"]
    processor = SentencePieceProcessor(model_proto=content)
    cases: list[tuple[dict[str, Any] | None, list[int]]] = [
        (None, [processor.bos_id()]),
        (LLAMA_2, [processor.bos_id()]),
        ({**LLAMA_2, "add_bos_token": False}, []),
    ]
    for config, first in cases:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        tokenizer = load_tokenizer(only_sentencepiece(tmp_path / "model", content, config))
        ids = prompt_ids(tokenizer, "an apple")
        assert ids == first + processor.encode("an apple")
        assert text_after(tokenizer, ids[:2], ids[2:]) == processor.decode(ids)[len(processor.decode(ids[:2])) :]


def test_tokenizer_json_goes_before_tokenizer_model(sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources("llama"), tmp_path / "model"))
    (folder / "tokenizer.model").write_bytes(b"not looked at")
    assert tokenize(load_tokenizer(folder), "Ab") == [65, 98]


def test_bad_tokenizer_model_is_refused(sentencepiece_files: dict[str, bytes], tmp_path: Path) -> None:
    content = sentencepiece_files["bpe"]
    for harmed in (b"", content[:-50], b"IQ== 0\nIg== 1\n" * 20):
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.model: is no whole sentencepiece model \(.*give"
        ) as caught:
            load_tokenizer(only_sentencepiece(tmp_path, harmed, None))
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"does not do what tokenizer_config\.json asks for \(add_prefix_space"):
        load_tokenizer(only_sentencepiece(tmp_path, content, {"add_prefix_space": False}))


def test_without_sentencepiece_its_name_is_said(
    sentencepiece_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: needs the package sentencepiece.*pip install senten"):
        load_tokenizer(only_sentencepiece(tmp_path, sentencepiece_files["bpe"], None))


def test_code_beside_tokenizer_model_is_said_not_to_run(
    sentencepiece_files: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    load_tokenizer(only_sentencepiece(tmp_path, sentencepiece_files["bpe"], config))
    assert caplog.messages == [
        f"{tmp_path}/tokenizer.model: its Python code (auto_map) is not run; sentencepiece alone tokenises"
    ]


SPLIT_AS_WRITTEN, SPLIT_RIGHT = ["12", "oW"], ["1", "2", "o", "W"]


def large_vocabulary(folder: Path, split: pre_tokenizers.PreTokenizer, names: tuple[str, ...], **config: Any) -> Path:
    """A byte-level tokenizer of more than 100,000 tokens, which knows "12" and "oW" in one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*names, *alphabet, *SPLIT_AS_WRITTEN]
    tokens += [f"filler{number}" for number in range(len(tokens), 100_001)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, [("1", "2"), ("o", "W")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    values = {"model_type": "mistral", "vocab_size": len(tokens), "transformers_version": "4.51.0", **config}
    tiny.write_json(folder / "config.json", {name: value for name, value in values.items() if value is not None})
    return folder


MISTRALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
LLAMAS = ("<|begin_of_text|>", "<|end_of_text|>")
MENDED = "splits words by a pattern that is wrong for Mistral"
DOUBTED = (
    'fix_mistral_regex=True` flag when loading this tokenizer to fix this issue. It is used as it is; decide by "fix_mi'
)
# pattern, special tokens, changes of config.json, tokens of "12oW", what is warned of
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], list[str], str | None]] = {
    "the converter's": (CONVERTERS_PATTERN, MISTRALS, {}, SPLIT_RIGHT, MENDED),
    "of no known version": (CONVERTERS_PATTERN, MISTRALS, {"transformers_version": None}, SPLIT_RIGHT, MENDED),
    "of version 5": (CONVERTERS_PATTERN, MISTRALS, {"transformers_version": "5.0.0"}, SPLIT_AS_WRITTEN, None),
    "another model's": (CONVERTERS_PATTERN, MISTRALS, {"model_type": "llama"}, SPLIT_AS_WRITTEN, None),
    "right already": (MISTRALS_PATTERN, MISTRALS, {}, SPLIT_RIGHT, None),
    "another vocabulary": (CONVERTERS_PATTERN, LLAMAS, {}, SPLIT_AS_WRITTEN, DOUBTED),
    "another pattern": (r"\p{L}+|\p{N}+", MISTRALS, {}, SPLIT_AS_WRITTEN, DOUBTED),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistrals_words_are_split_as_mistral_does(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where transformers knows of a wrong pattern; the verbosity that hides its warning is set here too."""
    pattern, names, config, expected, warning = CASES[case]
    folder = large_vocabulary(tmp_path, pre_tokenizers.Split(Regex(pattern), "isolated"), names, **config)
    vocabulary = tiny.read_json(folder / "tokenizer.json")["model"]["vocab"]
    ids = [vocabulary[token] for token in expected]
    assert tokenize(load_tokenizer(folder), "12oW") == ids
    (tmp_path / "text.txt").write_text("12oW" * 50)
    assert calibration_tokens(
        folder, Calibration(str(tmp_path / "text.txt"), samples=1, sequence_length=4 * len(ids))
    ).tolist() == [ids * 4]
    assert len(caplog.messages) == (2 if warning else 0)
    assert all(message.startswith(f"{folder}: ") and str(warning) in message for message in caplog.messages)


@pytest.mark.parametrize(("decided", "expected"), [(True, SPLIT_RIGHT), (False, SPLIT_AS_WRITTEN)])
def test_the_user_may_decide_on_the_pattern(
    decided: bool, expected: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = large_vocabulary(tmp_path, pre_tokenizers.Split(Regex(CONVERTERS_PATTERN), "isolated"), LLAMAS)
    path = folder / "tokenizer_config.json"
    tiny.write_json(path, {**tiny.read_json(path), "fix_mistral_regex": decided})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(tokenize(tokenizer, "12oW")) == expected
    assert caplog.messages == []


def test_warnings_of_transformers_are_heard_whatever_its_verbosity(capfd: pytest.CaptureFixture[str]) -> None:
    root, library = logging.getLogger("transformers"), logging.getLogger("transformers.some.module")
    before = root.level, root.handlers, root.propagate
    assert not library.isEnabledFor(logging.WARNING)
    for _ in range(2):  # also what transformers says once in a process
        with warnings_heard() as heard:
            library.warning("ids are\n   %s\x1b[2J", "wrong")
            library.warning_once("once")
            library.error("an error, too")
            library.info("no warning")
            library.warning_once("once")
        assert list(heard) == ["ids are wrong\\x1b[2J", "once", "an error, too"]
    assert (root.level, root.handlers, root.propagate) == before
    assert capfd.readouterr() == ("", "")


def test_warnings_of_transformers_about_a_tokenizer_are_passed_on(
    sources: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*_arguments: Any, **_options: Any) -> str:
        for message in ("a doubt\nabout ids", "`X` but `tokenizer.json` is ByteLevel; loading `TokenizersBackend`."):
            logging.getLogger("transformers.tokenization").warning(message)
        return "tokenizer"

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", warned)
    assert load_tokenizer(sources("llama")) == "tokenizer"
    assert caplog.messages == [f"{sources('llama')}: transformers warns: a doubt about ids"]


def test_the_converters_pattern_is_the_one_that_transformers_had() -> None:
    """Its general converter still has it by default."""
    assert TikTokenConverter().pattern == CONVERTERS_PATTERN
