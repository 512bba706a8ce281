"""One block made real: dense from source tensors, or sparse from packed ones; and running it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from streamprune.checkpoint.packed import PackedLayer, layer_from_tensors
from streamprune.checkpoint.reader import all_finite
from streamprune.errors import NumericsError
from streamprune.model.skeleton import Skeleton
from streamprune_kernels import expand

Observer = Callable[[torch.Tensor, torch.Tensor], None]  # of a layer's inputs [tokens, in] and outputs [tokens, out]


class PackedLinear(nn.Module):
    """The sparse product of one packed layer, from values, mask and permutation as read from disk.

    On a processor without a sparse instruction the layout that its GEMM wants is the expanded weight in the dtype of
    the arithmetic, its columns back in the order of the input, which spares a gather at run time
    (docs/benchmarks.md). It is made once, here.
    """

    def __init__(self, layer: PackedLayer, in_features: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", expand(layer.values, layer.mask, in_features, layer.permutation).to(dtype))
        self.register_buffer("bias", bias.to(dtype) if bias is not None else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


def dense_block(
    skeleton: Skeleton, index: int, tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A block with dense weights, from its parameters by full name, in the arithmetic's dtype."""
    prefix = f"{skeleton.blocks[index]}."
    block = copy.deepcopy(skeleton.block(index))
    state = {name.removeprefix(prefix): tensors[name].to(device, dtype) for name in skeleton.block_parameters(index)}
    block.load_state_dict(state, strict=True, assign=True)
    return block.to(device).eval()


def packed_block(
    skeleton: Skeleton,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    layers: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A block from the tensors of its shard: `layers` (full names) are packed, everything else is dense."""
    prefix = f"{skeleton.blocks[index]}."
    packed = set(layers)
    block = copy.deepcopy(skeleton.block(index))
    for name in sorted(packed):
        local = name.removeprefix(prefix)
        bias = tensors.get(f"{name}.bias")
        in_features = block.get_submodule(local).get_parameter("weight").shape[1]
        layer = layer_from_tensors(name, tensors)
        block.set_submodule(local, PackedLinear(layer, in_features, bias, dtype))
    inside = tuple(f"{name}." for name in packed)
    names = [name for name in skeleton.block_parameters(index) if not name.startswith(inside)]
    state = {name.removeprefix(prefix): tensors[name].to(dtype) for name in names}
    block.load_state_dict(state, strict=False, assign=True)
    return block.to(device).eval()


def run_block(block: nn.Module, states: torch.Tensor, arguments: Mapping[str, Any], name: str) -> torch.Tensor:
    """The block's output [sequences, tokens, hidden]. Raises NumericsError where it is not finite."""
    with torch.inference_mode():
        output = block(states, **arguments)
    output = output[0] if isinstance(output, tuple) else output
    if not all_finite(output):
        raise NumericsError(f"{name}: its output holds NaN or infinity; try --dtype float32")
    return output


@contextmanager
def layers_observed(block: nn.Module, observers: Mapping[str, Observer], tokens: int) -> Iterator[None]:
    """While open, show an observer what passes the linear layer of its name, one sequence of `tokens` after another."""

    def hook_for(observe: Observer) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            of_sequences = (x.flatten(0, -2).split(tokens) for x in (inputs[0], output))
            for x, y in zip(*of_sequences, strict=True):
                observe(x, y)

        return hook

    handles = [
        block.get_submodule(name).register_forward_hook(hook_for(observe)) for name, observe in observers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
