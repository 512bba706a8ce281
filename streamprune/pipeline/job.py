"""A job resolved: model, plan, calibration tokens, arithmetic, and the identity that a resumed job must share."""

import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.beside import Beside, list_beside
from streamprune.checkpoint.packed import is_packed
from streamprune.checkpoint.reader import INDEX_FILES, Checkpoint, open_checkpoint
from streamprune.config import PruneConfig
from streamprune.errors import CheckpointError
from streamprune.model.arithmetic import Arithmetic, resolve_arithmetic, return_free_memory, warn_without_kernels
from streamprune.model.configuration import forward_settings
from streamprune.model.documents import TEXT_COLUMN
from streamprune.model.machine import gpu_versions, rounding
from streamprune.model.skeleton import Skeleton, build_skeleton, match_names
from streamprune.model.streaming import check_tied, sequences_at_once
from streamprune.model.text import tokenizer_digests
from streamprune.pipeline.calibration import calibration_tokens, tokens_digest
from streamprune.pipeline.plan import Plan, make_plan

logger = logging.getLogger("streamprune")

# Settings that decide which outcome a block has, but no byte of a block with the same outcome: a stopped job may go on
# under another budget, if every finished block would have ended the same way.
BUDGET_SETTINGS = ("max_block_error", "on_excess")


@dataclass(frozen=True)
class Job:
    """Everything that the scheduler needs to know, and nothing that changes while it works."""

    source: Path
    skeleton: Skeleton
    checkpoint: Checkpoint
    names: dict[str, str]
    config: PruneConfig
    plan: Plan
    tokens: torch.Tensor
    arithmetic: Arithmetic
    identity: dict[str, Any]
    beside: Beside

    @property
    def shards(self) -> int:
        """Output shards: one for what lies outside the blocks, then one a block."""
        return len(self.skeleton.blocks) + 1

    def shard_name(self, index: int | None) -> str:
        """File name of a block's shard; None: the tensors outside the blocks."""
        number = 1 if index is None else index + 2
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"


def resolve_job(
    model: Path,
    config: PruneConfig,
    calibration: str | None,
    samples: int,
    sequence_length: int | None,
    seed: int,
    device: str,
    dtype: str,
    *,
    text_column: str = TEXT_COLUMN,
    **resources: Any,
) -> Job:
    """Open the source, read its headers, tokenise the calibration text, and refuse what cannot work.

    `resources` are `make_plan`'s: limits on memory, which the settings are fitted to, micro-batch and prefetch.
    """
    warn_without_kernels()
    skeleton, checkpoint, names = open_model(model)
    arithmetic = resolve_arithmetic(device, dtype, source_dtype(skeleton, checkpoint, names))
    check_tied(skeleton, checkpoint, names)
    asked = config.moments_width
    plan, config = make_plan(skeleton, checkpoint, names, config, samples, sequence_length, arithmetic, **resources)
    sequence_length = plan.sequence_length
    if config.moments_width < asked:
        logger.warning("second moments in blocks of at most %d channels, to keep to the memory", config.moments_width)
    if config.validate:
        tokens = calibration_tokens(model, calibration, samples, sequence_length, seed, text_column)
    else:
        tokens = torch.empty(0, 0, dtype=torch.int64)  # no text passes the model
    return_free_memory()  # a tokenizer takes much for a moment
    vocabulary, _ = skeleton.embedding_shape
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise CheckpointError(f"{model}: the tokenizer makes ids up to {int(tokens.max())}, the model has {vocabulary}")
    calibrated = None
    if config.validate:
        amount = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
        calibrated = {"tokens": tokens_digest(tokens), **amount}
    identity = {
        "source": {
            "fingerprint": checkpoint.fingerprint(),
            "config": forward_settings(skeleton.model.config),
            "tokenizer": tokenizer_digests(model),
        },
        "calibration": calibrated,
        "settings": config.to_dict(),
        "compute": {**arithmetic.identity, **_pace_that_decides(arithmetic, plan)},
    }
    known = {"config.json", *INDEX_FILES, *(source.path.name for source in checkpoint.tensors.values())}
    beside = list_beside(model, known)
    return Job(model, skeleton, checkpoint, names, config, plan, tokens, arithmetic, identity, beside)


def open_model(model: Path) -> tuple[Skeleton, Checkpoint, dict[str, str]]:
    """A dense model's modules, what lies where in its files, and each parameter's name there."""
    if is_packed(model):
        raise CheckpointError(f"{model}: is already an output of streamprune; give the dense model")
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(model, checkpoint)
    return skeleton, checkpoint, match_names(skeleton, checkpoint)


def source_dtype(skeleton: Skeleton, checkpoint: Checkpoint, names: dict[str, str]) -> torch.dtype:
    """The dtype that the first block's weights are stored in."""
    return checkpoint.tensors[names[skeleton.block_parameters(0)[0]]].dtype


def _pace_that_decides(arithmetic: Arithmetic, plan: Plan) -> dict[str, int]:
    """On a GPU how many sequences go through a block at once: cuBLAS chooses by rows how it multiplies."""
    if arithmetic.device.type != "cuda":
        return {}
    return {"sequences_at_once": sequences_at_once(plan.micro_batch, plan.sequence_length, arithmetic.device)}


def surroundings(job: Job) -> dict[str, Any]:
    """What else decides the bytes: an interrupted job goes on where all of it is the same. A finished output does not
    record it, and is recognised elsewhere.
    """
    device, dtype = job.arithmetic.device, job.arithmetic.dtype
    found = versions(*(["scipy"] if "assignment" in job.config.search_stages else []))
    found.update(gpu_versions(device) if device.type == "cuda" else {})
    if not job.config.validate:  # nothing is multiplied by a text
        return {"versions": found}
    return {"versions": found, "rounding": rounding(device, dtype, job.plan.sequence_length)}


def versions(*more: str) -> dict[str, str]:
    """Versions of the libraries whose arithmetic or modules decide the bytes, and of `more`."""
    return {name: importlib.metadata.version(name) for name in ("streamprune", "torch", "transformers", *more)}


def without_budget(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the settings that a resumed job may change."""
    settings = {name: value for name, value in identity["settings"].items() if name not in BUDGET_SETTINGS}
    return {**identity, "settings": settings}
