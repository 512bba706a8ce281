"""`plan` and --max-memory: what is foretold from headers, and what a limit on memory changes or refuses."""

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import streamprune
from streamprune.checkpoint.reader import Checkpoint, open_checkpoint
from streamprune.config import PruneConfig, parse_bytes
from streamprune.errors import CheckpointError, NumericsError, SettingsError
from streamprune.model.source import open_dense
from streamprune.pipeline.compress import CompressResult
from streamprune.pipeline.planning import memory
from streamprune.pipeline.planning.plan import plan_layers
from streamprune.text.tokenizers import fitting_length

Sources = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("12GiB", 12 * 2**30),
        ("900 MB", 900_000_000),
        ("1.5k", 1500),
        ("2e9", 2_000_000_000),
        ("0.5tib", 2**39),
        (" 7 kib ", 7 * 1024),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.2.3", "nan", "inf", "12 apples", "1e999", "0", "1e19", 7])
def test_parse_bytes_refuses(text: Any) -> None:
    with pytest.raises(SettingsError, match=r"is not a number of bytes \(1 to 2\^63\); write for example 12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("source", "pattern"), [("llama", "2:4"), ("opt-bin", "2:4"), ("llama", "3:5")])
def test_plan_foretells_the_job(
    source: str, pattern: str, sources: Sources, prune: Callable[..., CompressResult], tmp_path: Path
) -> None:
    foretold = streamprune.plan(sources(source), pattern=pattern, **tiny.CALIBRATION)
    done = prune(source, tmp_path / "out", pattern=pattern)
    manifest = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)
    assert foretold.blocks == done.blocks
    assert foretold.layers == sum(len(block["layers"]) for block in manifest["blocks"])
    assert foretold.dense_layers == done.dense_layers
    assert foretold.written_bytes == done.source_bytes - done.dense_bytes + done.packed_bytes
    assert foretold.read_bytes == done.source_bytes + foretold.written_bytes
    assert foretold.seconds > 0
    assert "this machine" in foretold.assumption


@pytest.mark.parametrize(
    ("source", "pattern", "dense"),
    [("llama", "2:4", 0), ("opt-bin", "2:4", 0), ("llama", "3:5", 3 * 2 * (12288 + 2 * 10240)), ("qwen2", "2:4", 0)],
)
def test_every_byte_of_the_source_is_pruned_copied_or_left_dense(
    source: str, pattern: str, dense: int, sources: Sources
) -> None:
    foretold = streamprune.plan(sources(source), pattern=pattern)
    tensors = open_checkpoint(sources(source)).tensors
    parts = foretold.pruned_bytes, foretold.dense_bytes, foretold.copied_bytes
    assert foretold.dense_bytes == dense  # of q, k, v, o and gate, up
    assert sum(parts) == sum(tensor.size_bytes for tensor in tensors.values())
    assert foretold.weights.keys() == tensors.keys()
    by_fate = {start: sum(tensors[name].size_bytes for name, fate in foretold.weights.items() if fate.startswith(start))
               for start in ("pruned", "left dense: ", "copied")}  # fmt: skip
    assert tuple(by_fate.values()) == parts
    assert foretold.coverage == 1.0  # another pattern prunes them


def test_plan_reads_no_tensor(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read_unchecked", refuse)
    streamprune.plan(sources("llama"))


def test_plan_of_a_packed_folder_is_refused(outputs: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="already an output"):
        streamprune.plan(outputs("llama"))


def test_memory_follows_what_the_settings_hold(sources: Sources) -> None:
    def stages(**settings: Any) -> Any:
        return streamprune.plan(sources("llama"), **tiny.CALIBRATION, micro_batch=1, **settings).memory

    everything, plain = stages(), stages(refine=False, metric="wanda", shuffle="none")
    assert everything.dense_pass > stages(correction=0.0).dense_pass > stages(refine=False).dense_pass
    counts = (3 * 64 + 160) * 4 * (4096 + 80)
    assert stages(refine=False).dense_pass - plain.dense_pass == pytest.approx(memory.HEAP_SLACK * counts, abs=2)
    assert everything.dense_pass > stages(moments_width=64).dense_pass
    assert everything.embeddings == plain.embeddings
    longer = streamprune.plan(sources("llama"), samples=40, sequence_length=128).memory
    assert longer == streamprune.plan(sources("llama"), samples=4000, sequence_length=128).memory
    assert longer.dense_pass > everything.dense_pass


def test_a_limit_cuts_second_moments_and_no_more_than_needed(
    sources: Sources, prune: Callable[..., CompressResult], caplog: pytest.LogCaptureFixture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory, "LIBRARIES_BYTES", 0)
    monkeypatch.setattr(memory, "MIN_MOMENTS_WIDTH", 64)

    def needed(width: int) -> int:
        return streamprune.plan(
            sources("llama"), **tiny.CALIBRATION, micro_batch=1, moments_width=width
        ).peak_memory_bytes

    monkeypatch.setattr(memory.Memory, "peak", property(lambda self: self.dense_pass))
    assert needed(64) < needed(128) < needed(256)
    for limit, width in ((needed(256), 16384), (needed(256) - 1, 128), (needed(64), 64)):
        found = streamprune.plan(sources("llama"), **tiny.CALIBRATION, max_memory=str(limit))
        assert found.moments_width == width
        assert found.peak_memory_bytes <= limit
    prune("llama", tmp_path / "out", max_memory=str(needed(128)))
    settings = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)["identity"]["settings"]
    assert settings["moments_width"] == 128
    assert "second moments in blocks of at most 128 channels" in caplog.text
    with pytest.raises(SettingsError, match=r"needs about .* GiB of memory, the limit is .*--no-refine"):
        prune("llama", tmp_path / "refused", max_memory=str(needed(64) - 1))
    assert not (tmp_path / "refused").exists()


def test_a_limit_without_second_moments_is_kept_or_refused(sources: Sources) -> None:
    settings: dict[str, Any] = {"metric": "wanda", "shuffle": "none", "refine": False, "micro_batch": 1}
    free = streamprune.plan(sources("opt"), **settings)
    needed = free.peak_memory_bytes - free.memory.read_ahead
    assert streamprune.plan(sources("opt"), max_memory=str(needed), **settings).peak_memory_bytes == needed
    with pytest.raises(SettingsError, match="raise --max-memory; streamprune plan shows"):
        streamprune.plan(sources("opt"), max_memory=str(needed - 1), **settings)


def test_without_room_for_the_next_block_it_is_not_read_ahead_and_the_bytes_are_the_same(
    sources: Sources, outputs: Callable[..., Path], prune: Callable[..., CompressResult], tmp_path: Path
) -> None:
    foretold = streamprune.plan(sources("llama"), **tiny.CALIBRATION)
    assert foretold.micro_batch == tiny.CALIBRATION["samples"]  # short sequences go together
    slower = streamprune.plan(sources("llama"), **tiny.CALIBRATION, max_memory=str(foretold.peak_memory_bytes - 1))
    assert (slower.micro_batch, slower.memory.blocks_ahead) == (1, 1)
    assert slower.memory.read_ahead > 0
    limit = str(slower.peak_memory_bytes - 1)
    tight = streamprune.plan(sources("llama"), **tiny.CALIBRATION, max_memory=limit)
    assert (tight.micro_batch, tight.memory.blocks_ahead, tight.memory.read_ahead) == (1, 0, 0)
    assert tight.peak_memory_bytes == slower.peak_memory_bytes - slower.memory.read_ahead
    prune("llama", tmp_path / "out", max_memory=limit)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))


def test_on_a_gpu_the_stages_of_a_block_lie_there(sources: Sources) -> None:
    """What each limit is held against; the arithmetic of it needs no GPU."""
    source, config = open_dense(sources("llama")), PruneConfig()
    layers, _ = plan_layers(source, config.pattern)
    shapes = [{name: layer.shape for name, layer in block.items()} for block in layers]
    pace = memory.Pace(4, 1)
    host, gpu = (memory.Sizes(source, shapes, 48, torch.float32, on_gpu=on_gpu) for on_gpu in (False, True))
    here, there = (memory.estimate_memory(sizes, config, pace) for sizes in (host, gpu))
    assert (here.device_peak, there.device_peak) == (0, here.of_block)
    assert there.peak == there.libraries + max(there.embeddings, there.on_its_way + there.read_ahead)
    assert here.peak == here.libraries + max(here.embeddings, here.of_block + here.read_ahead)
    assert there.on_its_way > there.read_ahead > here.read_ahead, "page-locked pieces are powers of two"
    assert here.on_its_way == 0
    weights = sum(math.prod(shape) for shape in shapes[0].values())
    largest = max(math.prod(shape) for shape in shapes[0].values())
    metadata = (weights + 2 * largest) / 8  # a bit for each, also where the largest layer is copied
    assert there.sparse_pass - here.sparse_pass == pytest.approx(memory.HEAP_SLACK * metadata, abs=4)
    enough = memory.Limits(there.peak, there.device_peak)
    assert memory.fit_memory(gpu, config, pace, enough) == (config, pace)
    slower = memory.fit_memory(gpu, config, pace, memory.Limits(device=there.device_peak - 1))
    assert slower == (config, memory.Pace(1, 1))
    with pytest.raises(SettingsError, match=r"GiB of GPU memory, .* raise --max-device-memory, shorten"):
        memory.fit_memory(gpu, config, pace, memory.Limits(device=1000))


def test_no_more_is_read_ahead_than_there_is(sources: Sources) -> None:
    assert streamprune.plan(sources("llama"), prefetch=1000).memory.blocks_ahead == 3


@pytest.mark.parametrize(("asked", "length"), [(None, 320), (320, 320), (48, 48)])
def test_the_length_of_sequences(
    asked: int | None, length: int, sources: Sources, prune: Callable[..., CompressResult], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """2048 tokens, or the model's positions where they are fewer; the identity holds what was used."""
    foretold = streamprune.plan(sources("llama"), sequence_length=asked)
    assert (foretold.samples, foretold.sequence_length) == (128, length)
    said = ["sequences of 320 tokens: the model has no more positions"] if asked is None else []
    assert caplog.messages == said
    prune("llama", tmp_path / "out", sequence_length=asked)
    assert caplog.messages == said * 2
    identity = tiny.read_json(tmp_path / "out" / tiny.MANIFEST)["identity"]
    assert identity["calibration"]["sequence_length"] == length
    assert prune("llama", tmp_path / "out", sequence_length=length).status == "already finished"


@pytest.mark.parametrize(
    ("asked", "positions", "length"),
    [(None, None, 2048), (None, 2048, 2048), (None, 4096, 2048), (None, 320, 320), (4096, None, 4096), (2, 2, 2)],
)
def test_lengths_that_fit(asked: int | None, positions: int | None, length: int) -> None:
    assert fitting_length(asked, positions) == length


@pytest.mark.parametrize(("asked", "positions"), [(321, 320), (None, 1)])
def test_lengths_that_do_not(asked: int | None, positions: int) -> None:
    with pytest.raises(SettingsError, match=rf"sequence length {asked or 2} is beyond the model's {positions} pos"):
        fitting_length(asked, positions)


@pytest.mark.parametrize("length", [None, 321, 10**6])
def test_without_a_text_no_length_matters(
    length: int | None, sources: Sources, prune: Callable[..., CompressResult], outputs: Callable[..., Path],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    unseen: dict[str, Any] = {"metric": "magnitude", "shuffle": "none", "validate": False}
    foretold = streamprune.plan(sources("llama"), sequence_length=length, **unseen)
    assert (foretold.samples, foretold.sequence_length, foretold.scratch_bytes) == (0, 0, 0)
    assert foretold.memory.embeddings == 0
    prune("llama", tmp_path / "out", sequence_length=length, **unseen)
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama", **unseen))
    assert caplog.messages == []


def test_what_a_job_refuses_from_headers_its_plan_refuses_too(sources: Sources) -> None:
    with pytest.raises(SettingsError, match="sequence length 321 is beyond the model's 320 positions"):
        streamprune.plan(sources("llama"), sequence_length=321)


def test_reading_ahead_ends_with_the_job(
    sources: Sources, prune: Callable[..., CompressResult], tmp_path: Path
) -> None:
    """A fault in block 2 shows when block 2 is reached; until then the blocks before it are finished and kept."""
    source = Path(shutil.copytree(sources("llama-sharded"), tmp_path / "source"))
    name = "model.layers.2.self_attn.v_proj.weight"
    tiny.edit_tensor(tiny.shard_of(source, name), name, lambda tensor: tensor[0].fill_(float("nan")))
    with pytest.raises(NumericsError, match=rf"tensor {name} holds NaN or infinity"):
        prune(source, tmp_path / "out")
    assert len(list((tmp_path / "out" / ".work").glob("block-*.json"))) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
