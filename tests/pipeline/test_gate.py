"""The gates after pass 2: a block error above the budget, and a written layer that does not compute what it should."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reader
import pytest
import tiny
import torch

from streamprune.checkpoint import packed
from streamprune.checkpoint.writer import Pieces, Staged
from streamprune.errors import BlockErrorExceeded, KernelFault
from streamprune.pipeline import two_passes
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.two_passes import BlockWork
from streamprune.pipeline.writing import entries
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.inspect import inspect
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
Tensors = dict[str, Any]  # tensors, and some that are made while they are written


def block_errors(out: Path) -> list[float]:
    return [block["block_error"] for block in tiny.read_json(out / tiny.MANIFEST)["blocks"]]


@pytest.fixture
def between(outputs: Callable[..., Path]) -> tuple[float, int]:
    """A budget that some block of the tiny LLaMA keeps and another exceeds, and the first that exceeds it."""
    errors = block_errors(outputs("llama"))
    ordered = sorted(errors)
    budget = (ordered[0] + ordered[1]) / 2
    return budget, next(index for index, error in enumerate(errors) if error > budget)


def test_errors_are_of_what_the_block_adds(outputs: Callable[..., Path]) -> None:
    errors = block_errors(outputs("llama"))
    assert all(0.1 < error < 1.5 for error in errors)
    assert len(set(errors)) == 3


def test_stop_names_the_block(
    prune: Prune, between: tuple[float, int], outputs: Callable[..., Path], tmp_path: Path
) -> None:
    budget, first = between
    with pytest.raises(
        BlockErrorExceeded, match=rf"model\.layers\.{first}: block error .* above --max-block-error"
    ) as stop:
        prune("llama", tmp_path / "out", max_block_error=budget)
    assert stop.value.exit_code == 8
    assert sorted((tmp_path / "out" / ".work").glob("block-*.json")) == [
        tmp_path / "out" / ".work" / f"block-{index:05d}.json" for index in range(first)
    ]
    assert not (tmp_path / "out" / tiny.MANIFEST_DIGEST).exists()
    # raising the budget goes on to the bytes of a run that had it from the start
    prune("llama", tmp_path / "out", max_block_error=5.0)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama", max_block_error=5.0))


def test_warn_says_so_and_prunes_all_the_same(
    prune: Prune,
    between: tuple[float, int],
    outputs: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    budget, first = between
    errors = block_errors(outputs("llama"))
    above = [f"model.layers.{index}" for index, error in enumerate(errors) if error > budget]
    prune("llama", tmp_path / "out", max_block_error=budget, on_excess="warn")
    blocks = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)["blocks"]
    assert [block["name"] for block in blocks if block["outcome"] == "warned"] == above
    assert [message.split(":")[0] for message in caplog.messages] == above
    assert f"model.layers.{first}: warned, block error" in caplog.text
    shards = {
        name: digest for name, digest in tiny.digests(outputs("llama")).items() if name.startswith("streamprune-")
    }
    assert shards.items() <= tiny.digests(tmp_path / "out").items()


def test_keep_dense(
    prune: Prune, between: tuple[float, int], sources: Callable[[str], Path], held_out: Path, tmp_path: Path
) -> None:
    budget, first = between
    out, source = tmp_path / "out", sources("llama")
    result = prune("llama", out, max_block_error=budget, on_excess="keep-dense")
    blocks = tiny.read_json(out / tiny.MANIFEST)["blocks"]
    kept = [block["name"] for block in blocks if block["outcome"] == "kept dense"]
    assert list(result.kept_dense) == kept
    assert kept[0] == f"model.layers.{first}"
    assert 0 < len(kept) < 3
    tensors = tiny.read_tensors(source)
    packed = packed_reader.PackedFolder(out)
    packed.check_against(tensors)
    assert {name.rsplit(".", 2)[0].removesuffix(".self_attn").removesuffix(".mlp") for name in packed.patterns} == {
        block["name"] for block in blocks if block["name"] not in kept
    }
    reasons = {name: reason for name, reason in result.dense_layers.items() if name.startswith(f"{kept[0]}.")}
    assert len(reasons) == 7
    assert all("above the budget" in reason for reason in reasons.values())
    assert inspect(out).dense_layers == result.dense_layers
    assert verify(out, source=source).faults == []
    dense = export(out, out=tmp_path / "dense")
    assert len(dense.in_memory_order) + len(dense.regathered) == 7 * (3 - len(kept))
    figures = [
        evaluate(folder, text=held_out, sequence_length=100, dtype="float32") for folder in (out, tmp_path / "dense")
    ]
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=1e-5)


def test_after_a_block_kept_dense_the_next_sees_dense_outputs(
    prune: Prune, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """With every block kept, every block's figures are those of dense inputs: block 1's are not those after pruning."""
    out = outputs("llama", max_block_error=0.0, on_excess="keep-dense")
    pruned, kept = block_errors(outputs("llama")), block_errors(out)
    assert kept[0] == pruned[0]
    assert kept[1] != pruned[1]
    assert tiny.read_json(out / "config.json")["quantization_config"]["layers"] == {}


def test_hidden_states_after_a_block_kept_dense(
    prune: Prune, sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What enters block 1 is bit for bit what the dense block 0 gave."""
    seen: dict[int, list[torch.Tensor]] = {}
    dense: list[torch.Tensor] = []
    original, original_dense = two_passes._compress_block, two_passes._dense_pass

    def compress_block(work: BlockWork, *rest: Any) -> Any:
        hidden = work.inputs.hidden
        seen[work.block.index] = [hidden.read(sequence) for sequence in range(len(hidden))]
        return original(work, *rest)

    def dense_pass(work: BlockWork, *rest: Any) -> Any:
        result = original_dense(work, *rest)
        if work.block.index == 0:
            dense.extend(work.dense.read(sequence) for sequence in range(len(work.dense)))
        return result

    monkeypatch.setattr(two_passes, "_compress_block", compress_block)
    monkeypatch.setattr(two_passes, "_dense_pass", dense_pass)
    prune("llama", tmp_path / "out", max_block_error=0.0, on_excess="keep-dense")
    assert len(dense) == 4
    assert all(torch.equal(one, other) for one, other in zip(seen[1], dense, strict=True))
    assert not torch.equal(seen[1][0], seen[0][0])


def test_every_block_kept_dense(
    outputs: Callable[..., Path], sources: Callable[[str], Path], held_out: Path, tmp_path: Path
) -> None:
    out = outputs("llama", max_block_error=0.0, on_excess="keep-dense")
    verification = verify(out, source=sources("llama"))
    assert (verification.faults, verification.layers) == ([], [])
    assert inspect(out).layers == []
    export(out, out=tmp_path / "dense")
    tensors = tiny.read_tensors(sources("llama"))
    exported = packed_reader.open_folder(tmp_path / "dense")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
    figures = [
        evaluate(folder, text=held_out, sequence_length=100, dtype="float32") for folder in (out, sources("llama"))
    ]
    assert figures[0].perplexity == figures[1].perplexity


# One packed tensor of block 1 is written with a fault. Each edit is as small as a fault can be.
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def flip_low_bit(values: torch.Tensor) -> None:
    values.view(torch.int16)[5, 7] ^= 1


def flip_sign(values: torch.Tensor) -> None:
    values.view(torch.int16)[0, 0] ^= -0x8000


def swap_mask_bits(mask: torch.Tensor) -> None:
    """In the first group of row 2, drop a kept channel and keep a dropped one."""
    bits = [int(mask[2, 0]) >> bit & 1 for bit in range(4)]
    mask[2, 0] ^= (1 << bits.index(0)) | (1 << bits.index(1))


def swap_places(permutation: torch.Tensor) -> None:
    permutation[[0, 9]] = permutation[[9, 0]]


FAULTS = [
    (DOWN, "weight_values", flip_low_bit),
    (DOWN, "weight_values", flip_sign),
    (DOWN, "weight_mask", swap_mask_bits),
    (QUERY, "weight_values", flip_low_bit),
    (QUERY, "input_permutation", swap_places),
]


def made(tensor: Any) -> torch.Tensor:
    """A tensor that may be one which is made while it is written."""
    return torch.cat(list(tensor.make())) if isinstance(tensor, Pieces) else tensor


@pytest.mark.parametrize(("layer", "part", "edit"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_corrupt_tensor_stops_the_job_before_the_next_block(
    layer: str,
    part: str,
    edit: Callable[[torch.Tensor], None],
    prune: Prune,
    outputs: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = tiny.digests(outputs("llama"))
    original = entries.stage_safetensors
    written: list[str] = []

    def corrupt(path: Path, tensors: Tensors, *rest: Any) -> Staged:
        written.append(path.name)
        if f"{layer}.{part}" in tensors:
            tensors = {**tensors, f"{layer}.{part}": made(tensors[f"{layer}.{part}"])}
            edit(tensors[f"{layer}.{part}"])
        return original(path, tensors, *rest)

    monkeypatch.setattr(entries, "stage_safetensors", corrupt)
    with pytest.raises(KernelFault, match=rf"{layer}: kernel_error \S+ is beyond") as fault:
        prune("llama", tmp_path / "out")
    assert fault.value.exit_code == 7
    assert [name for name in written if name.startswith("streamprune-")] == [
        f"streamprune-0000{i}-of-00004.safetensors" for i in (2, 3)
    ]
    assert [path.name for path in sorted((tmp_path / "out" / ".work").glob("block-*.json"))] == ["block-00000.json"]
    monkeypatch.undo()
    prune("llama", tmp_path / "out")
    assert tiny.digests(tmp_path / "out") == expected


def test_one_low_bit_of_one_weight_is_stopped(prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the smallest weight: no product on a sample sees it; the comparison of the bits does."""
    layer, original = "model.layers.0.mlp.down_proj", entries.stage_safetensors

    def flip(path: Path, tensors: Tensors, *rest: Any) -> Staged:
        name = f"{layer}.weight_values"
        if name in tensors:
            values = made(tensors[name])
            values.view(torch.int16).view(-1)[values.abs().view(-1).argmin()] ^= 1
            tensors = {**tensors, name: values}
        return original(path, tensors, *rest)

    monkeypatch.setattr(entries, "stage_safetensors", flip)
    with pytest.raises(KernelFault, match=rf"^{layer}\.weight_values: came back from disk changed"):
        prune("llama", tmp_path / "out")
    assert list((tmp_path / "out" / ".work").glob("block-*.json")) == []


def test_a_packer_that_is_wrong_is_stopped_too(prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reference never went through pack and unpack, so an error of the packer itself is seen."""
    original = packed.pack_values
    monkeypatch.setattr(packed, "pack_values", lambda weight, keep: original(weight, keep).flip(1))
    with pytest.raises(KernelFault, match=r"^model\.layers\.0\.self_attn\.\w_proj: kernel_error"):
        prune("llama", tmp_path / "out")
    assert list((tmp_path / "out" / ".work").glob("block-*.json")) == []


def test_journal_entries_hold_only_plain_data(prune: Prune, tmp_path: Path) -> None:
    """They are read back by a later process: strict JSON, without NaN."""
    entry = tmp_path / "out" / ".work" / "block-00001.json"
    texts: list[str] = []

    def look() -> bool:
        if entry.exists() and not texts:
            texts.append(entry.read_text())
        return False

    prune("llama", tmp_path / "out", should_stop=look)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    loaded = json.loads(texts[0], parse_constant=refuse)["value"]["record"]
    assert loaded["name"] == "model.layers.1"
    assert len(loaded["layers"]) == 7
