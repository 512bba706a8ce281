"""--no-validate: blocks pruned by their weights alone, without a forward pass."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reader
import pytest
import tiny
import torch
from click.testing import CliRunner

import streamprune
from streamprune.cli import cli
from streamprune.errors import Interrupted, NumericsError, SettingsError
from streamprune.model import blocks
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.inspect import inspect
from streamprune.runtime.verify import verify
from streamprune.text import calibration

Prune = Callable[..., CompressResult]
UNSEEN: dict[str, Any] = {"metric": "magnitude", "shuffle": "none", "validate": False}


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a text read nor a block run."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the text or a block was used")

    monkeypatch.setattr(calibration, "load_tokenizer", refuse)
    monkeypatch.setattr(blocks.RunnableBlock, "run", refuse)
    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("source", ["llama", "opt"])
@pytest.mark.parametrize("shuffle", ["none", "global+local", "assignment"])
def test_kept_weights_are_the_largest(
    source: str, shuffle: str, sources: Callable[[str], Path], prune: Prune, tmp_path: Path
) -> None:
    result = prune(source, tmp_path / "out", **{**UNSEEN, "shuffle": shuffle})
    assert (result.worst_block, result.worst_layers) == (None, ())
    assert verify(tmp_path / "out", source=sources(source)).faults == []
    if shuffle == "none":
        dense, packed = tiny.read_tensors(sources(source)), packed_reader.open_folder(tmp_path / "out")
        name = next(name for name in dense if name.endswith("v_proj.weight"))
        groups = dense[name].float().abs().view(len(dense[name]), -1, 4)
        first = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :2]  # of equal ones the lower channel
        kept = torch.zeros_like(groups).scatter_(2, first, 1).bool().view(dense[name].shape)
        stored = f"{name.removesuffix('weight')}weight_values"
        assert torch.equal(packed[stored].reshape(-1), dense[name][kept])


def test_masks_are_those_of_the_same_method_with_validation(prune: Prune, tmp_path: Path) -> None:
    """With validation magnitude without refinement chooses the same masks: the shards are equal byte for byte."""
    prune("llama", tmp_path / "unseen", **{**UNSEEN, "shuffle": "global+local"})
    prune("llama", tmp_path / "seen", metric="magnitude", shuffle="global+local", refine=False)
    one, other = tiny.digests(tmp_path / "unseen"), tiny.digests(tmp_path / "seen")
    shards = [name for name in one if name.startswith("streamprune-")]
    assert len(shards) == 4
    assert [one[name] for name in shards] == [other[name] for name in shards]


def test_what_is_not_known_is_said(prune: Prune, tmp_path: Path) -> None:
    """In the manifest, by verify and by inspect; nothing stands in for a figure."""
    out = tmp_path / "out"
    prune("llama", out, **UNSEEN)
    manifest = tiny.read_json(out / tiny.MANIFEST)
    assert manifest["identity"]["settings"]["validate"] is False
    assert manifest["identity"]["calibration"] is None
    assert all(block["block_error"] is None for block in manifest["blocks"])
    verification = verify(out)
    assert (verification.ok, verification.validated) == (True, False)
    assert all(row.layer_error is row.kernel_error is row.block_error is None for row in inspect(out).layers)
    shown = CliRunner().invoke(cli, ["verify", str(out), "--quiet"])
    assert "not validated: no text has passed the model" in shown.output
    assert shown.exit_code == 0
    table = CliRunner().invoke(cli, ["inspect", str(out)])
    assert table.exit_code == 0, table.output
    rows = json.loads(CliRunner().invoke(cli, ["inspect", str(out), "--json"]).output)["layers"]
    assert rows[0]["layer_error"] is None


def test_a_validated_output_says_so(outputs: Callable[..., Path]) -> None:
    assert verify(outputs("llama")).validated
    assert "not validated" not in CliRunner().invoke(cli, ["verify", str(outputs("llama")), "--quiet"]).output


def test_it_goes_on_where_it_was_stopped(prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from streamprune.pipeline.writing.journal import Journal

    prune("llama", tmp_path / "whole", **UNSEEN)
    original = Journal.record

    def stop(self: Journal, index: int, entry: dict[str, Any]) -> None:
        original(self, index, entry)
        if index == 1:
            raise Interrupted("stopped")

    monkeypatch.setattr(Journal, "record", stop)
    with pytest.raises(Interrupted):
        prune("llama", tmp_path / "out", **UNSEEN)
    monkeypatch.undo()
    prune("llama", tmp_path / "out", **UNSEEN)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


def test_asked_to_stop_it_keeps_what_is_finished(prune: Prune, tmp_path: Path) -> None:
    last = tmp_path / "out" / ".work" / "block-00001.json"
    with pytest.raises(Interrupted, match="stopped after 2 of 3 blocks; the same command goes on"):
        prune("llama", tmp_path / "out", should_stop=last.exists, **UNSEEN)
    assert len(list((tmp_path / "out" / ".work").glob("block-*.json"))) == 2
    prune("llama", tmp_path / "whole", **UNSEEN)
    prune("llama", tmp_path / "out", **UNSEEN)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


def test_a_fault_leaves_the_blocks_before_it(sources: Callable[[str], Path], prune: Prune, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources("llama-sharded"), tmp_path / "source"))
    name = "model.layers.2.self_attn.v_proj.weight"
    tiny.edit_tensor(tiny.shard_of(source, name), name, lambda tensor: tensor[0].fill_(float("nan")))
    threads = torch.get_num_threads()
    with pytest.raises(NumericsError, match=rf"tensor {name} holds NaN or infinity"):
        prune(source, tmp_path / "out", **UNSEEN)
    assert len(list((tmp_path / "out" / ".work").glob("block-*.json"))) == 2
    assert torch.get_num_threads() == threads
    stages = ("read-ahead", "prune", "write", "sync")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(stages)]


def test_bytes_are_the_same_however_many_blocks_are_under_way(prune: Prune, tmp_path: Path) -> None:
    for prefetch in (0, 1, 3):
        prune("llama", tmp_path / str(prefetch), prefetch=prefetch, **UNSEEN)
    first, *others = (tiny.digests(tmp_path / str(prefetch)) for prefetch in (0, 1, 3))
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"metric": "esparse"}, "metric esparse needs one"),
        ({"metric": "wanda", "refine": True}, "metric wanda, refinement need one"),
        ({"refine": True}, "refinement needs one"),
        ({"reconstruct": True}, "reconstruction needs one"),
        ({"shuffle": "residual"}, "a residual shuffle needs one"),
        ({"max_block_error": 0.5}, "a budget on block errors needs one"),
    ],
    ids=str,
)
def test_what_needs_a_text_is_refused(
    settings: dict[str, Any], needs: str, sources: Callable[[str], Path], prune: Prune, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=needs):
        prune("llama", tmp_path / "out", **{**UNSEEN, **settings})
    with pytest.raises(SettingsError, match=needs):
        streamprune.plan(sources("llama"), **{**UNSEEN, **settings})
    assert not (tmp_path / "out").exists()


def test_no_scratch_and_no_pass_is_planned(sources: Callable[[str], Path]) -> None:
    planned = streamprune.plan(sources("llama"), **UNSEEN)
    assert planned.scratch_bytes == planned.memory.dense_pass == planned.memory.sparse_pass == 0
    assert planned.memory.pruning > 0
