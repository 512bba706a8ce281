"""Tiny checkpoints, texts and edits of outputs for the tests: seconds to compress, nothing about them degenerate.

Weights are scaled so that every block adds something of the size of its input; biases and norms are random, so that a
permutation that forgets one of them changes the logits; channels differ in size, so that shuffles have work to do.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 128
POSITIONS = 320  # more than evaluate computes logits for at once
# Of every tiny job, unless a test says otherwise; auto would be bfloat16 on some processors.
CALIBRATION = {"samples": 4, "sequence_length": 48, "dtype": "float32"}
MANIFEST, MANIFEST_DIGEST = "streamprune_manifest.json", "streamprune_manifest.sha256"
PERMUTATIONS, STATISTICS = "streamprune_permutations.st", "streamprune_statistics.st"
INDEX = "streamprune.safetensors.index.json"  # of an output


def write_llama(
    folder: Path, *, heads: int = 4, kv_heads: int = 2, biases: bool = True, tied: bool = True, blocks: int = 3
) -> Path:
    """A LLaMA in bf16, hidden 64, four heads of 16, intermediate 160."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return write_model(folder, LlamaForCausalLM(config), torch.bfloat16)


def write_opt(folder: Path, *, heads: int = 4, blocks: int = 3) -> Path:
    """An OPT with biases in fp16, hidden 64, four heads of 16; its 156 ffn channels leave padding bits in the masks."""
    torch.manual_seed(2)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=156, num_hidden_layers=blocks, num_attention_heads=heads,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=64, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    return write_model(folder, OPTForCausalLM(config), torch.float16)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_mistral(folder: Path) -> Path:
    config = MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=8)
    return write_model(folder, MistralForCausalLM(config), torch.float32)


def write_ministral(folder: Path) -> Path:
    """Its blocks attend to a window and to everything in turn."""
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = MinistralConfig(**SIZES, num_hidden_layers=2, head_dim=8, **windows)
    return write_model(folder, MinistralForCausalLM(config), torch.float32)


def write_qwen2(folder: Path) -> Path:
    """Blocks 0 and 1 attend to everything, 2 and 3 to a window: their masks differ."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    config = Qwen2Config(**SIZES, num_hidden_layers=4, tie_word_embeddings=True, **window)
    return write_model(folder, Qwen2ForCausalLM(config), torch.float32)


def write_qwen3(folder: Path) -> Path:
    """Heads of 16, so that their outputs are twice as many as the hidden size, and norms inside attention."""
    config = Qwen3Config(**SIZES, num_hidden_layers=2, head_dim=16)
    return write_model(folder, Qwen3ForCausalLM(config), torch.float32)


def write_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype) -> Path:
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def randomise(model: PreTrainedModel) -> None:
    """Random numbers of a seed of our own in every parameter: torch's initialisation leaves biases 0 and norms 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.exp(noise * 0.7))  # channels of very different size
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.2)
            elif "embed" in name:
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)


def write_tokenizer(folder: Path) -> None:
    """One token a character; ids 0 to 126 are ASCII, 127 is everything else."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(127)} | {"[UNK]": 127}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def write_beside(folder: Path) -> Path:
    """More files beside the weights, some of them in folders."""
    for name in ("NOTICE", "additional_chat_templates/tool_use.jinja", "original/deep/params.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def write_as_bin_shards(source: Path, folder: Path, shards: int = 2) -> Path:
    """The same checkpoint as pytorch_model-*.bin with an index, its names without the base model's prefix (old OPT)."""
    copy_without_weights(source, folder)
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(source).items()}
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        torch.save({name: tensors[name] for name in weight_map if weight_map[name] == shard}, folder / shard)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def write_as_safetensors_shards(source: Path, folder: Path, shards: int = 3) -> Path:
    """The same checkpoint in several safetensors files, tensors dealt out so that blocks lie across shards."""
    copy_without_weights(source, folder)
    tensors = read_tensors(source)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def copy_without_weights(source: Path, folder: Path) -> None:
    folder.mkdir()
    for path in source.iterdir():
        if not path.name.startswith(("model", "pytorch_model")):
            (folder / path.name).write_bytes(path.read_bytes())


def as_hub_cache(source: Path, repository: Path, commit: str = "0a1b2c") -> Path:
    """The same in the layout of a model hub's cache: blobs, and a snapshot of links to them."""
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in source.rglob("*"):
        link = snapshot / path.relative_to(source)
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = Path(shutil.copyfile(path, repository / "blobs" / sha256(path)))
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def text(characters: int, seed: int = 0) -> str:
    """Sentences of made-up words: letters differ in frequency, as in a language."""
    draw = random.Random(seed)
    words = [
        "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=draw.randint(1, 9))) for _ in range(300)
    ]
    sentences: list[str] = []
    size = 0
    while size < characters:
        sentences.append(" ".join(draw.choices(words, k=draw.randint(4, 14))).capitalize() + ".\n")
        size += len(sentences[-1])
    return "".join(sentences)[:characters]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's model.safetensors or of the shards in its index."""
    index = next(folder.glob("*.safetensors.index.json"), folder)
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of an output, timings.json excepted: what must be equal between equal jobs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "timings.json"]
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(files)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_byte(path: Path, position: int, bits: int = 0x01) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def shard_of(folder: Path, tensor: str) -> Path:
    """The file that holds a tensor, of an output or of any sharded checkpoint."""
    [index] = folder.glob("*.safetensors.index.json")
    return folder / read_json(index)["weight_map"][tensor]


def edit_tensor(path: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    """Let `edit` change one tensor of a safetensors file in place; the file's metadata are kept."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, metadata=metadata)


def reseal(folder: Path, edit: Callable[[Any], None] = lambda manifest: None) -> None:
    """Make every checksum of an output right again, as a forger would; `edit` may change the manifest."""
    manifest = read_json(folder / MANIFEST)
    edit(manifest)
    for name, entry in manifest["files"].items():
        path = folder / name
        entry.update(sha256=sha256(path), bytes=path.stat().st_size)
    write_json(folder / MANIFEST, manifest)
    (folder / MANIFEST_DIGEST).write_text(f"{sha256(folder / MANIFEST)}  {MANIFEST}\n")


def as_version_1(out: Path) -> Path:
    """Turn an output into one of version 1 of the format, finished or not: its names, numbers and keys."""
    renamed = {path.name: path.name.replace("streamprune-", "model-") for path in out.glob("streamprune-*")}
    renamed |= {INDEX: "model.safetensors.index.json"}
    renamed |= {name: name.replace(".st", ".safetensors") for name in (PERMUTATIONS, STATISTICS)}
    for path in [*out.glob("*.json"), *out.glob(".work/block-*.json")]:
        content = path.read_text()
        for name, former in renamed.items():
            content = content.replace(f'"{name}"', f'"{former}"')
        path.write_text(content.replace('"format_version": 2', '"format_version": 1'))
    for name, former in renamed.items():
        if (out / name).exists():
            (out / name).rename(out / former)
    (out / "README.md").unlink(missing_ok=True)
    if (out / "README.source.md").exists():
        (out / "README.source.md").rename(out / "README.md")
    for path in out.glob(".work/*.json"):
        sealed = read_json(path)
        sealed["value"].pop("format_version", None)
        content = json.dumps(sealed["value"], sort_keys=True, separators=(",", ":"))
        write_json(path, {"sha256": hashlib.sha256(content.encode()).hexdigest(), "value": sealed["value"]})
    if (out / MANIFEST).exists():
        reseal(out, _as_version_1)
    return out


def _as_version_1(manifest: Any) -> None:
    for key in ("source_name", "made_by", "source_revision"):
        del manifest[key]
    del manifest["files"]["README.md"]
    if "README.source.md" in manifest["files"]:
        manifest["files"]["README.md"] = manifest["files"].pop("README.source.md")


def windows(tokens: list[int], length: int) -> Iterator[torch.Tensor]:
    """Windows [1, length] that do not overlap, the remainder dropped."""
    for start in range(0, len(tokens) - length + 1, length):
        yield torch.tensor([tokens[start : start + length]])
