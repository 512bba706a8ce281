"""What a job refuses before it computes, and how it ends on numbers that are not finite."""

import json
import os
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from streamprune.cli import cli
from streamprune.config import PruneConfig
from streamprune.errors import CheckpointError, NumericsError, OutputError, SettingsError, UnsupportedModelError
from streamprune.pipeline import two_passes
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job must end before its first block is read."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a block was reached")

    monkeypatch.setattr(two_passes, "_compress_block", refuse)


@pytest.fixture
def source(sources: Callable[[str], Path], tmp_path: Path) -> Path:
    """A source that a test may change."""
    return Path(shutil.copytree(sources("llama"), tmp_path / "source"))


def edit(source: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    tiny.edit_tensor(source / "model.safetensors", name, change)


@pytest.mark.usefixtures("no_blocks")
class TestBeforeAnyBlock:
    @pytest.mark.parametrize("inside", [".", "pruned", "deep/pruned"])
    def test_output_in_the_source_folder(self, inside: str, prune: Prune, source: Path) -> None:
        before = tiny.digests(source)
        with pytest.raises(OutputError, match="lies in the source folder; choose another --out"):
            prune(source, source / inside)
        assert tiny.digests(source) == before

    def test_output_in_the_source_folder_through_a_link(self, prune: Prune, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(OutputError, match="lies in the source folder"):
            prune(source, tmp_path / "link" / "pruned")

    def test_foreign_folder(self, prune: Prune, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        with pytest.raises(OutputError, match="is not empty and not an output of streamprune; choose another --out"):
            prune("llama", tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]

    def test_output_is_a_file(self, prune: Prune, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="cannot be used as output"):
            prune("llama", tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_scratch_is_a_file(self, prune: Prune, tmp_path: Path) -> None:
        (tmp_path / "scratch").write_text("mine")
        with pytest.raises(OutputError, match="cannot be used as scratch folder"):
            prune("llama", tmp_path / "out", scratch=tmp_path / "scratch")

    def test_disk_too_small(self, prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Output and scratch on one file system are added up."""
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 200_000))
        with pytest.raises(OutputError, match=r"out: \d+ bytes are needed and 200000 are free; free space or choose"):
            prune("llama", tmp_path / "out")
        assert list((tmp_path / "out").glob("streamprune-*")) == []

    def test_too_many_positions(self, prune: Prune, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"sequence length 321 is beyond the model's 320 positions"):
            prune("llama", tmp_path / "out", sequence_length=321)

    def test_unsupported_architecture_is_named(self, prune: Prune, source: Path, tmp_path: Path) -> None:
        config = tiny.read_json(source / "config.json")
        tiny.write_json(source / "config.json", config | {"model_type": "bert"})
        with pytest.raises(UnsupportedModelError, match="'bert' is not supported: it is made for masked"):
            prune(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("harm", ["missing file", "missing tensor", "other shape", "cut short"])
    def test_incomplete_source(self, harm: str, prune: Prune, source: Path, tmp_path: Path) -> None:
        weights = source / "model.safetensors"
        if harm == "missing file":
            weights.unlink()
        elif harm == "missing tensor":
            tensors = tiny.read_tensors(source)
            del tensors["model.layers.2.mlp.up_proj.weight"]
            save_file(tensors, weights)
        elif harm == "other shape":
            tensors = tiny.read_tensors(source)
            tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(160, 32, dtype=torch.bfloat16)
            save_file(tensors, weights)
        else:
            os.truncate(weights, weights.stat().st_size - 1)
        message = {
            "missing file": "holds neither model.safetensors nor pytorch_model.bin",
            "missing tensor": r"1 tensors are missing, first model\.layers\.2\.mlp\.up_proj\.weight",
            "other shape": r"layers\.2\.mlp\.up_proj\.weight has shape \[160, 32\], config\.json makes it \[160, 64\]",
            "cut short": r"model\.safetensors: truncated or padded",
        }[harm]
        with pytest.raises(CheckpointError, match=message):
            prune(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"pattern": "4:2"}, "N:M needs 0 < N < M"),
            ({"pattern": "2-4"}, "is not N:M"),
            ({"metric": "best"}, "metric 'best' is none of esparse, wanda, ria, magnitude"),
            ({"shuffle": "best"}, "shuffle 'best' is not none, nor stride, global, local, assignment joined by "),
            ({"shuffle": "none+global"}, r"shuffle 'none\+global' is not none, nor "),
            ({"shuffle": "global+residual"}, r"shuffle 'global\+residual' is not .* nor residual before them"),
            ({"shuffle": ""}, "shuffle '' is not none"),
            ({"shuffle": "residual+"}, r"shuffle 'residual\+' is not none"),
            ({"fold": "both"}, "fold 'both' is none of heads, across-heads"),
            ({"objective": "error"}, "objective 'error' is none of score, energy"),
            ({"entropy_range": "model"}, "entropy_range 'model' is none of channel, layer"),
            ({"shrinkage": 1.1}, "shrinkage 1.1 is not a number from 0 to 1"),
            ({"shrinkage": float("nan")}, "shrinkage nan"),
            ({"correction": -0.1}, "correction -0.1 is not a number from 0 to 1"),
            ({"correction": float("nan")}, "correction nan"),
            ({"correction_stride": 0}, "correction_stride 0 is not a whole number from 1 to"),
            ({"moments_width": 63}, "moments_width 63 is not a whole number from 64 to"),
            ({"amplitude": "l1"}, "amplitude 'l1' is none of l2, wanda, rms"),
            ({"on_excess": "shrug"}, "on_excess 'shrug' is none of stop, keep-dense, warn"),
            ({"alpha": -1.0}, "alpha -1.0"),
            ({"alpha": float("nan")}, "alpha nan"),
            ({"entropy_bins": 1}, "entropy_bins 1"),
            ({"shuffle_block": 1}, "shuffle_block 1"),
            ({"max_block_error": -0.1}, "max_block_error -0.1"),
            ({"samples": "4"}, "samples '4' is not a whole number from 1 to 2147483647"),
            ({"samples": 4.0}, "samples 4.0 is not a whole number"),
            ({"samples": True}, "samples True is not a whole number"),
            ({"samples": None}, "samples None is not a whole number"),
            ({"seed": -1}, "seed -1 is not a whole number from 0 to 9223372036854775807"),
            ({"micro_batch": 0}, "micro_batch 0 is not a whole number"),
            ({"prefetch": -1}, "prefetch -1 is not a whole number from 0 to 1000"),
            ({"alpha": "1"}, "alpha '1' is not a number from 0 to 1000000"),
            ({"max_block_error": True}, "max_block_error True is not a number"),
            ({"max_memory": 2**30}, "1073741824 is not a number of bytes"),
            ({"refine": "no"}, "refine 'no' is neither true nor false"),
            ({"relative": 1}, "relative 1 is neither true nor false"),
            ({"shuffle": None}, "shuffle None is not none, nor stride"),
            ({"metric": ["wanda"]}, r"metric \['wanda'\] is none of"),
            ({"pattern": 24}, "pattern 24 is not N:M"),
            ({"device": "tpu"}, "device 'tpu'"),
            ({"dtype": "int8"}, "dtype 'int8'"),
            ({"dtype": "float16", "device": "cpu"}, "dtype float16 is about 100 times slower"),
        ],
        ids=str,
    )
    def test_settings_that_make_no_sense(
        self, settings: dict[str, Any], message: str, prune: Prune, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError, match=message) as error:
            prune("llama", tmp_path / "out", **settings)
        assert error.value.exit_code == 2
        assert not (tmp_path / "out").exists()


def test_equal_settings_are_equal_bytes() -> None:
    whole, parts = (PruneConfig(alpha=number(1), correction=number(0)) for number in (int, float))
    assert json.dumps(whole.to_dict()) == json.dumps(parts.to_dict())


def test_an_output_as_source(prune: Prune, outputs: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is already an output of streamprune; give the dense model"):
        prune(outputs("llama"), tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(
    name: str, value: float, prune: Prune, source: Path, tmp_path: Path
) -> None:
    edit(source, name, lambda tensor: tensor.view(-1)[7:8].fill_(value))
    with pytest.raises(NumericsError, match=rf"tensor {name} holds NaN or infinity") as error:
        prune(source, tmp_path / "out")
    assert error.value.exit_code == 6
    assert not (tmp_path / "out" / tiny.MANIFEST_DIGEST).exists()


def test_hidden_states_that_overflow_name_the_block(prune: Prune, source: Path, tmp_path: Path) -> None:
    edit(source, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.fill_(3e38))
    with pytest.raises(NumericsError, match=r"model\.layers\.1: its output holds NaN or infinity"):
        prune(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / ".work").glob("block-*.json")] == ["block-00000.json"]


def test_a_layers_input_that_overflows_names_the_layer(prune: Prune, source: Path, tmp_path: Path) -> None:
    edit(source, "model.layers.0.mlp.up_proj.weight", lambda weight: weight.fill_(3e38))
    with pytest.raises(NumericsError, match=r"model\.layers\.0(\.mlp\.down_proj)?: .*NaN or infinity"):
        prune(source, tmp_path / "out")


def test_a_dead_channel_and_a_layer_of_zeros(
    prune: Prune, source: Path, sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Scores of 0 everywhere tie: still exactly N of M, the lower channels, and nothing is NaN."""
    edit(source, "model.layers.1.post_attention_layernorm.weight", lambda weight: weight[::3].zero_())
    edit(source, "model.layers.1.self_attn.o_proj.weight", lambda weight: weight.zero_())
    result = prune(source, tmp_path / "out")
    assert verify(tmp_path / "out", source=source).faults == []
    assert all(torch.tensor(error).isfinite() for _, error in result.worst_layers)


def scaled(factors: dict[str, float], source: Path) -> None:
    """Multiply every tensor whose name holds a key, in float32: bfloat16 sums of large numbers are coarse."""
    tensors = {name: tensor.float() for name, tensor in tiny.read_tensors(source).items()}
    for part, factor in factors.items():
        for name in [name for name in tensors if part in name]:
            tensors[name] *= factor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


BLOCK = "model.layers.1."
ATTENTION, MLP = f"{BLOCK}self_attn.", f"{BLOCK}mlp."
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "reconstruct": {"reconstruct": True},
    "ria": {"metric": "ria", "shuffle": "residual+assignment"},
    "wanda": {"metric": "wanda", "shuffle": "global+local", "refine": False, "objective": "energy"},
    "magnitude": {"metric": "magnitude", "shuffle": "none", "refine": False},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "factors",
    [
        {ATTENTION: 0.0, MLP: 0.0},  # a block of zeros
        {f"{ATTENTION}o_proj": 0.0, f"{MLP}down_proj": 0.0},  # that adds nothing
        {"": 0.0},
        {"model.embed_tokens": 0.0},
        {"norm": 0.0},
        {"model.embed_tokens": 1e15},  # what blocks add is lost in rounding
        {f"{BLOCK}input_layernorm": 1e-30, f"{ATTENTION}q_proj.weight": 1e30},  # squares of its scores: beyond float32
        {f"{MLP}down_proj": 1e-38},
    ],
    ids=str,
)
def test_figures_of_zeros_and_of_extremes_are_finite(
    factors: dict[str, float], method: str, prune: Prune, source: Path, tmp_path: Path
) -> None:
    """The job ends, and what it wrote is strict JSON, which the manifest's reader wants, and is right."""
    scaled(factors, source)
    prune(source, tmp_path / "out", **METHODS[method])
    assert verify(tmp_path / "out", source=source).faults == []
    assert prune(source, tmp_path / "out", **METHODS[method]).status == "already finished"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({f"{BLOCK}input_layernorm": 1e25, f"{ATTENTION}q_proj": 1e-20}, "second moments of the input are beyond fl"),
        ({f"{BLOCK}input_layernorm": 1e20, f"{ATTENTION}q_proj": 1e19}, "holds NaN or infinity"),
    ],
    ids=str,
)
def test_figures_that_float32_does_not_hold_name_the_layer(
    factors: dict[str, float], message: str, prune: Prune, source: Path, tmp_path: Path
) -> None:
    scaled({**factors, f"{ATTENTION}k_proj": 0.0}, source)
    with pytest.raises(NumericsError, match=rf"^model\.layers\.1\.self_attn\.[qo]_proj: .*{message}"):
        prune(source, tmp_path / "out")


def test_an_error_against_zeros_is_the_largest_number(prune: Prune, source: Path, tmp_path: Path) -> None:
    """Inputs that are equal in all channels, and rows that add up to 0: dense outputs are 0, pruned ones are not."""
    tensors = {name: tensor.float() for name, tensor in tiny.read_tensors(source).items()}
    tensors["model.embed_tokens.weight"].fill_(1.0)
    tensors["model.layers.0.input_layernorm.weight"].fill_(1.0)
    tensors["model.layers.0.self_attn.q_proj.bias"].zero_()
    tensors["model.layers.0.self_attn.q_proj.weight"].copy_(torch.tensor([3.0, -1.0, -1.0, -1.0]).repeat(64, 16))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = prune(source, tmp_path / "out", metric="magnitude", shuffle="none", refine=False)
    assert result.worst_layers[0] == ("model.layers.0.self_attn.q_proj", sys.float_info.max)
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).stdout
    assert max(map(len, shown.splitlines())) < 250
    assert "1.8e+308" in shown
