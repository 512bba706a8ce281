"""What plain loaders make of an output: an error, and no weights. Version 1 is read by every command, and never mixed.

tests/version1 holds a real output of version 1 and its source, 70 KB in all, made by an early streamprune, which
recorded less of a job than the last that wrote version 1.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reader
import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from streamprune.checkpoint.layout import LAYOUT
from streamprune.cli import cli
from streamprune.errors import CheckpointError, Interrupted, JobMismatchError
from streamprune.model.machine import former_instruction_set
from streamprune.pipeline.compress import CompressResult
from streamprune.runtime.evaluate import evaluate
from streamprune.runtime.export import export
from streamprune.runtime.inspect import inspect
from streamprune.runtime.verify import verify

Prune = Callable[..., CompressResult]
ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "version1"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A copy of the real version 1 output."""
    return Path(shutil.copytree(REAL / "packed", tmp_path / "real"))


@pytest.fixture
def former(copy_of: Callable[..., Path]) -> Path:
    """An output of this version, rewritten as version 1."""
    return tiny.as_version_1(copy_of("llama"))


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"])
def test_plain_from_pretrained_ends_with_an_error(kind: str, outputs: Callable[..., Path]) -> None:
    """In a process that knows nothing of streamprune: no model of random weights comes back."""
    script = (
        f"import sys, transformers\ntry:\n    transformers.{kind}.from_pretrained({str(outputs('llama'))!r})\n"
        "except OSError as error:\n    assert 'streamprune' not in sys.modules\n    print('refused:', error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("refused: ")
    assert "no file named model.safetensors" in ended.stdout


def test_no_loader_that_takes_every_file_of_weights_takes_the_others(outputs: Callable[..., Path]) -> None:
    """Every *.safetensors, *.bin, *.pt or *.pth of the folder, or streamprune-*: shards of the index alone."""
    out = outputs("llama")
    index = tiny.read_json(out / tiny.INDEX)
    shards = set(index["weight_map"].values())
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "streamprune-*")
    assert {path.name for pattern in patterns for path in out.glob(pattern)} == shards
    assert shards == {LAYOUT.shard(number, 4) for number in (1, 2, 3, 4)}
    tensors = packed_reader.open_folder(out)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert index["weight_map"].keys() == tensors.keys()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "a.safetensors"]
)
def test_verify_finds_weights_that_are_none_of_the_outputs(name: str, copy_of: Callable[..., Path]) -> None:
    """A loader would take them."""
    out = copy_of("llama")
    (out / name).write_bytes(b"{}")
    (out / "notes.txt").write_text("mine")
    assert verify(out).faults == [f"{name}: is not in {tiny.MANIFEST}"]


def test_a_rewritten_output_is_version_1_in_every_name(former: Path, real: Path) -> None:
    """The rewriting is sound: keys and names are those of the real one."""
    manifests = [tiny.read_json(folder / tiny.MANIFEST) for folder in (former, real)]
    assert manifests[0].keys() == manifests[1].keys()
    assert [manifest["format_version"] for manifest in manifests] == [1, 1]
    names = [{re.sub(r"\d{5}", "N", path.name) for path in folder.iterdir()} for folder in (former, real)]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["real", "rewritten"])
def test_version_1_is_read_by_every_command(
    kind: str, real: Path, former: Path, sources: Callable[[str], Path], outputs: Callable[..., Path], held_out: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder, source = (real, REAL / "source") if kind == "real" else (former, sources("llama"))
    for checked in (verify(folder), verify(folder, source=source), verify(folder, quick=True)):
        assert checked.faults == []
    layers = inspect(folder).layers
    assert len(layers) == (14 if kind == "real" else 21)
    export(folder, out=tmp_path / "dense")
    packed = packed_reader.PackedFolder(folder)
    expected = packed.unpacked_state(tiny.read_tensors(source))
    assert packed.check_against(tiny.read_tensors(source)) > 0
    model, plain = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "dense", source)
    )
    plain.load_state_dict({name: tensor.float() for name, tensor in expected.items()}, strict=False)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert (model(tokens).logits - plain(tokens).logits).abs().max() <= 1e-4
    dense = evaluate(tmp_path / "dense", text=held_out, sequence_length=48, dtype="float32")
    assert evaluate(folder, text=held_out, sequence_length=48, dtype="float32").loss == pytest.approx(
        dense.loss, rel=1e-5
    )
    if kind == "rewritten":
        assert inspect(folder) == inspect(outputs("llama"))
    for command in (["verify", str(folder), "--quiet"], ["inspect", str(folder)]):
        assert CliRunner().invoke(cli, command).exit_code == 0


def test_a_version_1_folder_that_carries_a_card_of_its_source_exports_it(
    sources: Callable[[str], Path], prune: Prune, tmp_path: Path
) -> None:
    """There README.md was the source's own."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# Dense\n")
    prune(source, tmp_path / "out", metric="magnitude", refine=False, validate=False)
    out = tiny.as_version_1(tmp_path / "out")
    assert verify(out, source=source).faults == []
    export(out, out=tmp_path / "dense")
    assert (tmp_path / "dense" / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
    card = (tmp_path / "dense" / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "# `a model`, pruned" in card


def test_compress_says_what_a_finished_version_1_output_is(
    prune: Prune, former: Path, sources: Callable[[str], Path], calibration: Path
) -> None:
    before = tiny.digests(former)
    result = prune("llama", former)
    assert (result.status, result.format_version, result.blocks) == ("already finished", 1, 3)
    assert result.output_bytes == sum(path.stat().st_size for path in former.glob("model-*"))
    command = ["compress", str(sources("llama")), "--out", str(former), "--samples", "4", "--sequence-length", "48"]
    shown = CliRunner().invoke(cli, [*command, "--dtype", "float32", "--calibration", str(calibration), "--quiet"])
    assert "already finished" in shown.output
    assert "version 1, which plain transformers loads wrongly; --restart" in shown.output
    assert tiny.digests(former) == before
    with pytest.raises(JobMismatchError, match=r"settings\.metric: esparse there, wanda now"):
        prune("llama", former, metric="wanda")
    with pytest.raises(CheckpointError, match="is already an output of streamprune"):
        prune(former, former.parent / "out")


def test_compress_knows_the_real_one(real: Path, prune: Prune, tmp_path: Path) -> None:
    """By what it recorded; the machine and transformers' spelling of the config are set as they are here."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2000, seed=1))
    prune(REAL / "source", tmp_path / "now", calibration=str(text))
    here = tiny.read_json(tmp_path / "now" / tiny.MANIFEST)["identity"]

    def as_here(manifest: Any) -> None:
        identity = manifest["identity"]
        compute = here["compute"] | {"instruction_set": former_instruction_set(torch.device("cpu"), torch.float32)}
        assert identity["compute"].keys() == {"device", "dtype", "instruction_set", "kernels"}
        identity["compute"] = {key: compute[key] for key in identity["compute"]}
        identity["source"]["config"] = here["source"]["config"]

    tiny.reseal(real, as_here)
    result = prune(REAL / "source", real, calibration=str(text))
    assert (result.status, result.format_version, result.blocks) == ("already finished", 1, 2)
    tiny.reseal(real, lambda manifest: manifest["identity"]["compute"].update(instruction_set="NEON"))
    with pytest.raises(JobMismatchError, match=r"\(compute\.instruction_set: NEON there, [^;]* now\)"):
        prune(REAL / "source", real, calibration=str(text))
    tiny.reseal(real, lambda manifest: manifest["identity"]["source"].update(fingerprint="0" * 64))
    with pytest.raises(JobMismatchError, match=r"source\.fingerprint"):
        prune(REAL / "source", real, calibration=str(text))


def interrupted(prune: Prune, out: Path) -> Path:
    with pytest.raises(Interrupted):
        prune("llama", out, should_stop=(out / ".work" / "block-00000.json").exists)
    return tiny.as_version_1(out)


def test_a_half_finished_job_of_version_1_is_refused_by_name(
    prune: Prune, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    out = interrupted(prune, tmp_path / "out")
    before = tiny.digests(out)
    assert "model-00002-of-00004.safetensors" in before
    with pytest.raises(JobMismatchError, match=r"\(format_version: 1 there, 2 now\); use .* or --restart"):
        prune("llama", out)
    assert tiny.digests(out) == before
    assert prune("llama", out, restart=True).status == "finished"
    assert tiny.digests(out) == tiny.digests(outputs("llama"))


def test_a_restart_leaves_no_file_of_version_1(prune: Prune, outputs: Callable[..., Path], former: Path) -> None:
    (former / "notes.md").write_text("mine")
    prune("llama", former, restart=True)
    (former / "notes.md").unlink()
    assert tiny.digests(former) == tiny.digests(outputs("llama"))


@pytest.mark.parametrize(
    ("kind", "where", "fault"),
    [
        ("current", "config.json", "config.json says format 1, the manifest 2"),
        ("current", tiny.MANIFEST, "config.json says format 2, the manifest 1"),
        ("former", "config.json", "config.json says format 2, the manifest 1"),
        ("former", tiny.MANIFEST, "is malformed (source_name is missing)"),
    ],
)
def test_versions_that_disagree(
    kind: str, where: str, fault: str, former: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    folder = former if kind == "former" else Path(shutil.copytree(outputs("llama"), tmp_path / "current"))
    there, other = (1, 2) if kind == "former" else (2, 1)
    path = folder / where
    path.write_text(path.read_text().replace(f'"format_version": {there}', f'"format_version": {other}'))
    tiny.reseal(folder)
    assert fault in verify(folder).faults[-1]


@pytest.mark.parametrize("kind", ["current", "former", "real"])
@pytest.mark.parametrize("undo_folded", [False, True])
def test_the_reader_that_the_specification_holds(
    undo_folded: bool, kind: str, former: Path, real: Path, outputs: Callable[..., Path],
    sources: Callable[[str], Path], tmp_path: Path,
) -> None:  # fmt: skip
    """Run as it stands in docs/format.md, on both versions: against our own reader, bit for bit."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    folder = {"current": outputs("llama"), "former": former, "real": real}[kind]
    read = names["dense_weights"](folder, undo_folded)
    if undo_folded:
        expected = packed_reader.PackedFolder(folder).unpacked_state(
            tiny.read_tensors(REAL / "source" if kind == "real" else sources("llama"))
        )
    else:
        export(folder, out=tmp_path / "dense")
        expected = tiny.read_tensors(tmp_path / "dense")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name] == packed_reader.bits(tensor)).all(), name


@pytest.fixture
def source(sources: Callable[[str], Path], tmp_path: Path) -> Path:
    """A source that a test may change."""
    return Path(shutil.copytree(sources("llama"), tmp_path / "changed"))


def test_an_output_of_version_1_whose_rope_scaling_was_dropped_is_named_wrong(
    prune: Prune, former: Path, source: Path
) -> None:
    """Neither sound, nor "already finished": masks and errors are of the model without it."""
    for folder in (former, source):
        config = tiny.read_json(folder / "config.json")
        scaling = {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
        tiny.write_json(folder / "config.json", {**config, **scaling})
    tiny.reseal(former)
    assert "its rope_scaling was dropped by the streamprune that made this output" in verify(former).faults[0]
    with pytest.raises(JobMismatchError, match="dropped the model's rope_scaling"):
        prune(source, former)
