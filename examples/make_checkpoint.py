"""Write a checkpoint of random weights in a real model's shapes, for measuring memory and speed.

    python examples/make_checkpoint.py /data/llama-65b-2 --like llama-65b --blocks 2
    python examples/make_checkpoint.py /data/opt-66b-2 --like opt-66b --blocks 2 --format bin
    python examples/make_checkpoint.py /data/olmoe-8 --like olmoe-1b-7b --blocks 8 --embeddings 1 --skew 0.5

Shapes are the published models' (hidden, intermediate, heads, vocabulary); weights are fp16 or bf16 (--dtype), normal
with a standard deviation of 0.02, norms 1 and biases 0, so nothing that is measured on them says anything of
perplexity. With --embeddings 1 the states of a mixture of experts stay those of their tokens, so that tokens differ in
the experts that they are routed to; with --skew some experts are more popular than others. Files are sharded at
--shard-bytes as the originals are (10 GB), safetensors or pickled .bin, with an index. One tensor at a time is in
memory with safetensors, one shard with .bin. The tokenizer has one token for each byte.
"""

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from streamprune.config import parse_bytes

LLAMA = {  # LLaMA, arXiv 2302.13971, table 2: hidden, intermediate, heads, blocks
    "llama-160m": (768, 3072, 12, 12),  # of no paper: small enough to measure many blocks of
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
    "llama-30b": (6656, 17920, 52, 60),
    "llama-65b": (8192, 22016, 64, 80),
}
OPT = {"opt-66b": (9216, 36864, 72, 64)}  # OPT, arXiv 2205.01068, table 1
MIXTURES = {  # and experts, of which so many a token
    "olmoe-1b-7b": (2048, 1024, 16, 16, 64, 8),  # OLMoE, arXiv 2409.02060, table 1
    "mixtral-8x7b": (4096, 14336, 32, 32, 8, 2),  # Mixtral, arXiv 2401.04088, table 1
    "deepseek-v3": (7168, 2048, 128, 61, 256, 8),  # DeepSeek-V3, arXiv 2412.19437, section 4.2
}
CLASSES = {
    **dict.fromkeys(LLAMA, "Llama"),
    **dict.fromkeys(OPT, "OPT"),
    **dict(zip(MIXTURES, ("Olmoe", "Mixtral", "DeepseekV3"), strict=True)),
}
DEVIATION = 0.02
DTYPES = {"float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16")}  # and the format's names
TILE = 1 << 24  # random numbers that are drawn once and repeated: drawing billions would take minutes


class Deviations(NamedTuple):
    """Where weights are not all alike: the deviation of input embeddings, and the power of an expert's rank that its
    router's row is divided by.
    """

    embeddings: float
    skew: float


EQUAL = Deviations(DEVIATION, 0.0)


def config_like(name: str, blocks: int | None, experts: int | None = None) -> PreTrainedConfig:
    """The model's config with `blocks` blocks and `experts` experts in each, or as many as it has."""
    hidden, intermediate, heads, count, *mixture = (LLAMA | OPT | MIXTURES)[name]
    shared: dict[str, Any] = {
        "num_hidden_layers": blocks or count,
        "num_attention_heads": heads,
        "tie_word_embeddings": name in OPT,
    }
    if name in OPT:
        return OPTConfig(vocab_size=50272, hidden_size=hidden, ffn_dim=intermediate, word_embed_proj_dim=hidden,
                         max_position_embeddings=2048, **shared)  # fmt: skip
    if mixture:
        return mixture_like(name, hidden, intermediate, experts or mixture[0], mixture[1], shared)
    return LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate,
                       max_position_embeddings=2048, **shared)  # fmt: skip


def mixture_like(
    name: str, hidden: int, intermediate: int, experts: int, taken: int, shared: dict[str, Any]
) -> PreTrainedConfig:
    """Of a mixture of experts; DeepSeek's blocks all have experts here, and small vocabularies spare writing them."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_experts_per_tok": min(taken, experts), **shared}
    if name == "olmoe-1b-7b":
        return OlmoeConfig(vocab_size=50304, intermediate_size=intermediate, num_experts=experts,
                           max_position_embeddings=4096, **sizes)  # fmt: skip
    if name == "mixtral-8x7b":
        return MixtralConfig(vocab_size=1024, intermediate_size=intermediate, num_key_value_heads=8,
                             num_local_experts=experts, max_position_embeddings=2048, **sizes)  # fmt: skip
    groups: dict[str, Any] = {"n_group": 1, "topk_group": 1}
    if experts % 8 == 0 and experts > 8:
        groups = {"n_group": 8, "topk_group": 4}
    return DeepseekV3Config(vocab_size=1024, moe_intermediate_size=intermediate, n_routed_experts=experts,
                            first_k_dense_replace=0, max_position_embeddings=2048, **groups, **sizes)  # fmt: skip


def shapes_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a checkpoint of this model stores, in their order."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = {name: buffer.shape for name, buffer in model.named_buffers() if name in model.state_dict()}
    whole = (parameters | stored).items()
    return {name: shape for one in whole for name, shape in apart(*one, mixtral=config.model_type == "mixtral")}


def apart(name: str, shape: torch.Size, mixtral: bool) -> Iterator[tuple[str, torch.Size]]:
    """A parameter; or the matrices of each expert, as checkpoints have them, of one that holds all."""
    name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
    if len(shape) < 3:
        yield name, shape
        return
    path, _, layers = name.rpartition(".")
    up, down = (("w1", "w3"), ("w2",)) if mixtral else (("gate_proj", "up_proj"), ("down_proj",))
    for expert in range(shape[0]):
        for layer in up if layers == "gate_up_proj" else down:
            rows = shape[1] // (2 if layers == "gate_up_proj" else 1)
            yield f"{path}.{expert}.{layer}.weight", torch.Size((rows, shape[2]))


def shards_of(shapes: dict[str, torch.Size], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would grow beyond `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        count = 2 * math.prod(shape)
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def values(
    shapes: dict[str, torch.Size], names: list[str], tile: torch.Tensor, deviations: Deviations
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each named tensor, in the tile's dtype."""
    for name in names:
        count = math.prod(shapes[name])
        if len(shapes[name]) == 1:
            flat = torch.full((count,), 1.0 if "norm" in name and name.endswith("weight") else 0.0, dtype=tile.dtype)
        else:
            start = hash_of(name) % len(tile)
            flat = tile.roll(-start).repeat(-(-count // len(tile)))[:count]
        tensor = flat.view(shapes[name])
        if name.endswith(
            (".mlp.gate.weight", ".block_sparse_moe.gate.weight")
        ):  # a router; which experts come first differs between blocks
            ranks = (torch.arange(len(tensor)) * 29 + hash_of(name)) % len(tensor)
            tensor = (tensor * (1 + ranks[:, None]) ** -deviations.skew).to(tile.dtype)
        if "embed_tokens" in name:
            tensor = tensor * (deviations.embeddings / DEVIATION)
        yield name, tensor


def hash_of(name: str) -> int:
    """A number of a name's own, the same in every process."""
    return int.from_bytes(name.encode(), "big") % (2**31 - 1)


def write_safetensors(
    path: Path, shapes: dict[str, torch.Size], names: list[str], tile: torch.Tensor, deviations: Deviations
) -> None:
    """The format's header, then the tensors one after the other."""
    header, offset = {}, 0
    for name in names:
        end = offset + 2 * math.prod(shapes[name])
        header[name] = {
            "dtype": dict(DTYPES.values())[tile.dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in values(shapes, names, tile, deviations):
            tensor.contiguous().view(torch.int16).numpy().tofile(file)


def write_tokenizer(folder: Path) -> None:
    """One token a byte."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_checkpoint(
    folder: Path,
    like: str,
    blocks: int | None,
    form: str,
    shard_bytes: int,
    dtype: str = "float16",
    deviations: Deviations = EQUAL,
    experts: int | None = None,
) -> None:
    """Write the checkpoint; the folder must not exist."""
    config = config_like(like, blocks, experts)
    shapes = shapes_of(config)
    folder.mkdir(parents=True)
    config.architectures = [f"{CLASSES[like]}ForCausalLM"]
    config.dtype = DTYPES[dtype][0]
    config.save_pretrained(folder)
    write_tokenizer(folder)
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul_(DEVIATION).to(config.dtype)
    shards = shards_of(shapes, shard_bytes)
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for index, names in enumerate(tqdm(shards, unit="shard", disable=None)):
        file = f"{stem}-{index + 1:05d}-of-{len(shards):05d}.{suffix}"
        weight_map.update(dict.fromkeys(names, file))
        if form == "safetensors":
            write_safetensors(folder / file, shapes, names, tile, deviations)
        else:
            torch.save(dict(values(shapes, names, tile, deviations)), folder / file)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    index_name = f"{stem}.{suffix}.index.json"
    (folder / index_name).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", choices=tuple(CLASSES), required=True)
    parser.add_argument("--blocks", type=int, help="default: as many as the model has")
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--shard-bytes", type=parse_bytes, default=10_000_000_000, help="such as 2GB (default: 10 GB)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    parser.add_argument("--embeddings", type=float, default=DEVIATION, help="standard deviation (default: 0.02)")
    parser.add_argument("--skew", type=float, default=0.0, help="an expert's row of a router, times (1 + rank)^-SKEW")
    parser.add_argument("--experts", type=int, help="in each block of a mixture (default: as many as the model has)")
    given = parser.parse_args()
    if given.experts is not None and given.like not in MIXTURES:
        sys.exit(f"{given.like} has no experts; leave --experts out")
    if given.folder.exists():
        sys.exit(f"{given.folder} exists; name a new folder")
    deviations = Deviations(given.embeddings, given.skew)
    amount = given.blocks, given.format, given.shard_bytes, given.dtype
    make_checkpoint(given.folder, given.like, *amount, deviations, given.experts)


if __name__ == "__main__":
    main()
