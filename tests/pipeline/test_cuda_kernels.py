"""A whole job whose products of packed weights are made by the CUDA kernels' own source, on the CPU."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from cuda_tools import host

from streamprune.pipeline.compress import CompressResult
from streamprune_kernels.launch import Launch, standing_in
from streamprune_kernels.reference import unpack_mask

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host shim needs a C++ compiler")
EQUAL_BITS = 0.995


def test_a_job_by_the_kernels_of_a_gpu(prune: Callable[..., CompressResult], tmp_path: Path) -> None:
    """Block 0 has the plain path's masks, all of it nearly so, and errors agree."""
    launched: Counter[str] = Counter()

    def run(launch: Launch) -> None:
        launched[launch.kernel] += 1
        host.run(launch)

    settings = {"dtype": "bfloat16", "samples": 2}
    prune("llama", tmp_path / "plain", **settings)
    with standing_in(run):
        prune("llama", tmp_path / "kernels", **settings)
    assert launched["sparse_gemm_bf16_128"]
    assert launched["add_tokens_bf16"]
    assert any(name.startswith("nm_gemm_bf16") for name in launched)
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
