"""The torch operator `streamprune::packed_linear`: one product of packed N:M weights, whatever device computes it.

It is registered when `streamprune_kernels` is imported, has shapes for torch.compile, and no gradient.
"""

import torch

from streamprune_kernels import reference
from streamprune_kernels.cpu import library
from streamprune_kernels.decode import decode_unsuitable, nm_decode
from streamprune_kernels.gemm import MOST_GROUP_SIZE, nm_linear_cuda, nm_weight, sparse_linear
from streamprune_kernels.launch import Run, runner_for
from streamprune_kernels.metadata import sparse_unsuitable, sparse_weight
from streamprune_kernels.packed_product import TYPES, packed_product


@torch.library.custom_op("streamprune::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """y = x W^T + b for a packed W, in x's dtype, [..., out]; x [..., in] in the order of the layer's source.

    values [out, kept], mask uint8 [out, ceil(in/8)] and permutation int32 [in], a bijection, as in docs/format.md; bias
    [out]. x, values and bias are each bfloat16, float16 or float32. On a processor sums are float32 and rounded once.
    `group_size`, the M of N:M, lets a GPU use the kernels for packed weights; 0: the weight is expanded there.
    Raises ValueError for tensors that do not fit together, of another dtype or device, or that want a gradient, and
    where a row of the mask does not keep as many weights as there are values.
    """
    _check(x, values, mask, bias, permutation)
    run = runner_for(x)
    if run is not None and group_size and x.numel() and x.dtype == values.dtype != torch.float32:
        y = _by_cuda_kernels(x, values, mask, bias, permutation, group_size, run)
        if y is not None:
            return y
    if x.device.type == "cuda":
        return _expanded_on_gpu(x, values, mask, bias, permutation)
    rows = x.reshape(-1, x.shape[-1])
    if library() is not None:
        y = packed_product(rows, values, mask, permutation)
    else:
        rows = rows if permutation is None else rows[:, permutation]
        y = reference.nm_linear(rows.to(torch.float32), values, mask)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], len(values))


@packed_linear.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    _check(x, values, mask, bias, permutation)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _by_cuda_kernels(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
    group_size: int,
    run: Run,
) -> torch.Tensor | None:
    """The product on tensor cores, or of few vectors; None for a shape that no kernel takes. Not run on hardware."""
    in_features, kept = x.shape[-1], values.shape[1] * group_size // x.shape[-1]
    if in_features % 8 or group_size > MOST_GROUP_SIZE:
        return None
    x = (x if permutation is None else x[..., permutation]).contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    weight = nm_weight(values, mask, kept, group_size)
    rows = x.view(-1, in_features)
    if decode_unsuitable(weight, len(rows)) is None:
        return nm_decode(rows, weight, bias, run=run).view(*x.shape[:-1], len(values))
    if (kept, group_size) == (2, 4) and sparse_unsuitable(kept, group_size, in_features) is None:
        return sparse_linear(x, sparse_weight(values, mask, run=run), bias, run=run)
    return nm_linear_cuda(x, weight, bias, run=run)


def _expanded_on_gpu(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
) -> torch.Tensor:
    """The plain product on the device, in x's dtype; not run on hardware."""
    permuted = x if permutation is None else x[..., permutation]
    return reference.nm_linear(permuted, values, mask, None if bias is None else bias.to(x.dtype))


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
) -> None:
    """Raise ValueError, in one line, for what no kernel computes."""
    weights = {"values": values, "mask": mask, "bias": bias, "permutation": permutation}
    given = {name: tensor for name, tensor in weights.items() if tensor is not None}
    if x.device.type not in ("cpu", "cuda", "meta") or any(tensor.device != x.device for tensor in given.values()):
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in {"x": x, **given}.items())
        raise ValueError(f"packed_linear wants its tensors on one cpu or cuda device; it got {devices}")
    for name, tensor in {"x": x, **given}.items():
        expected = {"mask": (torch.uint8,), "permutation": (torch.int32,)}.get(name, tuple(TYPES))
        if tensor.dtype not in expected:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
            raise ValueError(f"packed_linear wants {name} of {names}, not {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.requires_grad and name != "x":
            raise ValueError(f"packed_linear has no gradient: its {name} must not require one; detach it")
    if x.dim() == 0 or values.dim() != 2:
        raise ValueError(
            f"packed_linear wants x [..., in] and values [out, kept], not {_sizes(x)} and {_sizes(values)}"
        )
    out_features, in_features = values.shape[0], x.shape[-1]
    shapes = {"mask": (out_features, -(-in_features // 8)), "bias": (out_features,), "permutation": (in_features,)}
    for name, shape in shapes.items():
        if name in given and tuple(given[name].shape) != shape:
            raise ValueError(f"packed_linear: {name} {_sizes(given[name])} does not fit {out_features} x {in_features}")
    if not 0 < values.shape[1] <= in_features:
        raise ValueError(f"packed_linear: {values.shape[1]} values a row do not fit {in_features} input channels")


def _sizes(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
