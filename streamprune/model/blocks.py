"""One block made real: dense from source tensors, or sparse from packed ones; and running it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from streamprune.checkpoint.packed import layer_from_tensors
from streamprune.config import NMPattern
from streamprune.errors import NumericsError
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Skeleton
from streamprune_kernels import all_finite

Observer = Callable[[torch.Tensor, torch.Tensor], None]  # of a layer's inputs [tokens, in] and outputs [tokens, out]


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
    layers: Mapping[str, NMPattern],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A block from the tensors of its shard: `layers` (full names) stay packed, everything else is dense."""
    prefix = f"{skeleton.blocks[index]}."
    block = copy.deepcopy(skeleton.block(index))
    for name in sorted(layers):
        local = name.removeprefix(prefix)
        layer = layer_from_tensors(name, tensors)
        packed = PackedLinear.from_packed(
            _for_kernels(layer.values),
            layer.mask,
            in_features=block.get_submodule(local).get_parameter("weight").shape[1],
            pattern=layers[name],
            bias=_for_kernels(bias) if (bias := tensors.get(f"{name}.bias")) is not None else None,
            permutation=layer.permutation,
        )
        block.set_submodule(local, packed)
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in skeleton.block_parameters(index) if not name.startswith(inside)]
    state = {name.removeprefix(prefix): tensors[name].to(dtype) for name in names}
    block.load_state_dict(state, strict=False, assign=True)
    return block.to(device).eval()


def _for_kernels(tensor: torch.Tensor) -> torch.Tensor:
    """As float32 where it is wider, which no kernel takes."""
    return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor


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
