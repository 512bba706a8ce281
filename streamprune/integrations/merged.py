"""Packed layers in engines that merge layers, and cut them among processes: what goes, and what is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm

from streamprune.config import NMPattern
from streamprune.errors import SettingsError
from streamprune.model.experts import EXPERTS

MASK_BITS = 8  # in a byte


@dataclass(frozen=True)
class Layer:
    """What config.json says of a pruned layer: its pattern, and whether it stores an input permutation."""

    pattern: NMPattern
    permuted: bool

    def __str__(self) -> str:
        return f"{self.pattern}{' permuted' if self.permuted else ''}"


def check_experts(layers: Iterable[str]) -> None:
    """Raise SettingsError for the first of an output's packed layers that is one of several experts'."""
    if expert := next((name for name in layers if f".{EXPERTS}." in name), None):
        raise SettingsError(
            f"layer {expert}: is one expert's, and vLLM computes all experts of a block from one dense tensor; make "
            "the output dense by `streamprune export`, or load it with transformers"
        )


def merged_layer(name: str, merges: Mapping[str, list[str]], layers: Mapping[str, Layer]) -> Layer | None:
    """What a layer of an engine is, of those in an output that it consists of; None for a dense one.

    `name` is "model.layers.0.self_attn.qkv_proj", say, and `merges` {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}: what
    is not in there, or lies on disk as the engine has it, consists of itself. Raises SettingsError where the parts
    differ in pattern, or in whether a permutation is stored.
    """
    parent, _, last = name.rpartition(".")
    parts = [name]
    if name not in layers and last in merges:
        parts = [f"{parent}.{part}" if parent else part for part in merges[last]]
    kinds = {part: layers.get(part) for part in parts}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{part.rpartition('.')[2]} is {kind or 'dense'}" for part, kind in kinds.items())
        raise SettingsError(
            f"layer {name}: {said}; they are merged when served, which wants one pattern for all; compress them alike, "
            "or make the output dense by `streamprune export`"
        )
    return kinds[parts[0]]


def check_cut(name: str, layer: Layer, inputs: int, whole: int) -> tuple[int, int]:
    """Columns of the values and bytes of a mask's row in a part of `inputs` of the layer's `whole` input channels.

    Parts follow each other from channel 0 on, all of one size. Raises SettingsError where one does not begin with a
    group and with a byte of the mask, or where a stored permutation takes channels of other parts.
    """
    group = layer.pattern.group_size
    if inputs != whole:
        reason = ""
        if inputs % lcm(group, MASK_BITS):
            reason = f"parts of {inputs} do not end with a group of {group} and a byte of the mask"
        elif layer.permuted:
            reason = "its stored input permutation crosses them; compress with --fold heads, or without shuffle"
        if reason:
            raise SettingsError(
                f"layer {name}: its {whole} input channels cannot be cut into {whole // inputs} parts: {reason}; serve "
                "with another --tensor-parallel-size, or the dense export"
            )
    return inputs // group * layer.pattern.kept, -(-inputs // MASK_BITS)
