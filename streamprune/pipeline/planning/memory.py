"""How much memory a job takes, from shapes alone; and its pace and second moments cut to fit a limit.

Counts what each stage of a block holds at once. Mirrors each stage's allocations; update both together. The libraries
themselves are a measured constant.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from streamprune.checkpoint.reader import PIECE_BYTES
from streamprune.config import PruneConfig, parse_bytes
from streamprune.errors import SettingsError
from streamprune.model.skeleton import Block
from streamprune.model.source import Source
from streamprune.pipeline.block_pruning import moment_unit
from streamprune.pruning.group import ROWS_AT_ONCE
from streamprune.pruning.statistics import FINE_BINS, ROW_GAP, moment_blocks

LIBRARIES_BYTES = 500_000_000  # resident with torch, transformers and a model's skeleton, before anything is read
GPU_LIBRARIES_BYTES = 1_200_000_000  # the same with CUDA, cuBLAS and CuPy
PAGE_LOCKED_CHUNKS = 8  # of hidden states, on their way between files and a GPU
HEAP_SLACK = 1.03  # about what an allocator holds, over what was asked for
MIN_MOMENTS_WIDTH = 1024  # to which blocks of second moments are cut for a limit
ROW_COPIES = 12  # float32 matrices of a piece of rows that selection and refinement hold at once
Shape = tuple[int, int]


@dataclass(frozen=True)
class Memory:
    """Estimated bytes that each stage holds at once, for the block that needs most.

    On the host lie the libraries (with a piece of what is copied unchanged), embeddings, and the `blocks_ahead` next
    blocks as the source stores them (together `read_ahead`); the stages of a block are on the device, which without a
    GPU is the host too. With one the host has in their place what is `on_its_way`: the block that went there,
    hidden states, and what is written and compared with what was written.
    """

    libraries: int
    embeddings: int
    dense_pass: int
    pruning: int
    sparse_pass: int
    read_ahead: int
    on_its_way: int
    blocks_ahead: int
    on_gpu: bool

    @property
    def of_block(self) -> int:
        """The stage that needs most."""
        return max(self.dense_pass, self.pruning, self.sparse_pass)

    @property
    def peak(self) -> int:
        """Of the host."""
        beside = self.on_its_way if self.on_gpu else self.of_block
        return self.libraries + max(self.embeddings, beside + self.read_ahead)

    @property
    def device_peak(self) -> int:
        """Of the GPU; 0 without one."""
        return self.of_block if self.on_gpu else 0


@dataclass(frozen=True)
class Limits:
    """Most bytes that a job may take on the host and on a GPU; None: no limit."""

    host: int | None = None
    device: int | None = None

    @classmethod
    def parse(cls, host: str | None, device: str | None) -> "Limits":
        """Read numbers of bytes: "12GiB". Raises SettingsError."""
        return cls(parse_bytes(host), parse_bytes(device))

    def hold(self, memory: Memory) -> bool:
        """Whether a job with these needs keeps to them."""
        return (self.host is None or memory.peak <= self.host) and (
            self.device is None or memory.device_peak <= self.device
        )


@dataclass(frozen=True)
class Pace:
    """What changes a job's time and memory and none of its bytes: sequences at once, blocks read ahead."""

    micro_batch: int
    blocks_ahead: int


@dataclass(frozen=True)
class Sizes:
    """What of a model and a job decides the memory: headers, layers to prune in each block, tokens of a sequence."""

    source: Source
    layers: Sequence[Mapping[str, Shape]]
    tokens: int
    dtype: torch.dtype
    on_gpu: bool = False

    def stored(self, parameters: Iterable[str]) -> int:
        """Bytes of parameters as they are stored."""
        return self.source.stored_bytes(parameters)

    def computed(self, parameters: Iterable[str]) -> int:
        """Bytes of parameters in the dtype of the arithmetic."""
        return sum(math.prod(self.source.stored(name).shape) for name in parameters) * self.dtype.itemsize


def estimate_memory(sizes: Sizes, config: PruneConfig, pace: Pace) -> Memory:
    """What the job holds at once, stage by stage."""
    by_size = {sizes.stored(block.parameters): block for block in sizes.source.blocks}
    blocks = [_stages(sizes, block, config, pace) for block in by_size.values()]  # equal blocks need the same
    parts = {sizes.stored(part.parameters): part for block in by_size.values() for part in block.parts}
    dense_pass, pruning, sparse_pass = (int(HEAP_SLACK * max(values)) for values in zip(*blocks, strict=True))
    one_block = max(_page_locked(sizes, part) for part in parts.values()) if sizes.on_gpu else max(parts)
    on_its_way = max(one_block + _staged(sizes, part, config) for part in parts.values()) if sizes.on_gpu else 0
    libraries = (GPU_LIBRARIES_BYTES if sizes.on_gpu else LIBRARIES_BYTES) + _copied_memory(sizes)
    embeddings = _embedding_memory(sizes) if config.validate else 0
    read_ahead, ahead = pace.blocks_ahead * one_block, pace.blocks_ahead
    passes = dense_pass, pruning, sparse_pass
    return Memory(libraries, embeddings, *passes, read_ahead, on_its_way, ahead, sizes.on_gpu)


def fit_memory(sizes: Sizes, config: PruneConfig, pace: Pace, limits: Limits) -> tuple[PruneConfig, Pace]:
    """The configuration and the pace that keep to limits: one sequence at a time, nothing read ahead, second moments
    in narrower blocks, in this order and only as far as needed.

    Raises SettingsError where that is not enough, naming what the job would need.
    """
    slower = [pace, Pace(1, pace.blocks_ahead), Pace(1, 0)]
    for pace in slower:
        if limits.hold(memory := estimate_memory(sizes, config, pace)):
            return config, pace
    while config.needs_moments and config.moments_width > MIN_MOMENTS_WIDTH:
        config = dataclasses.replace(config, moments_width=max(config.moments_width // 2, MIN_MOMENTS_WIDTH))
        if limits.hold(memory := estimate_memory(sizes, config, pace)):
            return config, pace
    less = ", shorten --sequence-length or give --no-refine" if config.needs_moments else ""
    needs = [("memory", memory.peak, limits.host, "--max-memory")]
    needs.append(("GPU memory", memory.device_peak, limits.device, "--max-device-memory"))
    what, needed, limit, option = next(need for need in needs if need[2] is not None and need[1] > need[2])
    raise SettingsError(
        f"the job needs about {needed / 2**30:.2f} GiB of {what}, the limit is {(limit or 0) / 2**30:.2f} GiB; raise "
        f"{option}{less}; streamprune plan shows what needs it"
    )


def _page_locked(sizes: Sizes, block: Block) -> int:
    """Bytes that a block is read into for a GPU: torch makes each page-locked piece a power of two."""
    tensors = (sizes.stored([name]) for name in block.parameters)
    return sum(1 << max(size - 1, 0).bit_length() for size in tensors)


def _staged(sizes: Sizes, block: Block, config: PruneConfig) -> int:
    """Bytes on a GPU's host of a packed block, of the largest layer that is compared with it, and of hidden states."""
    share = config.pattern.kept / config.pattern.group_size
    elements = [math.prod(shape) for name, shape in sizes.layers[block.index].items() if name in block.layers]
    itemsize = sizes.source.stored(block.parameters[0]).dtype.itemsize
    packed = int(sum(elements) * (itemsize * share + 1 / 8))
    compared = max(elements, default=0) * (itemsize + 1) if config.validate else 0
    chunk = sizes.tokens * sizes.source.skeleton.stream_width * sizes.dtype.itemsize if config.validate else 0
    return packed + compared + PAGE_LOCKED_CHUNKS * chunk


def _copied_memory(sizes: Sizes) -> int:
    """Bytes of a piece of a large tensor that is copied; without a text that goes on beside the blocks."""
    return 2 * min(PIECE_BYTES, max(sizes.stored([name]) for name in sizes.source.skeleton.outer_parameters))


def _embedding_memory(sizes: Sizes) -> int:
    """Bytes of what embeds one sequence."""
    small, tables = sizes.source.small_parameters, map(sizes.source.stored, sizes.source.skeleton.read_by_rows)
    width = sum(table.shape[1] * 2 * (table.dtype.itemsize + sizes.dtype.itemsize) for table in tables)
    rows = sizes.tokens * width
    return sizes.stored(small) + sizes.computed(small) + rows


def _stages(sizes: Sizes, block: Block, config: PruneConfig, pace: Pace) -> tuple[int, int, int]:
    """Bytes of a block's dense pass, pruning and sparse pass, its experts coming one at a time."""
    resident, *experts = block.parts
    dense, pruning, sparse = _block_memory(sizes, resident, config, pace)
    if not experts:
        return dense, pruning, sparse
    largest = max(experts, key=lambda part: sizes.stored(part.parameters))
    of_expert = _block_memory(sizes, largest, config, pace)
    if not config.validate:
        return dense, pruning + of_expert[1], sparse
    return dense + max(of_expert), pruning, sparse + of_expert[2]


def _block_memory(sizes: Sizes, block: Block, config: PruneConfig, pace: Pace) -> tuple[int, int, int]:
    """Bytes of a block's dense pass, pruning and sparse pass."""
    layers = {name: shape for name, shape in sizes.layers[block.index].items() if name in block.layers}
    heads = sizes.source.skeleton.heads
    source, computed = sizes.stored(block.parameters), sizes.computed(block.parameters)
    elements = {name: math.prod(shape) for name, shape in layers.items()}
    largest = max(elements.values(), default=0)
    widest = max((max(shape) for shape in layers.values()), default=0)
    # what attention and the MLP hold at once, and the tokens of layers that are kept for correction
    skeleton = sizes.source.skeleton
    beside = skeleton.stream_width - skeleton.hidden_size  # which is there as input, copied, and as two outputs
    activations = 4 * pace.micro_batch * sizes.tokens * (16 * skeleton.hidden_size + 4 * beside + 10 * widest)
    groups = [group for group in block.groups if group.name in layers]
    inputs = [layers[group.name][1] for group in groups]
    histograms = 4 * (FINE_BINS + ROW_GAP) * sum(inputs) if config.metric == "esparse" else 0
    moments = [
        _moment_bytes([layers[name] for name in group.names], moment_unit(group, heads, config), config)
        for group in groups
    ]
    pruning = kept = 0
    for place, group in enumerate(groups):
        search = _search_bytes([layers[name] for name in group.names], config)
        pruning = max(pruning, kept + sum(moments[place:]) + search)
        kept += sum(elements[name] for name in group.names)  # masks
    itemsize = sizes.source.stored(block.parameters[0]).dtype.itemsize
    written = kept * itemsize if config.reconstruct else 0
    results = source + kept + written
    share = config.pattern.kept / config.pattern.group_size
    has_metadata = sizes.on_gpu and (config.pattern.kept, config.pattern.group_size) == (2, 4)  # for tensor cores
    mask_bytes = (2 if has_metadata else 1) / 8  # of each weight
    packed, packed_largest = (int(count * (itemsize * share + mask_bytes)) for count in (kept, largest))
    dense = computed - kept * sizes.dtype.itemsize  # what of the block is not packed
    if not config.validate:  # no pass at all; a block is written while the next is pruned
        return 0, source + max(pruning + written, results) + (results if pace.blocks_ahead else 0), 0
    return (
        source + computed + sum(moments) + histograms + activations,
        source + max(pruning + written, results),
        results + packed + dense + (sizes.dtype.itemsize + 1) * largest + 2 * packed_largest + activations,
    )


def _moment_bytes(shapes: Sequence[Shape], unit: int, config: PruneConfig) -> int:
    """Second and cross moments of one input."""
    if not config.needs_moments:
        return 0
    out_features, in_features = sum(shape[0] for shape in shapes), shapes[0][1]
    square = sum((end - begin) ** 2 for begin, end in moment_blocks(in_features, config.moments_width, unit))
    by_output = len(shapes) == 1 and out_features <= in_features
    cross = (out_features * in_features if by_output else square) if config.correction else 0
    return 4 * (2 * square + cross)


def _search_bytes(shapes: Sequence[Shape], config: PruneConfig) -> int:
    """Scores of one input's layers, and beside them the search's copies or what a piece of the rows takes."""
    if not config.search_stages and not config.needs_moments and config.metric != "ria":
        return 0
    rows, in_features = sum(shape[0] for shape in shapes), shapes[0][1]
    scores, piece = rows * in_features, min(max(shape[0] for shape in shapes), ROWS_AT_ONCE) * in_features
    copies = 2 * scores if config.search_stages else scores
    return 4 * (scores + max(copies, ROW_COPIES * piece if config.needs_moments else 6 * piece))
