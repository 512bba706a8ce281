"""Products with packed N:M weights on tensor cores: y = x W^T + b, checked, launched, and measured against a reference.

`sparse_linear` runs 2:4 (and padded 1:4) on sparse tensor cores, `nm_linear_cuda` any N:M on dense ones. Both take and
return torch tensors without copies. `..._with_error` also compares y with reference outputs while it writes it, so that
validating a layer costs no pass of its own. `run` (launch.py) is the device; tests put a CPU there.
"""

from dataclasses import dataclass
from functools import cache

import torch

from streamprune_kernels.launch import Argument, Launch, Run, on_device, refuse_gradients
from streamprune_kernels.metadata import SparseWeight
from streamprune_kernels.reference import unpack_mask

ALIGNMENT_BYTES = 16  # kernels read 16 bytes at once
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
TILE_TOKENS = 128
K_STEP = 64
# Bytes of shared memory that the kernels declare in their comments: stages of values, x and metadata; tiles of W and x.
SPARSE_SHARED_BYTES = {256: 4 * (256 * 64 + 128 * 128 + 4 * 512), 128: 3 * (128 * 64 + 128 * 128 + 2 * 512)}
# Where the 256 tile is taken. It takes 136 KiB a block, which 8.6 and 8.9 do not have, and moves two thirds of what the
# 128 tile does. Of that one two blocks share a multiprocessor: on sm_90 it is 1.3 to 1.5 times as fast
# (docs/benchmarks.md).
WIDE_CAPABILITY = (8, 0)
NM_TILE_OUT = 128
NM_SHARED_BYTES = 2 * 128 * 128 + 3 * 128 * 128
MOST_GROUP_SIZE = 32
ROWS_AT_ONCE = 1024  # bounds the memory of checking a mask


@dataclass(frozen=True)
class NMWeight:
    """A weight [out, in] as it lies packed: values [out, in*N/M] float16 or bfloat16, mask uint8 [out, in/8]."""

    values: torch.Tensor
    mask: torch.Tensor
    kept: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return 8 * self.mask.shape[1]


def nm_weight(values: torch.Tensor, mask: torch.Tensor, kept: int, group_size: int) -> NMWeight:
    """A packed weight whose mask is checked, once, so that kernels may rely on it.

    Raises ValueError where shapes do not fit kept:group_size, in_features is no multiple of 8 and of the group, or a
    group does not keep `kept` values.
    """
    in_features = 8 * mask.shape[-1]
    if not 1 <= kept <= group_size <= MOST_GROUP_SIZE:
        raise ValueError(
            f"the product of packed weights takes N:M with M up to {MOST_GROUP_SIZE}, not {kept}:{group_size}"
        )
    if mask.dtype != torch.uint8 or mask.dim() != 2 or values.dim() != 2 or not values.numel():
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} {mask.dtype} are no packed weight")
    fits = len(values) == len(mask) and values.shape[1] * group_size == in_features * kept
    if not fits or in_features % group_size:
        raise ValueError(
            f"values {list(values.shape)} and mask {list(mask.shape)} are not {kept}:{group_size} with in_features a "
            "multiple of 8: use the plain nm_linear"
        )
    for rows in mask.split(ROWS_AT_ONCE):
        groups = unpack_mask(rows, in_features).view(len(rows), -1, group_size)
        if not bool((groups.sum(dim=2, dtype=torch.uint8) == kept).all()):
            raise ValueError(f"a mask does not keep {kept} values in every group of {group_size}")
    return NMWeight(values, mask, kept, group_size)


def sparse_linear(
    x: torch.Tensor,
    weight: SparseWeight,
    bias: torch.Tensor | None = None,
    *,
    float_output: bool = False,
    tile: int | None = None,
    run: Run = on_device,
) -> torch.Tensor:
    """y [..., out] = x W^T + b on sparse tensor cores, summed in float32.

    x [..., in] and bias [out] in the values' type, as is y, or float32 with `float_output`. `tile`, 256 or 128 output
    features for a block, is chosen by the device if not given. Raises ValueError for tensors that do not fit.
    """
    return _sparse(x, weight, bias, None, float_output, tile, run)[0]


def sparse_linear_with_error(
    x: torch.Tensor,
    weight: SparseWeight,
    reference: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: int | None = None,
    run: Run = on_device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sparse_linear` beside the sums over tokens of (y - reference)^2 and of reference^2, float64 [out] each.

    reference has y's shape and is of x's type or float32, which is then y's type too; y is compared as it is returned.
    """
    y, sums = _sparse(x, weight, bias, reference, reference.dtype == torch.float32, tile, run)
    assert sums is not None, "there is a reference"
    return y, sums[0], sums[1]


def nm_linear_cuda(
    x: torch.Tensor,
    weight: NMWeight,
    bias: torch.Tensor | None = None,
    *,
    float_output: bool = False,
    run: Run = on_device,
) -> torch.Tensor:
    """y [..., out] = x W^T + b on dense tensor cores, W expanded on the way, summed in float32.

    x [..., in] and bias [out] in the values' type, as is y, or float32 with `float_output`. Raises ValueError for
    tensors that do not fit.
    """
    return _dense(x, weight, bias, None, float_output, run)[0]


def nm_linear_with_error(
    x: torch.Tensor,
    weight: NMWeight,
    reference: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    run: Run = on_device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`nm_linear_cuda` beside the sums over tokens of (y - reference)^2 and of reference^2, float64 [out] each.

    reference has y's shape and is of x's type or float32, which is then y's type too; y is compared as it is returned.
    """
    y, sums = _dense(x, weight, bias, reference, reference.dtype == torch.float32, run)
    assert sums is not None, "there is a reference"
    return y, sums[0], sums[1]


def _sparse(
    x: torch.Tensor,
    weight: SparseWeight,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    float_output: bool,
    tile: int | None,
    run: Run,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tile = tile or _tile_of(x.device, weight.out_features, _tokens(x))
    if tile not in SPARSE_SHARED_BYTES:
        raise ValueError(f"a tile has 256 or 128 output features, not {tile}")
    product = _Product(x, weight, weight.metadata, bias, reference, float_output)
    kernel = f"sparse_gemm_{TYPE_NAMES[x.dtype]}_{tile}"
    return product.run("sparse_gemm", kernel, tile, SPARSE_SHARED_BYTES[tile], (), run)


def _dense(
    x: torch.Tensor,
    weight: NMWeight,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    float_output: bool,
    run: Run,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    product = _Product(x, weight, weight.mask, bias, reference, float_output)
    in_8_columns = 8 // weight.group_size * weight.kept if 8 % weight.group_size == 0 else 0
    name = in_8_columns if in_8_columns in (2, 4) else "any"
    pattern = (weight.kept, weight.group_size)
    kernel = f"nm_gemm_{TYPE_NAMES[x.dtype]}_{name}"
    return product.run("nm_gemm", kernel, NM_TILE_OUT, NM_SHARED_BYTES, pattern, run)


@dataclass(frozen=True)
class _Product:
    """The tensors of a product, checked when made; `places` is the metadata or the mask."""

    x: torch.Tensor
    weight: SparseWeight | NMWeight
    places: torch.Tensor
    bias: torch.Tensor | None
    reference: torch.Tensor | None
    float_output: bool

    def __post_init__(self) -> None:
        x, values = self.x, self.weight.values
        refuse_gradients("the product", x=x, values=values, bias=self.bias, reference=self.reference)
        if x.dtype not in TYPE_NAMES or x.dtype != values.dtype:
            raise ValueError(f"x {x.dtype} and values {values.dtype}: the product takes both float16 or both bfloat16")
        if x.dim() < 1 or x.shape[-1] != self.weight.in_features:
            raise ValueError(f"x {list(x.shape)} does not have the weight's {self.weight.in_features} in_features")
        if self.bias is not None and (self.bias.shape != (self.weight.out_features,) or self.bias.dtype != x.dtype):
            raise ValueError(
                f"bias {list(self.bias.shape)} {self.bias.dtype} does not fit [{self.weight.out_features}]"
            )
        shape = [*x.shape[:-1], self.weight.out_features]
        if self.reference is not None and (list(self.reference.shape) != shape or self.reference.dtype != self.y_type):
            raise ValueError(f"reference {list(self.reference.shape)} {self.reference.dtype} is not y's {shape}")
        tensors = {"x": x, "values": values, "places": self.places, "bias": self.bias, "reference": self.reference}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
            if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT_BYTES:
                raise ValueError(
                    f"{name} is not contiguous and aligned to {ALIGNMENT_BYTES} bytes: pass {name}.clone()"
                )

    @property
    def y_type(self) -> torch.dtype:
        return torch.float32 if self.float_output else self.x.dtype

    def run(
        self, source: str, kernel: str, tile: int, shared_bytes: int, pattern: tuple[int, ...], run: Run
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and with a reference its error's sums float64 [2, out]."""
        out, tokens = self.weight.out_features, _tokens(self.x)
        token_tiles = -(-tokens // TILE_TOKENS)
        y = torch.empty(*self.x.shape[:-1], out, dtype=self.y_type, device=self.x.device)
        partials = None
        if self.reference is not None:
            partials = torch.empty(token_tiles, 2, out, dtype=torch.float32, device=self.x.device)
        if tokens:
            tensors = (
                self.weight.values,
                self.places,
                self.x,
                self.bias,
                self.reference,
                y,
                partials,
            )
            sizes = (tokens, out, self.weight.in_features)
            arguments: tuple[Argument, ...] = (*tensors, *sizes, *pattern, int(self.float_output))
            blocks = -(-out // tile) * token_tiles
            run(Launch(source, kernel, (blocks, 1, 1), (tile, 1, 1), shared_bytes, arguments))
        return y, None if partials is None else partials.sum(dim=0, dtype=torch.float64)


def _tokens(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _tile_of(device: torch.device, out_features: int, tokens: int) -> int:
    """256 output features for a block on devices that they suit, where all multiprocessors get one; else 128."""
    wide = _wide_multiprocessors(device)
    return 256 if 0 < wide <= -(-out_features // 256) * -(-tokens // TILE_TOKENS) else 128


@cache
def _wide_multiprocessors(device: torch.device) -> int:
    """How many there are that the tile of 256 suits; asked once, as that takes a share of a launch."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != WIDE_CAPABILITY:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
