"""`generate`: what is said, when it ends, what is refused, and what the command prints where."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import run
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from streamprune.checkpoint.spans import aligned_memory
from streamprune.errors import CalibrationError, CheckpointError, NumericsError, SettingsError
from streamprune.model import residency
from streamprune.model.arithmetic import resolve_arithmetic
from streamprune.model.residency import stored_blocks
from streamprune.model.source import open_source
from streamprune.runtime import generate as generation
from streamprune.runtime.generate import generate, placement
from streamprune.text.tokenizers import TextFollower, prompt_ids, text_after

PROMPT = "The quick brown fox"


def said(folder: Path, prompt: str | list[str] = PROMPT, **settings: Any) -> list[list[int]]:
    return generate(folder, prompt=prompt, **{"max_new_tokens": 12, "dtype": "float32", **settings}).tokens


def test_the_text_comes_in_pieces_that_make_up_the_whole(sources: Callable[[str], Path]) -> None:
    pieces: list[str] = []
    result = generate(sources("llama"), prompt=PROMPT, max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == result.texts[0]
    assert len(pieces) > 6
    characters = [chr(token) if token < 127 else "[UNK]" for token in result.tokens[0]]
    assert result.texts == ["".join(f" {character}" for character in characters)]  # as the tiny tokenizer writes them
    assert (result.prompts, result.ended, len(result.tokens[0])) == ([PROMPT], [False], 12)
    assert result.tokens_per_second is not None
    assert generate(sources("llama"), prompt=PROMPT, max_new_tokens=1).tokens_per_second is None


def test_characters_of_several_tokens_are_told_whole() -> None:
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    before, text = prompt_ids(tokenizer, "Zürich: "), "größer 漢字\nend ü"
    ids, pieces = prompt_ids(tokenizer, text), list[str]()
    follower = TextFollower(tokenizer, before, pieces.append)
    for token in ids[:-1]:
        follower.put([token])
    assert pieces == [*text[:-1]]
    follower.end()  # in the middle of a character
    assert pieces[-1] == "\ufffd"
    assert text_after(tokenizer, before, ids) == text


def test_drawn_tokens_depend_on_the_seed_alone(sources: Callable[[str], Path]) -> None:
    folder = sources("llama")
    first, again, other = (said(folder, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    greedy = said(folder)
    assert greedy not in (first, other)
    assert said(folder, temperature=1.5, top_p=0) == said(folder, temperature=0.01) == greedy


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_a_text_ends_by_itself(where: str, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """At the first token that either file names; others of the same call go on."""
    folder = Path(shutil.copytree(sources("llama"), tmp_path / "model"))
    prompts = [PROMPT, "jumps"]
    whole = said(folder, prompts)
    end = next(token for token in whole[0] if token not in whole[1])
    (folder / "generation_config.json").unlink()
    values = tiny.read_json(folder / where) if where == "config.json" else {"temperature": 9.0, "do_sample": True}
    tiny.write_json(folder / where, {**values, "eos_token_id": end if where == "config.json" else [999, end]})
    result = generate(folder, prompt=prompts, max_new_tokens=12, dtype="float32")
    assert result.tokens == [whole[0][: whole[0].index(end) + 1], whole[1]]
    assert result.ended == [True, False]
    assert said(folder) == result.tokens[:1]
    tiny.write_json(folder / "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(CheckpointError, match=r"eos_token_id is \['</s>'\], no numbers of tokens"):
        said(folder)


def test_prompts_of_a_file(sources: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("jumps\nover the lazy dog\n")
    found = generate(sources("llama"), prompt=PROMPT, prompt_file=tmp_path / "prompts.txt", max_new_tokens=2)
    assert found.prompts == [PROMPT, "jumps", "over the lazy dog"]


def test_refusals(sources: Callable[[str], Path], tmp_path: Path) -> None:
    llama = sources("llama")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SettingsError, "no prompt; give --prompt", {"prompt": []}),
        (SettingsError, "no prompt; give --prompt", {"prompt": [], "prompt_file": tmp_path / "empty.txt"}),
        (SettingsError, "prompt 1 is empty", {"prompt": ""}),
        (SettingsError, "prompt 3 is empty", {"prompt_file": tmp_path / "blank.txt"}),
        (CalibrationError, r"nowhere\.txt: no such file", {"prompt_file": tmp_path / "nowhere.txt"}),
        (CalibrationError, r"latin\.txt: is no text in UTF-8", {"prompt_file": tmp_path / "latin.txt"}),
        (SettingsError, "prompt 2 has 315 tokens, which with 12 new ones", {"prompt": ["a", "x" * 315]}),
        (SettingsError, "beyond the model's 320 positions", {"max_new_tokens": 302}),
        (SettingsError, r"need about \d\.\d\d GiB of memory, the limit is 0\.00 GiB; raise --max-memory",
         {"max_memory": "1MB"}),
    ]  # fmt: skip
    for kind, message, settings in refused:
        with pytest.raises(kind, match=message):
            generate(llama, **{"prompt": PROMPT, "max_new_tokens": 12, **settings})
    without = Path(shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "special*")))
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        said(without)


def test_the_least_memory_is_what_the_message_says(
    sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "held_bytes", lambda: 2**30)
    with pytest.raises(SettingsError) as caught:
        said(sources("llama"), max_memory="1GiB")
    least = float(str(caught.value).partition("about ")[2].split()[0])
    assert 1.04 <= least <= 1.07  # 50 MB for the libraries, less than 20 for what a tiny model does
    result = generate(sources("llama"), prompt=PROMPT, max_new_tokens=2, max_memory=f"{least + 0.01}GiB")
    assert result.resident_blocks == 3


@pytest.mark.parametrize("resident", [True, False])
def test_no_weights_stay_behind(resident: bool, outputs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until garbage is collected: the next call counts what the process has."""
    monkeypatch.setattr(generation, "place_blocks", lambda blocks, _: ([resident] * 3, 2 * (not resident)))
    made: list[weakref.ref[Any]] = []

    def noted(size_bytes: int) -> torch.Tensor:
        array = aligned_memory(size_bytes).numpy()
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(residency, "aligned_memory", noted)
    gc.disable()
    try:
        said(outputs("llama"))
        assert [reference() is None for reference in made] == [True] * (3 if resident else 2)
    finally:
        gc.enable()


def test_memory_beside_a_gpu(sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """There blocks stay in its memory; the host's holds those that are read, beside what the process has."""
    source = open_source(sources("llama"))
    blocks = stored_blocks(source, resolve_arithmetic("cpu", "bfloat16", source.dtype))
    size = max(block.layout.size_bytes for block in blocks)
    monkeypatch.setattr(generation, "held_bytes", lambda: 0)
    monkeypatch.setattr(generation, "LATER_BYTES", 10)
    monkeypatch.setattr(generation, "default_limit", lambda on_gpu: 100 + (3 if on_gpu else 2) * size)
    assert placement(blocks, 100, (None, None), on_gpu=True) == ([True] * 3, 0, None)
    assert placement(blocks, 100, (10 + 2 * size, 100 + 2 * size), on_gpu=True) == ([False] * 3, 2, None)
    assert placement(blocks, 90, (None, None)) == ([False] * 3, 2, None)
    refused = {(9 + 2 * size, 100 + 2 * size): "of memory, .* raise --max-memory$",
               (None, 99 + size): "of GPU memory, .* raise --max-device-memory$"}  # fmt: skip
    for limits, message in refused.items():
        with pytest.raises(SettingsError, match=message):
            placement(blocks, 100, limits, on_gpu=True)


def test_logits_that_are_not_finite(sources: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources("llama"), tmp_path / "model"))
    tensors = {name: tensor.float() for name, tensor in tiny.read_tensors(folder).items()}
    tensors["model.norm.weight"] *= 1e37
    tensors["model.embed_tokens.weight"] *= 100  # the head's, too
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype, advice in (("float32", "mend the weights"), ("bfloat16", "try --dtype float32")):
        with pytest.raises(NumericsError, match=rf"logits of new token 1 are NaN or infinite; {advice}"):
            said(folder, dtype=dtype)


def test_what_the_command_prints(outputs: Callable[..., Path]) -> None:
    """The text alone on standard output, figures on the other one; several texts after their prompts; or JSON."""
    command = ["generate", outputs("llama"), "--max-new-tokens", 6, "--dtype", "float32", "--prompt", PROMPT]
    expected = generate(outputs("llama"), prompt=[PROMPT, "jumps"], max_new_tokens=6, dtype="float32")
    one, quiet, two, as_json = (
        run(*command, *more) for more in ([], ["--quiet"], ["--prompt", "jumps"], ["--json", "--quiet"])
    )
    texts = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in expected.texts]
    assert one.stdout == quiet.stdout == f"{texts[0]}\n"
    assert quiet.stderr == ""
    assert one.stderr.startswith("6 tokens: the first after ")
    assert "tokens/s; 3 of 3 blocks in memory, peak memory " in one.stderr
    assert two.stdout == f"{PROMPT}{texts[0]}\n\njumps{texts[1]}\n\n"
    found = json.loads(as_json.stdout)
    assert (found["texts"], found["tokens"]) == (expected.texts[:1], expected.tokens[:1])
    assert (found["blocks"], found["resident_blocks"], found["pass_bytes"], found["packed"]) == (3, 3, 0, True)
    assert (found["ceiling_tokens_per_second"], found["dtype"]) == (None, "float32")
    assert math.isfinite(found["tokens_per_second"])
    assert as_json.stderr == ""


def test_figures_of_streamed_blocks(outputs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "place_blocks", lambda blocks, _: ([False, True, False], 2))
    result = run("generate", outputs("llama"), "--max-new-tokens", 6, "--prompt", PROMPT)
    assert result.exit_code == 0
    assert "1 of 3 blocks in memory" in result.stderr
    assert " KiB read for each pass; the disk's " in result.stderr
    assert result.stderr.endswith(" tokens/s\n")


def started(folder: Path, stdout: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "streamprune", "generate", str(folder), "--prompt", "a", "--max-new-tokens", "319"]
    return subprocess.Popen([*command, "--quiet"], stdout=stdout, stderr=subprocess.PIPE)


def test_ctrl_c_and_a_reader_that_has_gone(outputs: Callable[..., Path]) -> None:
    """Real processes: the first token has come when the one gets its signal, and the other one's reader goes."""
    interrupted = started(outputs("llama"), subprocess.PIPE)
    assert interrupted.stdout is not None
    assert interrupted.stdout.read(1) == b" "
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=60)
    assert (interrupted.returncode, stderr) == (130, b"streamprune: interrupted\n")
    reading, writing = os.pipe()
    left = started(outputs("llama"), writing)
    os.close(writing)
    assert os.read(reading, 1) == b" "
    os.close(reading)
    assert (left.wait(timeout=60), left.communicate()[1]) == (1, b"")
