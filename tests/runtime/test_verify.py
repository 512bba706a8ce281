"""verify: an intact output passes; every change of a byte is found; forgeries with right checksums, by the source."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamprune.errors import CheckpointError, SettingsError
from streamprune.runtime.verify import VerifyResult, verify

DOWN, OUT = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"
QUERY, VALUE = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "streamprune-00001-of-00004.safetensors",
    "streamprune-00002-of-00004.safetensors",
    "streamprune-00003-of-00004.safetensors",
    "streamprune-00004-of-00004.safetensors",
    "streamprune.safetensors.index.json",
    "streamprune_manifest.json",
    "streamprune_manifest.sha256",
    "streamprune_permutations.st",
    "streamprune_statistics.st",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def llama(sources: Callable[[str], Path]) -> Path:
    return sources("llama")


@pytest.fixture
def out(copy_of: Callable[..., Path]) -> Path:
    return copy_of("llama")


def forge(out: Path, name: str, edit: Callable[[torch.Tensor], object], file: str | None = None) -> None:
    """Change a tensor and make every checksum right again."""
    tiny.edit_tensor(out / file if file else tiny.shard_of(out, name), name, edit)
    tiny.reseal(out)


def found(verification: VerifyResult, layer: str) -> bool:
    """At fault, named in a fault, and no other layer is."""
    checks = {check.name: check.ok for check in verification.layers}
    return (
        not verification.ok
        and any(fault.startswith(f"{layer}: ") for fault in verification.faults)
        and [name for name, ok in checks.items() if not ok] == [layer]
    )


def test_intact(outputs: Callable[..., Path], llama: Path) -> None:
    out = outputs("llama")
    assert {path.name for path in out.iterdir()} == {*FILES, "timings.json"}
    for source in (None, llama):
        verification = verify(out, source=source)
        assert verification.faults == []
        assert verification.ok
        assert verification.against_source is (source is not None)
        assert len(verification.layers) == 21
        assert all(check.ok and check.relative_error <= 1e-6 for check in verification.layers)
        assert verification.manifest_sha256 == tiny.sha256(out / tiny.MANIFEST)


def test_quick_sees_what_is_missing_and_not_what_is_damaged(out: Path, llama: Path) -> None:
    quick = verify(out, quick=True)
    assert (quick.ok, quick.quick, quick.layers) == (True, True, [])
    assert quick.manifest_sha256 == verify(out).manifest_sha256
    shard = out / "streamprune-00003-of-00004.safetensors"
    tiny.flip_byte(shard, shard.stat().st_size - 1)
    assert verify(out, quick=True).ok
    assert not verify(out).ok
    with shard.open("ab") as file:
        file.write(b"x")
    assert verify(out, quick=True).faults[0].startswith(f"{shard.name}: has ")
    shard.unlink()
    assert f"{shard.name}: is missing" in verify(out, quick=True).faults
    with pytest.raises(SettingsError, match="give one of the two"):
        verify(out, quick=True, source=llama)


def test_timings_may_change(out: Path) -> None:
    (out / "timings.json").unlink()
    assert verify(out).ok


def test_a_resealed_copy_is_intact(out: Path, llama: Path) -> None:
    """The forger's tool of the tests below is sound: without a change it leaves a good output."""
    tiny.reseal(out)
    assert verify(out, source=llama).faults == []


def test_a_setting_by_its_former_name(out: Path, llama: Path) -> None:
    """Outputs from before `--fold across-heads` had that name say "free"; what they hold is as good."""
    tiny.reseal(out, lambda manifest: manifest["identity"]["settings"].update(fold="free"))
    assert verify(out, source=llama).ok


def test_the_largest_weights(out: Path) -> None:
    """Their products are beyond float32, and so scaled: the figure is a number, and no fault is seen where none is."""
    name = f"{DOWN}.weight_values"
    tiny.edit_tensor(tiny.shard_of(out, name), name, lambda values: values.sign_().mul_(3e38))
    tiny.reseal(out)
    verification = verify(out)
    assert verification.ok
    assert all(0 <= layer.relative_error <= 1e-6 for layer in verification.layers if layer.relative_error is not None)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(name: str, out: Path) -> None:
    """At the start, in the middle, at the end: not ok, and a fault names the file."""
    size = (out / name).stat().st_size
    for position in (0, 9, size // 2, size - 1):
        for bits in (0x01, 0x80):
            tiny.flip_byte(out / name, position, bits)
            verification = verify(out)
            assert not verification.ok, position
            assert any(name in fault for fault in verification.faults), (position, verification.faults)
            tiny.flip_byte(out / name, position, bits)
    assert verify(out).ok


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, out: Path) -> None:
    (out / name).unlink()
    verification = verify(out)
    assert not verification.ok
    assert any(name in fault for fault in verification.faults)


@pytest.mark.parametrize("name", FILES)
def test_a_longer_and_a_shorter_file(name: str, out: Path) -> None:
    content = (out / name).read_bytes()
    for other in (content + b"\n", content[:-1], b""):
        (out / name).write_bytes(other)
        verification = verify(out)
        assert not verification.ok
        assert any(name in fault for fault in verification.faults)


def swap_mask_bits(mask: torch.Tensor) -> None:
    """In the first group of row 2, drop a kept channel and keep a dropped one: still exactly N of M."""
    bits = [int(mask[2, 0]) >> bit & 1 for bit in range(4)]
    mask[2, 0] ^= (1 << bits.index(0)) | (1 << bits.index(1))


def exchange_values(values: torch.Tensor) -> None:
    """The two kept values of row 3's first group, each in the other's place."""
    assert values[3, 0] != values[3, 1]
    values[3, :2] = values[3, :2].flip(0).clone()


def negate_a_value(values: torch.Tensor) -> None:
    values[4, 5] *= -1


def flip_low_bit(values: torch.Tensor) -> None:
    values.view(torch.int16)[0, 0] ^= 1


FORGERIES = [
    ("weight_mask", swap_mask_bits),
    ("weight_values", exchange_values),
    ("weight_values", negate_a_value),
    ("weight_values", flip_low_bit),
]


@pytest.mark.parametrize(("part", "edit"), FORGERIES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("layer", [DOWN, OUT, QUERY, VALUE])
def test_forgeries_are_found_by_the_source(
    layer: str, part: str, edit: Callable[[torch.Tensor], None], out: Path, llama: Path
) -> None:
    """With all checksums recomputed nothing is wrong by itself; position by position it is."""
    forge(out, f"{layer}.{part}", edit)
    alone = verify(out)
    assert alone.ok
    assert not alone.against_source
    assert found(verify(out, source=llama), layer)


def test_another_mask_with_its_own_source_values(out: Path, llama: Path) -> None:
    """Every kept value is the source's at its place, but it is not the selection that was made: the error tells."""
    shard = tiny.shard_of(out, f"{QUERY}.weight_values")
    tensors = load_file(shard)
    mask, values = tensors[f"{QUERY}.weight_mask"], tensors[f"{QUERY}.weight_values"]
    order = tensors[f"{QUERY}.input_permutation"].long()
    source = tiny.read_tensors(llama)[f"{QUERY}.weight"][2, order]
    swap_mask_bits(mask)
    values[2, :2] = source[[bit for bit in range(4) if int(mask[2, 0]) >> bit & 1]]
    save_file(tensors, shard)
    tiny.reseal(out)
    assert verify(out).ok
    verification = verify(out, source=llama)
    assert found(verification, QUERY)
    assert "weighted error" in verification.faults[0]


def swap_places(permutation: torch.Tensor) -> None:
    permutation[[0, 9]] = permutation[[9, 0]]


def test_a_wrong_stored_permutation(out: Path, llama: Path) -> None:
    """In all three layers that share it (alone it is seen even without the source)."""
    names = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    for name in names:
        forge(out, f"{name}.input_permutation", swap_places)
    assert verify(out).ok
    verification = verify(out, source=llama)
    assert {check.name for check in verification.layers if not check.ok} == set(names)
    assert all(any(fault.startswith(f"{name}: ") for fault in verification.faults) for name in names)


def test_copies_of_a_permutation_that_differ(out: Path) -> None:
    forge(out, f"{VALUE}.input_permutation", swap_places)
    verification = verify(out)
    assert found(verification, VALUE)
    assert f"differs from that of {QUERY}, whose input it shares" in verification.faults[0]


def test_a_stored_permutation_that_is_none(out: Path) -> None:
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}_proj.input_permutation"
        forge(out, name, lambda permutation: permutation[:1].copy_(permutation[1:2]))
    verification = verify(out)
    assert len(verification.faults) == 3
    assert all("its input_permutation is not a permutation" in fault for fault in verification.faults)


@pytest.mark.parametrize("layer", [DOWN, OUT])
def test_a_tampered_folded_permutation(layer: str, out: Path, llama: Path) -> None:
    """Its layer's columns, and where it has producers of the same width their rows, are not the source's any more."""
    forge(out, f"{layer}.input_permutation", swap_places, tiny.PERMUTATIONS)
    assert verify(out).ok
    verification = verify(out, source=llama)
    faulty = {check.name for check in verification.layers if not check.ok}
    mlp = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert faulty == (mlp if layer == DOWN else {OUT})


def test_a_folded_permutation_that_is_none(out: Path, llama: Path) -> None:
    forge(out, f"{DOWN}.input_permutation", lambda order: order[:1].copy_(order[1:2]), tiny.PERMUTATIONS)
    verification = verify(out, source=llama)
    assert any("is not a permutation" in fault and "model.layers.1.mlp" in fault for fault in verification.faults)


@pytest.mark.parametrize("edit", ["tensor", "dimension", "permutation", "nothing", "text"])
def test_a_forged_list_of_reordered_tensors(edit: str, out: Path, llama: Path) -> None:
    """Whatever stands there, verify says that it is wrong and does not fall over."""
    path = out / tiny.PERMUTATIONS
    with safe_open(path, "pt") as file:
        about: Any = json.loads(file.metadata()["streamprune"])
    entry = next(item for item in about if item["permutation"] == f"{DOWN}.input_permutation")
    if edit == "tensor":
        entry["reorders"][0][0] = f"{QUERY}.weight"
    elif edit == "dimension":
        entry["reorders"][0][1] = 5
    elif edit == "permutation":
        entry["permutation"] = "nowhere"
    elif edit == "nothing":
        about.clear()
    else:
        about[0] = "text"
    save_file(load_file(path), path, metadata={"streamprune": json.dumps(about)})
    tiny.reseal(out)
    verification = verify(out, source=llama)
    assert not verification.ok
    assert all("\n" not in fault for fault in verification.faults)


def test_a_tampered_input_rms(out: Path, llama: Path) -> None:
    forge(out, f"{DOWN}.input_rms", lambda rms: rms[3:4].mul_(1.01), tiny.STATISTICS)
    assert verify(out).ok
    verification = verify(out, source=llama)
    assert found(verification, DOWN)
    assert "weighted error recomputed" in verification.faults[0]


def test_a_tampered_weighted_error(out: Path, llama: Path) -> None:
    def improve(manifest: Any) -> None:
        layer = next(layer for layer in manifest["blocks"][1]["layers"] if layer["name"] == DOWN)
        layer["weighted_error"] *= 0.999999

    tiny.reseal(out, improve)
    assert verify(out).ok
    assert found(verify(out, source=llama), DOWN)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate_proj.bias", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_changed_dense_tensor(name: str, out: Path, llama: Path) -> None:
    forge(out, name, lambda tensor: tensor[5:6].mul_(-1))
    assert verify(out).ok
    verification = verify(out, source=llama)
    assert any(fault.startswith(f"{name}: ") for fault in verification.faults)


def test_a_group_that_keeps_another_number(out: Path) -> None:
    def move_a_bit(mask: torch.Tensor) -> None:
        """From the first group of row 2 to the second: as many bits as before."""
        low, high = int(mask[2, 0]) & 0xF, int(mask[2, 0]) >> 4
        low &= low - 1
        mask[2, 0] = low | (high | ~high & (high + 1)) << 4

    forge(out, f"{DOWN}.weight_mask", move_a_bit)
    verification = verify(out)
    assert found(verification, DOWN)
    assert "row 2, group 0 keeps 1 of 4, not 2" in verification.faults[0]


def test_padding_bits(copy_of: Callable[..., Path]) -> None:
    """156 inputs leave four bits of the last byte over."""
    out = copy_of("opt")
    name = "model.decoder.layers.1.fc2"
    forge(out, f"{name}.weight_mask", lambda mask: mask[0, -1:].bitwise_or_(0x10))
    verification = verify(out)
    assert found(verification, name)
    assert "padding bits" in verification.faults[0]


def test_another_source(out: Path, llama: Path, tmp_path: Path) -> None:
    """One that differs in a weight that was dropped: only the digest of its bytes can tell."""
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    tensors = load_file(tiny.shard_of(out, f"{VALUE}.weight_mask"))
    order = tensors[f"{QUERY}.input_permutation"].tolist()
    bit = next(bit for bit in range(4) if not int(tensors[f"{QUERY}.weight_mask"][0, 0]) >> bit & 1)
    tiny.edit_tensor(other / "model.safetensors", f"{QUERY}.weight", lambda weight: weight[0, order[bit]].mul_(0.5))
    verification = verify(out, source=other)
    assert any(
        f"{QUERY}.weight: the source is not the one that was compressed" in fault for fault in verification.faults
    )


def test_a_source_of_another_shape(out: Path, sources: Callable[[str], Path]) -> None:
    """The comparison cannot be done, and the result says that it was not."""
    for source in (sources("opt"), sources("llama-plain")):
        verification = verify(out, source=source)
        assert not verification.ok
        assert verification.faults


def test_no_source_and_no_folder(out: Path, tmp_path: Path) -> None:
    """Not a fault of the output: the command was given something else."""
    with pytest.raises(CheckpointError, match="is itself an output of streamprune; give --source the dense model"):
        verify(out, source=out)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        verify(out, source=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        verify(tmp_path / "nowhere")


def test_folders_that_are_no_output(llama: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, llama):
        verification = verify(folder)
        assert not verification.ok
        assert len(verification.faults) == 1
        assert "is not a finished output" in verification.faults[0]
        assert verification.layers == []
        assert verification.manifest_sha256 is None


@pytest.mark.parametrize("value", [None, [], "text", 7, {}])
@pytest.mark.parametrize("key", ["files", "blocks", "source_tensors"])
def test_a_malformed_manifest(key: str, value: Any, out: Path, llama: Path) -> None:
    """A forger's manifest of the wrong kind is a fault, not a traceback."""
    manifest = tiny.read_json(out / tiny.MANIFEST)
    manifest[key] = value
    tiny.write_json(out / tiny.MANIFEST, manifest)
    (out / tiny.MANIFEST_DIGEST).write_text(f"{tiny.sha256(out / tiny.MANIFEST)}  {tiny.MANIFEST}\n")
    verification = verify(out, source=llama)
    assert not verification.ok
    assert verification.faults


def test_files_outside_the_folder_are_not_read(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")

    def point_outside(manifest: Any) -> None:
        manifest["files"]["../secret"] = {"sha256": tiny.sha256(tmp_path / "secret"), "bytes": 1}

    tiny.reseal(out, point_outside)
    verification = verify(out)
    assert any("../secret" in fault for fault in verification.faults)


def test_json_keys(outputs: Callable[..., Path]) -> None:
    result = dataclasses.asdict(verify(outputs("llama")))
    assert {"ok", "layers", "faults"} <= result.keys()
    assert all({"name", "relative_error", "ok"} <= layer.keys() for layer in result["layers"])
