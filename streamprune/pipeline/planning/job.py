"""A job resolved: model, plan, calibration tokens, arithmetic, and the identity that a resumed job must share."""

import dataclasses
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.beside import Beside, list_beside
from streamprune.checkpoint.layout import LAYOUT
from streamprune.checkpoint.reader import INDEX_FILES
from streamprune.config import OF_EXPERTS, PruneConfig
from streamprune.errors import CheckpointError
from streamprune.model.arithmetic import Arithmetic, resolve_arithmetic, warn_without_kernels
from streamprune.model.configuration import forward_settings
from streamprune.model.machine import gpu_versions, rounding
from streamprune.model.skeleton import Block
from streamprune.model.source import Source, open_dense
from streamprune.model.streaming import sequences_at_once
from streamprune.pipeline.planning.plan import Plan, Resources, make_plan
from streamprune.process import return_free_memory
from streamprune.text.calibration import Calibration, calibration_tokens, tokens_digest
from streamprune.text.tokenizers import tokenizer_digests

logger = logging.getLogger("streamprune")

# Settings that decide which outcome a block has, but no byte of a block with the same outcome: a stopped job may go on
# under another budget, if every finished block would have ended the same way.
BUDGET_SETTINGS = ("max_block_error", "on_excess")


@dataclass(frozen=True)
class Job:
    """Everything that the scheduler needs to know, and nothing that changes while it works.

    tokens are calibration's, int64 [samples, length]; beside is what lies beside the source's weights.
    """

    source: Source
    config: PruneConfig
    plan: Plan
    tokens: torch.Tensor
    arithmetic: Arithmetic
    identity: dict[str, Any]
    beside: Beside

    @property
    def shards(self) -> int:
        """Output shards: one for what lies outside the blocks, then one a block."""
        return len(self.source.blocks) + 1

    def shard_name(self, block: Block | None) -> str:
        """File name of a block's shard; None: the tensors outside the blocks."""
        return LAYOUT.shard(1 if block is None else block.index + 2, self.shards)


def resolve_job(model: Path, config: PruneConfig, calibration: Calibration, resources: Resources) -> Job:
    """Open the source, read its headers, tokenise the calibration text, and refuse what cannot work."""
    warn_without_kernels()
    source = open_dense(model)
    arithmetic = resolve_arithmetic(resources.device, resources.dtype, source.dtype)
    source.check_tied()
    asked = config.moments_width
    plan, config = make_plan(source, config, calibration, arithmetic, resources)
    if config.moments_width < asked:
        logger.warning("second moments in blocks of at most %d channels, to keep to the memory", config.moments_width)
    if config.validate:
        tokens = calibration_tokens(model, dataclasses.replace(calibration, sequence_length=plan.sequence_length))
    else:
        tokens = torch.empty(0, 0, dtype=torch.int64)  # no text passes the model
    return_free_memory()  # a tokenizer takes much for a moment
    vocabulary, _ = source.skeleton.embedding_shape
    if tokens.numel() and int(tokens.max()) >= vocabulary:
        raise CheckpointError(f"{model}: the tokenizer makes ids up to {int(tokens.max())}, the model has {vocabulary}")
    known = {"config.json", *INDEX_FILES, *(stored.path.name for stored in source.checkpoint.tensors.values())}
    compute = {**arithmetic.identity, **_pace_that_decides(arithmetic, plan)}
    identity = _identity(source, config, calibration, tokens, compute)
    return Job(source, config, plan, tokens, arithmetic, identity, list_beside(model, known))


def _identity(
    source: Source, config: PruneConfig, calibration: Calibration, tokens: torch.Tensor, compute: dict[str, Any]
) -> dict[str, Any]:
    """What determines the output's bytes, as nested plain data."""
    idle = () if any(block.experts for block in source.blocks) else OF_EXPERTS
    amount = {"samples": len(tokens), "sequence_length": tokens.shape[1], "seed": calibration.seed}
    return {
        "source": {
            "fingerprint": source.checkpoint.fingerprint(),
            "config": forward_settings(source.skeleton.model.config),
            "tokenizer": tokenizer_digests(source.folder),
        },
        "calibration": {"tokens": tokens_digest(tokens), **amount} if config.validate else None,
        "settings": {name: value for name, value in config.to_dict().items() if name not in idle},
        "compute": compute,
    }


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
