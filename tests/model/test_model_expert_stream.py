"""Experts that are read when tokens are routed to them: the same logits and tokens, whatever memory holds of them."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from command import run
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from streamprune.checkpoint.spans import Reader, aligned_memory
from streamprune.errors import NumericsError, SettingsError
from streamprune.model import expert_cache
from streamprune.model.arithmetic import resolve_arithmetic
from streamprune.model.expert_cache import ExpertCache
from streamprune.model.expert_stream import Guess
from streamprune.model.residency import expert_bytes, needed_bytes, stored_blocks
from streamprune.model.source import open_source
from streamprune.runtime import generate as generation
from streamprune.runtime.generate import GenerateResult, Placement, generate, placement
from streamprune.text.tokenizers import load_tokenizer, prompt_ids

NEW = 10  # tokens
PROMPTS = ["The quick brown fox jumps over the lazy dog", "jumps"]
GROUPED = {**families.GROUPED, "num_hidden_layers": 3}
FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {  # apart; more of them; shared ones and a dense block; with biases; fused
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, **FEW, "num_experts": 6, "head_dim": 8},
    "deepseek_v3": {**GROUPED, **FEW, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
                    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "rope_parameters": families.ROPE},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
PLACES = {  # how many blocks stay, how many others are there at once, and room for how many experts
    "one expert": (3, 0, 1),
    "two": (3, 0, 2),
    "a few": (3, 0, 5),
    "blocks are read too": (1, 2, 3),
    "all experts, no block": (0, 1, 18),
}


def write_mixture(folder: Path, kind: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**MIXTURES[kind], **changes}))
    return tiny.write_model(folder, model, torch.float32)


@pytest.fixture(scope="module")
def mixture(prune: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny mixture of experts by its type, in float32, or its packed output."""
    folder = tmp_path_factory.mktemp("mixtures")

    def made(kind: str, packed: bool = False) -> Path:
        dense, out = folder / kind, folder / f"{kind}-packed"
        if not dense.exists():
            write_mixture(dense, kind)
        if packed and not out.exists():
            prune(dense, out, metric="magnitude", refine=False, validate=False, shuffle="none")
        return out if packed else dense

    return made


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerateResult]:
    """`generate` where so many blocks and experts have room, or all; in float32 unless told otherwise."""

    def said(folder: Path, place: tuple[int, int, int] | None, **settings: Any) -> GenerateResult:
        def chosen(blocks: list[Any], *_: Any) -> Placement:
            staying, slots, experts = place or (len(blocks), 0, None)
            return Placement([number < staying for number in range(len(blocks))], slots, experts)

        monkeypatch.setattr(generation, "placement", chosen)
        defaults = {"prompt": PROMPTS, "max_new_tokens": NEW, "dtype": "float32", "device": "cpu"}
        return generate(folder, **{**defaults, **settings})

    return said


def tokens_of_transformers(folder: Path, prompt: str) -> list[int]:
    tokens = prompt_ids(load_tokenizer(folder), prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokens])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return list(made[0, len(tokens) :].tolist())


@pytest.mark.parametrize("kind", MIXTURES)
def test_tokens_are_those_of_transformers(
    kind: str, mixture: Callable[..., Path], placed: Callable[..., GenerateResult]
) -> None:
    """Of a dense checkpoint, of each prompt alone; a packed output's and another dtype's are those of all in memory."""
    expected = [tokens_of_transformers(mixture(kind), prompt) for prompt in PROMPTS]
    whole = placed(mixture(kind), None)
    assert (whole.tokens, whole.expert_hit_rate, whole.pass_bytes) == (expected, None, 0)
    packed, other = placed(mixture(kind, packed=True), None), placed(mixture(kind), None, dtype="bfloat16")
    for name, place in PLACES.items():
        found = placed(mixture(kind), place)
        assert found.tokens == expected, name
        assert (found.experts, found.resident_experts) == (whole.experts, place[2])
        assert placed(mixture(kind, packed=True), place).tokens == packed.tokens, name
        assert placed(mixture(kind), place, dtype="bfloat16").tokens == other.tokens, name


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_logits_are_the_same_bits(
    kind: str, tokens: int, mixture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few rows, whose experts are computed in any order, and of more; the first time and when some are there."""
    ids, found = torch.arange(5, 5 + tokens)[None], []
    for room in (None, 5):
        source = open_source(mixture(kind, packed=True))
        arithmetic = resolve_arithmetic("cpu", "float32", source.dtype)
        monkeypatch.setattr(generation, "placement", lambda *_, room=room: Placement([True] * 3, 0, room))
        with generation._placed(source, arithmetic, 0, (None, None), False) as (model, _, _), torch.inference_mode():
            found += [model(ids).logits.clone() for _ in range(2)]
    assert all(torch.equal(logits, found[0]) for logits in found)


def test_figures(mixture: Callable[..., Path], placed: Callable[..., GenerateResult]) -> None:
    """With room for all, each is read once; with room for one, all that tokens are routed to in every pass."""
    folder, each = mixture("qwen3_moe"), 3 * 32 * 24 * 4
    all_there, one = (placed(folder, (3, 0, room), prompt=PROMPTS[1]) for room in (18, 1))
    assert 0.5 < all_there.expert_hit_rate <= 1
    assert all_there.pass_bytes <= 18 * (each + 4096) / (NEW - 1)
    assert one.expert_hit_rate == 0
    assert 6 * each <= one.pass_bytes <= 6 * (each + 4096)  # two for each of three blocks, from a page's start
    assert one.ceiling_tokens_per_second == pytest.approx(one.disk_bytes_per_second / one.pass_bytes)
    only_prompt = placed(folder, (3, 0, 18), max_new_tokens=1)
    assert 9 * each < only_prompt.pass_bytes <= 18 * (each + 4096)


def test_what_the_command_says(mixture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "placement", lambda *_: Placement([True] * 3, 0, 5))
    result = run("generate", mixture("qwen3_moe"), "--prompt", "a", "--max-new-tokens", 4)
    assert result.exit_code == 0
    assert "3 of 3 blocks in memory" in result.stderr
    assert "room for 5 of 18 experts; " in result.stderr
    assert "% of those that tokens were routed to were there\n" in result.stderr
    assert " KiB read for each pass; the disk's " in result.stderr


def test_blocks_go_before_experts(mixture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(mixture("qwen3_moe"))
    monkeypatch.setattr(generation, "held_bytes", lambda: 0)
    monkeypatch.setattr(generation, "LATER_BYTES", 0)
    for dtype in ("float32", "bfloat16"):  # as stored, and converted: those are read into memory of its own
        blocks = stored_blocks(source, resolve_arithmetic("cpu", dtype, source.dtype))
        experts = [expert for block in blocks for expert in block.experts]
        one, reading = expert_bytes(blocks, on_gpu=False)
        assert (one, reading > 0) == (max(expert.resident_bytes for expert in experts), dtype == "bfloat16")
        staying, streamed = (needed_bytes(blocks, [stays] * 3, slots) for stays, slots in ((True, 0), (False, 1)))
        everything = needed_bytes([*blocks, *experts], [True] * 21, 0)
        cases = {
            everything: ([True] * 3, 0, None),
            staying + reading + 3 * one: ([True] * 3, 0, 3),
            staying + reading + 2 * one: ([True] * 3, 0, 2),
            streamed + reading + 2 * one: ([False] * 3, 1, 2),
        }
        for budget, expected in cases.items():
            assert placement(blocks, 1000, (1000 + budget, None)) == expected
        with pytest.raises(SettingsError, match="raise --max-memory"):
            placement(blocks, 1000, (999 + streamed + reading + 2 * one, None))


def test_which_experts_make_room(mixture: Callable[..., Path]) -> None:
    """The least used, then those used longest ago; of those that are to compute the last one, and only for earlier."""
    source = open_source(mixture("qwen3_moe"))
    block = stored_blocks(source, resolve_arithmetic("cpu", "float32", source.dtype))[0]
    a, b, c, d, e, f = keys = [(0, number) for number in range(6)]
    with Reader() as reader:
        cache = ExpertCache(source, dict(zip(keys, block.experts, strict=True)), 3, reader, torch.device("cpu"))
        for key, uses, now in ((a, 3, 1), (b, 1, 1), (c, 1, 2), (d, 1, 3), (e, 1, 3)):
            cache.note(key, uses, now)

        def held_after(key: tuple[int, int], coming: list[tuple[int, int]]) -> tuple[bool, set[int]]:
            begun = cache.begin(key, {other: place for place, other in enumerate(coming)})
            if begun:
                cache.ready(key)
            return begun, {number for _, number in cache._held}

        assert [held_after(key, [key])[0] for key in (a, b, c)] == [True] * 3
        assert held_after(d, [d]) == (True, {0, 2, 3})
        assert held_after(e, [c, e]) == (True, {0, 2, 4})
        assert held_after(f, [*keys, f]) == (False, {0, 2, 4})
        assert held_after(f, [f, a, c, e]) == (True, {0, 2, 5})
        assert cache.read_bytes == sum(block.experts[number].layout.read_bytes for _, number in (a, b, c, d, e, f))
        cache.end()


def test_guesses_are_read_while_most_are_right() -> None:
    guess = Guess()
    for _ in range(30):
        guess.keys = frozenset({(1, 2), (1, 3)})
        guess.check([(1, 5)])
    assert guess.right < 0.2
    for _ in range(60):
        guess.check([(1, 2), (1, 3)])
    assert guess.right > 0.9


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_expert(
    packed: bool, mixture: Callable[..., Path], placed: Callable[..., GenerateResult], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(mixture("qwen3_moe", packed), tmp_path / "model"))
    name = f"model.layers.1.mlp.experts.2.gate_proj.weight{'_values' * packed}"
    path = tiny.shard_of(folder, name) if packed else folder / "model.safetensors"
    tiny.edit_tensor(path, name, lambda tensor: tensor[0].fill_(torch.nan))
    for place in (None, (3, 0, 2)):
        with pytest.raises(NumericsError, match=rf"{name} holds NaN"):
            placed(folder, place)


def test_no_weights_stay_behind(
    mixture: Callable[..., Path], placed: Callable[..., GenerateResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    def noted(size_bytes: int) -> torch.Tensor:
        array = aligned_memory(size_bytes).numpy()
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(expert_cache, "aligned_memory", noted)
    gc.disable()
    try:
        placed(mixture("mixtral", packed=True), (2, 1, 5))
        assert [reference() is None for reference in made] == [True] * 5
    finally:
        gc.enable()


def test_the_limit_on_memory_is_kept_to(tmp_path: Path) -> None:
    """A process of its own, with room for some experts of 6.3 MB each."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 8, "num_attention_heads": 8}
    folder = write_mixture(tmp_path / "model", "qwen3_moe", **sizes)
    command = [sys.executable, "-m", "streamprune", "generate", str(folder), "--prompt", "The quick brown fox"]
    command += ["--json", "--quiet", "--max-new-tokens", "6", "--dtype", "float32", "--max-memory"]
    refused = subprocess.run([*command, "1MB"], capture_output=True, text=True, check=False)
    least = float(refused.stderr.partition("about ")[2].split()[0]) * 2**30
    done = subprocess.run([*command, str(int(least + 60e6))], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 2 < found["resident_experts"] < found["experts"] == 24
    assert found["peak_memory_bytes"] <= least + 60e6
