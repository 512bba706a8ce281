"""One Wanda job of llm-compressor; run by bench_llmcompressor.py with the interpreter of that library's environment.

    python llmcompressor_job.py MODEL TOKENS OUT NORMS

Needs the package llmcompressor, which that environment has. TOKENS is a JSON list of sequences of token ids, NORMS the
precision of the inputs' norms: float32 is llm-compressor's own, float64 is put in its place to learn what rounding
does. Prints one JSON line: versions, seconds from the first byte read to the last written without imports, and peak
memory of the process, with and without the saving of the model.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def norms_in_float64() -> None:
    """Have llm-compressor sum, and compare, in float64."""
    import torch
    from llmcompressor.modifiers.pruning.wanda import base, wanda_sparsify

    wanda_sparsify.WANDA_PRECISION = torch.float64
    base.make_empty_row_scalars = lambda module, device=None: torch.zeros(module.weight.shape[1], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("norms", metavar="NORMS", choices=("float32", "float64"))
    given = parser.parse_args()
    try:
        compress(given.model, given.tokens, given.out, given.norms)
    except ModuleNotFoundError as error:
        parser.exit(2, f"{error}: run bench_llmcompressor.py, which makes an environment with llm-compressor\n")


def compress(model: str, tokens: str, out: str, norms: str) -> None:
    """The job; what it imports counts on neither side."""
    import datasets
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from transformers import AutoModelForCausalLM

    ids = json.loads(Path(tokens).read_text())
    data = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    if norms == "float64":
        norms_in_float64()
    head = "re:.*lm_head.*"  # the plain name is not ignored, as it is compared with "lm_head."
    recipe = WandaPruningModifier(targets=["Linear"], ignore=[head], sparsity=0.5, mask_structure="2:4")
    start = time.perf_counter()
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    length = len(ids[0])
    oneshot(model=dense, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=length)
    before_saving = peak_memory_bytes()
    dense.bfloat16().save_pretrained(out)
    seconds = time.perf_counter() - start
    peaks = {"peak_memory_bytes": peak_memory_bytes(), "peak_before_saving_bytes": before_saving}
    names = ("llmcompressor", "transformers", "torch", "compressed-tensors")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"seconds": seconds, **peaks, "versions": versions}))


if __name__ == "__main__":
    main()
