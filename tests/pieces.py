"""A dense model run in pieces: outer parameters, block inputs, single blocks, logits."""

from pathlib import Path

import torch

from streamprune.model.arithmetic import Arithmetic
from streamprune.model.blocks import RunnableBlock, dense_block
from streamprune.model.forward import BlockInputs, embedded, record_block_inputs, run_tail
from streamprune.model.source import Source, open_dense

FLOAT32 = Arithmetic(torch.device("cpu"), torch.float32)
TOKENS = torch.tensor([[ord(character) for character in "Twenty-nine letters and more."]])


def outer_tensors(source: Source) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in source.read(source.skeleton.outer_parameters).items()}


def recorded(source: Source, tokens: torch.Tensor = TOKENS) -> BlockInputs:
    outer = outer_tensors(source)
    rows = outer[source.skeleton.embedding][tokens[0]]
    skeleton = source.skeleton
    further = {name: embedded(skeleton, outer[f"{name}.weight"][tokens[0]], name)[None] for name in skeleton.tables}
    return record_block_inputs(skeleton, outer, embedded(skeleton, rows)[None], further)


def runnable(source: Source, index: int, inputs: BlockInputs) -> RunnableBlock:
    """A dense block in float32, to be called as `inputs` say."""
    block = source.blocks[index]
    module = dense_block(source.skeleton, block, source.read(block.parameters), FLOAT32)
    return RunnableBlock(block.name, module, inputs.arguments[index])


def logits_in_pieces(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence [1, tokens], block by block."""
    return logits_of(open_dense(folder), tokens)


def logits_of(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    inputs = recorded(source, tokens)
    states = inputs.hidden_states
    for index in range(len(source.blocks)):
        states = runnable(source, index, inputs).run(states)
    return run_tail(source.skeleton, outer_tensors(source), states, torch.arange(tokens.shape[1]))
