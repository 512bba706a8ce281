"""Pass 2's figures: is a written layer right (kernel_error), and what does pruning cost (layer_error, block_error)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from streamprune.checkpoint.manifest import LayerRecord
from streamprune.checkpoint.packed import PackedLayer, layer_from_tensors, tensor_names
from streamprune.checkpoint.reader import Checkpoint
from streamprune.errors import KernelFault, NumericsError
from streamprune.model.arithmetic import Arithmetic, against_overflow
from streamprune.model.packed_linear import PackedLinear
from streamprune.model.skeleton import Block
from streamprune.pipeline.block_pruning import PrunedBlock, PrunedLayer
from streamprune.pipeline.planning.job import Job
from streamprune.pipeline.writing.entries import layer_record
from streamprune.pruning.selection import relative, stable_sum
from streamprune.stopping import safe_point
from streamprune_kernels import all_finite, pack_values, squared_distances, unpack_mask

SAMPLE_TOKENS = 256


@dataclass
class InputSample:
    """At most SAMPLE_TOKENS tokens of a layer's inputs: equally many, evenly spaced, of each of the first sequences.

    One tensor from the start: small ones kept beside a pass's large ones would fragment the heap.
    """

    sequences: int
    room: torch.Tensor | None = None
    taken: int = 0

    def observe(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take this sequence's share of its inputs [tokens, in]."""
        share = min(max(2, -(-SAMPLE_TOKENS // self.sequences)), SAMPLE_TOKENS - self.taken, x.shape[0])
        if self.room is None:
            self.room = x.new_empty(SAMPLE_TOKENS, x.shape[1])
        if share > 0:
            step = x.shape[0] // share
            self.room[self.taken : self.taken + share] = x[: share * step : step]
            self.taken += share

    @property
    def tokens(self) -> torch.Tensor:
        """float [taken, in]."""
        if self.room is None:
            raise ValueError("no sequence has been seen")
        return self.room[: self.taken]


@dataclass(frozen=True)
class LayerErrors:
    """Relative Frobenius errors of one layer on its sample."""

    kernel_error: float
    layer_error: float


def layer_errors(
    name: str,
    written: PackedLinear,
    pruned: PrunedLayer,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    arithmetic: Arithmetic,
) -> LayerErrors:
    """Hold a layer loaded from the written bytes against its kept weights times mask, and against the dense weight.

    x [tokens, in] is the layer's own input in pass 2. The reference tensors never went through pack and unpack. Raises
    KernelFault, naming the layer, where kernel_error is beyond the arithmetic's tolerance, NumericsError where the
    layer's outputs are not finite, which a block's own need not show.
    """
    offset = bias.to(arithmetic.dtype) if bias is not None else None
    permuted = x if pruned.gather is None else x[:, pruned.gather]
    with torch.inference_mode():
        weight = pruned.weight.to(arithmetic.dtype, copy=True)  # the one copy of that size at a time
        dense = functional.linear(permuted, weight, offset)
        sparse, squared_error, squared_norm = written.forward_with_error(x, dense)
        if pruned.written is not pruned.weight:
            weight.copy_(pruned.written)
        masked = functional.linear(permuted, weight.mul_(pruned.keep), offset)
    if not (all_finite(dense) and all_finite(masked)):
        raise NumericsError(f"{name}: its output holds NaN or infinity; {against_overflow(arithmetic.dtype)}")
    kernel_error = relative_error(sparse, masked)
    if not kernel_error <= arithmetic.kernel_tolerance:
        raise KernelFault(
            f"{name}: kernel_error {kernel_error:.3g} is beyond {arithmetic.kernel_tolerance:g}: the written layer "
            "does not compute what its masked weight does; check the disk and memory, then run again"
        )
    return LayerErrors(kernel_error, _relative(squared_error, squared_norm))


def validated(
    job: Job,
    block: Block,
    pruned: PrunedBlock,
    shard: Checkpoint,
    module: nn.Module,
    samples: Mapping[str, InputSample],
) -> Iterator[LayerRecord]:
    """The records of a written block's layers, of inputs by their groups' names.

    Raises KernelFault where a bit or a product is not what it must be.
    """
    for group in block.groups:
        for name in group.names if group.name in samples else ():
            safe_point()
            written = module.get_submodule(block.local(name))
            assert isinstance(written, PackedLinear)
            layer, bias, x = pruned.layers[name], pruned.others.get(f"{name}.bias"), samples[group.name].tokens
            errors = layer_errors(name, written, layer, bias, x, job.arithmetic)
            yield layer_record(job, name, layer, errors)
            check_packed_bits(name, layer, layer_from_tensors(name, shard.read(tensor_names(shard, name))))
    for parameter, tensor in pruned.others.items():
        check_bits(parameter, tensor, shard.read([parameter])[parameter])


def check_packed_bits(name: str, pruned: PrunedLayer, written: PackedLayer) -> None:
    """Raise KernelFault unless a written layer holds exactly the kept bits (the source's, if not fitted) in place.

    A product on a sample cannot see a low bit of one weight; this can.
    """
    keep = pruned.keep.cpu()
    if not torch.equal(unpack_mask(written.mask, keep.shape[1]), keep):
        raise KernelFault(f"{name}: the written mask is not the chosen one; check the disk and memory, then run again")
    check_bits(f"{name}.weight_values", pack_values(pruned.written.cpu(), keep), written.values)
    if (pruned.gather is None) != (written.permutation is None):
        raise KernelFault(f"{name}: its input_permutation is missing or not wanted; check the disk, then run again")
    if pruned.gather is not None and written.permutation is not None:
        check_bits(f"{name}.input_permutation", pruned.gather.cpu().to(torch.int32), written.permutation)


def check_bits(name: str, expected: torch.Tensor, written: torch.Tensor) -> None:
    """Raise KernelFault unless a tensor came back from disk with the bits that it went there with."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (expected.cpu(), written))
    if written.dtype != expected.dtype or written.shape != expected.shape or not torch.equal(one, other):
        raise KernelFault(f"{name}: came back from disk changed; check the disk and memory, then run again")


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - reference|| / ||reference|| (Frobenius) of [tokens, out], in float64; NaN where y is not finite."""
    expected = reference.to(torch.float32)
    norms = expected.to(torch.float64).square_().sum(dim=1)
    return _relative(squared_distances(y.to(torch.float32), expected), norms)


def _relative(squared_errors: torch.Tensor, squared_norms: torch.Tensor) -> float:
    """||error|| / ||reference|| from float64 parts of their squares, which are added up exactly."""
    return relative(stable_sum(squared_errors), stable_sum(squared_norms))


class BlockErrorSum:
    """||Y_pruned - Y_dense|| / ||Y_dense - X|| (Frobenius) over all tokens: the error of what the block adds.

    One partial sum for each sequence, combined exactly.
    """

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.norms: list[float] = []

    def add(self, x: torch.Tensor, dense: torch.Tensor, pruned: torch.Tensor) -> None:
        """Add one sequence: inputs, dense outputs and pruned outputs, each [1, tokens, hidden]."""
        before, y, now = (states[0].to(torch.float32) for states in (x, dense, pruned))
        self.differences.append(stable_sum(squared_distances(now, y)))
        self.norms.append(stable_sum(squared_distances(y, before)))

    @property
    def value(self) -> float:
        return relative(math.fsum(self.differences), math.fsum(self.norms))
