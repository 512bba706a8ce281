"""A packed layer's products by the kernels that ship, held against numpy's unpack and a plain linear layer.

They go through `PackedLinear` on the device that is asked for, with as many rows and in such dtypes as between them run
each kernel that may take the layer there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch.nn import functional

from streamprune.checkpoint.packed import PackedLayer
from streamprune.config import NMPattern
from streamprune.model.arithmetic import Arithmetic, name_of
from streamprune.model.packed_linear import PackedLinear
from streamprune_kernels import FEW_ROWS
from streamprune_kernels.gemm import NARROW_TOKENS
from streamprune_kernels.packed_product import has_pairs

# Of products on a processor few, and many; on a GPU few vectors, and each kind of tile.
ROWS = (FEW_ROWS - 8, FEW_ROWS + 16)
GPU_ROWS = (8, 40, NARROW_TOKENS + 8)


@dataclass(frozen=True)
class Product:
    """One product: its rows, the dtype of inputs and outputs, and the largest relative error of any output feature."""

    rows: int
    dtype: torch.dtype
    error: float
    tolerance: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it; an error that is no number is wrong."""
        if self.error <= self.tolerance:
            return None
        return (
            f"its sparse product of {self.rows} rows in {name_of(self.dtype)} is off by {self.error:.3g} "
            f"(relative; {self.tolerance:g} is allowed)"
        )


def products(layer: PackedLayer, pattern: NMPattern, device: torch.device, seed: int) -> Iterator[Product]:
    """Multiply a layer whose structure is right by seeded normal inputs, once for each kernel that may take it.

    Compared in the float32 of a plain linear layer on the processor.
    """
    dense = _unpacked(layer, pattern)
    order = slice(None) if layer.permutation is None else layer.permutation.long()
    packed = _on_device(layer, dense.shape[1], pattern, device)
    for dtype, rows in _kernels_of(packed).items():
        x = _inputs(dense, max(rows), dtype, seed)
        expected = functional.linear(x[:, order].to(torch.float32), dense)
        for count in rows:
            with torch.inference_mode():
                y = packed(x[:count].to(device)).cpu()
            tolerance = Arithmetic(device, dtype).kernel_tolerance
            yield Product(count, dtype, _worst_error(y, expected[:count], dense.shape[1]), tolerance)


def unpacked_mask(layer: PackedLayer) -> numpy.ndarray:
    """bool [out, 8 * ceil(in/8)], by numpy: written apart from the code that packs."""
    return numpy.unpackbits(layer.mask.numpy(), axis=1, bitorder="little").view(bool)


def _unpacked(layer: PackedLayer, pattern: NMPattern) -> torch.Tensor:
    """float32 [out, in], columns in the order of the mask's places."""
    in_features = layer.values.shape[1] // pattern.kept * pattern.group_size
    keep = unpacked_mask(layer)[:, :in_features]
    dense = numpy.zeros(keep.shape, dtype=numpy.float32)
    dense[keep] = layer.values.to(torch.float32).numpy().reshape(-1)
    return torch.from_numpy(dense)


def _on_device(layer: PackedLayer, in_features: int, pattern: NMPattern, device: torch.device) -> PackedLinear:
    values = layer.values.to(torch.float32) if layer.values.dtype == torch.float64 else layer.values  # as blocks do
    packed = PackedLinear.from_packed(
        values, layer.mask, in_features=in_features, pattern=pattern, permutation=layer.permutation
    )
    return packed.to(device)


def _kernels_of(packed: PackedLinear) -> dict[torch.dtype, tuple[int, ...]]:
    """Numbers of rows by dtype that run each kernel which takes a layer where it lies."""
    values = packed.weight_values
    if packed.weight_metadata is not None:  # CUDA kernels take it in its values' dtype, and expand it for another
        return {torch.float32: ROWS[1:], values.dtype: GPU_ROWS}
    ways: dict[torch.dtype, tuple[int, ...]] = {torch.float32: ROWS}
    if values.device.type == "cpu" and values.dtype == torch.bfloat16 and has_pairs():
        ways[torch.bfloat16] = ROWS
    return ways


def _inputs(dense: torch.Tensor, rows: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal [rows, in], for large weights scaled by a power of two so that no output is beyond `dtype`."""
    x = torch.randn(rows, dense.shape[1], generator=torch.Generator().manual_seed(seed))
    _, of_weights = math.frexp(max(float(dense.amax()), -float(dense.amin())))
    _, most = math.frexp(torch.finfo(dtype).max)
    beyond = of_weights + dense.shape[1].bit_length() + 3 - most
    return (x * 2.0 ** -max(beyond, 0)).to(dtype)


def _worst_error(y: torch.Tensor, expected: torch.Tensor, in_features: int) -> float:
    """The largest ||y - expected|| / ||expected|| of any column; NaN where there is one.

    A column by itself: one wrong output of many thousands would be lost in the norm of all. What subnormal numbers may
    add up to does not count: some instructions take them for zero.
    """
    wide = expected.to(torch.float64)
    errors, norms = (y.to(torch.float64) - wide).norm(dim=0), wide.norm(dim=0)
    errors = (errors - in_features * len(y) * torch.finfo(torch.float32).tiny).clamp(min=0)
    return float(torch.where(errors == 0, errors, errors / norms).amax())
