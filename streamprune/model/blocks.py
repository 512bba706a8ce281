"""One block made real: dense from source tensors, or sparse from packed ones; and running it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from streamprune.checkpoint.packed import check_contents, layer_from_tensors, tensor_names
from streamprune.config import NMPattern
from streamprune.errors import NumericsError
from streamprune.model.arithmetic import Arithmetic, against_overflow
from streamprune.model.forward import Arguments
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Block, Skeleton
from streamprune.model.source import Source
from streamprune_kernels import all_finite

Observer = Callable[[torch.Tensor, torch.Tensor], None]  # of a layer's inputs [tokens, in] and outputs [tokens, out]


def dense_block(
    skeleton: Skeleton, block: Block, tensors: Mapping[str, torch.Tensor], arithmetic: Arithmetic
) -> nn.Module:
    """A block with dense weights, from its parameters by full name, in the arithmetic's dtype."""
    module = skeleton.without_weights(block)
    device, dtype = arithmetic.device, arithmetic.dtype
    state = {block.local(name): tensors[name].to(device, dtype) for name in block.parameters}
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device).eval()


def packed_block(
    skeleton: Skeleton,
    block: Block,
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, NMPattern],
    arithmetic: Arithmetic,
) -> nn.Module:
    """A block from the tensors of its shard: `layers` (full names) stay packed, everything else is dense."""
    module = skeleton.without_weights(block)
    for name in sorted(layers):
        layer, bias = layer_from_tensors(name, tensors), tensors.get(f"{name}.bias")
        packed = PackedLinear.from_packed(
            _for_kernels(layer.values),
            layer.mask,
            in_features=block.layers[name].shape[1],
            pattern=layers[name],
            bias=None if bias is None else _for_kernels(bias),
            permutation=layer.permutation,
        )
        module.set_submodule(block.local(name), packed)
    inside = tuple(f"{name}." for name in layers)
    names = [name for name in block.parameters if not name.startswith(inside)]
    state = {block.local(name): tensors[name].to(arithmetic.dtype) for name in names}
    module.load_state_dict(state, strict=False, assign=True)
    return module.to(arithmetic.device).eval()


def load_block(source: Source, block: Block, arithmetic: Arithmetic, untrusted: bool = False) -> nn.Module:
    """A block ready to run from disk: its packed layers are sparse, everything else is dense.

    Of an `untrusted` source masks and permutations are checked, with CheckpointError for those that are none.
    """
    layers = {name: source.packed[name] for name in block.layers if name in source.packed}
    pruned = {block.layers[name].parameter for name in layers}
    dense = [name for name in block.parameters if name not in pruned]
    stored = [name for layer in layers for name in tensor_names(source.checkpoint, layer)]
    tensors = source.checkpoint.read([*source.stored_names(dense), *stored])
    if untrusted:
        for name, pattern in layers.items():
            check_contents(name, layer_from_tensors(name, tensors), pattern)
    by_parameter = {**{name: tensors[source.names[name]] for name in dense}, **{name: tensors[name] for name in stored}}
    return packed_block(source.skeleton, block, by_parameter, layers, arithmetic)


def _for_kernels(tensor: torch.Tensor) -> torch.Tensor:
    """As float32 where it is wider, which no kernel takes."""
    return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor


@dataclass(frozen=True)
class RunnableBlock:
    """A block with weights, and what it is called with beside hidden states."""

    name: str
    module: nn.Module
    arguments: Arguments

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """What follows `states` [sequences, tokens, stream width]. Raises NumericsError where that is not finite."""
        args, kwargs, channels = self.arguments
        hidden = states
        with torch.inference_mode():
            if channels is not None:
                args, kwargs = channels.arguments(states, args, kwargs)
                hidden = states[..., : channels.hidden].contiguous()
            output = self.module(hidden, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            if channels is not None:
                output = channels.following(states, output, kwargs)
        if not all_finite(output):
            raise NumericsError(f"{self.name}: its output holds NaN or infinity; {against_overflow(states.dtype)}")
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
