"""Calibration tokens: from a text file, a data set, or the text that ships with the package."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from streamprune.config import Texts, check_settings
from streamprune.errors import CalibrationError, SettingsError
from streamprune.text.documents import (
    BATCH_CHARACTERS,
    CHARACTERS_PER_TOKEN,
    TEXT_COLUMN,
    check_texts,
    documents,
    name_of_texts,
)
from streamprune.text.tokenizers import load_tokenizer, tokenize

CANDIDATES_PER_SAMPLE = 8  # reading stops when the text could give this many times the samples asked for


@dataclass(frozen=True)
class Calibration:
    """Which text calibrates, and how much of it.

    text             a file's or a data set's name, or the texts; None: the text that ships with the package
    column           holds the texts in a file of JSON or .parquet, or in a data set
    samples          sequences, drawn by `seed`
    sequence_length  tokens of each; None: as many as fit the model

    Raises SettingsError for what is none of these; nothing is read.
    """

    text: Texts | None = None
    column: str = TEXT_COLUMN
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(samples=self.samples, sequence_length=self.sequence_length, seed=self.seed)
        check_settings(text_column=self.column)
        check_texts(self.text)


def calibration_tokens(model: Path, calibration: Calibration) -> torch.Tensor:
    """Token ids int64 [samples, sequence_length], windows that do not overlap, without special tokens.

    Reading stops when there are enough. Raises CalibrationError where the text is missing, is not text, or is too short
    for that many windows.
    """
    samples, length = calibration.samples, calibration.sequence_length
    if length is None:
        raise SettingsError("calibration needs a sequence length")
    tokenizer = load_tokenizer(model)
    enough = CANDIDATES_PER_SAMPLE * samples * length
    tokens: list[int] = []
    characters = 0
    for batch in _batches(documents(calibration.text, calibration.column)):
        tokens += tokenize(tokenizer, batch)
        characters += len(batch)
        if len(tokens) >= enough or characters >= CHARACTERS_PER_TOKEN * enough:
            break
    windows = len(tokens) // length
    if windows < samples:
        raise CalibrationError(
            f"{name_of_texts(calibration.text)}: {len(tokens)} tokens make {windows} windows of {length}, "
            f"{samples} are asked for; give a longer text, fewer --samples or a smaller --sequence-length"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return torch.tensor(tokens[: windows * length]).view(windows, length)[chosen]


def tokens_digest(tokens: torch.Tensor) -> str:
    """sha256 over the ids as int64."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _batches(texts: Iterator[str]) -> Iterator[str]:
    """Documents joined by blank lines into batches of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield "\n\n".join(batch)
            batch, size = [], 0
    if batch:
        yield "\n\n".join(batch)
