"""Calibration tokens: from a text file, a data set, or the text that ships with the package."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from streamprune.config import Texts
from streamprune.errors import CalibrationError, SettingsError
from streamprune.model.documents import BATCH_CHARACTERS, CHARACTERS_PER_TOKEN, TEXT_COLUMN, documents, name_of_texts
from streamprune.model.text import load_tokenizer, tokenize

CANDIDATES_PER_SAMPLE = 8  # reading stops when the text could give this many times the samples asked for


def calibration_tokens(
    model: Path,
    calibration: Texts | None,
    samples: int,
    sequence_length: int,
    seed: int,
    text_column: str = TEXT_COLUMN,
) -> torch.Tensor:
    """Token ids int64 [samples, sequence_length], windows that do not overlap, drawn by `seed`, without special tokens.

    Reading stops when there are enough. Raises CalibrationError where the text is missing, is not text, or is too short
    for that many windows.
    """
    if samples < 1 or sequence_length < 2:
        raise SettingsError("calibration needs at least 1 sample of at least 2 tokens")
    tokenizer = load_tokenizer(model)
    enough = CANDIDATES_PER_SAMPLE * samples * sequence_length
    tokens: list[int] = []
    characters = 0
    for batch in _batches(documents(calibration, text_column)):
        tokens += tokenize(tokenizer, batch)
        characters += len(batch)
        if len(tokens) >= enough or characters >= CHARACTERS_PER_TOKEN * enough:
            break
    windows = len(tokens) // sequence_length
    if windows < samples:
        raise CalibrationError(
            f"{name_of_texts(calibration)}: {len(tokens)} tokens make {windows} windows of {sequence_length}, "
            f"{samples} are asked for; give a longer text, fewer --samples or a smaller --sequence-length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return torch.tensor(tokens[: windows * sequence_length]).view(windows, sequence_length)[chosen]


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
