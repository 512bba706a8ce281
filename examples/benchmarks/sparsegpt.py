"""SparseGPT (arXiv 2301.00774) for N:M, written from the paper's formulas, to compare with.

    python examples/benchmarks/sparsegpt.py MODEL OUT --calibration TEXT [--pattern 2:4] [--samples 128]
        [--sequence-length 2048] [--seed 0]

The whole model is in memory, in float32. Calibration takes the very tokens that `streamprune compress` takes with the
same options, and the blocks are pruned one after the other: the Hessians of a block are of inputs that went through the
pruned blocks before. Kept weights CHANGE: they make up for the dropped ones. OUT is an ordinary dense checkpoint with
zeros in place, in the source's dtype; it must not exist. Prints one JSON object with seconds and peak memory.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from streamprune.config import NMPattern
from streamprune.model.discovery import discover
from streamprune.model.library import empty_model
from streamprune.process import peak_memory_bytes
from streamprune.text.calibration import Calibration, calibration_tokens
from streamprune.text.tokenizers import load_tokenizer

BLOCK_SIZE = 128  # columns whose updates are applied to the rest at once; the paper's B
DAMPING = 0.01  # of the mean diagonal of the Hessian; the paper's lambda


@dataclass(frozen=True)
class Comparison:
    """What the run cost; `dense_layers` are those that the pattern does not fit."""

    out: str
    seconds: float
    peak_memory_bytes: int
    dense_layers: tuple[str, ...]


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The pruned weight float32 [out, in], whose kept values make up for the dropped ones.

    `hessian` [in, in] is X^T X of the layer's inputs, up to a factor. Columns are done from left to right. With U the
    upper Cholesky factor of the damped Hessian's inverse, U_jj^2 is [H^-1]_jj once the columns before j are done. At
    the first column of each group of M the M - N weights of least w^2 / U_jj^2 are dropped (section 3.4), and the error
    of each column is spread over those right of it (algorithm 1). A column that no input reached is dropped first.
    """
    weight, hessian = weight.to(torch.float32, copy=True), hessian.to(torch.float32, copy=True)
    columns, group = weight.shape[1], pattern.group_size
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += DAMPING * diagonal.mean()
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)

    step = max(group, BLOCK_SIZE - BLOCK_SIZE % group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, factor = weight[:, start:end], U[start:end, start:end]
        errors = torch.zeros_like(block)
        for j in range(end - start):
            if j % group == 0:
                importance = (block[:, j : j + group] / factor.diagonal()[j : j + group]).square()
                drop = importance.topk(group - pattern.kept, largest=False).indices
                dropped = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, drop, True)
            pruned = block[:, j].masked_fill(dropped[:, j % group], 0)
            errors[:, j] = (block[:, j] - pruned) / factor[j, j]
            block[:, j] = pruned
            block[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
        weight[:, end:] -= errors @ U[start:end, end:]
    return weight


class _Reached(Exception):
    """The first block was called: its inputs are known, the rest of the forward is not needed."""


@torch.inference_mode()
def block_calls(model: nn.Module, first: nn.Module, tokens: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """For each sequence the hidden states that enter the first block, and what else every block is called with."""
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def record(_block: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((positional[0], named))
        raise _Reached

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    for sequence in tokens:
        try:
            model(input_ids=sequence[None], use_cache=False)
        except _Reached:
            continue
    handle.remove()
    return calls


def accumulate(hessian: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds X^T X of a layer's input to `hessian`."""

    def hook(_layer: nn.Module, positional: tuple[Any, ...]) -> None:
        X = positional[0].reshape(-1, len(hessian))
        hessian.addmm_(X.T, X)

    return hook


@torch.inference_mode()
def prune_block(
    block: nn.Module,
    groups: tuple[tuple[str, ...], ...],
    calls: list[tuple[torch.Tensor, dict[str, Any]]],
    pattern: NMPattern,
    dtype: torch.dtype,
) -> tuple[list[tuple[torch.Tensor, dict[str, Any]]], list[str]]:
    """Prune a block's linear layers in place; return the next block's calls, and the layers that were left dense.

    Weights are rounded to `dtype` at once: the blocks behind see what will be stored.
    """
    hessians, handles, dense = [], [], []
    for group in groups:
        first = block.get_submodule(group[0])
        assert isinstance(first, nn.Linear)
        hessians.append(torch.zeros(first.in_features, first.in_features))
        handles.append(first.register_forward_pre_hook(accumulate(hessians[-1])))
    for hidden, named in calls:
        block(hidden, **named)
    for handle in handles:
        handle.remove()
    for group, hessian in zip(groups, hessians, strict=True):
        for name in group:
            weight = block.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            if weight.shape[1] % pattern.group_size:
                dense.append(name)
            else:
                weight.copy_(sparsegpt(weight, hessian, pattern).to(dtype))
    return [(block(hidden, **named), named) for hidden, named in calls], dense


def prune_model(
    model: Path, out: Path, calibration: str, pattern: NMPattern, samples: int, sequence_length: int, seed: int
) -> Comparison:
    """Prune the checkpoint `model` into the new folder `out`."""
    start = time.perf_counter()
    tokens = calibration_tokens(
        model, Calibration(calibration, samples=samples, sequence_length=sequence_length, seed=seed)
    )
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    dtype = network.dtype
    network = network.float()
    found = discover(empty_model(network.config).eval())
    blocks = network.base_model.get_submodule(found.path)
    calls = block_calls(network, blocks[0], tokens)
    left = []
    for index, block in enumerate(tqdm(blocks, unit="block", desc="sparsegpt", disable=None)):
        calls, dense = prune_block(block, found.blocks[index].groups, calls, pattern, dtype)
        left += [f"{found.path}.{index}.{name}" for name in dense]

    partial = out.with_name(f"{out.name}.partial")
    network.to(dtype).save_pretrained(partial)
    load_tokenizer(model).save_pretrained(partial)
    partial.rename(out)
    return Comparison(str(out), time.perf_counter() - start, peak_memory_bytes(), tuple(left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--pattern", type=NMPattern.parse, default=NMPattern(2, 4))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    settings = vars(parser.parse_args())
    if settings["out"].exists():
        sys.exit(f"{settings['out']} exists already")
    print(json.dumps(dataclasses.asdict(prune_model(**settings))))


if __name__ == "__main__":
    main()
