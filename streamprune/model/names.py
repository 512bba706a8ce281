"""Which tensor of a checkpoint is which parameter of a model, by the rules of from_pretrained."""

import logging
from collections.abc import Iterable, Mapping

import torch

from streamprune.checkpoint.packed import packed_shape
from streamprune.checkpoint.reader import Checkpoint, TensorSource
from streamprune.config import NMPattern
from streamprune.errors import CheckpointError, UnsupportedModelError
from streamprune.model.experts import EXPERTS
from streamprune.model.library import merged_while_loading, name_while_loading
from streamprune.model.skeleton import Skeleton

logger = logging.getLogger("streamprune")

# Buffers that old checkpoints carry and current modules compute for themselves.
OBSOLETE_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
UNKNOWN_LISTED = 10  # tensors that belong to no parameter


def candidates(name: str, prefix: str) -> tuple[str, str, str]:
    """What a tensor may be called in the model: one of the base model lacks the prefix, or has one too many."""
    return name, prefix + name, name.removeprefix(prefix)


def with_experts_apart(skeleton: Skeleton, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the slices of each tensor that holds all experts of a block in that one's place.

    Raises CheckpointError where such a tensor has not as many.
    """
    renamed = name_while_loading(skeleton.model)
    counts = {}
    for name in checkpoint.tensors if skeleton.fused else ():
        known = (new for new in candidates(renamed(name), skeleton.base_prefix) if new in skeleton.fused)
        if (parameter := next(known, None)) is not None:
            counts[name] = skeleton.fused[parameter].count
    for name, count in counts.items():
        if (shape := checkpoint.tensors[name].shape)[:1] != (count,):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} has shape {list(shape)}, config.json makes it {count} experts"
            )
    return checkpoint.sliced(counts)


def match_names(skeleton: Skeleton, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name to the checkpoint's name for it, by the rules of from_pretrained.

    A checkpoint of the base model lacks the prefix ("decoder.layers..." for "model.decoder.layers..."), and its experts
    are apart (`with_experts_apart`). Raises CheckpointError for a parameter without tensor or with one of another
    shape, UnsupportedModelError for tensors that are merged while loading; those without parameter are logged.
    """
    shapes, renamed, merged = skeleton.shapes, name_while_loading(skeleton.model), merged_while_loading(skeleton.model)
    prefix = skeleton.base_prefix
    tied = skeleton.tied
    names: dict[str, str] = {}
    unknown = []
    for name in checkpoint.tensors:
        whole, place = checkpoint.tensors[name].slice_of or (name, None)
        found: tuple[str, ...] = candidates(renamed(whole), prefix)
        if place is not None:
            found = tuple(skeleton.fused[one].slices.format(place) for one in found if one in skeleton.fused)
        parameter = next((candidate for candidate in found if candidate in shapes), None)
        if parameter is None:
            _check_experts(skeleton, checkpoint, name, found)
        if parameter is None and place is None and merged(name):
            raise UnsupportedModelError(f"{name}: transformers merges or splits it while loading; not supported yet")
        if parameter is None:
            unknown.append(name)
        else:
            names[parameter] = name
    for parameter, stored in tied.items():
        other = names.pop(parameter, None)
        if other is not None and names.setdefault(stored, other) != other:
            _check_shape(checkpoint, other, checkpoint.tensors[other], shapes[stored])
    if part := next((name for name in unknown if _is_inside_a_matrix(skeleton, name, shapes)), None):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {part} is a part of a weight that is quantised, or has an adapter; give the "
            "weights as they are used, dequantised and merged"
        )
    missing = sorted(set(shapes) - set(names) - set(tied))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    for parameter, name in names.items():
        _check_shape(checkpoint, name, checkpoint.tensors[name], shapes[parameter])
    strange = [name for name in unknown if not name.endswith(OBSOLETE_SUFFIXES)]
    strange = _without_predicting_blocks(skeleton, checkpoint, strange)
    for name in strange[:UNKNOWN_LISTED]:
        logger.warning("%s: tensor %s belongs to no parameter of the model and is left out", checkpoint.folder, name)
    if len(strange) > UNKNOWN_LISTED:
        logger.warning("%s: so do %d more tensors", checkpoint.folder, len(strange) - UNKNOWN_LISTED)
    return names


def output_names(skeleton: Skeleton, checkpoint: Checkpoint, packed: Mapping[str, NMPattern]) -> dict[str, str]:
    """As `match_names`, for an output, whose packed layers' weights have no tensor of their own."""
    pruned = {f"{name}.weight" for name in packed}
    expected = {*skeleton.outer_parameters, *(name for block in skeleton.blocks for name in block.parameters)}
    unknown = sorted(packed.keys() - skeleton.views.keys())
    if unknown:
        raise CheckpointError(f"{checkpoint.folder}: layer {unknown[0]} is not in the model of config.json")
    missing = sorted(expected - pruned - set(checkpoint.tensors))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]}")
    for name in sorted(expected):
        layer = name.removesuffix(".weight")
        shape = skeleton.views[layer].shape if name in pruned else skeleton.shapes[name]
        stored = packed_shape(checkpoint, layer, packed[layer]) if name in pruned else checkpoint.tensors[name].shape
        if shape != tuple(stored):
            raise CheckpointError(f"{checkpoint.folder}: {name} is {list(stored)}, config.json makes it {list(shape)}")
    return {name: name for name in sorted(expected - pruned)}


def check_tied(skeleton: Skeleton, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Raise CheckpointError where a tensor that config.json ties to another is there too, and is not the same."""
    for parameter, stored in skeleton.tied.items():
        if parameter not in checkpoint.tensors or names[stored] == parameter:
            continue
        pairs = zip(checkpoint.pieces(parameter), checkpoint.pieces(names[stored]), strict=False)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {parameter} differs from {names[stored]}, which config.json ties it to; "
                "set tie_word_embeddings to false where the weights are right"
            )


def _without_predicting_blocks(skeleton: Skeleton, checkpoint: Checkpoint, unknown: list[str]) -> list[str]:
    """Unknown tensors without those of blocks for multi-token prediction, which follow the model's own in their list.

    They are no part of a causal LM's forward: from_pretrained drops them, and so does this, in a line. Raises
    CheckpointError for a block that config.json does not know of.
    """
    count = len(skeleton.blocks)
    predicting = getattr(skeleton.model.config, "num_nextn_predict_layers", None)
    last = count + (predicting if type(predicting) is int else 0)
    later = {name: number for name in unknown if (number := _number_of_block(skeleton, name)) >= count}
    if beyond := next((name for name, number in later.items() if number >= last), None):
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {beyond} is of a block beyond the {last} of config.json; "
            "give a config.json that belongs to the weights"
        )
    if later:
        logger.warning(
            "%s: %d tensors of blocks for multi-token prediction (first %s) are left out; the causal LM does without",
            *(checkpoint.folder, len(later), next(iter(later))),
        )
    return [name for name in unknown if name not in later]


def _number_of_block(skeleton: Skeleton, name: str) -> int:
    """The number in a tensor's name that it would have in the list of blocks; -1 where it has none."""
    path = skeleton.path
    for start in (f"{path}.", f"{path}.".removeprefix(skeleton.base_prefix)):
        number = name.removeprefix(start).partition(".")[0]
        if name.startswith(start) and number.isdecimal():
            return int(number[:10])  # a longer one is beyond all blocks as well
    return -1


def _check_experts(skeleton: Skeleton, checkpoint: Checkpoint, name: str, found: Iterable[str]) -> None:
    """Raise CheckpointError for a tensor that lies among the experts of a block and is none of their parameters."""
    for path, _, inside in (candidate.partition(f".{EXPERTS}.") for candidate in found):
        if (count := skeleton.expert_counts.get(f"{path}.{EXPERTS}")) is None:
            continue
        number = inside.partition(".")[0]
        if number.isdecimal() and int(number[:10]) >= count:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} is of an expert beyond the {count} of config.json; "
                "give a config.json that belongs to the weights"
            )
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name} is none of the experts' weights; give these as they are used, "
            "dequantised and merged"
        )


def _is_inside_a_matrix(skeleton: Skeleton, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor that belongs to no parameter lies in a module whose weight is a matrix: without the scale or the
    adapter that it is, the weight is not what the model multiplies by. A bias that the class lacks is dropped by
    from_pretrained too.
    """
    parent, _, part = name.rpartition(".")
    while parent and part != "bias":
        for start in ("", skeleton.base_prefix):
            if len(shapes.get(f"{start}{parent}.weight", ())) == 2:
                return True
        parent = parent.rpartition(".")[0]
    return False


def _check_shape(checkpoint: Checkpoint, name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name} has shape {list(source.shape)}, config.json makes it {list(shape)}"
        )
    if not source.dtype.is_floating_point:
        raise CheckpointError(f"{checkpoint.folder}: tensor {name} is {source.dtype}; the source must be unquantized")
