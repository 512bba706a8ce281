"""Tokenizers: the checkpoint's own, and the ids it makes of a text."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from streamprune.checkpoint.untrusted import MAX_TOKENIZER_BYTES, open_regular, read_bounded, read_json
from streamprune.errors import CheckpointError, SettingsError
from streamprune.model.configuration import config_class_of, config_of, one_line
from streamprune.model.library import pass_on, warnings_heard

logger = logging.getLogger("streamprune")

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "chat_template.j*",
    "additional_chat_templates/*.jinja",
)
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
DEFAULT_LENGTH = 2048  # tokens of a sequence
SENTENCEPIECE_FILE = "tokenizer.model"
COMPLETE_FILES = ("tokenizer.json", "tekken.json")  # that say themselves how a text is split
# What transformers warns of that is no fault of the ids: it reads a byte-level tokenizer.json as it is, rather than by
# the class that tokenizer_config.json names; chat templates play no part.
HARMLESS = ("is ByteLevel; loading `TokenizersBackend`", "generate chat template")
MISTRAL_FIX = "fix_mistral_regex"  # transformers' name of the option, which its warning also holds
CONTEXT_TOKENS = 8  # before new ones, with which they are written
HALF_CHARACTER = "\ufffd"  # how the bytes of one that is not complete are written
MISTRALS_INST = 3  # the id of "[INST]" in each of Mistral's large vocabularies
CONVERTERS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SentencePiece:
    """A tokenizer.model that stands alone, tokenised by sentencepiece itself: what the model was trained on.

    transformers, without a tokenizer.json, has rules of its own in place of the file's. Called as its tokenizers are.
    """

    def __init__(self, path: Path, begins: bool = True) -> None:
        """`begins`: whether a text with special tokens begins with one. Raises CheckpointError where the file is no
        sentencepiece model, or the package is not there.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise CheckpointError(
                f"{path}: needs the package sentencepiece, which is not installed; pip install sentencepiece"
            ) from error
        self.name_or_path, self.begins = str(path.parent), begins
        self.processor = SentencePieceProcessor()
        content = read_bounded(path, MAX_TOKENIZER_BYTES)
        try:
            self.processor.LoadFromSerializedProto(content)
        except Exception as error:  # of several kinds
            raise CheckpointError(
                f"{path}: is no whole sentencepiece model ({one_line(error)}); give one, or a tokenizer.json beside it"
            ) from error

    def __call__(self, text: str, add_special_tokens: bool = True, **_: bool) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"input_ids": self.processor.encode(text, add_bos=add_special_tokens and self.begins, add_eos=False)}

    def decode(self, ids: list[int], **_: bool) -> str:
        """The text of ids, special tokens left out."""
        text: str = self.processor.decode(ids)
        return text


def tokenizer_digests(model: Path) -> dict[str, str]:
    """sha256 of each file that makes the tokenizer, by name; {} where there is none. Raises CheckpointError."""
    files = {str(path.relative_to(model)): path for path in _files(model)}
    return {name: hashlib.sha256(read_bounded(path, MAX_TOKENIZER_BYTES)).hexdigest() for name, path in files.items()}


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
    """The checkpoint's own tokenizer, without remote code; warnings about it are passed on.

    Raises CheckpointError where it is none.
    """
    for path in _files(model):
        _check_size(path)
    configs = {name: read_json(model / name) for name in TOKENIZER_CONFIGS if (model / name).exists()}
    coded = any("auto_map" in config for config in configs.values())
    path = model / "config.json"
    values = read_json(path)
    config_class_of(path, values)
    if (model / SENTENCEPIECE_FILE).exists() and not any((model / name).exists() for name in COMPLETE_FILES):
        return _sentencepiece(model / SENTENCEPIECE_FILE, configs.get("tokenizer_config.json", {}), coded)
    config = config_of(path, values)
    config.name_or_path = str(model)
    without = " without Python code of its own (auto_map), which is never run" * coded

    def load(**options: bool) -> tuple[Any, list[str]]:
        """A tokenizer of transformers', and its warnings of it."""
        with warnings_heard() as heard, _tokenizer_errors(f"{model}: its tokenizer cannot be loaded{without}"):
            tokenizer = AutoTokenizer.from_pretrained(model, config=config, trust_remote_code=False, **options)
        return tokenizer, [message for message in heard if not any(part in message for part in HARMLESS)]

    tokenizer, warnings = load()
    if any(MISTRAL_FIX in warning for warning in warnings):
        mended, _ = load(**{MISTRAL_FIX: True})
        tokenizer, warnings = _judged(model, tokenizer, mended, warnings)
    pass_on(model, warnings)
    return tokenizer


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens; no warning about the model's length, windows are cut afterwards.

    Raises CheckpointError where the tokenizer does not work.
    """
    with _tokenizer_errors(f"{tokenizer.name_or_path}: its tokenizer fails on the text"):
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with the special tokens that a model wants before it. Raises the errors of `tokenize`."""
    with _tokenizer_errors(f"{tokenizer.name_or_path}: its tokenizer fails on the prompt"):
        return list(tokenizer(text, verbose=False)["input_ids"])


def text_after(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """The text of ids that follow others: how a word is written may depend on what is before it."""
    return _decoded(tokenizer, before + ids)[len(_decoded(tokenizer, before)) :]


class TextFollower:
    """Tells the text of tokens that come one by one, as soon as they make whole characters."""

    def __init__(self, tokenizer: Any, before: list[int], tell: Callable[[str], object]) -> None:
        self.tokenizer, self.tell = tokenizer, tell
        self._before, self._new = before[-CONTEXT_TOKENS:], list[int]()

    def put(self, ids: list[int]) -> None:
        """Tokens that follow the former ones."""
        self._new += ids
        text = text_after(self.tokenizer, self._before, self._new)
        if text and not text.endswith(HALF_CHARACTER):
            self._tell(text)

    def end(self) -> None:
        """No more follow: what is left is told as it is."""
        self._tell(text_after(self.tokenizer, self._before, self._new))

    def _tell(self, text: str) -> None:
        self.tell(text)
        self._before, self._new = (self._before + self._new)[-CONTEXT_TOKENS:], []


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    with _tokenizer_errors(f"{tokenizer.name_or_path}: its tokenizer fails on what the model says"):
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _files(model: Path) -> list[Path]:
    return sorted({path for pattern in TOKENIZER_FILES for path in model.glob(pattern) if not path.is_dir()})


def _check_size(path: Path) -> None:
    file, size_bytes = open_regular(path)
    file.close()
    if size_bytes > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: has {size_bytes} bytes where at most {MAX_TOKENIZER_BYTES} are read")


def _sentencepiece(path: Path, config: dict[str, Any], coded: bool) -> SentencePiece:
    if config.get("add_prefix_space") is False:
        raise CheckpointError(
            f"{path}: does not do what tokenizer_config.json asks for (add_prefix_space false); give a tokenizer.json"
        )
    if coded:
        logger.warning("%s: its Python code (auto_map) is not run; sentencepiece alone tokenises", path)
    return SentencePiece(path, begins=config.get("add_bos_token") is not False)


def _judged(model: Path, tokenizer: Any, mended: Any, warnings: list[str]) -> tuple[Any, list[str]]:
    """Whether to mend how a Mistral's tokenizer splits words: the tokenizer to use, and the warnings to pass on.

    transformers suspects each large one from before its version 5, since its converter of then wrote a wrong pattern.
    It is certain where that pattern is found beside Mistral's own special tokens, and unfounded where the right one is.
    """
    asis, right = (json.loads(one.backend_tokenizer.pre_tokenizer.__getstate__()) for one in (tokenizer, mended))
    others = [warning for warning in warnings if MISTRAL_FIX not in warning]
    if asis == right:
        return tokenizer, others
    right["pretokenizers"][0]["pattern"] = {"Regex": CONVERTERS_PATTERN}
    if asis == right and tokenizer.convert_tokens_to_ids("[INST]") == MISTRALS_INST:
        logger.warning(
            "%s: its tokenizer.json splits words by a pattern that is wrong for Mistral, from a converter of "
            "transformers before 5; Mistral's own is used (%s)", model, MISTRAL_FIX
        )  # fmt: skip
        return mended, others
    advice = f'It is used as it is; decide by "{MISTRAL_FIX}": true or false in tokenizer_config.json'
    return tokenizer, [f"{warning} {advice}" if MISTRAL_FIX in warning else warning for warning in warnings]


@contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Raise what the libraries raise, of many kinds, as CheckpointError; a panic of Rust code is no Exception there."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({one_line(error)}); give a folder whose tokenizer loads") from error
