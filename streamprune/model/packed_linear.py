"""The public layer of packed N:M weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from streamprune.config import MAX_GROUP_SIZE, NMPattern
from streamprune.model.arithmetic import warn_without_kernels
from streamprune_kernels import (
    all_finite,
    expand,
    pack_mask,
    pack_values,
    packed_linear,
    packed_linear_with_error,
    packed_metadata,
    select_groups,
    unpack_mask,
)

TENSORS = ("weight_values", "weight_mask", "bias", "input_permutation")  # parameters: buffers are not offloaded to disk


class PackedLinear(nn.Module):
    """A linear layer whose weights stay packed in memory: y = x W^T + b with N of every M weights kept.

    Its tensors have the names and the layout of a packed checkpoint (docs/format.md): `weight_values` [out, in*N/M]
    bfloat16, float16 or float32, `weight_mask` uint8 [out, ceil(in/8)], and where there are any `bias` [out] and
    `input_permutation` int32 [in]. All are parameters without gradients: the layer is for inference. x [..., in] is
    bfloat16, float16 or float32, whatever the values' dtype, and the result has its dtype.

    On a GPU the mask is checked, and what sparse tensor cores need beside it is made, when the weights get there:
    `weight_metadata`, a buffer that is not part of the state. Changing the mask in place afterwards is not noticed.

    Made like this it is empty until `load_state_dict`, and its product raises ValueError; see `from_dense` and
    `from_packed`. Raises SettingsError for what is no pattern, ValueError where it does not divide `in_features`.

    >>> layer = streamprune.PackedLinear.from_dense(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), "2:4")
    >>> layer.weight_values, layer.weight_mask[0, 0].item() == 0b0110
    (Parameter containing:
    tensor([[-3.,  2.]]), True)
    >>> layer(torch.ones(1, 4))
    tensor([[-1.]])
    """

    weight_values: torch.Tensor
    weight_mask: torch.Tensor
    bias: torch.Tensor | None
    input_permutation: torch.Tensor | None
    weight_metadata: torch.Tensor | None
    transposed = False  # whether the dense layer that it stands for keeps its weight as [in, out]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: str | NMPattern = "2:4",
        bias: bool = True,
        permuted: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        warn_without_kernels()
        self.in_features, self.out_features, self.pattern = in_features, out_features, _parsed(pattern)
        groups = _groups_of(in_features, self.pattern)
        values = torch.zeros(out_features, groups * self.pattern.kept, device=device, dtype=dtype)
        mask = torch.zeros(out_features, -(-in_features // 8), device=device, dtype=torch.uint8)
        order = torch.arange(in_features, device=device, dtype=torch.int32) if permuted else None
        offset = values.new_zeros(out_features) if bias else None
        for name, tensor in zip(TENSORS, (values, mask, offset, order), strict=True):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("weight_metadata", None, persistent=False)

    @classmethod
    def from_dense(
        cls, weight: torch.Tensor, pattern: str | NMPattern = "2:4", bias: torch.Tensor | None = None
    ) -> "PackedLinear":
        """Keep the N largest magnitudes of every M consecutive weights of each row; of equal ones the lower channel.

        weight [out, in] bfloat16, float16 or float32, bias [out]; both are copied. Raises ValueError for weights that
        are not finite.
        """
        weight = weight.detach()
        if weight.dim() != 2:
            raise ValueError(f"a weight is [out, in], not {list(weight.shape)}")
        parsed = _parsed(pattern)
        _groups_of(weight.shape[1], parsed)
        if not all_finite(weight):
            raise ValueError("the weight holds NaN or infinity, whose magnitudes cannot be ranked")
        keep = select_groups(weight.to(torch.float32).abs(), parsed.kept, parsed.group_size)
        values, mask = pack_values(weight, keep), pack_mask(keep)
        copied = None if bias is None else bias.detach().clone()
        return cls.from_packed(values, mask, in_features=weight.shape[1], pattern=parsed, bias=copied)

    @classmethod
    def from_packed(
        cls,
        values: torch.Tensor,
        mask: torch.Tensor,
        *,
        in_features: int,
        pattern: str | NMPattern | None = None,
        bias: torch.Tensor | None = None,
        permutation: torch.Tensor | None = None,
    ) -> "PackedLinear":
        """A layer from tensors as they lie in a packed checkpoint, which it shares and does not copy.

        Without a pattern, the one with the least M that the mask keeps to. Raises ValueError for tensors that do not
        fit together; a mask that keeps another number of weights in some row is refused by the product.
        """
        if values.dim() != 2 or tuple(mask.shape) != (len(values), -(-in_features // 8)) or mask.dtype != torch.uint8:
            raise ValueError(
                f"a mask {list(mask.shape)} of {mask.dtype} does not fit {in_features} inputs and values "
                f"{list(values.shape)}; it is uint8 [out, ceil(in/8)]"
            )
        if pattern is None:
            pattern = _pattern_of(mask, in_features, values.shape[1])
        if permutation is not None and (
            permutation.dtype != torch.int32 or not is_permutation(permutation, in_features)
        ):
            raise ValueError(f"the input permutation is not an int32 one of {in_features} channels")
        layer = cls(in_features, len(values), pattern, bias is not None, permutation is not None, device="meta")
        if values.shape != layer.weight_values.shape:
            raise ValueError(f"{layer.pattern} of {in_features} inputs keeps {layer.weight_values.shape[1]} weights a "
                             f"row, the values hold {values.shape[1]}")  # fmt: skip
        if bias is not None and tuple(bias.shape) != (len(values),):
            raise ValueError(f"a bias {list(bias.shape)} does not fit {len(values)} outputs")
        layer.weight_values, layer.weight_mask = values.detach(), mask
        layer.bias = None if bias is None else bias.detach()
        layer.input_permutation = permutation
        layer.prepare()
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] in x's dtype; x [..., in] in the order of the dense layer's inputs."""
        packed = self.weight_values, self.weight_mask, self.bias, self.input_permutation
        return packed_linear(x, *packed, self.pattern.group_size, self.weight_metadata)

    def forward_with_error(
        self, x: torch.Tensor, expected: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y of x [tokens, in], with float64 parts of ||y - expected||^2 and of ||expected||^2 to be added up.

        expected [tokens, out] in x's dtype. On a GPU the product's kernel sums them while it writes y.
        """
        packed = self.weight_values, self.weight_mask, expected, self.bias, self.input_permutation
        return packed_linear_with_error(x, *packed, self.pattern.group_size, self.weight_metadata)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TENSORS and isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        super().__setattr__(name, value)
        if name in ("weight_values", "weight_mask"):
            self.weight_metadata = None  # that of other weights: products make their own until `prepare`

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves and casts of all kinds: what comes to lie on a GPU is made ready there."""
        values, mask = self.weight_values, self.weight_mask
        super()._apply(fn, recurse)
        if self.weight_values is not values or self.weight_mask is not mask:
            self.prepare()
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state, prefix, *arguments)
        if f"{prefix}weight_values" in state or f"{prefix}weight_mask" in state:
            self.prepare()

    def prepare(self) -> None:
        """Make `weight_metadata` where a GPU wants it, after weights were put in place by hand.

        A mask that is not right yet is left for the product to refuse.
        """
        weights = self.weight_values.detach(), self.weight_mask
        try:
            self.weight_metadata = packed_metadata(*weights, self.in_features, self.pattern.group_size)
        except ValueError:
            self.weight_metadata = None

    def dense_weight(self) -> torch.Tensor:
        """The weight [out, in] in the values' dtype, dropped weights +0, columns in the order of the inputs."""
        return expand(self.weight_values, self.weight_mask, self.in_features, self.input_permutation)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        permuted = ", permuted" if self.input_permutation is not None else ""
        dtype = str(self.weight_values.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, pattern={self.pattern}, "
            f"bias={self.bias is not None}{permuted}, dtype={dtype}"
        )


def _parsed(pattern: str | NMPattern) -> NMPattern:
    return pattern if isinstance(pattern, NMPattern) else NMPattern.parse(pattern)


def _groups_of(in_features: int, pattern: NMPattern) -> int:
    if in_features < 1 or in_features % pattern.group_size:
        raise ValueError(f"{pattern} does not divide {in_features} input channels: groups of {pattern.group_size} "
                         "must come out even")  # fmt: skip
    return in_features // pattern.group_size


def _pattern_of(mask: torch.Tensor, in_features: int, kept: int) -> NMPattern:
    """The N:M of the least M that every group of a mask keeps to."""
    common = math.gcd(in_features, kept)
    n, m = kept // common, in_features // common
    keep = unpack_mask(mask, in_features)
    for times in range(1, MAX_GROUP_SIZE // m + 1):
        if n < m and in_features % (times * m) == 0:
            groups = keep.view(len(keep), -1, times * m)
            if all(bool((rows.sum(dim=2) == times * n).all()) for rows in (groups[:1], groups)):
                return NMPattern(times * n, times * m)
    raise ValueError(f"the mask does not keep N of every M <= {MAX_GROUP_SIZE} input channels in every row")


def is_permutation(permutation: torch.Tensor, count: int) -> bool:
    """Whether it holds each of 0 to count - 1 once."""
    order = torch.arange(count, dtype=torch.int32, device=permutation.device)
    return permutation.shape == order.shape and torch.equal(permutation.sort().values, order)
