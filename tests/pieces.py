"""A dense model run in pieces: outer parameters, block inputs, single blocks, logits."""

from pathlib import Path
from typing import Any

import torch

from streamprune.checkpoint.reader import open_checkpoint
from streamprune.model.blocks import dense_block, run_block
from streamprune.model.skeleton import (
    BlockInputs,
    Skeleton,
    build_skeleton,
    match_names,
    record_block_inputs,
    run_tail,
)

CPU = torch.device("cpu")
TOKENS = torch.tensor([[ord(character) for character in "Twenty-nine letters and more."]])


def outer_tensors(skeleton: Skeleton, folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    names = match_names(skeleton, checkpoint)
    tensors = checkpoint.read(names[name] for name in skeleton.outer_parameters)
    return {name: tensors[names[name]].float() for name in skeleton.outer_parameters}


def recorded(skeleton: Skeleton, folder: Path, tokens: torch.Tensor = TOKENS) -> BlockInputs:
    outer = outer_tensors(skeleton, folder)
    return record_block_inputs(skeleton, outer, outer[skeleton.embedding][tokens])


def block_of(skeleton: Skeleton, folder: Path, index: int) -> Any:
    checkpoint = open_checkpoint(folder)
    names = match_names(skeleton, checkpoint)
    parameters = skeleton.block_parameters(index)
    stored = checkpoint.read(names[name] for name in parameters)
    return dense_block(skeleton, index, {name: stored[names[name]] for name in parameters}, CPU, torch.float32)


def logits_in_pieces(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence [1, tokens], block by block."""
    skeleton = build_skeleton(folder, open_checkpoint(folder))
    inputs = recorded(skeleton, folder, tokens)
    states = inputs.hidden_states
    for index in range(len(skeleton.blocks)):
        states = run_block(block_of(skeleton, folder, index), states, inputs.arguments[index], "block")
    return run_tail(skeleton, outer_tensors(skeleton, folder), states, torch.arange(tokens.shape[1]))
