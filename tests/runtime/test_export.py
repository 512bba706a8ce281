"""A dense export is the pruned model for plain transformers: same logits, source's own names, zeros in place."""

from collections.abc import Callable
from pathlib import Path

import packed_reader
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.errors import CheckpointError, NumericsError, OutputError, SettingsError
from streamprune.runtime.export import export

TOKENS = torch.tensor([[ord(character) for character in tiny.text(300, seed=6)]])


@pytest.mark.parametrize(
    ("source", "pattern"),
    [("llama", "2:4"), ("llama", "8:32"), ("llama", "3:5"), ("llama-plain", "2:4"), ("opt", "2:4")],
)
def test_logits_are_those_of_the_unpacked_weights(
    source: str, pattern: str, sources: Callable[[str], Path], outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """Against a plain model of the source's config whose weights our own reader unpacked, in the source's order."""
    out = outputs(source, pattern=pattern, metric="esparse", shuffle="global+local")
    export(out, out=tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(sources(source), dtype=torch.float64).eval()
    state = packed_reader.PackedFolder(out).unpacked_state(tiny.read_tensors(sources(source)))
    with torch.inference_mode():
        dense = plain(TOKENS).logits
        outcome = plain.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
        assert outcome.unexpected_keys == []
        assert outcome.missing_keys in ([], ["lm_head.weight"])
        expected = plain(TOKENS).logits
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float64).eval()
        logits = exported(TOKENS).logits
    assert (logits - expected).abs().max() <= 1e-5
    assert (dense - expected).abs().max() > 0.1


def test_files(sources: Callable[[str], Path], outputs: Callable[..., Path], tmp_path: Path) -> None:
    """A plain checkpoint: no trace of streamprune, the source's config and tokenizer, the dtype of the source."""
    result = export(outputs("llama"), out=tmp_path / "deep" / "dense")
    folder = tmp_path / "deep" / "dense"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["dense"]
    names = {path.name for path in folder.iterdir()}
    shards = {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    rest = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == shards | rest | {"model.safetensors.index.json", "README.md"}
    assert tiny.read_json(folder / "config.json") == tiny.read_json(sources("llama") / "config.json")
    for name in rest - {"config.json"}:
        assert (folder / name).read_bytes() == (sources("llama") / name).read_bytes()
    source, tensors = tiny.read_tensors(sources("llama")), tiny.read_tensors(folder)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in source.items()
    }
    index = tiny.read_json(folder / "model.safetensors.index.json")
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert index["metadata"]["total_size"] == result.output_bytes == total
    assert set(index["weight_map"]) == set(source)
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [97, 98, 99]


def test_exported_twice_the_same_bytes(outputs: Callable[..., Path], tmp_path: Path) -> None:
    export(outputs("opt"), out=tmp_path / "one")
    export(outputs("opt"), out=tmp_path / "two")
    assert tiny.digests(tmp_path / "one") == tiny.digests(tmp_path / "two")


def test_dropped_weights_are_positive_zero(outputs: Callable[..., Path], tmp_path: Path) -> None:
    result = export(outputs("opt"), out=tmp_path / "dense")
    tensors = packed_reader.open_folder(tmp_path / "dense")
    for name in [*result.in_memory_order, *result.regathered]:
        weight = packed_reader.bits(tensors[f"{name}.weight"])
        assert (weight == 0).sum() >= weight.size // 2
        assert (weight == 0x8000).sum() == 0


def test_refusals(
    sources: Callable[[str], Path], outputs: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there: exists already; choose another --out"):
        export(outputs("llama"), out=tmp_path / "there")
    with pytest.raises(SettingsError, match="to 'gguf' is none of dense"):
        export(outputs("llama"), out=tmp_path / "dense", to="gguf")
    with pytest.raises(CheckpointError, match="is not a finished streamprune output"):
        export(sources("llama"), out=tmp_path / "dense")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        export(outputs("llama"), out=tmp_path / "file" / "dense")
    damaged = copy_of("llama")
    name = "model.layers.1.mlp.up_proj.weight_values"
    tiny.edit_tensor(tiny.shard_of(damaged, name), name, lambda values: values.view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(NumericsError):
        export(damaged, out=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
