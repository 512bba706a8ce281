"""Which linear layers a block has, which of them share an input, and where a permutation of that input can be folded.

A table of data. An architecture is added by a row here, if its blocks are a plain list of modules with linear layers.
"""

from dataclasses import dataclass

from streamprune.errors import UnsupportedModelError


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read one and the same input, by their names inside the block.

    producers: layers whose output rows (and bias) are this input, channel by channel, up to elementwise functions: a
               permutation folds into them. Empty: the input is the residual stream, the permutation is stored.
    per_head:  the input is attention's output: a permutation must stay inside heads, and is one for all the query
               heads that share a KV head, whose value rows are the producer's.
    """

    layers: tuple[str, ...]
    producers: tuple[str, ...] = ()
    per_head: bool = False


@dataclass(frozen=True)
class Architecture:
    """Where a model class keeps its blocks (a module path), and the input groups of a block."""

    blocks: str
    groups: tuple[InputGroup, ...]


_LLAMA = Architecture(
    blocks="model.layers",
    groups=(
        InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        InputGroup(("self_attn.o_proj",), producers=("self_attn.v_proj",), per_head=True),
        InputGroup(("mlp.gate_proj", "mlp.up_proj")),
        InputGroup(("mlp.down_proj",), producers=("mlp.gate_proj", "mlp.up_proj")),
    ),
)

_OPT = Architecture(
    blocks="model.decoder.layers",
    groups=(
        InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        InputGroup(("self_attn.out_proj",), producers=("self_attn.v_proj",), per_head=True),
        InputGroup(("fc1",)),
        InputGroup(("fc2",), producers=("fc1",)),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
}


def architecture_of(model_type: str) -> Architecture:
    """The row of a config's `model_type`. Raises UnsupportedModelError naming the known ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"model type {model_type!r} is not supported; these are: {known}")
    return ARCHITECTURES[model_type]
