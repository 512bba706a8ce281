"""A job that was stopped, killed or damaged goes on to the bytes of an uninterrupted one, and does no block twice."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from streamprune.errors import Interrupted, JobMismatchError, OutputError
from streamprune.model.skeleton import Block
from streamprune.pipeline import two_passes
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.writing.journal import output_leased
from streamprune.pipeline.writing.lease import holder_file
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]


@pytest.fixture
def pruned_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are pruned while a test runs, in order."""
    blocks: list[int] = []
    original = two_passes.prune_block

    def counted(block: Block, *rest: Any) -> Any:
        blocks.append(block.index)
        return original(block, *rest)

    monkeypatch.setattr(two_passes, "prune_block", counted)
    return blocks


def stop_after(prune: Prune, out: Path, blocks: int, source: str = "llama", **settings: Any) -> None:
    """Interrupt a job at the first safe point after `blocks` blocks are in the journal."""
    last = out / ".work" / f"block-{blocks - 1:05d}.json"
    with pytest.raises(Interrupted, match=rf"out: stopped after {blocks} of 3 blocks; the same command goes on"):
        prune(source, out, should_stop=last.exists, **settings)
    assert last.exists()
    assert not (out / ".work" / f"block-{blocks:05d}.json").exists()


def test_a_resumed_job_asks_for_no_scratch_that_it_holds(
    prune: Prune, outputs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a disk that has room for what is left of the output and no more."""
    settings = {"samples": 200}  # so that the hidden states are larger than the model
    stop_after(prune, tmp_path / "out", 1, **settings)
    held = sum(path.stat().st_size for path in (tmp_path / "out" / ".work").glob("*.bin"))
    assert held > 2 * sum(path.stat().st_size for path in outputs("llama").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, held // 2))
    with pytest.raises(OutputError, match=rf"bytes are needed and {held // 2} are free"):
        prune("llama", tmp_path / "another", **settings)
    prune("llama", tmp_path / "out", **settings)
    monkeypatch.undo()
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama", **settings))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("source", ["llama", "opt-bin"])
def test_stopped_between_blocks(
    source: str, blocks: int, prune: Prune, outputs: Callable[..., Path], pruned_blocks: list[int], tmp_path: Path
) -> None:
    expected = tiny.digests(outputs(source))
    pruned_blocks.clear()
    stop_after(prune, tmp_path / "out", blocks, source)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("streamprune-*")}
    pruned_blocks.clear()
    result = prune(source, tmp_path / "out")
    assert (result.status, result.blocks) == ("finished", 3)
    assert pruned_blocks == list(range(blocks, 3))
    finished = sorted(shards)[:blocks]
    assert {path: path.stat().st_mtime_ns for path in finished} == {path: shards[path] for path in finished}
    assert tiny.digests(tmp_path / "out") == expected


def test_stopped_before_the_first_block(prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        prune("llama", tmp_path / "out", should_stop=lambda: True)
    prune("llama", tmp_path / "out")
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage(path: Path) -> None:
    tiny.flip_byte(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [remove, truncate, damage])
@pytest.mark.parametrize("names", [("hidden",), ("reference",), ("hidden", "reference")], ids="+".join)
def test_torn_hidden_states_are_made_again(
    names: tuple[str, ...],
    harm: Callable[[Path], None],
    prune: Prune,
    outputs: Callable[..., Path],
    pruned_blocks: list[int],
    tmp_path: Path,
) -> None:
    """By replaying the packed blocks, the reference's by the source's: the finished ones are not pruned again."""
    expected = tiny.digests(outputs("llama"))
    stop_after(prune, tmp_path / "out", 2)
    for name in names:
        harm(tmp_path / "out" / ".work" / f"{name}-0.bin")
    pruned_blocks.clear()
    prune("llama", tmp_path / "out")
    assert pruned_blocks == [2]
    assert tiny.digests(tmp_path / "out") == expected


def test_replaying_a_block_kept_dense(prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    budget = {"max_block_error": 0.0, "on_excess": "keep-dense"}
    expected = tiny.digests(outputs("llama", **budget))
    stop_after(prune, tmp_path / "out", 2, **budget)
    remove(tmp_path / "out" / ".work" / "hidden-0.bin")
    remove(tmp_path / "out" / ".work" / "reference-0.bin")
    prune("llama", tmp_path / "out", **budget)
    assert tiny.digests(tmp_path / "out") == expected


@pytest.mark.parametrize("harm", [remove, truncate, damage])
@pytest.mark.parametrize("name", ["streamprune-00002-of-00004.safetensors", ".work/block-00000.safetensors"])
def test_a_damaged_block_and_those_after_it_are_done_again(
    name: str,
    harm: Callable[[Path], None],
    prune: Prune,
    outputs: Callable[..., Path],
    pruned_blocks: list[int],
    tmp_path: Path,
) -> None:
    expected = tiny.digests(outputs("llama"))
    stop_after(prune, tmp_path / "out", 2)
    harm(tmp_path / "out" / name)
    pruned_blocks.clear()
    prune("llama", tmp_path / "out")
    assert pruned_blocks == [0, 1, 2]
    assert tiny.digests(tmp_path / "out") == expected


class PowerCut(BaseException):
    """Not an Exception: nothing in the library may catch it."""


def test_cut_at_every_write(
    prune: Prune, outputs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whichever file is being written when the power goes, the end is the same."""
    settings = {"samples": 1, "shuffle": "none", "refine": False}
    expected = tiny.digests(outputs("opt", **settings))
    original = Path.replace
    remaining = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal remaining
        if remaining == 0:
            raise PowerCut
        remaining -= 1
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for write in itertools.count():
        remaining, out = write, tmp_path / str(write)
        try:
            prune("opt", out, **settings)
            break
        except PowerCut:
            remaining = 1000
        prune("opt", out, **settings)
        assert tiny.digests(out) == expected, f"cut at write {write}"
    # identity, what runs there were; three a block; outer shard, permutations, statistics, index, config; names of the
    # copies, three of them, the card; timings, manifest and its digest
    assert write == 2 + 3 * 3 + 5 + 5 + 3


KILLED_AFTER_TWO_BLOCKS = """
import json, os, signal, sys
from streamprune.pipeline.compress import compress
from streamprune.pipeline.writing.journal import Journal

record = Journal.record

def record_and_die(journal, index, entry):
    record(journal, index, entry)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.record = record_and_die
settings = json.loads(sys.argv[4])
compress(sys.argv[1], sys.argv[2], calibration=sys.argv[3], samples=4, sequence_length=48, dtype="float32",
         **settings)
"""
EVERYTHING = {"shuffle": "residual+assignment", "reconstruct": True, "moments_width": 64, "correction_stride": 3}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"correction": 0.0}], ids=str)
def test_killed_between_two_blocks(
    settings: dict[str, Any],
    prune: Prune,
    sources: Callable[[str], Path],
    outputs: Callable[..., Path],
    calibration: Path,
    pruned_blocks: list[int],
    tmp_path: Path,
) -> None:
    expected = tiny.digests(outputs("llama", **settings))
    command = [sys.executable, "-c", KILLED_AFTER_TWO_BLOCKS, str(sources("llama")), str(tmp_path / "out")]
    killed = subprocess.run([*command, str(calibration), json.dumps(settings)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pruned_blocks.clear()
    prune("llama", tmp_path / "out", **settings)
    assert pruned_blocks == [2]
    assert tiny.digests(tmp_path / "out") == expected


def test_a_finished_job_says_so_and_leaves_nothing_new(
    prune: Prune, copy_of: Callable[..., Path], pruned_blocks: list[int]
) -> None:
    out = copy_of("llama")
    before = {path: (path.stat().st_mtime_ns, tiny.sha256(path)) for path in out.rglob("*")}
    pruned_blocks.clear()
    result = prune("llama", out)
    assert result.status == "already finished"
    assert result.manifest_sha256 == tiny.sha256(out / tiny.MANIFEST)
    assert pruned_blocks == []
    assert {path: (path.stat().st_mtime_ns, tiny.sha256(path)) for path in out.rglob("*")} == before


OTHER_SETTINGS = [
    ("pattern", {"pattern": "4:8"}),
    ("metric", {"metric": "wanda"}),
    ("shuffle", {"shuffle": "none"}),
    ("alpha", {"alpha": 2.0}),
    ("entropy_bins", {"entropy_bins": 99}),
    ("amplitude", {"amplitude": "rms"}),
    ("shuffle_block", {"shuffle": "local", "shuffle_block": 32}),
    ("fold", {"fold": "across-heads"}),
    ("objective", {"objective": "energy"}),
    ("entropy_range", {"entropy_range": "layer"}),
    ("relative", {"relative": True}),
    ("refine", {"refine": False}),
    ("shrinkage", {"shrinkage": 0.25}),
    ("correction", {"correction": 0.5}),
    ("correction_stride", {"correction_stride": 1}),
    ("moments_width", {"moments_width": 64}),
    ("reconstruct", {"reconstruct": True}),
    ("calibration.samples", {"samples": 3}),
    ("calibration.sequence_length", {"sequence_length": 50}),
    ("calibration.seed", {"seed": 1}),
    ("compute.dtype", {"dtype": "bfloat16"}),
]


@pytest.fixture
def source(sources: Callable[[str], Path], tmp_path: Path) -> Path:
    """A source that a test may change."""
    return Path(shutil.copytree(sources("llama"), tmp_path / "source"))


@pytest.fixture(scope="module")
def unfinished(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unfinished") / "out"
    stop_after(prune, out, 1)
    return out


@pytest.fixture(scope="module")
def finished(outputs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(outputs("llama"), tmp_path_factory.mktemp("finished") / "out"))


@pytest.mark.parametrize(("name", "settings"), OTHER_SETTINGS, ids=lambda value: str(value))
def test_other_settings_are_refused_by_name(
    name: str, settings: dict[str, Any], prune: Prune, finished: Path, unfinished: Path
) -> None:
    for out in (unfinished, finished):
        with pytest.raises(JobMismatchError, match=rf"holds a job with other settings .*{name}: .* now") as caught:
            prune("llama", out, **settings)
        assert "--restart" in str(caught.value)


OTHER_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("rms_norm_eps", {"rms_norm_eps": 0.5}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("max_position_embeddings", {"max_position_embeddings": 256}),
    ("pretraining_tp", {"pretraining_tp": 2}),
    ("attention_dropout", {"attention_dropout": 0.5}),
    ("initializer_range", {"initializer_range": 0.5}),
    ("eos_token_id", {"eos_token_id": 2}),
    ("is_causal", {"is_causal": False}),
    ("rope_parameters.rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
    ("rope_parameters.rope_theta", {"rope_parameters": None, "rope_theta": 10.0}),
    ("rope_parameters.factor", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
]


@pytest.mark.parametrize(("name", "changes"), OTHER_CONFIGS, ids=str)
def test_another_config_of_the_same_weights_is_refused_by_name(
    name: str, changes: dict[str, Any], prune: Prune, finished: Path, unfinished: Path, source: Path
) -> None:
    tiny.write_json(source / "config.json", {**tiny.read_json(source / "config.json"), **changes})
    for out in (unfinished, finished):
        with pytest.raises(JobMismatchError, match=rf"source\.config\.{re.escape(name)}: .* there, .* now"):
            prune(source, out)
    checked = verify(finished, source=source)
    assert [fault.split(" is ")[0] for fault in checked.faults if name in fault] == [f"config.json: {name}"]


def test_the_same_config_spelled_otherwise_is_the_same_job(prune: Prune, finished: Path, source: Path) -> None:
    config = tiny.read_json(source / "config.json")
    parameters = config.pop("rope_parameters")
    tiny.write_json(source / "config.json", {**config, "rope_theta": parameters["rope_theta"], "num_labels": 7})
    assert prune(source, finished).status == "already finished"
    assert verify(finished, source=source).ok


def test_another_tokenizer_is_refused(prune: Prune, finished: Path, unfinished: Path, source: Path) -> None:
    path = source / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    for out in (unfinished, finished):
        with pytest.raises(JobMismatchError, match=r"source\.tokenizer\.tokenizer\.json: [0-9a-f]{8}\.\.\. there"):
            prune(source, out)
    assert verify(finished, source=source).faults == ["tokenizer.json: is not the source's"]


def test_another_text_is_refused(prune: Prune, finished: Path, held_out: Path) -> None:
    with pytest.raises(JobMismatchError, match=r"calibration\.tokens: [0-9a-f]{8}\.\.\. there, [0-9a-f]{8}\.\.\. now"):
        prune("llama", finished, calibration=str(held_out))


def test_a_refused_job_changes_nothing(prune: Prune, copy_of: Callable[..., Path], unfinished: Path) -> None:
    for out in (unfinished, copy_of("llama")):
        before = tiny.digests(out)
        with pytest.raises(JobMismatchError):
            prune("llama", out, metric="wanda")
        assert tiny.digests(out) == before


def test_another_source_is_refused(
    prune: Prune, sources: Callable[[str], Path], copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Also one that differs in a single weight: two fine-tunes share their headers."""
    tiny.copy_without_weights(sources("llama"), tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").write_bytes((sources("llama") / "model.safetensors").read_bytes())
    tiny.edit_tensor(
        tmp_path / "tuned" / "model.safetensors",
        "model.layers.1.mlp.up_proj.weight",
        lambda weight: weight[3, 5].add_(1),
    )
    with pytest.raises(JobMismatchError, match=r"source\.fingerprint"):
        prune(tmp_path / "tuned", copy_of("llama"))


def test_every_difference_is_named(prune: Prune, finished: Path) -> None:
    with pytest.raises(JobMismatchError, match=r"settings\.metric: esparse there, wanda now; settings\.pattern: 2:4"):
        prune("llama", finished, metric="wanda", pattern="1:4")


def test_restart_starts_over_and_keeps_foreign_files(
    prune: Prune, outputs: Callable[..., Path], unfinished: Path, copy_of: Callable[..., Path], pruned_blocks: list[int]
) -> None:
    expected = tiny.digests(outputs("llama", pattern="1:4"))
    finished = copy_of("llama")
    for out in (finished, unfinished):
        (out / "notes.txt").write_text("mine")
        (out / "folder").mkdir()
        (out / "folder" / "weights.safetensors").write_text("mine, too")
        pruned_blocks.clear()
        assert prune("llama", out, pattern="1:4", restart=True).status == "finished"
        assert pruned_blocks == [0, 1, 2]
        foreign = {name for name in tiny.digests(out) if name not in expected}
        assert foreign == {"notes.txt", "folder/weights.safetensors"}
        assert {name: tiny.digests(out)[name] for name in expected} == expected


def test_restart_does_not_touch_a_folder_that_is_not_ours(prune: Prune, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="not an output of streamprune"):
        prune("llama", tmp_path / "out", restart=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_a_looser_budget_goes_on(
    prune: Prune, outputs: Callable[..., Path], pruned_blocks: list[int], tmp_path: Path
) -> None:
    """All finished blocks would have ended the same: allowed, and the bytes are those of the new budget's own run."""
    expected = tiny.digests(outputs("llama", max_block_error=9.0, on_excess="warn"))
    stop_after(prune, tmp_path / "out", 2, max_block_error=5.0)
    pruned_blocks.clear()
    prune("llama", tmp_path / "out", max_block_error=9.0, on_excess="warn")
    assert pruned_blocks == [2]
    assert tiny.digests(tmp_path / "out") == expected


def test_a_budget_that_would_have_ended_otherwise_is_refused(
    prune: Prune, outputs: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    stop_after(prune, tmp_path / "out", 1)
    for out in (tmp_path / "out", finished):
        with pytest.raises(
            JobMismatchError, match=r"model\.layers\.0: was pruned .* with these settings it would be kept dense"
        ):
            prune("llama", out, max_block_error=0.0, on_excess="keep-dense")
    prune("llama", tmp_path / "out")
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))


def test_a_folder_in_use_is_refused(prune: Prune, sources: Callable[[str], Path], tmp_path: Path) -> None:
    """While the first works, a second one on the same folder ends at once and disturbs nothing."""
    attempts: list[str] = []

    def try_a_second() -> bool:
        if not attempts:
            with pytest.raises(
                OutputError, match=rf"is in use by process {os.getpid()} on .*; wait for it or stop it"
            ) as caught:
                prune("llama", tmp_path / "out", restart=True)
            attempts.append(str(caught.value))
        return False

    prune("llama", tmp_path / "out", should_stop=try_a_second)
    assert len(attempts) == 1
    assert prune("llama", tmp_path / "out").status == "already finished"


def test_a_lease_that_was_given_back_holds_nothing(prune: Prune, tmp_path: Path) -> None:
    with output_leased(tmp_path / "out") as journal:
        assert tiny.read_json(holder_file(journal.temporary))["process"] == os.getpid()
    assert (tmp_path / "out" / ".work").exists()
    assert prune("llama", tmp_path / "out").status == "finished"
    assert not (tmp_path / "out" / ".work").exists()
