"""Perplexity streamed block by block is transformers' own loss on the same windows."""

import gzip
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.reader import Checkpoint
from streamprune.cli import cli
from streamprune.errors import CalibrationError, CheckpointError, Interrupted, NumericsError, SettingsError
from streamprune.model.source import open_source
from streamprune.runtime import evaluate as evaluation
from streamprune.runtime.evaluate import LOGIT_POSITIONS, evaluate
from streamprune.text import documents


def transformers_loss(folder: Path, text: str, length: int) -> float:
    """Mean of the model's own loss over windows that do not overlap."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [float(model(window, labels=window).loss) for window in tiny.windows([ord(c) for c in text], length)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("source", ["llama", "llama-plain", "opt", "opt-bin", "llama-sharded"])
@pytest.mark.parametrize("length", [100, 300])
def test_equals_transformers(source: str, length: int, sources: Callable[[str], Path], held_out: Path) -> None:
    assert LOGIT_POSITIONS < 300  # logits in more than one piece
    folder = sources(source)
    result = evaluate(folder, text=held_out, sequence_length=length, max_tokens=700, dtype="float32")
    loss = transformers_loss(sources(source.removesuffix("-bin")), held_out.read_text()[:700], length)
    assert result.loss == pytest.approx(loss, rel=2e-6)
    assert result.perplexity == math.exp(result.loss)
    assert (result.tokens, result.sequence_length, result.packed) == (700 // length * length, length, False)


def test_bfloat16_is_near(sources: Callable[[str], Path], held_out: Path) -> None:
    full, half = (
        evaluate(sources("llama"), text=held_out, sequence_length=100, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert half.loss != full.loss


@pytest.mark.parametrize("name", ["text.jsonl", "text.JSON.GZ", "text.parquet"])
def test_other_kinds_of_text(name: str, sources: Callable[[str], Path], held_out: Path, tmp_path: Path) -> None:
    parts = [held_out.read_text()[:500], held_out.read_text()[500:900]]
    (tmp_path / "joined.txt").write_text("\n\n".join(parts))
    lines = "".join(json.dumps({"body": part}) + "\n" for part in parts).encode()
    if name.endswith("parquet"):
        datasets.Dataset.from_dict({"body": parts}).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("GZ") else lines)
    expected = evaluate(sources("opt"), text=tmp_path / "joined.txt", sequence_length=100)
    got = evaluate(sources("opt"), text=tmp_path / name, text_column="body", sequence_length=100)
    assert (got.loss, got.tokens) == (expected.loss, expected.tokens)


@pytest.mark.parametrize("name", ["text.txt.gz", "text.jsonl.gz"])
def test_a_long_text_is_read_until_it_gives_enough_tokens(
    name: str, sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is cut off here; without a number of tokens, or with one that it never gives, there is an end too."""
    text = tiny.text(30_000, seed=3)
    lines = "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())
    noise = random.Random(0).randbytes(100_000)
    content = (text if "txt" in name else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content + noise)[:-50_000])
    (tmp_path / "head.txt").write_text(text[:2_000] if "txt" in name else "\n\n".join(text.splitlines())[:2_000])
    for module in (evaluation, documents):
        monkeypatch.setattr(module, "BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr(evaluation, "WHOLE_CHARACTERS", 10_000)
    expected = evaluate(sources("opt"), text=tmp_path / "head.txt", sequence_length=100)
    assert evaluate(sources("opt"), text=tmp_path / name, sequence_length=100, max_tokens=2_000).loss == expected.loss
    with pytest.raises(CalibrationError, match=rf"{name}: more than 10000 characters are there; give --max-tokens"):
        evaluate(sources("opt"), text=tmp_path / name, sequence_length=100)
    monkeypatch.setattr(evaluation, "CHARACTERS_PER_TOKEN", 0)
    with pytest.raises(CalibrationError, match=rf"{name}: more than 10000 characters do not make 20000 tokens"):
        evaluate(sources("opt"), text=tmp_path / name, sequence_length=100, max_tokens=20_000)


def test_scratch_is_used_and_cleaned(sources: Callable[[str], Path], held_out: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    evaluate(sources("opt"), text=held_out, sequence_length=100, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_refusals(sources: Callable[[str], Path], held_out: Path, tmp_path: Path) -> None:
    llama = sources("llama")
    (tmp_path / "short.txt").write_text("x" * 99)
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (CalibrationError, r"short\.txt: 99 tokens are fewer than one window of 100", {"text": tmp_path / "short.txt"}),
        (CalibrationError, "99 tokens are fewer than one window of 100", {"max_tokens": 99}),
        (CalibrationError, r"missing\.txt: no such file", {"text": tmp_path / "missing.txt"}),
        (SettingsError, "sequence_length 1 is not a whole number from 2 to", {"sequence_length": 1}),
        (SettingsError, r"sequence_length 100\.0 is not a whole number", {"sequence_length": 100.0}),
        (SettingsError, "max_tokens 0 is not a whole number from 2 to", {"max_tokens": 0}),
        (SettingsError, "sequence length 321 is beyond the model's 320 positions", {"sequence_length": 321}),
        (SettingsError, "device 'tpu'", {"device": "tpu"}),
    ]
    for kind, message, settings in refused:
        with pytest.raises(kind, match=message):
            evaluate(llama, **{"text": held_out, "sequence_length": 100, **settings})
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        evaluate(tmp_path, text=held_out)
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "nowhere", text=held_out)


def test_an_unfinished_output_is_refused(prune: Callable[..., Any], held_out: Path, tmp_path: Path) -> None:
    last = tmp_path / "out" / ".work" / "block-00001.json"
    with pytest.raises(Interrupted):
        prune("llama", tmp_path / "out", should_stop=last.exists)
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "out", text=held_out, sequence_length=100)


def test_damaged_packed_values_that_are_not_finite(copy_of: Callable[..., Path], held_out: Path) -> None:
    out = copy_of("llama")
    name = "model.layers.1.mlp.up_proj.weight_values"
    tiny.edit_tensor(tiny.shard_of(out, name), name, lambda values: values.view(-1)[3:4].fill_(math.inf))
    with pytest.raises(NumericsError, match=rf"tensor {name} holds NaN or infinity"):
        evaluate(out, text=held_out, sequence_length=100)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("llama-plain", {"model.norm.weight", "lm_head.weight"}),
        ("llama", {"model.norm.weight", "model.embed_tokens.weight"}),
    ],
)
def test_an_embedding_that_no_head_is_tied_to_is_not_loaded(
    name: str, read: set[str], sources: Callable[[str], Path], held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are read one by one for the text's tokens; whole it would be as large as a block."""
    asked: set[str] = set()
    original = Checkpoint.read

    def noted(self: Checkpoint, names: Iterable[str], *rest: Any) -> Any:
        names = list(names)
        asked.update(names)
        return original(self, names, *rest)

    monkeypatch.setattr(Checkpoint, "read", noted)
    evaluate(sources(name), text=held_out, sequence_length=100)
    assert {parameter for parameter in asked if not parameter.startswith("model.layers.")} == read


def test_the_arithmetic_is_that_of_the_blocks(
    sources: Callable[[str], Path], outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """As compress has it, also where the embedding, or the whole outside of the blocks, is stored in another dtype."""
    folder = Path(shutil.copytree(sources("llama"), tmp_path / "model"))
    tensors = {
        name: tensor if name.startswith("model.layers.") else tensor.float()
        for name, tensor in tiny.read_tensors(folder).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [open_source(path).dtype for path in (folder, outputs("llama"))] == [torch.bfloat16] * 2


def test_the_length_of_a_window_is_the_models_where_that_is_short(
    sources: Callable[[str], Path], held_out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = evaluate(sources("llama"), text=held_out)
    assert (result.sequence_length, result.tokens) == (320, 1920)
    assert caplog.messages == ["sequences of 320 tokens: the model has no more positions"]


def with_final_norm(source: Path, factor: float, folder: Path) -> Path:
    """A copy in float32 whose logits are `factor` times as large."""
    shutil.copytree(source, folder)
    tensors = {name: tensor.float() for name, tensor in tiny.read_tensors(source).items()}
    tensors["model.norm.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("scale", "form"), [(1000.0, ".4f"), (1e30, ".1e")])
def test_a_perplexity_beyond_floats(
    scale: float, form: str, sources: Callable[[str], Path], held_out: Path, tmp_path: Path
) -> None:
    """The loss is known; e to its power is not a number that a float holds, nor JSON."""
    folder = with_final_norm(sources("llama"), scale, tmp_path / "model")
    loss = transformers_loss(folder, held_out.read_text(), 100)
    assert loss > 709.79
    arguments = [
        "evaluate",
        str(folder),
        "--text",
        str(held_out),
        "--sequence-length=100",
        "--dtype=float32",
        "--quiet",
    ]
    plain, as_json = (CliRunner().invoke(cli, [*arguments, *flag]) for flag in ([], ["--json"]))
    figures = json.loads(as_json.stdout)
    assert figures["perplexity"] is None
    assert figures["loss"] == pytest.approx(loss, rel=2e-6)
    assert plain.stdout.startswith(
        f"perplexity beyond 1.8e308 (loss {figures['loss']:{form}} nats a token) over 2000 tok"
    )


def test_a_loss_that_is_not_finite(sources: Callable[[str], Path], held_out: Path, tmp_path: Path) -> None:
    folder = with_final_norm(sources("llama"), 1e37, tmp_path / "model")
    for dtype, advice in (("float32", "too large for float32; mend the weights"), ("bfloat16", "try --dtype float32")):
        with pytest.raises(NumericsError, match=rf"model: the loss of window 0 is NaN or infinite: .*{advice}"):
            evaluate(folder, text=held_out, sequence_length=100, dtype=dtype)
