"""Mixtures of experts: each expert is pruned by the tokens routed to it, one at a time, and no byte depends on how.

Expected values come from transformers' own model, whose experts lie in 3-D parameters.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from streamprune.errors import Interrupted, SettingsError
from streamprune.model import expert_streaming
from streamprune.model.blocks import RunnableBlock, load_block
from streamprune.model.expert_streaming import ExpertStage, advance_by_parts
from streamprune.model.source import open_dense
from streamprune.pipeline import expert_pruning
from streamprune.pipeline.compress import CompressResult
from streamprune.pruning.statistics import StatisticsAccumulator
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.verify import verify
from streamprune.text.calibration import Calibration, calibration_tokens

Prune = Callable[..., CompressResult]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BLOCK, LAYERS = "model.layers.{}.mlp.experts", ("w1", "w3", "w2")
SEEN = {"metric": "wanda", "refine": False, "min_expert_tokens": 1}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**families.GROUPED, **EXPERTS))
    tiny.randomise(model)
    return tiny.write_model(tmp_path_factory.mktemp("mixtral") / "source", model, torch.float32)


@pytest.fixture(scope="module")
def tokens(mixtral: Path, calibration: Path) -> torch.Tensor:
    settings = {name: value for name, value in tiny.CALIBRATION.items() if name != "dtype"}
    return calibration_tokens(mixtral, Calibration(str(calibration), **settings))


@pytest.fixture(scope="module")
def routed(mixtral: Path, tokens: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Of each of transformers' experts modules: rows of all tokens, experts and weights of each."""
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.inference_mode():
        model(tokens)
    return seen


def inputs_of_layers(source: Path, expert: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What block 0's layers of an expert are given, where it is given rows [n, hidden]."""
    weights = tiny.read_tensors(source)
    gate, up = (rows @ weights[f"model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight"].T for w in ("w1", "w3"))
    return {"w1": rows, "w3": rows, "w2": torch.nn.functional.silu(gate) * up}


def input_rms(out: Path, expert: int, layer: str) -> torch.Tensor:
    return load_file(out / tiny.STATISTICS)[f"{BLOCK.format(0)}.{expert}.{layer}.input_rms"]


@pytest.mark.parametrize("expert", range(4))
def test_statistics_are_of_the_tokens_routed_to_an_expert(
    expert: int, mixtral: Path, prune: Prune, routed: list[Any], tmp_path: Path
) -> None:
    prune(mixtral, tmp_path / "out", **SEEN)
    rows, index, _ = routed[0]
    for layer, x in inputs_of_layers(mixtral, expert, rows[(index == expert).any(dim=1)]).items():
        found = input_rms(tmp_path / "out", expert, layer)
        torch.testing.assert_close(found, x.square().mean(dim=0).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [2, 1])
def test_starved_experts_pool_inputs(step: int, mixtral: Path, prune: Prune, routed: list[Any], tmp_path: Path) -> None:
    """Their own tokens, and every second one, as two experts of four take each; all where the text has too few."""
    rows, index, _ = routed[0]
    counts = [int((index == expert).sum()) for expert in range(4)]
    fewest = counts.index(min(counts))
    least = min(counts) + 1 if step == 2 else 10**6
    result = prune(mixtral, tmp_path / "out", **{**SEEN, "min_expert_tokens": least})
    assert {name: seen for name, seen in result.starved.items() if name.startswith(BLOCK.format(0))} == {
        f"{BLOCK.format(0)}.{expert}": seen for expert, seen in enumerate(counts) if seen < least
    }
    observed = (index == fewest).any(dim=1)
    observed[::step] = True
    for layer, x in inputs_of_layers(mixtral, fewest, rows[observed]).items():
        found = input_rms(tmp_path / "out", fewest, layer)
        torch.testing.assert_close(found, x.square().mean(dim=0).sqrt(), rtol=1e-4, atol=1e-6)


def test_starved_experts_by_magnitude(mixtral: Path, prune: Prune, tmp_path: Path) -> None:
    """Their masks are those of a job by magnitude; other layers are pruned as asked for."""
    prune(mixtral, tmp_path / "out", starved="magnitude", min_expert_tokens=10**6)
    prune(mixtral, tmp_path / "alone", metric="magnitude", validate=False)
    ours, alone = (tiny.read_tensors(folder) for folder in (tmp_path / "out", tmp_path / "alone"))
    assert {name for name in ours if "experts" in name} == {name for name in alone if "experts" in name}
    assert all(torch.equal(tensor, alone[name]) for name, tensor in ours.items() if "experts" in name)
    mask = "model.layers.0.self_attn.q_proj.weight_mask"
    assert not torch.equal(ours[mask], alone[mask])
    assert verify(tmp_path / "out", source=mixtral).faults == []


def test_starved_experts_stay_dense(mixtral: Path, prune: Prune, routed: list[Any], tmp_path: Path) -> None:
    counts = [int((routed[0][1] == expert).sum()) for expert in range(4)]
    fewest = counts.index(min(counts))
    least = min(counts) + 1
    result = prune(mixtral, tmp_path / "out", starved="dense", min_expert_tokens=least)
    reason = f"its expert saw {min(counts)} tokens, fewer than {least}"
    dense = {f"{BLOCK.format(0)}.{fewest}.{layer}": reason for layer in LAYERS}
    assert dense.items() <= result.dense_layers.items()
    ours, source = tiny.read_tensors(tmp_path / "out"), tiny.read_tensors(mixtral)
    for layer in LAYERS:
        theirs = source[f"model.layers.0.block_sparse_moe.experts.{fewest}.{layer}.weight"]
        assert torch.equal(ours[f"{BLOCK.format(0)}.{fewest}.{layer}.weight"], theirs)
    assert verify(tmp_path / "out", source=mixtral).faults == []


def test_correction_compares_the_same_tokens(
    mixtral: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind pruned and behind dense blocks an expert takes different tokens: compared are those that it takes in both.

    The cross moments of an expert's inputs in block 1 are those of rows picked by token from the two streams.
    """
    expected, found = {}, {}
    prune_one, result = expert_pruning._ExpertWork.prune, StatisticsAccumulator.result

    def spied(work: Any, tensors: Any, digests: Any) -> Any:
        if work.part.index == 1:
            hidden, reference = work.streams
            cross, compared, differing = torch.zeros(32, 32), 0, 0
            for sequence in range(0, hidden.sequences, 2):
                sides = [s.rows_of(n, work.number)[0] for s, n in ((hidden, sequence), (reference, sequence // 2))]
                both = sides[0][torch.isin(sides[0], sides[1])]
                x, dense = hidden.inputs(sequence, both), reference.inputs(sequence // 2, both)
                cross += (dense - x).T @ x
                compared, differing = compared + len(both), differing + len(sides[0]) + len(sides[1]) - 2 * len(both)
            expected[work.number] = cross * hidden.tokens_of(work.number) / compared, differing
        return prune_one(work, tensors, digests)

    def kept(accumulator: StatisticsAccumulator) -> Any:
        statistics = result(accumulator)
        cross = statistics.moments and statistics.moments.cross
        found.setdefault(len(found), cross[0].clone() if cross else None)
        return statistics

    monkeypatch.setattr(expert_pruning._ExpertWork, "prune", spied)
    monkeypatch.setattr(StatisticsAccumulator, "result", kept)
    prune(mixtral, tmp_path / "out", samples=8, min_expert_tokens=1)
    ups = [cross for cross in found.values() if cross is not None and cross.shape == (32, 32)]
    assert sum(differing for _, differing in expected.values()) > 0, "routing is the same in both"
    for cross, _ in expected.values():
        assert any(torch.allclose(cross, mine, rtol=1e-3, atol=1e-3) for mine in ups)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_one_by_one_compute_what_the_whole_block_does(kind: str, mixtral: Path, tmp_path: Path) -> None:
    """Bit by bit; gpt_oss has biases and its experts fused, interleaved and transposed."""
    folder = mixtral
    if kind == "gpt_oss":
        more = {**families.WITH_HEADS, **EXPERTS, "rope_parameters": families.ROPE}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**more))
        tiny.randomise(model)
        folder = tiny.write_model(tmp_path / "source", model, torch.float32)
    from pieces import FLOAT32, recorded

    from streamprune.checkpoint.scratch import HiddenStates

    source = open_dense(folder)
    inputs = recorded(source)
    streams = tuple(HiddenStates(tmp_path / name, 2, 29, 32, torch.float32) for name in ("in.bin", "out.bin"))
    states = [inputs.hidden_states, inputs.hidden_states.flip(1)]
    for index, one in enumerate(states):
        streams[0].write(index, one)
    block, loaded = source.blocks[0], []

    def load(part: Any) -> torch.nn.Module:
        loaded.append(part.name.removeprefix(f"{block.name}."))
        return load_block(source, part, FLOAT32)

    advance_by_parts(block, load, inputs.arguments[0], streams, FLOAT32, tmp_path, lambda: None)
    whole = RunnableBlock(block.name, load_block(source, block, FLOAT32), inputs.arguments[0])
    for index, one in enumerate(states):
        assert torch.equal(streams[1].read(index), whole.run(one))
    for stream in streams:
        stream.close()
    assert loaded == [block.name, *(f"mlp.experts.{number}" for number in range(4))]
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["in.bin", "out.bin"], "scratch is left"


@pytest.mark.parametrize("moment", ["reach", "work", "prune", "sparse"])
def test_stopped_among_the_experts_and_resumed(
    moment: str, mixtral: Path, prune: Prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is done again, and the bytes are those of an uninterrupted job; nothing is left behind."""
    calls = {
        "reach": (ExpertStage, "reach", 7),
        "work": (ExpertStage, "add", 20),
        "prune": (expert_pruning, "write_part", 6),
        "sparse": (ExpertStage, "work", 6),
    }
    place, name, count = calls[moment]
    original, seen = getattr(place, name), []

    def counted(*arguments: Any) -> Any:
        seen.append(name)
        if len(seen) == count:
            raise Interrupted("out: stopped")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, counted)
        with pytest.raises(Interrupted):
            prune(mixtral, tmp_path / "out")
    prune(mixtral, tmp_path / "out")
    prune(mixtral, tmp_path / "whole")
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")
    assert not (tmp_path / "out" / ".work").exists()


def test_kept_dense_with_experts(mixtral: Path, prune: Prune, tmp_path: Path) -> None:
    result = prune(mixtral, tmp_path / "out", max_block_error=1e-3, on_excess="keep-dense")
    assert len(result.kept_dense) == 2
    ours, source = tiny.read_tensors(tmp_path / "out"), tiny.read_tensors(mixtral)
    for name, tensor in source.items():
        assert torch.equal(ours[name.replace("block_sparse_moe", "mlp")], tensor)


def test_a_config_that_asks_for_the_routers_outputs(mixtral: Path, calibration: Path, tmp_path: Path) -> None:
    """They are for training: transformers would make a loss of them."""
    folder = shutil.copytree(mixtral, tmp_path / "source")
    tiny.write_json(folder / "config.json", tiny.read_json(folder / "config.json") | {"output_router_logits": True})
    asked, plain = (evaluate(path, text=calibration, sequence_length=48, max_tokens=96) for path in (folder, mixtral))
    assert asked.perplexity == plain.perplexity


def test_settings_of_experts_are_refused_without_any(prune: Prune, tmp_path: Path) -> None:
    for settings in ({"starved": "dense"}, {"min_expert_tokens": 5}):
        (name, value), *_ = settings.items()
        with pytest.raises(SettingsError, match=re.escape(f"{name} {value} has no effect: the model has no experts")):
            prune("llama", tmp_path / "out", **settings)


def test_routing_that_changes_is_refused(mixtral: Path, prune: Prune, tmp_path: Path, monkeypatch: Any) -> None:
    """The block runs twice to its experts; what it computed for some tokens would be given to others."""
    original = ExpertStage.run

    def other_inputs(stage: ExpertStage, states: torch.Tensor) -> torch.Tensor:
        return original(stage, states.flip(1))

    monkeypatch.setattr(expert_streaming.ExpertStage, "run", other_inputs)
    with pytest.raises(Exception, match="routes the same tokens otherwise when it is run again"):
        prune(mixtral, tmp_path / "out")
