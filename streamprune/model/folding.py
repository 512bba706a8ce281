"""Where a permutation of a layer's input folds into the layers that make it: believed only where numbers show it.

A candidate is a layer whose input has as many channels as an earlier layer of its block has outputs, or as two beside
each other have, or one that holds them twice (gate and up fused), or once for each KV head (values); an expert's layers
are among themselves. Each is tried on a
small instance of the model's own class, with random weights in float64: the producers' rows and the reader's columns
are permuted as pruning does it. What a block returns must stay, and must change with each of these tensors left as it
was. All else is stored. So no class has to be known, and whatever a config switches on is in what is tried.
"""

import copy
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from streamprune.errors import UnsupportedModelError
from streamprune.model.configuration import NO_DIMENSIONS, one_line
from streamprune.model.forward import Arguments, BlockInputs, record_block_inputs
from streamprune.model.library import (
    PretrainedConfig,
    config_fields,
    linear_shape,
    read_for_all_layers,
    tree_flatten,
    tree_map,
    warnings_heard,
)
from streamprune.model.skeleton import Block, Heads, LayerGroup, Skeleton, modules_of

logger = logging.getLogger("streamprune")

TOKENS = 32  # of the trial: so many that most experts of a block see some
MAX_HEADS, MAX_SHARED = 4, 2  # KV heads of a small instance, and query heads of each
MAX_WIDTH, MAX_INNER, MAX_EXPERTS = 64, 32, 16
MAX_PARAMETERS = 1 << 24  # of a block that is tried
MAX_ALIKE = 8  # layers of one name and shape (experts') that are tried, until one tells of all
SAME = 1e-5  # at most: a fold's change, of what each of its tensors alone changes; a norm in float32 may round once
SEEN = 1e-6  # at least: what such a tensor changes, of what the block returns
CAPPED = {"intermediate": MAX_INNER, "ffn": MAX_INNER, "inner": MAX_INNER, "experts": MAX_EXPERTS}  # by parts of names


class Fold(NamedTuple):
    """How a permutation folds, by the producers' names inside the block; as in LayerGroup."""

    producers: tuple[str, ...]
    per_head: bool = False
    times: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class FoldedPermutation:
    """A permutation that is applied once, to the tensors themselves: place j holds source index permutation[j]."""

    name: str
    permutation: torch.Tensor
    reorders: tuple[tuple[str, int], ...]  # (tensor, dimension)


def folded_permutations(
    block: Block, group: LayerGroup, permutation: torch.Tensor, heads: Heads | None
) -> list[FoldedPermutation]:
    """How a permutation int64 [in] of a group's input folds into its producers; `heads`: it stays inside these."""
    views = [block.layers[name] for name in group.producers]
    sides = [((view.parameter, 1 - view.input_dim), (f"{view.name}.bias", 0)) for view in views]
    rows, reader = tuple(side for pair in sides for side in pair), group.layers[0]
    name, columns = f"{group.name}.input_permutation", ((reader.parameter, reader.input_dim),)
    of_rows = _of_producer(permutation, group, heads)
    if of_rows is permutation:
        return [FoldedPermutation(name, permutation, columns + rows)]
    producer = f"{group.producers[0]}.output_permutation"
    return [FoldedPermutation(name, permutation, columns), FoldedPermutation(producer, of_rows, rows)]


def _of_producer(permutation: torch.Tensor, group: LayerGroup, heads: Heads | None) -> torch.Tensor:
    """The permutation of a producer's rows, int64 [rows]: the input's own, unless they are fewer or more."""
    if heads is not None and heads.queries != heads.key_values:  # value rows are fewer than the inputs that they make
        permutation = permutation.view(heads.key_values, -1, heads.size)[:, 0] % heads.size
        starts = heads.size * torch.arange(heads.key_values, device=permutation.device)[:, None]
        permutation = (permutation + starts).reshape(-1)
    if group.times > 1:
        rows = torch.arange(group.times * len(permutation), device=permutation.device)
        rows = rows.view(-1, group.times).T if group.interleaved else rows.view(group.times, -1)
        permutation = rows[:, permutation].T.flatten() if group.interleaved else rows[:, permutation].flatten()
    return permutation


def with_folds(skeleton: Skeleton) -> Skeleton:
    """A skeleton whose groups know the producers of their input. Neither torch's random numbers nor its dtype change.

    Where no small instance can be built or run, the model's own blocks are tried, up to MAX_PARAMETERS each; where that
    fails too no fold is believed, with a warning if there was any to try. Blocks of one kind are tried once: the same
    modules, the same flags.
    """
    own = skeleton.model.config
    faults = []
    with torch.random.fork_rng(devices=[]), warnings_heard(), _one_thread():
        for apart in (True, False, None):
            try:
                folds = _folds_of_blocks(skeleton, own if apart is None else _small_config(skeleton, apart))
            except Exception as error:  # of many kinds, for sizes that do not fit each other
                faults.append(one_line(error))
            else:
                blocks = zip(skeleton.blocks, folds, strict=True)
                return replace(skeleton, blocks=tuple(_folding(block, found) for block, found in blocks))
    if any(any(_candidates(block, skeleton.heads).values()) for block in skeleton.blocks):
        text = "%s: no fold could be tried, all permutations are stored (%s)"
        logger.warning(text, own.model_type, "; ".join(faults))
    return skeleton


@contextmanager
def _one_thread() -> Iterator[None]:
    """While open, torch computes in one thread: more only wait for each other over so few numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _folding(block: Block, folds: Mapping[str, Fold]) -> Block:
    """A block whose groups fold by `folds`, by their first layers' names inside the block."""
    groups = []
    for group in block.groups:
        fold = folds.get(block.local(group.name), Fold(()))
        producers = tuple(f"{block.name}.{producer}" for producer in fold.producers)
        groups.append(replace(group, **{**fold._asdict(), "producers": producers}))
    return replace(block, groups=tuple(groups))


def _small_config(skeleton: Skeleton, apart: bool) -> PretrainedConfig:
    """A config of a narrow model of the same class and depth: few heads of the same size, so that what is made for one
    head still fits, and few inner channels. `apart`: the width of hidden states need not be that of all heads.
    """
    heads = skeleton.heads
    whole = copy.deepcopy(skeleton.model.config)
    small = whole.get_text_config()
    read_for_all_layers(small)
    key_values = min(heads.key_values, MAX_HEADS)
    queries = key_values * min(heads.queries // heads.key_values, MAX_SHARED)
    width = skeleton.hidden_size
    narrow = min(width, MAX_WIDTH) if apart else queries * heads.size
    for name in sorted(config_fields(type(small))):
        value = getattr(small, name)
        if type(value) is not int or any(part in name for part in NO_DIMENSIONS):
            continue
        if value == width:
            setattr(small, name, narrow)
        elif caps := [cap for part, cap in CAPPED.items() if part in name]:
            setattr(small, name, min(value, *caps))
        elif "heads" in name:  # of other mixers too: as many times fewer
            setattr(small, name, max(1, value * queries // heads.queries))
    known = {"hidden_size": narrow, "num_attention_heads": queries, "num_key_value_heads": key_values}
    for name, size in known.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, size)
    return whole


def _folds_of_blocks(skeleton: Skeleton, config: PretrainedConfig) -> list[dict[str, Fold]]:
    """Of each block of a skeleton the folds that hold in a model of another config, by their readers' local names."""
    model, _ = modules_of(config, lambda _: skeleton.shapes)
    layers = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
    blocks = tuple(_resized(block, layers) for block in skeleton.blocks)
    instance = replace(skeleton, model=model, blocks=blocks)
    inputs = _inputs(instance)
    instance = replace(instance, hidden_size=inputs.hidden_states.shape[-1])
    kinds: dict[Any, dict[str, Fold]] = {}
    folds = []
    for own, block, arguments in zip(skeleton.blocks, blocks, inputs.arguments, strict=True):
        kind = _kind(instance.module(block), own)
        if kind not in kinds:
            trial = _Trial.of(instance, block, _numbers("states", tuple(inputs.hidden_states.shape)), arguments)
            kinds[kind] = _proven_folds(own, trial, skeleton.heads)
        folds.append(kinds[kind])
    return folds


def _inputs(instance: Skeleton) -> BlockInputs:
    """What the blocks of a model are called with whose parameters and text are random numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in instance.model.named_parameters()}
    left_out = instance.read_by_rows | instance.aside
    names = (name for name in instance.outer_parameters if name in shapes and name not in left_out)
    outer = {name: _repeated(name, shapes[name]) for name in names}
    further = {table: _numbers(table, (1, TOKENS, shapes[f"{table}.weight"][1])) for table in instance.tables}
    embeddings = _numbers("embeddings", (1, TOKENS, instance.embedding_shape[1]))
    # what lies beside hidden states stays in the arguments
    return record_block_inputs(replace(instance, stream_width=instance.hidden_size), outer, embeddings, further)


def _resized(block: Block, shapes: Mapping[str, tuple[int, int]]) -> Block:
    """A block with the shapes of another model's layers; groups that it lacks (of more experts) are left out."""
    groups = []
    for group in block.groups:
        layers = [replace(layer, shape=shape) for layer in group.layers if (shape := shapes.get(layer.name))]
        if len(layers) == len(group.layers):
            groups.append(replace(group, layers=tuple(layers)))
    return replace(block, groups=tuple(groups))


def _kind(module: nn.Module, block: Block) -> tuple[Any, ...]:
    """What is equal of two blocks that fold alike: their modules, flags and names of modes, and layers' shapes."""
    flags = tuple(
        (place, name, value)
        for place, part in module.named_modules()
        for name, value in sorted(vars(part).items())
        if isinstance(value, bool | str)
    )
    shapes = tuple((block.local(layer.name), layer.shape) for group in block.groups for layer in group.layers)
    return repr(module), flags, shapes


@dataclass(frozen=True)
class _Trial:
    """A block of the instance with weights, what it is called with, and what it then returns."""

    block: Block
    heads: Heads
    module: nn.Module
    tensors: dict[str, torch.Tensor]
    arguments: Arguments
    states: torch.Tensor
    expected: list[torch.Tensor]

    @classmethod
    def of(cls, instance: Skeleton, block: Block, states: torch.Tensor, arguments: Arguments) -> "_Trial":
        """Raises UnsupportedModelError for a block that is too large to be tried."""
        module = instance.module(block)
        if (size := sum(parameter.numel() for parameter in module.parameters())) > MAX_PARAMETERS:
            raise UnsupportedModelError(f"a block has {size} parameters, more than {MAX_PARAMETERS}")
        tensors = {name: _numbers(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}
        trial = cls(block, instance.heads, module, tensors, arguments, states, [])
        return replace(trial, expected=trial.run({}, left=True))

    def run(self, tensors: Mapping[str, torch.Tensor], left: bool = False) -> list[torch.Tensor]:
        """All that the block returns, or leaves in what it is called with, some of its tensors being others.

        `left`: what it leaves in mappings stays there for later blocks, which share them.
        """
        args, kwargs = tree_map(_copied, (self.arguments.args, self.arguments.kwargs))
        with torch.inference_mode():
            output = functional_call(self.module, {**self.tensors, **tensors}, (self.states.clone(), *args), kwargs)
        mappings = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        for name, mapping in mappings.items() if left else ():
            self.arguments.kwargs[name].update(mapping)
        leaves, _ = tree_flatten((output, args, {**kwargs, **mappings}))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def change(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """The largest difference that other tensors make, as a share of the largest number where it is found."""
        pairs = zip(self.run(tensors), self.expected, strict=True)
        shares = [(new - old).abs().amax() / old.abs().amax() for new, old in pairs if not torch.equal(new, old)]
        return float(torch.stack(shares).amax()) if shares else 0.0

    def holds(self, reader: str, fold: Fold) -> bool | None:
        """Whether a fold changes nothing, and each tensor of it left as it was does; None: no such tensor matters."""
        block = _folding(self.block, {reader: fold})
        group = next(group for group in block.groups if block.local(group.name) == reader)
        heads = self.heads if fold.per_head else None
        folded = folded_permutations(block, group, _any_permutation(group.layers[0].shape[1], heads), heads)
        sides = [(block.local(name), dim, one.permutation) for one in folded for name, dim in one.reorders]
        moved = {name: self.tensors[name].index_select(dim, p) for name, dim, p in sides if name in self.tensors}
        together = self.change(moved)
        if not together <= SAME:
            return False
        alone = [self.change({name: x for name, x in moved.items() if name != left}) for left in moved]
        return None if not any(alone) else min(alone) >= SEEN and together <= SAME * min(alone)


def _proven_folds(own: Block, trial: _Trial, heads: Heads) -> dict[str, Fold]:
    """The folds of a block of the model that hold in the trial's, by their readers' local names.

    Layers of one shape whose names differ in numbers alone are experts of one class: one of them tells of all, whose
    producers have the numbers of their reader.
    """
    fitting, tried = _candidates(own, heads), _candidates(trial.block, trial.heads)
    layers = own.layers
    alike: dict[Any, list[str]] = {}
    for reader in fitting:
        alike.setdefault((re.sub(r"\d+", "#", reader), layers[f"{own.name}.{reader}"].shape), []).append(reader)
    folds: dict[str, Fold] = {}
    for readers in alike.values():
        for reader in [reader for reader in readers if reader in tried][:MAX_ALIKE]:
            both = (fold for fold in fitting[reader] if fold in tried[reader])
            fold = next((fold for fold in both if trial.holds(reader, fold)), None)
            if fold is None:
                continue
            folds[reader] = fold
            if all(_numbers_in(producer) == _numbers_in(reader) for producer in fold.producers):
                others = {other: _of_other(fold, other) for other in readers}
                folds |= {other: one for other, one in others.items() if one in fitting[other]}
                break
    return folds


def _candidates(block: Block, heads: Heads) -> dict[str, list[Fold]]:
    """The folds that shapes allow of a block's layers that share their input with no other, by local names.

    An expert's layers make inputs of its own alone.
    """
    return {
        block.local(group.name): list(_candidates_of(block, group, part.groups[:place], heads))
        for part in block.parts
        for place, group in enumerate(part.groups)
        if len(group.layers) == 1
    }


def _candidates_of(block: Block, group: LayerGroup, before: Sequence[LayerGroup], heads: Heads) -> Iterator[Fold]:
    """Of a block's group after others: those over all channels, and those into near layers, first."""
    channels = group.layers[0].shape[1]
    twice = [(2 * channels, Fold((), times=2, interleaved=interleaved)) for interleaved in (False, True)]
    inside = [(heads.key_values * heads.size, Fold((), per_head=True))] * (channels == heads.queries * heads.size)
    for rows, fold in [(channels, Fold(())), *twice, *inside]:
        for earlier in reversed(before):
            names = [block.local(layer.name) for layer in earlier.layers if layer.shape[0] == rows]
            yield from (fold._replace(producers=one) for one in [*zip(names, strict=True), *pairwise(names)])


def _numbers_in(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _of_other(fold: Fold, reader: str) -> Fold:
    """The fold of another reader, by its own numbers."""
    renamed = []
    for producer in fold.producers:
        parts, numbers = re.split(r"\d+", producer), [*_numbers_in(reader), ""]
        renamed.append("".join(part + number for part, number in zip(parts, numbers, strict=True)))
    return fold._replace(producers=tuple(renamed))


def _any_permutation(channels: int, heads: Heads | None) -> torch.Tensor:
    """A permutation int64 [channels]; with heads one inside each KV head, the same for all of its query heads."""
    generator = torch.Generator().manual_seed(channels)
    if heads is None:
        return torch.randperm(channels, generator=generator)
    each = [torch.randperm(heads.size, generator=generator) for _ in range(heads.key_values)]
    shared = heads.queries // heads.key_values
    return torch.cat([head * heads.size + each[head // shared] for head in range(heads.queries)])


def _numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random float64, others for each name: matrices that leave their inputs' size, vectors in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2:
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5


def _repeated(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random float64 along the last dimension, repeated without memory along the others."""
    return _numbers(name, shape[-1:]).expand(shape)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, MutableMapping):
        return type(leaf)(leaf)  # type: ignore[call-arg]
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
