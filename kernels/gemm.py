"""Products with packed N:M weights on tensor cores: y = x W^T + b, checked, launched, and measured against a reference.

`sparse_linear` runs 2:4 (and padded 1:4) on sparse tensor cores, `nm_linear_cuda` any N:M on dense ones. Both take and
return torch tensors without copies. `..._with_error` also compares y with reference outputs while it writes it, so that
validating a layer costs no pass of its own. `run` (launch.py) is the device; tests put a CPU there.

Where tiles are too few for a device, blocks share each: so many `parts` of the input channels are summed apart and then
added in their order (split-K), in one launch. Their number follows from shapes and device alone, and so do y's bits.
"""

from dataclasses import dataclass
from functools import cache

import torch

from streamprune_kernels.launch import Launch, Run, on_device, refuse_gradients
from streamprune_kernels.metadata import SparseWeight
from streamprune_kernels.reference import unpack_mask

ALIGNMENT_BYTES = 16  # kernels read 16 bytes at once
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16"}
K_STEP = 64
Tile = tuple[int, int]  # output features and tokens of a block, which has as many threads as output features
WIDE_TILE, COMMON_TILE, NARROW_TILE = (256, 128), (128, 128), (128, 32)
NARROW_TOKENS = 128  # up to so many the narrow tile is taken: measured, docs/benchmarks.md
SPARSE_STAGES = {WIDE_TILE: 4, COMMON_TILE: 3, NARROW_TILE: 4}
# Where the wide tile is taken. It takes 136 KiB a block, which 8.6 and 8.9 do not have, and moves two thirds of what
# the common one does. Of that one two blocks share a multiprocessor: on sm_90 it is 1.3 to 1.5 times as fast
# (docs/benchmarks.md).
WIDE_CAPABILITY = (8, 0)
NM_SHARED_BYTES = 2 * 128 * 128 + 3 * 128 * 128  # tiles of W and of x
# Parts are as many as give each multiprocessor this number of blocks, but of so many steps at least. Products of more
# tokens are never shared out: what such a token becomes does not depend on how many are multiplied at once.
BLOCKS_AT_ONCE = 2
MIN_PART_STEPS = 8
MAX_SHARED_TOKENS = 512
MAX_CUDA_GROUP_SIZE = 32  # M of an N:M pattern; config.py allows more
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
    if not 1 <= kept <= group_size <= MAX_CUDA_GROUP_SIZE:
        raise ValueError(
            f"the product of packed weights takes N:M with M up to {MAX_CUDA_GROUP_SIZE}, not {kept}:{group_size}"
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
    tile: Tile | None = None,
    parts: int | None = None,
    run: Run = on_device,
) -> torch.Tensor:
    """y [..., out] = x W^T + b on sparse tensor cores, summed in float32.

    x [..., in] and bias [out] in the values' type, as is y, or float32 with `float_output`. `tile`, a key of
    SPARSE_STAGES, and `parts`, of the in/64 steps, follow from shapes and device if not given; of both y's rounding
    depends on `parts` alone. Raises ValueError for tensors that do not fit, an unknown tile, and more parts than steps.
    """
    return _sparse(x, weight, bias, None, float_output, tile, parts, run)[0]


def sparse_linear_with_error(
    x: torch.Tensor,
    weight: SparseWeight,
    reference: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
    parts: int | None = None,
    run: Run = on_device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sparse_linear` beside the sums over tokens of (y - reference)^2 and of reference^2, float64 [out] each.

    reference has y's shape and is of x's type or float32, which is then y's type too; y is compared as it is returned.
    """
    y, sums = _sparse(x, weight, bias, reference, reference.dtype == torch.float32, tile, parts, run)
    assert sums is not None, "there is a reference"
    return y, sums[0], sums[1]


def nm_linear_cuda(
    x: torch.Tensor,
    weight: NMWeight,
    bias: torch.Tensor | None = None,
    *,
    float_output: bool = False,
    parts: int | None = None,
    run: Run = on_device,
) -> torch.Tensor:
    """y [..., out] = x W^T + b on dense tensor cores, W expanded on the way, summed in float32.

    x [..., in] and bias [out] in the values' type, as is y, or float32 with `float_output`. `parts`, of the ceil(in/64)
    steps, follows from shapes and device if not given. Raises ValueError for tensors that do not fit, and more parts
    than steps.
    """
    return _dense(x, weight, bias, None, float_output, parts, run)[0]


def nm_linear_with_error(
    x: torch.Tensor,
    weight: NMWeight,
    reference: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parts: int | None = None,
    run: Run = on_device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`nm_linear_cuda` beside the sums over tokens of (y - reference)^2 and of reference^2, float64 [out] each.

    reference has y's shape and is of x's type or float32, which is then y's type too; y is compared as it is returned.
    """
    y, sums = _dense(x, weight, bias, reference, reference.dtype == torch.float32, parts, run)
    assert sums is not None, "there is a reference"
    return y, sums[0], sums[1]


def sparse_shared_bytes(tile: Tile) -> int:
    """Dynamic shared memory of a block: its stages of values, x and metadata, as SparseStage declares them."""
    out, tokens = tile
    return SPARSE_STAGES[tile] * (out * K_STEP + 2 * tokens * K_STEP + out // 64 * 512)


def sparse_tile(out_features: int, tokens: int, wide_multiprocessors: int) -> Tile:
    """Of few tokens the narrow tile; else the wide one on devices that have multiprocessors which it suits, where all
    get one; else the common one."""
    if tokens <= NARROW_TOKENS:
        return NARROW_TILE
    return WIDE_TILE if 0 < wide_multiprocessors <= tile_count(WIDE_TILE, out_features, tokens) else COMMON_TILE


def tile_count(tile: Tile, out_features: int, tokens: int) -> int:
    return -(-out_features // tile[0]) * -(-tokens // tile[1])


def parts_for(tiles: int, tokens: int, steps: int, multiprocessors: int) -> int:
    """In how many parts the steps of each tile are shared out, 1 where tiles alone fill the multiprocessors."""
    if tokens > MAX_SHARED_TOKENS:
        return 1
    return max(1, min(BLOCKS_AT_ONCE * multiprocessors // max(tiles, 1), steps // MIN_PART_STEPS))


def _sparse(
    x: torch.Tensor,
    weight: SparseWeight,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    float_output: bool,
    tile: Tile | None,
    parts: int | None,
    run: Run,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if tile is None:
        wide = _multiprocessors(x.device) if _suits_wide_tiles(x.device) else 0
        tile = sparse_tile(weight.out_features, _tokens(x), wide)
    if tile not in SPARSE_STAGES:
        raise ValueError(f"a tile of the product is one of {', '.join(map(str, SPARSE_STAGES))}, not {tile}")
    product = _Product(x, weight, weight.metadata, bias, reference, float_output)
    name = f"sparse_gemm_{TYPE_NAMES[x.dtype]}_{tile[0]}x{tile[1]}"
    return product.run(_Kernel("sparse_gemm", name, tile, sparse_shared_bytes(tile)), parts, run)


def _dense(
    x: torch.Tensor,
    weight: NMWeight,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    float_output: bool,
    parts: int | None,
    run: Run,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    product = _Product(x, weight, weight.mask, bias, reference, float_output)
    in_8_columns = 8 // weight.group_size * weight.kept if 8 % weight.group_size == 0 else 0
    name = f"nm_gemm_{TYPE_NAMES[x.dtype]}_{in_8_columns if in_8_columns in (2, 4) else 'any'}"
    pattern = (weight.kept, weight.group_size)
    return product.run(_Kernel("nm_gemm", name, COMMON_TILE, NM_SHARED_BYTES, pattern), parts, run)


@dataclass(frozen=True)
class _Kernel:
    """A kernel of a product, what its blocks take, and the arguments that it has beyond the other's."""

    source: str
    name: str
    tile: Tile
    shared_bytes: int
    pattern: tuple[int, ...] = ()


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

    def run(self, kernel: _Kernel, parts: int | None, run: Run) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y, and with a reference its error's sums float64 [2, out]."""
        out, tokens, steps = self.weight.out_features, _tokens(self.x), -(-self.weight.in_features // K_STEP)
        tiles = tile_count(kernel.tile, out, tokens)
        if parts is None:
            parts = parts_for(tiles, tokens, steps, _multiprocessors(self.x.device))
        if not 1 <= parts <= steps:
            raise ValueError(f"{steps} steps of {K_STEP} input channels cannot be shared out in {parts} parts")
        y = self.x.new_empty(*self.x.shape[:-1], out, dtype=self.y_type)
        partials = sums = arrived = None
        if self.reference is not None:
            partials = self.x.new_empty(-(-tokens // kernel.tile[1]), 2, out, dtype=torch.float32)
        if parts > 1:
            sums = self.x.new_empty(parts, tiles, *kernel.tile, dtype=torch.float32)
            arrived = self.x.new_zeros(tiles, dtype=torch.int32)
        if tokens:
            tensors = (self.weight.values, self.places, self.x, self.bias, self.reference, y, partials, sums, arrived)
            sizes = (tokens, out, self.weight.in_features, *kernel.pattern, int(self.float_output))
            block = (kernel.tile[0], 1, 1)
            run(Launch(kernel.source, kernel.name, (tiles, parts, 1), block, kernel.shared_bytes, (*tensors, *sizes)))
        return y, None if partials is None else partials.sum(dim=0, dtype=torch.float64)


def _tokens(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


@cache
def _multiprocessors(device: torch.device) -> int:
    """How many a GPU has, 0 elsewhere; asked once, as that takes a share of a launch."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@cache
def _suits_wide_tiles(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == WIDE_CAPABILITY
