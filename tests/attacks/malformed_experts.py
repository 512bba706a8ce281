"""Mixtures of experts that are none: tensors of experts, their numbers, and how tokens are sent to them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from attacks.catalogue import Catalogue, config_with

CATALOGUE = Catalogue()
Tensors = dict[str, torch.Tensor]
APART, FUSED = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"  # mixtral, gpt_oss


def changed(case: Path, change: Callable[[Tensors], Any]) -> None:
    path = case / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def without(start: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    return drop


def resized(name: str, resize: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: resize(tensors[name])})


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def mxfp4(tensors: Tensors) -> None:
    """As gpt_oss is published."""
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        rows = tensors.pop(name).shape[2]
        tensors[f"{name}_blocks"] = torch.zeros(4, rows, 1, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(4, rows, 1, dtype=torch.uint8)


def fp8(tensors: Tensors) -> None:
    """As deepseek_v3 is published, whose scales lie beside the weights."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


STRAY = "is none of the experts' weights; give these as they are used"
W1, W2, W3 = (f"{APART}.1.w{number}.weight" for number in (1, 2, 3))
UP, DOWN = f"{FUSED}.gate_up_proj", f"{FUSED}.down_proj"
EXTRA = torch.ones(48, 32)
WEIGHTS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "an expert less": ("mixtral", without(f"{APART}.3."), "3 tensors are missing, first model.layers.0.mlp.experts.3."),
    "no expert": ("mixtral", without(f"{APART}."), "4 experts, and the checkpoint has 0 tensors of them"),
    "a matrix of an expert less": (
        "mixtral",
        without(W2),
        "1 tensors are missing, first model.layers.0.mlp",
    ),
    "an expert more": ("mixtral", added(f"{APART}.4.w1.weight", EXTRA), "is of an expert beyond the 4 of config.json"),
    "an expert of a name": ("mixtral", added(f"{APART}.x.w1.weight", EXTRA), STRAY),
    "an expert of fewer rows": ("mixtral", resized(W3, lambda w: w[:40]), "[40, 32], config.json makes it [48, 32]"),
    "an expert of a vector": ("mixtral", resized(W3, lambda w: w[0]), "has shape [32], config.json makes it [48, 32]"),
    "an expert of whole numbers": ("mixtral", resized(W1, lambda w: w.to(torch.int8)), "must be unquantized"),
    "a scale beside an expert": ("mixtral", added(f"{W3}_scale_inv", torch.ones(1)), STRAY),
    "FP8 experts with scales": ("mixtral", fp8, "the source is quantised"),
    "in one tensor, one less": ("gpt_oss", resized(DOWN, lambda w: w[:3]), "[3, 48, 32], config.json makes it 4"),
    "in one tensor, one more": ("gpt_oss", resized(DOWN, lambda w: w.repeat(2, 1, 1)), "config.json makes it 4"),
    "in one tensor of other rows": ("gpt_oss", resized(UP, lambda w: w[:, :16]), "gate_up_proj[0] has shape [16, 96]"),
    "in one number": ("gpt_oss", resized(DOWN, torch.sum), "has shape [], config.json makes it 4 experts"),
    "in one tensor, biases of three": ("gpt_oss", resized(f"{DOWN}_bias", lambda b: b[:3]), "has shape [3, 32]"),
    "in one tensor, and a slice of it": ("gpt_oss", added(f"{DOWN}[3]", EXTRA), f"tensor {DOWN}[3] is there beside"),
    "in one tensor, which is not there": ("gpt_oss", without(DOWN), "8 tensors are missing"),
    "of MXFP4": ("gpt_oss", mxfp4, STRAY),
    "a scale beside all": ("gpt_oss", added(f"{UP}_scale_inv", torch.ones(4)), STRAY),
}
for fault, (base, change, message) in WEIGHTS.items():
    make = functools.partial(changed, change=change)
    CATALOGUE.put(f"experts: {fault}", base, "plan", 3, message, make, "one fault in a mixture's tensors")

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a milliard experts": ("mixtral", {"num_local_experts": 10**9}, "num_local_experts is 1000000000, beyond"),
    "a milliard experts in one tensor": ("gpt_oss", {"num_local_experts": 10**9}, "is 1000000000, beyond"),
    "more experts than tensors": ("mixtral", {"num_local_experts": 128}, "128 experts, and the checkpoint has"),
    "more experts than the tensor has": ("gpt_oss", {"num_local_experts": 128}, "128 experts, and the checkpoint has"),
    "an expert more than there are": ("mixtral", {"num_local_experts": 5}, "first model.layers.0.mlp.experts.4.w1"),
    "an expert less than there are": ("mixtral", {"num_local_experts": 3}, "of an expert beyond the 3 of config.json"),
    "no experts": ("mixtral", {"num_local_experts": 0}, "config.json"),
    "fewer than no experts": ("mixtral", {"num_local_experts": -1}, "makes no model"),
    "experts of text": ("mixtral", {"num_local_experts": "4"}, "makes no model"),
    "more experts a token than there are": ("mixtral", {"num_experts_per_tok": 5}, "is 5, and there are 4 experts"),
    "no experts a token": ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, and there are 4 experts"),
    "fewer than none a token": ("gpt_oss", {"num_experts_per_tok": -1}, "is -1, and there are 4 experts"),
    "half an expert a token": ("mixtral", {"num_experts_per_tok": 0.5}, "makes no model"),
    "groups that do not divide the experts": ("deepseek_v3", {"n_group": 3}, "makes no model"),
    "no groups": ("deepseek_v3", {"n_group": 0}, "makes no model"),
    "more groups than there are": ("deepseek_v3", {"topk_group": 3}, "makes no model"),
    "fewer groups than none": ("deepseek_v3", {"topk_group": -1}, "makes no model"),
}
for fault, (base, changes, message) in CONFIGS.items():
    CATALOGUE.put(
        f"experts: {fault}", base, "plan", 3, message, config_with(**changes), "how many there are, or take part"
    )
