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
class ResidualStream:
    """Parameters with a residual-stream dimension, and which dimension it is; absent ones are skipped.

    block: inside every block; outer: outside, full names.
    """

    block: tuple[tuple[str, int], ...]
    outer: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Architecture:
    """Where a model class keeps its blocks (a module path), the input groups of a block, and the residual stream."""

    blocks: str
    groups: tuple[InputGroup, ...]
    residual: ResidualStream


_LLAMA = Architecture(
    blocks="model.layers",
    groups=(
        InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        InputGroup(("self_attn.o_proj",), producers=("self_attn.v_proj",), per_head=True),
        InputGroup(("mlp.gate_proj", "mlp.up_proj")),
        InputGroup(("mlp.down_proj",), producers=("mlp.gate_proj", "mlp.up_proj")),
    ),
    residual=ResidualStream(
        block=(
            ("input_layernorm.weight", 0),
            ("self_attn.q_proj.weight", 1),
            ("self_attn.k_proj.weight", 1),
            ("self_attn.v_proj.weight", 1),
            ("self_attn.o_proj.weight", 0),
            ("self_attn.o_proj.bias", 0),
            ("post_attention_layernorm.weight", 0),
            ("mlp.gate_proj.weight", 1),
            ("mlp.up_proj.weight", 1),
            ("mlp.down_proj.weight", 0),
            ("mlp.down_proj.bias", 0),
        ),
        outer=(("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("lm_head.weight", 1)),
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
    residual=ResidualStream(
        block=(
            ("self_attn_layer_norm.weight", 0),
            ("self_attn_layer_norm.bias", 0),
            ("self_attn.q_proj.weight", 1),
            ("self_attn.k_proj.weight", 1),
            ("self_attn.v_proj.weight", 1),
            ("self_attn.out_proj.weight", 0),
            ("self_attn.out_proj.bias", 0),
            ("final_layer_norm.weight", 0),
            ("final_layer_norm.bias", 0),
            ("fc1.weight", 1),
            ("fc2.weight", 0),
            ("fc2.bias", 0),
        ),
        outer=(
            ("model.decoder.embed_tokens.weight", 1),
            ("model.decoder.embed_positions.weight", 1),
            ("model.decoder.project_in.weight", 0),
            ("model.decoder.project_out.weight", 1),
            ("model.decoder.final_layer_norm.weight", 0),
            ("model.decoder.final_layer_norm.bias", 0),
            ("lm_head.weight", 1),
        ),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
}


def architecture_of(model_type: str) -> Architecture:
    """The row of a config's `model_type`. Raises UnsupportedModelError naming the known ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"model type {model_type[:80]!r} is not supported; these are: {known}")
    return ARCHITECTURES[model_type]
