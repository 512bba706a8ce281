"""Packed layers merged and cut as serving engines do: what they are then, and what is refused."""

import pytest
import torch

from streamprune.config import NMPattern
from streamprune.errors import SettingsError
from streamprune.integrations.merged import Layer, check_cut, check_experts, merged_layer
from streamprune_kernels import pack_mask, pack_values, packed_linear, select_groups

TWO_FOUR, PERMUTED = Layer(NMPattern(2, 4), False), Layer(NMPattern(2, 4), True)
MERGES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("m.0.o_proj", {"m.0.o_proj": TWO_FOUR}, TWO_FOUR),
        ("m.0.o_proj", {"m.1.o_proj": TWO_FOUR}, None),
        ("m.0.qkv_proj", {f"m.0.{part}_proj": PERMUTED for part in "qkv"}, PERMUTED),
        ("qkv_proj", {f"{part}_proj": PERMUTED for part in "qkv"}, PERMUTED),
        ("m.0.qkv_proj", {"m.0.qkv_proj": TWO_FOUR}, TWO_FOUR),  # merged on disk
        ("m.0.gate_up_proj", {"m.0.gate_up_proj": TWO_FOUR}, TWO_FOUR),
        ("m.0.qkv_proj", {}, None),
    ],
)
def test_a_layer_is_what_its_parts_are(name: str, layers: dict[str, Layer], expected: Layer | None) -> None:
    assert merged_layer(name, MERGES, layers) == expected


def test_experts_are_refused_by_name() -> None:
    check_experts(["m.0.mlp.shared_experts.up_proj", "m.0.mlp.experts_proj"])
    with pytest.raises(SettingsError, match=r"^layer m\.0\.mlp\.experts\.0\.w1: is one expert's, and vLLM .*$"):
        check_experts(["m.0.o_proj", "m.0.mlp.experts.0.w1", "m.0.mlp.experts.1.w1"])


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((TWO_FOUR, TWO_FOUR, None), "q_proj is 2:4, k_proj is 2:4, v_proj is dense"),
        ((TWO_FOUR, PERMUTED, PERMUTED), "q_proj is 2:4, k_proj is 2:4 permuted, v_proj is 2:4 permuted"),
        ((TWO_FOUR, TWO_FOUR, Layer(NMPattern(4, 8), False)), "q_proj is 2:4, k_proj is 2:4, v_proj is 4:8"),
    ],
)
def test_parts_that_differ_are_refused_in_one_line(kinds: tuple[Layer | None, ...], said: str) -> None:
    parts = zip(MERGES["qkv_proj"], kinds, strict=True)
    layers = {f"m.{part}": kind for part, kind in parts if kind is not None}
    with pytest.raises(
        SettingsError, match=f"^layer m.qkv_proj: {said}; they are merged.*dense by `streamprune export`$"
    ):
        merged_layer("m.qkv_proj", MERGES, layers)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 3), NMPattern(5, 16)])
def test_the_parts_of_a_cut_weight_add_up_to_its_product(pattern: NMPattern, parts: int) -> None:
    """Parts are taken from the tensors as vLLM's loaders take them: by their sizes, one after the other."""
    torch.manual_seed(4)
    whole = 4 * 48
    weight, x = torch.randn(24, whole), torch.randn(3, whole)
    keep = select_groups(weight.abs(), pattern.kept, pattern.group_size)
    values, mask = pack_values(weight, keep), pack_mask(keep)
    inputs = whole // parts
    kept, mask_bytes = check_cut("down", Layer(pattern, False), inputs, whole)
    assert (kept * parts, mask_bytes * parts) == (values.shape[1], mask.shape[1])
    products = [
        packed_linear(
            x.narrow(1, part * inputs, inputs).contiguous(),
            values.narrow(1, part * kept, kept).contiguous(),
            mask.narrow(1, part * mask_bytes, mask_bytes).contiguous(),
        )
        for part in range(parts)
    ]
    torch.testing.assert_close(sum(products), x @ (weight * keep).T, rtol=1e-5, atol=1e-5)


def test_a_mask_with_padding_is_whole_where_nothing_is_cut() -> None:
    assert check_cut("fc2", PERMUTED, 156, 156) == (78, 20)


@pytest.mark.parametrize(
    ("layer", "inputs", "whole", "reason"),
    [
        (TWO_FOUR, 78, 156, "2 parts: parts of 78 do not end with a group of 4 and a byte of the mask"),
        (TWO_FOUR, 36, 72, "2 parts: parts of 36 do not end with a group of 4 and a byte of the mask"),
        (Layer(NMPattern(8, 16), False), 24, 48, "2 parts: parts of 24 do not end with a group of 16"),
        (PERMUTED, 32, 128, "4 parts: its stored input permutation crosses them"),
    ],
)
def test_cuts_elsewhere_are_refused_in_one_line(layer: Layer, inputs: int, whole: int, reason: str) -> None:
    with pytest.raises(
        SettingsError, match=f"^layer down: its {whole} input channels cannot be cut into {reason}"
    ) as why:
        check_cut("down", layer, inputs, whole)
    assert str(why.value).endswith("; serve with another --tensor-parallel-size, or the dense export")
