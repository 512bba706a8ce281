"""Outputs in transformers: loaded packed, the same numbers as the dense export's, saved and loaded again."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import streamprune
from streamprune import PackedLinear
from streamprune.errors import CheckpointError, OutputError, SettingsError

Outputs = Callable[..., Path]
SOURCES = ("llama", "llama-plain", "mistral", "opt", "qwen2", "qwen3")
PERMUTED = {"shuffle": "assignment"}


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})


def tokens(model: PreTrainedModel, length: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.config.vocab_size, (2, length), generator=generator)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(model)).logits.float()


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.fixture(scope="session")
def exports(outputs: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Dense exports of outputs, made once."""
    folder = tmp_path_factory.mktemp("exports")

    def export(source: str, **settings: Any) -> Path:
        out = folder / "-".join([source, *map(str, settings.values())])
        if not out.exists():
            streamprune.export(outputs(source, **settings), out=out)
        return out

    return export


@pytest.mark.parametrize("source", SOURCES)
def test_a_loaded_output_computes_what_its_dense_export_does(source: str, outputs: Outputs, exports: Outputs) -> None:
    folder = outputs(source, **PERMUTED)
    model, dense = load(folder), load(exports(source, **PERMUTED))
    layers = packed_layers(model)
    assert set(layers) == set(tiny.read_json(folder / "config.json")["quantization_config"]["layers"])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    prompt = tokens(model, 6)
    said = [one.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for one in (model, dense)]
    assert torch.equal(*said)
    for name, layer in layers.items():
        stored = sum(p.nbytes for key, p in layer.named_parameters() if key in ("weight_values", "weight_mask"))
        weight = dense.get_submodule(name).weight
        assert stored <= 0.58 * weight.numel() * layer.weight_values.itemsize
        torch.testing.assert_close(layer.dense_weight().float(), weight)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("auto", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),  # which holds them all: they stay as they are stored
        (torch.float16, torch.float16),
    ],
)
def test_values_have_the_narrower_dtype(dtype: Any, values: torch.dtype, outputs: Outputs) -> None:
    model = load(outputs("llama"), dtype=dtype)
    assert {layer.weight_values.dtype for layer in packed_layers(model).values()} == {values}
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert logits(model).isfinite().all()


def test_one_call_loads_an_output_and_refuses_what_is_none(outputs: Outputs, exports: Outputs, tmp_path: Path) -> None:
    model = streamprune.load(outputs("opt"), device="cpu", dtype="float32")
    assert torch.equal(logits(model), logits(load(outputs("opt"))))
    assert not model.training
    with pytest.raises(CheckpointError, match="is not a finished streamprune output"):
        streamprune.load(exports("opt"))
    with pytest.raises(SettingsError, match="device or device_map"):
        streamprune.load(outputs("opt"), device="cpu", device_map="auto")


@pytest.mark.parametrize("source", ["llama", "opt"])
def test_blocks_offloaded_to_disk_compute_the_same(source: str, outputs: Outputs, tmp_path: Path) -> None:
    folder = outputs(source, **PERMUTED)
    whole = load(folder)
    blocks = {"llama": "model.layers", "opt": "model.decoder.layers"}[source]
    places = {name: "cpu" for name, _ in whole.named_children()}
    places = {"lm_head": "cpu"} | {
        name: "cpu"
        for name, module in whole.named_modules()
        if name and not name.startswith(blocks) and not blocks.startswith(name) and not list(module.children())
    }
    places |= {f"{blocks}.0": "disk", f"{blocks}.1": "cpu", f"{blocks}.2": "disk"}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in model.get_submodule(f"{blocks}.0").parameters()} == {"meta"}
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(SettingsError, match="is offloaded"):
        model.dequantize()


@pytest.mark.parametrize("shard", ["50GB", "40KB"])
@pytest.mark.parametrize("source", ["llama", "opt"])
def test_saved_and_loaded_again_every_tensor_is_the_same(
    source: str, shard: str, outputs: Outputs, tmp_path: Path
) -> None:
    first = outputs(source, **PERMUTED)
    load(first, dtype="auto").save_pretrained(tmp_path / "1", max_shard_size=shard)
    load(tmp_path / "1", dtype="auto").save_pretrained(tmp_path / "2", max_shard_size=shard)
    expected = read(first)
    for folder in (tmp_path / "1", tmp_path / "2"):
        found = read(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)
        assert (len(list(folder.glob("streamprune-*.safetensors"))) > 1) == (shard == "40KB")
        assert not [path for path in folder.iterdir() if path.name.startswith((".", "model"))]
        entry, original = (tiny.read_json(one / "config.json") for one in (folder, first))
        assert entry["quantization_config"] == original["quantization_config"]
        assert "transformers_weights" not in entry


def read(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("streamprune-*-of-*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def test_saving_refuses_what_it_would_spoil(outputs: Outputs, copy_of: Outputs, tmp_path: Path) -> None:
    model = load(outputs("llama"))
    with pytest.raises(OutputError, match="save into another folder"):
        model.save_pretrained(copy_of("llama"))
    with pytest.raises(SettingsError, match="push_to_hub does not go with packed weights"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)  # of several processes one writes
    assert list((tmp_path / "other").iterdir()) == []


def test_what_is_pushed_is_what_is_saved(outputs: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own `push_to_hub`, with nothing at the other end."""
    model, pushed = load(outputs("llama")), set()
    nothing = SimpleNamespace(repo_id="a/b", save=lambda path: None)
    hub = SimpleNamespace(create_repo=lambda *_, **__: nothing)
    for name, stand_in in (("hf_api", lambda: hub), ("create_repo", hub.create_repo),
                           ("create_and_tag_model_card", lambda *_, **__: nothing)):  # fmt: skip
        monkeypatch.setattr(f"transformers.utils.hub.{name}", stand_in, raising=False)
    monkeypatch.setattr(
        model,
        "_upload_modified_files",
        lambda folder, *_, **__: pushed.update(path.name for path in Path(folder).iterdir()),
    )
    model.push_to_hub("a/b")
    assert {"config.json", tiny.INDEX, "streamprune-00001-of-00001.safetensors"} <= pushed
    assert not any(name.startswith("model") for name in pushed)


def test_a_model_made_dense_is_the_export_and_is_saved_as_any_other(
    outputs: Outputs, exports: Outputs, tmp_path: Path
) -> None:
    model = load(outputs("llama", **PERMUTED)).dequantize()
    assert not packed_layers(model)
    model.save_pretrained(tmp_path)
    plain, export = load(tmp_path), load(exports("llama", **PERMUTED))
    assert not hasattr(plain.config, "quantization_config")
    for name, parameter in export.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name


def test_a_loaded_model_compiles_as_one_graph(outputs: Outputs) -> None:
    model = load(outputs("llama"))
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(model), use_cache=False).logits, expected)


def edit_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], listed: bool = True) -> None:
    """Change the first block's shard, and the index with it where `listed`."""
    shard = sorted(folder.glob("streamprune-*-of-*.safetensors"))[1]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    if listed:
        index = tiny.read_json(folder / tiny.INDEX)
        kept = {name: file for name, file in index["weight_map"].items() if file != shard.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, shard.name)
        tiny.write_json(folder / tiny.INDEX, index)


def edit_entry(folder: Path, **changes: Any) -> None:
    config = tiny.read_json(folder / "config.json")
    config["quantization_config"] |= changes
    tiny.write_json(folder / "config.json", config)


LAYER = "model.layers.0.self_attn.q_proj"
ORDER = f"{LAYER}.input_permutation"
UP = "model.layers.0.mlp.up_proj"


def narrower(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("weight_values", "weight_mask"):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][:-8].contiguous()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "version": (lambda folder: edit_entry(folder, format_version=3), "has packed format 3, and format 2 is loaded"),
    "no version": (lambda folder: edit_entry(folder, format_version=None), "has packed format None"),
    "no layers": (lambda folder: edit_entry(folder, layers=None), "quantization_config is malformed"),
    "wrong shape": (lambda folder: edit_shard(folder, narrower), f"{UP} has 152 x 64 weights, its module .* 160 x 64"),
    "permutation missing": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.pop(ORDER)),
        f"{LAYER}: config.json says that its input_permutation is stored",
    ),
    "permutation missing in its shard": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.pop(ORDER), listed=False),
        "input_permutation",
    ),
    "no permutation": (
        lambda folder: edit_shard(folder, lambda tensors: tensors[ORDER].fill_(0)),
        f"{ORDER} is not a permutation",
    ),
    "norm missing": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight")),
        "has no tensor model.layers.0.input_layernorm.weight",
    ),
    "tensor of nothing": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.update(extra=torch.ones(2))),
        "LlamaForCausalLM has no extra",
    ),
    "layer of another model": (
        lambda folder: edit_entry(folder, layers={"model.layers.9.mlp.up_proj": {"pattern": "2:4"}}),
        "layer model.layers.9.mlp.up_proj has no weight_values",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_get_random_weights_is_refused_in_one_line(fault: str, copy_of: Outputs) -> None:
    spoil, message = FAULTS[fault]
    folder = copy_of("llama", **PERMUTED)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_outputs_of_version_1_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "version1" / "packed", tmp_path / "packed"))
    with pytest.raises(CheckpointError, match="has packed format 1, and format 2 is loaded here"):
        load(folder)


def test_without_the_plug_in_nothing_is_loaded(
    outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(outputs("llama")).save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "streamprune")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "streamprune")
    for folder in (outputs("llama"), tmp_path):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            load(folder)


@pytest.mark.parametrize(
    "first", ["import streamprune, transformers", "import transformers, streamprune",
              "from transformers import AutoModelForCausalLM; import streamprune"],
)  # fmt: skip
def test_a_fresh_process_loads_in_whatever_order_it_imports(first: str, outputs: Outputs) -> None:
    code = f"""{first}
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.get_submodule({LAYER!r})).__name__)
"""
    command = [sys.executable, "-c", code, str(outputs("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "PackedLinear\n"


def test_a_name_on_the_hub_is_loaded_from_its_cache(outputs: Outputs, tmp_path: Path) -> None:
    """As huggingface_hub lays it out: links to blobs in a folder of the commit."""
    tiny.as_hub_cache(outputs("llama"), tmp_path / "models--some--llama", commit := "0" * 40)
    code = f"""
import streamprune
for name in ("some/llama", "some/llama@main", "some/llama@{commit}"):
    print(type(streamprune.load(name, device="cpu").get_submodule({LAYER!r})).__name__)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "PackedLinear\n" * 3), done.stderr
