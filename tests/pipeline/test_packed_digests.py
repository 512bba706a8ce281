"""Packed values, masks and permutations are, byte for byte, those of earlier versions.

packed_digests.json holds, by how a machine rounds a source's logits, the digest of each kind of job. It was made by the
version before blocks and weights became objects: `python tests/pipeline/test_packed_digests.py` adds this machine's
rounding (all but reconstruction is the same with AVX2 and AVX-512). A change of the method itself makes them anew and
says so in CHANGELOG.md.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from streamprune.errors import Interrupted
from streamprune.pipeline.compress import compress

DIGESTS = Path(__file__).with_name("packed_digests.json")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"metric {metric}": {"metric": metric} for metric in ("wanda", "ria", "magnitude")},
    **{
        f"shuffle {shuffle}": {"shuffle": shuffle, "refine": False}
        for shuffle in ("none", "stride", "global", "local", "assignment", "stride+global+local", "residual+assignment")
    },
    "residual, refined": {"shuffle": "residual+local"},
    "across heads": {"fold": "across-heads"},
    "4:8": {"pattern": "4:8", "entropy_range": "layer", "relative": True, "amplitude": "rms"},
    "1:4, energy": {"pattern": "1:4", "objective": "energy", "correction": 0.0},
    "narrow moments": {"moments_width": 64, "shrinkage": 0.2, "correction_stride": 1},
    "reconstructed": {"reconstruct": True},
    "not validated": {"metric": "magnitude", "validate": False},
    "kept dense": {"max_block_error": 0.3, "on_excess": "keep-dense"},
}
SOURCES: dict[str, Callable[[Path], Path]] = {"llama": tiny.write_llama, "opt": tiny.write_opt}
PARTS = (".weight_values", ".weight_mask", ".input_permutation", ".output_permutation", "residual.permutation")


def digest_of(out: Path) -> str:
    """sha256 over name, dtype, shape and bytes of every packed part in a folder, whatever the files are called."""
    digest = hashlib.sha256()
    paths = [*out.glob("*.safetensors"), *out.glob("*.st")]
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    for name in sorted(name for name in tensors if name.endswith(PARTS)):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pruned(source: Path, out: Path, text: Path, settings: dict[str, Any], resumed: bool) -> Path:
    given = {"calibration": str(text), **tiny.CALIBRATION, **settings}
    if resumed:
        with pytest.raises(Interrupted):
            compress(source, out, should_stop=(out / ".work" / "block-00000.json").exists, **given)
    compress(source, out, **given)
    return out


def rounding_of(source: Path) -> str:
    """sha256 of a dense model's logits by plain transformers: how this machine's libraries round."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.arange(48)[None], use_cache=False).logits
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "resumed"])
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("source", list(SOURCES))
def test_packed_parts_are_those_of_before(
    source: str, name: str, resumed: bool, sources: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    known: dict[str, dict[str, str]] = json.loads(DIGESTS.read_text())
    if SETTINGS[name].get("validate", True):
        digests = known.get(rounding_of(sources(source)))
        if digests is None:
            pytest.skip("no digests are known for how this processor's libraries round; without a text they are")
    else:  # weights alone decide
        digests = next(of_source for of_source in known.values() if of_source["source"] == source)
    out = pruned(sources(source), tmp_path / "out", calibration, SETTINGS[name], resumed)
    assert digest_of(out) == digests[name]


def main() -> None:
    """Add the digests of this version on this machine to those that are known."""
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.txt"
        text.write_text(tiny.text(20_000, seed=1))
        for source, write in SOURCES.items():
            model = write(Path(folder) / source)
            digests = known[rounding_of(model)] = {"source": source}
            for name, settings in SETTINGS.items():
                out = Path(folder) / f"{source} {name}"
                digests[name] = digest_of(pruned(model, out, text, settings, resumed=False))
    tiny.write_json(DIGESTS, known)


if __name__ == "__main__":
    main()
