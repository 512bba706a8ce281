"""The torch operator `streamprune::packed_linear`: one product of packed N:M weights, whatever device computes it.

It is registered when `streamprune_kernels` is imported, has shapes for torch.compile, and no gradient. Where nothing
wants one, the function calls `streamprune::packed_linear_no_grad`, the same with less to do for torch.
"""

import torch
from torch.nn import functional

from streamprune_kernels import launch, reference
from streamprune_kernels.decode import decode_unsuitable, nm_decode
from streamprune_kernels.gemm import (
    ALIGNMENT_BYTES,
    MAX_CUDA_GROUP_SIZE,
    TYPE_NAMES,
    NMWeight,
    nm_linear_cuda,
    nm_linear_with_error,
    nm_weight,
    sparse_linear,
    sparse_linear_with_error,
)
from streamprune_kernels.launch import Run
from streamprune_kernels.metadata import SparseWeight, make_metadata, metadata_shape, sparse_unsuitable
from streamprune_kernels.native import TYPES, library
from streamprune_kernels.packed_product import packed_product
from streamprune_kernels.packing import expand
from streamprune_kernels.validation import squared_distances

_DEVICES = ("cpu", "cuda", "meta")
_INTEGERS = {"mask": (torch.uint8,), "permutation": (torch.int32,), "metadata": (torch.int32,)}


def packed_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
    metadata: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b for a packed W, in x's dtype, [..., out]; x [..., in] in the order of the layer's source.

    values [out, kept], mask uint8 [out, ceil(in/8)] and permutation int32 [in], a bijection, as in docs/format.md; bias
    [out]. x, values and bias are each bfloat16, float16 or float32. On a processor sums are float32 and rounded once.
    `group_size`, the M of N:M, lets a GPU use the kernels for packed weights; 0: the weight is expanded there. They
    want the mask checked and `metadata`, once for a weight by `packed_metadata`; without it every product does that.
    Raises ValueError for tensors that do not fit together, of another dtype or device, or that want a gradient, and
    where a row of the mask does not keep as many weights as there are values.
    """
    operator = _operator if x.requires_grad and torch.is_grad_enabled() else _operator_no_grad
    y: torch.Tensor = operator(x, values, mask, bias, permutation, group_size, metadata)
    return y


def _product(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
    metadata: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `packed_linear` is on every device."""
    _check(x, values, mask, bias, permutation, group_size, metadata)
    if x.numel() and (run := _cuda_runner(x, values, group_size)) is not None:
        return _by_cuda_kernels(x, values, mask, bias, permutation, group_size, metadata, run)
    if x.device.type == "cuda":
        return _expanded_on_gpu(x, values, mask, bias, permutation)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if library() is not None:
        y = packed_product(rows, values, mask, permutation, dtype=x.dtype if bias is None else torch.float32)
    else:
        rows = rows if permutation is None else rows[:, permutation]
        y = reference.nm_linear(rows.to(torch.float32), values, mask)
    if bias is not None:
        y += bias
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1 if len(rows) else len(values))


def _empty_product(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
    metadata: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shape and dtype alone."""
    _check(x, values, mask, bias, permutation, group_size, metadata)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _no_gradient(*_: object) -> None:
    raise RuntimeError("streamprune::packed_linear has no autograd formula: packed weights are for inference")


# Not by `torch.library.custom_op`, nor with a kernel for gradients where nothing wants one: either takes a call about
# as long as a small product (docs/benchmarks.md). The library must stay referenced: what it defines goes with it.
_LIBRARY = torch.library.Library("streamprune", "FRAGMENT")
_SCHEMA = torch.library.infer_schema(_product, mutates_args=())
for _name in ("packed_linear", "packed_linear_no_grad"):
    _LIBRARY.define(_name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _product, "CompositeExplicitAutograd")
    torch.library.register_fake(f"streamprune::{_name}", _empty_product, lib=_LIBRARY)
torch.library.register_autograd("streamprune::packed_linear", _no_gradient, lib=_LIBRARY)
_operator = torch.ops.streamprune.packed_linear.default
_operator_no_grad = torch.ops.streamprune.packed_linear_no_grad.default


def packed_metadata(values: torch.Tensor, mask: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor | None:
    """What `packed_linear` wants of a packed weight beside its tensors on a GPU: made, and the mask checked, once.

    int32 [ceil(out/64), in/64, 32, 4] for sparse tensor cores, or [0] for a pattern that needs nothing more; None where
    no CUDA kernel takes the weight. It holds as long as the mask does. Raises ValueError where a group of the mask does
    not keep N of M.
    """
    run = _cuda_runner(values.new_empty(0, in_features), values, group_size)
    return None if run is None else _metadata(values, mask, in_features, group_size, run)


def packed_linear_with_error(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    expected: torch.Tensor,
    bias: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    group_size: int = 0,
    metadata: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`packed_linear`'s y of x [tokens, in], with parts of ||y - expected||^2 and of ||expected||^2 to be added up.

    expected [tokens, out] in x's dtype. The parts are float64: one for each output feature from a CUDA kernel, which
    compares what it writes, and one for each token elsewhere. The other tensors and ValueError as for `packed_linear`.
    """
    _check(x, values, mask, bias, permutation, group_size, metadata)
    if x.dim() != 2 or expected.shape != (len(x), len(values)) or expected.dtype != x.dtype:
        raise ValueError(f"expected {expected.dtype} {_sizes(expected)} does not fit a product of x {_sizes(x)}")
    run = _cuda_runner(x, values, group_size)
    if run is None or not len(x):
        y = packed_linear(x, values, mask, bias, permutation, group_size, metadata)
        return y, squared_distances(y.float(), expected.float()), expected.to(torch.float64).square_().sum(dim=1)
    rows, offset, expected = _in_order(x, permutation), None if bias is None else bias.to(x.dtype), _aligned(expected)
    metadata = _metadata(values, mask, x.shape[1], group_size, run) if metadata is None else metadata
    if metadata.numel():
        return sparse_linear_with_error(rows, SparseWeight(values, metadata), expected, offset, run=run)
    weight = NMWeight(values, mask, _kept(values, x.shape[1], group_size), group_size)
    return nm_linear_with_error(rows, weight, expected, offset, run=run)


def _cuda_runner(x: torch.Tensor, values: torch.Tensor, group_size: int) -> Run | None:
    """What runs CUDA kernels on tensors that these take; None where there is nothing, or for what they do not take."""
    suited = 0 < group_size <= MAX_CUDA_GROUP_SIZE and x.shape[-1] % 8 == 0 and x.dtype == values.dtype
    return launch.runner_for(x) if suited and x.dtype in TYPE_NAMES else None


def _kept(values: torch.Tensor, in_features: int, group_size: int) -> int:
    return values.shape[1] * group_size // in_features


def _metadata(values: torch.Tensor, mask: torch.Tensor, in_features: int, group_size: int, run: Run) -> torch.Tensor:
    """As `packed_metadata`, where CUDA kernels take the weight."""
    if _needs_metadata(values, in_features, group_size):
        return make_metadata(mask, run=run)
    nm_weight(values, mask, _kept(values, in_features, group_size), group_size)
    return torch.empty(0, dtype=torch.int32, device=mask.device)


def _needs_metadata(values: torch.Tensor, in_features: int, group_size: int) -> bool:
    is_2_of_4 = group_size == 4 and 2 * values.shape[1] == in_features
    return is_2_of_4 and sparse_unsuitable(2, 4, in_features) is None


def _by_cuda_kernels(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
    group_size: int,
    metadata: torch.Tensor | None,
    run: Run,
) -> torch.Tensor:
    """The product on tensor cores, or of few vectors."""
    in_features = x.shape[-1]
    metadata = _metadata(values, mask, in_features, group_size, run) if metadata is None else metadata
    x, bias = _in_order(x, permutation), None if bias is None else bias.to(x.dtype)
    weight = NMWeight(values, mask, _kept(values, in_features, group_size), group_size)
    rows = x.view(-1, in_features)
    if decode_unsuitable(weight, len(rows)) is None:
        return nm_decode(rows, weight, bias, run=run).view(*x.shape[:-1], len(values))
    if metadata.numel():
        return sparse_linear(x, SparseWeight(values, metadata), bias, run=run)
    return nm_linear_cuda(x, weight, bias, run=run)


def _in_order(x: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
    """x in the order of the mask's places, as kernels read it; torch itself says that the operator has no gradient."""
    x = x.detach()
    return _aligned(x if permutation is None else x[..., permutation])


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x without gaps, at an address that kernels read from."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT_BYTES else x


def _expanded_on_gpu(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
) -> torch.Tensor:
    """The plain product on the device, in x's dtype."""
    weight = expand(values, mask, x.shape[-1], permutation).to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _check(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: torch.Tensor | None,
    group_size: int = 0,
    metadata: torch.Tensor | None = None,
) -> None:
    """Raise ValueError, in one line, for what no kernel computes."""
    device = x.device
    named = ("values", values), ("mask", mask), ("bias", bias), ("permutation", permutation), ("metadata", metadata)
    given = [("x", x), *[(name, tensor) for name, tensor in named if tensor is not None]]
    for name, tensor in given:
        if tensor.device != device or device.type not in _DEVICES:
            devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in given)
            raise ValueError(f"packed_linear wants its tensors on one cpu or cuda device; it got {devices}")
        expected = _INTEGERS.get(name, TYPES)
        if tensor.dtype not in expected:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
            raise ValueError(f"packed_linear wants {name} of {names}, not {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.requires_grad and name != "x":
            raise ValueError(f"packed_linear has no gradient: its {name} must not require one; detach it")
    if x.dim() == 0 or values.dim() != 2:
        raise ValueError(
            f"packed_linear wants x [..., in] and values [out, kept], not {_sizes(x)} and {_sizes(values)}"
        )
    (out_features, kept), in_features = values.shape, x.shape[-1]
    shapes = {"mask": (out_features, -(-in_features // 8)), "bias": (out_features,), "permutation": (in_features,)}
    for name, tensor in given:
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"packed_linear: {name} {_sizes(tensor)} does not fit {out_features} x {in_features}")
    if not 0 < kept <= in_features:
        raise ValueError(f"packed_linear: {kept} values a row do not fit {in_features} input channels")
    if group_size < 0 or (group_size and (in_features % group_size or kept * group_size % in_features)):
        raise ValueError(f"packed_linear: {kept} values a row of {in_features} are no N of every {group_size}")
    if metadata is not None:
        needed = group_size and _needs_metadata(values, in_features, group_size)
        shape = metadata_shape(out_features, in_features) if needed else (0,)
        if tuple(metadata.shape) != shape:
            raise ValueError(f"packed_linear: metadata {_sizes(metadata)} is not {list(shape)}; see packed_metadata")


def _sizes(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)
