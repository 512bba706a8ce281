"""Blocks that are read when they are called: tokens are transformers' own, whichever blocks are in memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.spans import Reader
from streamprune.errors import CheckpointError, NumericsError, UnsupportedModelError
from streamprune.model.arithmetic import resolve_arithmetic
from streamprune.model.residency import BlockStream, needed_bytes, place_blocks, stored_blocks
from streamprune.model.source import open_source
from streamprune.runtime import generate as generation
from streamprune.runtime.export import export
from streamprune.runtime.generate import GenerateResult, generate
from streamprune.text.tokenizers import load_tokenizer, prompt_ids

PROMPTS = ["The quick brown fox", "jumps", "over the lazy dog, again"]
NEW = 20  # tokens; the windows of those that have one hold 8
TYPES = ["llama", "mistral", "ministral", "qwen2", "qwen3", "opt"]


@pytest.fixture
def with_resident(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerateResult]:
    """`generate` where exactly so many blocks may stay in memory: what else the process has is not counted."""

    def run(folder: Path, resident: int, prompts: list[str], **settings: Any) -> GenerateResult:
        source = open_source(folder)
        arithmetic = resolve_arithmetic("cpu", settings.get("dtype", "auto"), source.dtype)
        blocks = stored_blocks(source, arithmetic)
        stays = [(number + 1) * resident // len(blocks) > number * resident // len(blocks)
                 for number in range(len(blocks))]  # fmt: skip
        slots = 0 if resident == len(blocks) else min(2, len(blocks) - resident - 1)
        monkeypatch.setattr(generation, "held_bytes", lambda: 0)
        monkeypatch.setattr(generation, "LATER_BYTES", 0)
        monkeypatch.setattr(generation, "working_bytes", lambda *_: 1000)
        limit = str(1000 + needed_bytes(blocks, stays, slots))
        result = generate(folder, prompt=prompts, max_memory=limit, device="cpu", max_new_tokens=NEW, **settings)
        assert (result.blocks, result.resident_blocks) == (len(blocks), resident)
        return result

    return run


def tokens_of_transformers(folder: Path, prompt: str) -> list[int]:
    tokens = prompt_ids(load_tokenizer(folder), prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokens])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return list(made[0, len(tokens) :].tolist())


@pytest.mark.parametrize("name", TYPES)
def test_tokens_are_those_of_transformers(
    name: str,
    sources: Callable[[str], Path],
    prune: Callable[..., Any],
    with_resident: Callable[..., GenerateResult],
    tmp_path: Path,
) -> None:
    """On the dense export, of each prompt alone: packed and dense, blocks streamed or not, several prompts or one."""
    prune(sources(name), tmp_path / "out", metric="magnitude", refine=False, validate=False)
    export(tmp_path / "out", out=tmp_path / "dense")
    expected = [tokens_of_transformers(tmp_path / "dense", prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == 3
    count = len(open_source(tmp_path / "out").blocks)
    for folder in (tmp_path / "out", tmp_path / "dense"):
        for resident in {0, 1, count} if count > 3 else {0, count}:
            result = with_resident(folder, resident, PROMPTS, dtype="float32")
            assert result.tokens == expected
            assert result.packed == (folder.name == "out")
        assert with_resident(folder, 0, PROMPTS[1:2], dtype="float32").tokens == expected[1:2]


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "opt-bin"])
def test_other_files_and_dtypes(
    name: str, sources: Callable[[str], Path], with_resident: Callable[..., GenerateResult]
) -> None:
    """Blocks that lie in several shards or in a .bin; computed as they are stored or not."""
    for dtype in ("float32", "bfloat16"):
        streamed, resident = (with_resident(sources(name), count, PROMPTS, dtype=dtype) for count in (0, 3))
        assert streamed.tokens == resident.tokens
        assert (streamed.dtype, resident.pass_bytes, resident.ceiling_tokens_per_second) == (dtype, 0, None)
        source = open_source(sources(name))
        stored = sum(source.stored_bytes(block.parameters) for block in source.blocks)
        assert stored <= streamed.pass_bytes <= 1.1 * stored + 3 * 3 * 4096  # of whole pages, three shards
        assert streamed.disk_bytes_per_second is not None
        pace = streamed.disk_bytes_per_second / streamed.pass_bytes
        assert streamed.ceiling_tokens_per_second == pytest.approx(3 * pace)


def stored(folder: Path, dtype: str = "auto") -> Any:
    source = open_source(folder)
    return source, stored_blocks(source, resolve_arithmetic("cpu", dtype, source.dtype))


def test_as_many_blocks_stay_as_fit_spread_evenly(sources: Callable[[str], Path]) -> None:
    block = stored(sources("llama"), "bfloat16")[1][0]
    blocks, size = [block] * 8, block.layout.size_bytes
    cases = {0: ([], 0), 1: ([], 1), 2: ([], 2), 3: ([7], 2), 5: ([2, 5, 7], 2), 7: ([1, 3, 4, 6, 7], 2)}
    for held, (expected, slots) in cases.items():
        resident, found = place_blocks(blocks, held * size + size // 2)
        assert ([number for number, stays in enumerate(resident) if stays], found) == (expected, slots), held
    assert place_blocks(blocks, 8 * size) == ([True] * 8, 0)


def test_what_blocks_take_in_another_dtype(sources: Callable[[str], Path], outputs: Callable[..., Path]) -> None:
    """Dense ones are converted whole, packed ones keep what was read, and their norms are converted."""
    (_, dense), (_, packed) = stored(sources("llama"), "float32"), stored(outputs("llama"), "float32")
    source = open_source(sources("llama"))
    parameters = sum(math.prod(source.stored(name).shape) for name in source.blocks[0].parameters)
    assert dense[0].converted_bytes == dense[0].resident_bytes == 4 * parameters
    assert packed[0].converted_bytes == 4 * 2 * 64
    assert packed[0].resident_bytes == packed[0].layout.size_bytes + packed[0].converted_bytes
    assert needed_bytes(dense, [True] * 3, 0) == 3 * 4 * parameters + max(block.layout.size_bytes for block in dense)


def test_blocks_are_called_in_their_order(sources: Callable[[str], Path]) -> None:
    source, blocks = stored(sources("llama"))
    with Reader() as reader:
        stream = BlockStream(source, blocks, 2, reader, torch.device("cpu"))
        with pytest.raises(UnsupportedModelError, match=r"layers\.2: is not called in the order"), stream.next(2):
            pass


@pytest.mark.parametrize("resident", [0, 3])
@pytest.mark.parametrize(
    ("part", "harm", "kind", "message"),
    [
        ("weight_values", lambda t: t[0].fill_(torch.nan), NumericsError, r"weight_values holds NaN"),
        ("weight_mask", lambda t: t[1, :1].fill_(0x37), CheckpointError, "row 1, group 0 keeps 3 of 4, not 2"),
        ("input_permutation", lambda t: t.fill_(7), CheckpointError, "is not a permutation"),
    ],
)
def test_a_damaged_block(
    part: str,
    harm: Callable[[torch.Tensor], object],
    kind: type[Exception],
    message: str,
    resident: int,
    copy_of: Callable[..., Path],
    with_resident: Callable[..., GenerateResult],
) -> None:
    folder, name = copy_of("llama"), f"model.layers.1.self_attn.q_proj.{part}"
    tiny.edit_tensor(tiny.shard_of(folder, name), name, harm)
    with pytest.raises(kind, match=message):
        with_resident(folder, resident, PROMPTS)
