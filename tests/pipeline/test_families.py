"""Every family goes the whole way: compress, interrupt, resume, verify, evaluate, export, loading in transformers.

A family is a row of tests/families.py; docs/models.md is the table of what is asserted here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import odd_model
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamprune
from streamprune.errors import Interrupted, SettingsError, UnsupportedModelError
from streamprune.model.architectures import UNPADDED
from streamprune.model.residency import StoredBlock
from streamprune.model.source import open_dense
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime import generate as generation
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
TOKENS = torch.tensor([[ord(character) for character in "Twenty-nine letters and more."]])
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NAMES = [*families.FAMILIES, *families.WRAPPED, *families.VARIANTS]
RESUMED = (
    *("bloom", "cohere", "deepseek_v3", "gemma3_text", "gemma4_text", "gptj", "nemotron_h", "phi3", "qwen2_5_vl"),
    "qwen3_5_text",
)  # a kind of block each


def logits_of(folder: Path) -> torch.Tensor:
    """As transformers computes them from a folder, dense or packed."""
    model = families.load(folder)
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS, use_cache=False).logits[0]
    return logits


def check_the_whole_way(source: Path, out: Path, held_out: Path) -> None:
    """Of an output: verify, transformers and evaluate find in it what its masked dense export is."""
    dense = out.with_name("dense")
    assert verify(out, source=source).faults == []
    export(out, out=dense)
    stored = [{name: tensor.shape for name, tensor in tiny.read_tensors(one).items()} for one in (dense, source)]
    assert stored[0] == stored[1]
    packed, masked = logits_of(out), logits_of(dense)
    torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-4)
    assert float((packed - logits_of(source)).abs().max()) > 1e-2
    losses = [evaluate(folder, text=held_out, sequence_length=32, dtype="float32").loss for folder in (out, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def nothing_there(blocks: Sequence[StoredBlock], *_: Any) -> generation.Placement:
    """No block in memory, and room for two experts where there are any."""
    return generation.Placement([False] * len(blocks), 2, 2 if any(block.experts for block in blocks) else None)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_from_disk_say_what_the_loaded_model_says(
    name: str, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` with no block in memory, two prompts of unequal length at once, each as transformers continues it."""
    monkeypatch.setattr(generation, "placement", nothing_there)
    out, prompts = tmp_path / "out", ["The hills are", "A walk"]
    prune(families.write_family(tmp_path / "source", name), out, metric="magnitude", shuffle="none", validate=False)
    if name in UNPADDED:
        with pytest.raises(SettingsError, match="prompts of unequal length change each other"):
            generation.generate(out, prompt=prompts, max_new_tokens=8, dtype="float32")
        prompts = [prompts[0], "A walk in the"[: len(prompts[0])]]
    result = generation.generate(out, prompt=prompts, max_new_tokens=8, dtype="float32")
    assert result.resident_blocks == 0
    model, tokenizer = streamprune.load(out, device="cpu", dtype="float32"), AutoTokenizer.from_pretrained(out)
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert said[0, ids.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name: str, prune: Prune, held_out: Path, tmp_path: Path) -> None:
    folder, out = families.write_family(tmp_path / "source", name), tmp_path / "out"
    prune(folder, out)
    check_the_whole_way(folder, out, held_out)
    source, foretold = open_dense(folder), streamprune.plan(folder, **tiny.CALIBRATION)
    row = families.row_of(source, foretold.coverage)
    assert row in PAGE.read_text().splitlines() or name in families.VARIANTS
    stored = {name.rpartition(".")[0] for name in tiny.read_tensors(out) if name.endswith(".input_permutation")}
    assert stored == {name for block in source.blocks for group in block.groups if not group.producers
                      for name in group.names}  # fmt: skip


def test_a_wrapped_models_card_names_what_loads_it(prune: Prune, tmp_path: Path) -> None:
    prune(families.write_family(tmp_path / "source", "mistral3"), tmp_path / "out")
    export(tmp_path / "out", out=tmp_path / "dense")
    for folder in (tmp_path / "out", tmp_path / "dense"):
        card = (folder / "README.md").read_text()
        assert 'pipeline_tag: "image-text-to-text"' in card
        assert card.count("AutoModelForImageTextToText") == 2


def test_the_residual_stream_of_post_norms(prune: Prune, held_out: Path, tmp_path: Path) -> None:
    folder = families.write_family(tmp_path / "source", "opt, post-norm")
    prune(folder, tmp_path / "out", shuffle="residual+assignment")
    check_the_whole_way(folder, tmp_path / "out", held_out)


@pytest.mark.parametrize("name", ["gpt2", "phi3", *families.MIXTURES])
def test_a_loaded_output_is_made_dense_and_saved(name: str, prune: Prune, tmp_path: Path) -> None:
    """GPT-2's weights lie as [in, out] again, and experts as transformers saves them."""
    source, out = families.write_family(tmp_path / "source", name), tmp_path / "out"
    prune(source, out, metric="magnitude", shuffle="none", validate=False)
    packed = logits_of(out)
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).dequantize().save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(tmp_path / "dense"), packed, rtol=1e-4, atol=1e-4)
    saved, shapes = (tiny.read_tensors(folder) for folder in (tmp_path / "dense", source))
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: x.shape for key, x in shapes.items()}


def test_the_page_has_no_other_families() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(families.FAMILIES | families.WRAPPED)


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_and_resumed_gives_the_same_bytes(name: str, prune: Prune, tmp_path: Path) -> None:
    source = families.write_family(tmp_path / "source", name)
    for out, micro_batch in ((tmp_path / "one", 1), (tmp_path / "two", 4)):
        if out.name == "two":
            with pytest.raises(Interrupted):
                prune(source, out, should_stop=(out / ".work" / "block-00000.json").exists, micro_batch=1)
        prune(source, out, micro_batch=micro_batch)
    assert tiny.digests(tmp_path / "one") == tiny.digests(tmp_path / "two")


def test_a_model_of_no_table(prune: Prune, held_out: Path, tmp_path: Path) -> None:
    """By discovery and trial alone; what of it is not understood is said, and refused by default."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.write_model(source, odd_model.OddForCausalLM(odd_model.OddConfig()), torch.float32)
    with pytest.raises(
        UnsupportedModelError, match=r"only 68\.0% of the blocks' matrices.*give --min-coverage 0\.68 to"
    ):
        prune(source, out)
    assert not out.exists()
    with pytest.raises(SettingsError, match="shuffle residual: is not known of model type 'odd'"):
        prune(source, out, min_coverage=0.68, shuffle="residual+assignment")
    result = prune(source, out, min_coverage=0.68)
    check_the_whole_way(source, out, held_out)
    assert sorted(result.dense_layers) == sorted(
        f"trunk.cells.{block}.{name}" for block in (0, 1) for name in ("idle", "read", "scaled", "twice")
    )
    permuted = {name.split(".")[3] for name in tiny.read_tensors(out) if name.endswith(".input_permutation")}
    assert permuted == {"mix", "gather", "spread", "side"}  # join's is folded
