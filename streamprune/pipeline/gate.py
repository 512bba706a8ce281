"""What becomes of a block by its error and the budget."""

import logging
from collections.abc import Iterable

from streamprune.checkpoint.manifest import BlockRecord
from streamprune.config import PruneConfig
from streamprune.errors import BlockErrorExceeded, JobMismatchError

logger = logging.getLogger("streamprune")


def outcome_of(error: float, max_block_error: float | None, on_excess: str) -> str:
    """What the gate makes of a block error: "pruned", or "kept dense", "warned", "stopped" above the budget."""
    if max_block_error is None or error <= max_block_error:
        return "pruned"
    return {"keep-dense": "kept dense", "warn": "warned", "stop": "stopped"}[on_excess]


def gate(name: str, error: float, config: PruneConfig) -> str:
    """The outcome of a block, said in a line where it is above the budget. Raises BlockErrorExceeded to stop there."""
    outcome = outcome_of(error, config.max_block_error, config.on_excess)
    if outcome == "stopped":
        raise BlockErrorExceeded(
            f"{name}: block error {error:.4g} is above --max-block-error {config.max_block_error:g}; raise it, or "
            "choose --on-excess keep-dense or warn"
        )
    if outcome != "pruned":
        logger.warning("%s: %s, block error %.4g above %g", name, outcome, error, config.max_block_error)
    return outcome


def check_outcomes(config: PruneConfig, blocks: Iterable[BlockRecord]) -> None:
    """Raise JobMismatchError where a finished block would have ended otherwise under these settings."""
    for block in blocks:
        if block.block_error is None:  # not validated
            continue
        now = outcome_of(block.block_error, config.max_block_error, config.on_excess)
        if now != block.outcome:
            raise JobMismatchError(
                f"{block.name}: was {block.outcome} at block error {block.block_error:.4g}, with these settings it "
                f"would be {now}; use the former --max-block-error and --on-excess, or --restart"
            )
