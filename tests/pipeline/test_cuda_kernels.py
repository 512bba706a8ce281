"""A whole job whose products of packed weights are made by the CUDA kernels' own source, on the CPU."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from cuda_tools import host
from cuda_tools.stand_in import standing_in

from streamprune.pipeline.compress import CompressResult
from streamprune_kernels.launch import Launch
from streamprune_kernels.reference import unpack_mask

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host shim needs a C++ compiler")
EQUAL_BITS = 0.995
REFERENCE = 4  # of a product's arguments: outputs to compare with


def test_a_job_by_the_kernels_of_a_gpu(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    """Block 0 has the plain path's masks, all of it nearly so, and errors agree."""
    launched: Counter[str] = Counter()
    with_reference = 0

    def run(launch: Launch) -> None:
        nonlocal with_reference
        launched[launch.kernel] += 1
        with_reference += "gemm" in launch.source and launch.arguments[REFERENCE] is not None
        host.run(launch)

    settings = {"dtype": "bfloat16", "samples": 2}
    prune("llama", tmp_path / "plain", **settings)
    with standing_in(run):
        prune("llama", tmp_path / "kernels", **settings)
    assert any(name.startswith("sparse_gemm_bf16") for name in launched)
    assert launched["add_tokens_bf16"]
    assert any(name.startswith("nm_gemm_bf16") for name in launched)
    assert launched["pack_values_16"]
    assert launched["hinge_sums"]
    assert launched["pack_mask"]
    assert launched["refine_rows"]
    layers = sum(len(block["layers"]) for block in tiny.read_json(tmp_path / "kernels" / tiny.MANIFEST)["blocks"])
    assert 0 < launched["sparse_metadata"] <= layers, "made once for each layer whose product wants it"
    assert with_reference == layers, "each layer's error is summed by its product's kernel"
    plain, kernels = (tiny.read_tensors(tmp_path / name) for name in ("plain", "kernels"))
    equal = total = 0
    for name in (name for name in plain if name.endswith(".weight_mask")):
        same = unpack_mask(plain[name], 8 * plain[name].shape[1]) == unpack_mask(
            kernels[name], 8 * kernels[name].shape[1]
        )
        if ".layers.0." in name:
            assert bool(same.all()), name
        equal, total = equal + int(same.sum()), total + same.numel()
    assert equal / total >= EQUAL_BITS
    manifests = [tiny.read_json(tmp_path / name / tiny.MANIFEST)["blocks"] for name in ("plain", "kernels")]
    for one, other in zip(*manifests, strict=True):
        assert other["block_error"] == pytest.approx(one["block_error"], rel=0.02)
        assert max(layer["kernel_error"] for layer in other["layers"]) < 1e-2
        for one_layer, other_layer in zip(one["layers"], other["layers"], strict=True):
            assert other_layer["layer_error"] == pytest.approx(one_layer["layer_error"], rel=0.02)


def test_weights_are_packed_to_the_same_bytes(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    """Without text and search nothing but packing differs: every file of the output has the plain path's bytes."""
    launched: Counter[str] = Counter()

    def run(launch: Launch) -> None:
        launched[launch.kernel] += 1
        host.run(launch)

    settings = {"metric": "magnitude", "validate": False, "shuffle": "none"}
    prune("llama", tmp_path / "plain", **settings)
    with standing_in(run):
        prune("llama", tmp_path / "kernels", **settings)
    assert set(launched) == {"pack_values_16", "pack_mask"}
    names = {path.name for path in (tmp_path / "plain").iterdir() if path.is_file()} - {"timings.json"}
    assert any(name.endswith(".safetensors") for name in names)
    for name in sorted(names):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "kernels" / name).read_bytes(), name
