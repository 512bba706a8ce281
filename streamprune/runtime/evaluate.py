"""Perplexity of a dense checkpoint or a packed output, streamed block by block; and its scores in tasks."""

import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from streamprune.checkpoint.scratch import HiddenStates
from streamprune.config import Device, Dtype, PathLike, check_settings, path_of
from streamprune.errors import CalibrationError, CheckpointError, NumericsError, SettingsError
from streamprune.model.arithmetic import (
    Arithmetic,
    against_overflow,
    check_arithmetic,
    name_of,
    resolve_arithmetic,
    warn_without_kernels,
)
from streamprune.model.blocks import load_block
from streamprune.model.expert_streaming import advance_by_parts
from streamprune.model.forward import run_tail
from streamprune.model.hub import folder_of
from streamprune.model.skeleton import Skeleton
from streamprune.model.source import Source, open_source
from streamprune.model.streaming import embed, text_inputs
from streamprune.process import peak_memory_bytes
from streamprune.runtime.tasks import check_harness, run_tasks
from streamprune.text.documents import (
    BATCH_CHARACTERS,
    CHARACTERS_PER_TOKEN,
    TEXT_COLUMN,
    check_file,
    documents,
    kind_of,
)
from streamprune.text.tokenizers import fitting_length, load_tokenizer, tokenize

WHOLE_CHARACTERS = 1 << 24  # tokenised at once without max_tokens: up to 6 GB, 400 bytes a token
MAX_LOSS = math.log(sys.float_info.max)  # nats; its exponential is the largest float
LOGIT_POSITIONS = 256  # logits computed at once: 50 MB in float32 at a vocabulary of 49,152


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity over `tokens` = windows x sequence length; `loss` is the mean negative log-likelihood in nats.

    The perplexity is e^loss; None if that is beyond a float (1.8e308, a loss of more than 709.78). Without a text both
    are None, over 0 tokens. `tasks`: metrics by task, as lm-evaluation-harness names them; none where none was given.
    """

    perplexity: float | None
    loss: float | None
    tokens: int
    sequence_length: int
    packed: bool
    seconds: float
    peak_memory_bytes: int
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(
    model: PathLike,
    *,
    text: PathLike | None = None,
    text_column: str = TEXT_COLUMN,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    scratch: PathLike | None = None,
    tasks: PathLike | None = None,
    progress: bool = False,
) -> EvaluateResult:
    """Perplexity of a text under a dense model or a packed output, its scores in tasks, or both.

    The whole text is tokenised without special tokens and cut into windows of `sequence_length` (default: 2048, or the
    model's positions where they are fewer) without overlap, the remainder dropped; the mean negative log-likelihood is
    over the sequence_length - 1 targets of each window (docs/method.md). With `max_tokens` a long text is read only
    until it gives that many. In a file of JSON or .parquet `text_column` holds the texts. `scratch` is a folder for
    hidden states (default: the system's temporary folder).

    `tasks` is a .yaml file of lm-evaluation-harness, which must be installed ("streamprune[eval]"); it may name Python
    functions, which run. For tasks the whole model is held in memory, its pruned layers packed. Raises NumericsError
    where a block's output, a loss or a score is not finite.

    >>> dense, packed = (streamprune.evaluate(folder, text=text, max_tokens=2000) for folder in (model, pruned))
    >>> dense.perplexity < packed.perplexity
    True
    """
    start = time.perf_counter()
    check_settings(sequence_length=sequence_length, max_tokens=max_tokens, text_column=text_column)
    check_settings(device=device, dtype=dtype, progress=progress)
    path_of("model", model)
    text = None if text is None else path_of("text", text)
    if text is None and tasks is None:
        raise SettingsError("give text, tasks, or both")
    if scratch is not None and not path_of("scratch", scratch).is_dir():
        raise SettingsError(f"scratch {scratch}: no such folder")
    if text is not None:
        check_file(text)
    file = None if tasks is None else check_harness(tasks)
    warn_without_kernels()
    check_arithmetic(device, dtype)
    folder = folder_of("model", model, progress)
    source = open_source(folder)
    source.check_tied()
    arithmetic = resolve_arithmetic(device, dtype, source.dtype)
    measured: tuple[float | None, float | None, int, int] = (None, None, 0, 0)
    if text is not None:
        sequence_length = fitting_length(sequence_length, source.skeleton.positions)
        windows = _windows(folder, text, text_column, sequence_length, max_tokens)
        loss = _mean_loss(source, windows, arithmetic, scratch, progress)
        measured = math.exp(loss) if loss < MAX_LOSS else None, loss, windows.numel(), sequence_length
    scores = {} if file is None else run_tasks(source, file, arithmetic)
    seconds, packed = time.perf_counter() - start, bool(source.packed)
    return EvaluateResult(*measured, packed, seconds, peak_memory_bytes(), scores)


def _mean_loss(
    source: Source, windows: torch.Tensor, arithmetic: Arithmetic, scratch: PathLike | None, progress: bool
) -> float:
    """The mean negative log-likelihood, in nats, of windows [count, sequence_length] of tokens."""
    vocabulary, _ = source.skeleton.embedding_shape
    if int(windows.max()) >= vocabulary:
        raise CheckpointError(f"the tokenizer makes ids up to {int(windows.max())}, the model has {vocabulary}")
    count = (len(source.blocks) + 2) * len(windows)
    bar = tqdm(total=count, unit="sample", desc="evaluate", disable=None if progress else True)
    with tempfile.TemporaryDirectory(prefix="streamprune-", dir=scratch) as work, bar:
        losses = _losses(source, windows, arithmetic, Path(work), bar.update)
    return math.fsum(losses) / (windows.numel() - len(windows))


def _losses(
    source: Source, windows: torch.Tensor, arithmetic: Arithmetic, scratch: Path, tick: Callable[[], object]
) -> list[float]:
    """Each window's loss, as `_window_loss`; hidden states lie in the folder `scratch`."""
    skeleton, on_gpu = source.skeleton, arithmetic.device.type == "cuda"
    sizes = (*windows.shape, skeleton.stream_width, arithmetic.dtype)
    with ExitStack() as open_files:
        files = [HiddenStates(scratch / f"{number}.bin", *sizes, for_gpu=on_gpu) for number in (0, 1)]
        for file in files:
            open_files.callback(file.close)
        arguments = embed(skeleton, text_inputs(source), windows, arithmetic, files[0], tick)
        load = partial(load_block, source, arithmetic=arithmetic, untrusted=True)
        for block in source.blocks:
            streams = files[0], files[1]
            advance_by_parts(block, load, arguments[block.index], streams, arithmetic, scratch, tick)
            files.reverse()
        # the tail is given embeddings, so that their matrix is needed where the head is tied to it alone
        spared = skeleton.aside | skeleton.read_by_rows - {*skeleton.tied.values()}
        needed = [name for name in skeleton.outer_parameters if name not in spared]
        tail = {n: tensor.to(arithmetic.device, arithmetic.dtype) for n, tensor in source.read(needed).items()}
        losses = []
        for index, window in enumerate(windows):
            losses.append(_window_loss(skeleton, tail, files[0].read(index), window, arithmetic))
            if not math.isfinite(losses[-1]):
                raise NumericsError(
                    f"{source.folder}: the loss of window {index} is NaN or infinite: weights behind the last block "
                    f"are too large for {name_of(arithmetic.dtype)}; {against_overflow(arithmetic.dtype)}"
                )
            tick()
    return losses


def _windows(folder: Path, text: Path, text_column: str, sequence_length: int, max_tokens: int | None) -> torch.Tensor:
    ids = _ids(load_tokenizer(folder), text, text_column, max_tokens)[:max_tokens]
    count = len(ids) // sequence_length
    if count == 0:
        raise CalibrationError(
            f"{text}: {len(ids)} tokens are fewer than one window of {sequence_length}; give a longer text"
        )
    return torch.tensor(ids[: count * sequence_length]).view(count, sequence_length)


def _ids(tokenizer: Any, path: Path, text_column: str, max_tokens: int | None) -> list[int]:
    """Ids of a whole text, or of its first documents until they give `max_tokens`."""
    separator = "" if kind_of(path)[0] == ".txt" else "\n\n"
    most = max(WHOLE_CHARACTERS, CHARACTERS_PER_TOKEN * (max_tokens or 0))
    read: list[str] = []
    size, look_at = 0, BATCH_CHARACTERS
    for document in documents(str(path), text_column):
        read.append(document)
        size += len(document)
        if size > most:
            few = (
                f"do not make {max_tokens} tokens; give another text" if max_tokens else "are there; give --max-tokens"
            )
            raise CalibrationError(f"{path}: more than {most} characters {few}")
        if max_tokens and size >= look_at:
            ids = tokenize(tokenizer, separator.join(read))
            if len(ids) >= max_tokens:
                return ids
            look_at = 2 * size  # so that no more than twice the text is tokenised in all
    return tokenize(tokenizer, separator.join(read))


def _window_loss(
    skeleton: Skeleton,
    tail: dict[str, torch.Tensor],
    states: torch.Tensor,
    window: torch.Tensor,
    arithmetic: Arithmetic,
) -> float:
    """Sum of negative log-likelihoods, in nats, of a window's tokens after the first."""
    states, targets = states.to(arithmetic.device), window[1:].to(arithmetic.device)
    positions = torch.arange(len(targets), device=arithmetic.device)
    pieces = -(-len(targets) // LOGIT_POSITIONS)
    losses: list[float] = []
    for piece in positions.tensor_split(pieces):
        logits = run_tail(skeleton, tail, states, piece).to(torch.float32)
        losses += functional.cross_entropy(logits, targets[piece], reduction="none").tolist()
    return math.fsum(losses)
