"""PackedLinear, the public layer: made from dense and from packed weights, kept, restored, shown."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from streamprune import PackedLinear
from streamprune.config import NMPattern
from streamprune.errors import SettingsError
from streamprune_kernels import pack_mask, pack_values, reference, select_groups

PATTERNS = ["2:4", "4:8", "1:4", "2:8", "1:2", "3:4", "5:16"]


def weight(out_features: int = 12, in_features: int = 96, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_dense_keeps_the_largest_magnitudes(pattern: str, dtype: torch.dtype) -> None:
    dense = weight(dtype=dtype)
    layer = PackedLinear.from_dense(dense, pattern)
    n, m = (int(number) for number in pattern.split(":"))
    expected = torch.zeros_like(dense)
    for row in range(len(dense)):
        for first in range(0, dense.shape[1], m):
            group = dense[row, first : first + m].float().abs().tolist()
            for place in sorted(range(m), key=lambda place: (-group[place], place))[:n]:
                expected[row, first + place] = dense[row, first + place]
    assert torch.equal(layer.dense_weight(), expected)
    assert layer.weight_values.dtype == dtype
    x = inputs(2, 3, 96)
    torch.testing.assert_close(layer(x), functional.linear(x, expected.float()), rtol=1e-5, atol=1e-5)


def test_of_equal_magnitudes_the_lower_channels_stay() -> None:
    layer = PackedLinear.from_dense(torch.tensor([[1.0, -1.0, 1.0, -1.0, -2.0, 3.0, 3.0, 3.0]]))
    assert layer.dense_weight().tolist() == [[1, -1, 0, 0, 0, 3, 3, 0]]


def test_from_dense_takes_a_parameter_with_its_bias_and_copies_both() -> None:
    linear = nn.Linear(8, 4)
    layer = PackedLinear.from_dense(linear.weight, "2:4", linear.bias)
    before = layer(torch.ones(2, 8))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with torch.no_grad():
        linear.weight.fill_(0)
        linear.bias.fill_(0)
    assert torch.equal(layer(torch.ones(2, 8)), before)
    assert before.abs().max() > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_packed_finds_the_pattern_and_undoes_the_permutation(pattern: str) -> None:
    dense, parsed = weight(), NMPattern.parse(pattern)
    keep = select_groups(dense.abs(), parsed.kept, parsed.group_size)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    bias = inputs(12)
    layer = PackedLinear.from_packed(
        pack_values(dense, keep), pack_mask(keep), in_features=96, bias=bias, permutation=order
    )
    assert layer.pattern == parsed
    expected = torch.empty_like(dense).index_copy_(1, order.long(), dense.masked_fill(~keep, 0))
    assert torch.equal(layer.dense_weight(), expected)
    x = inputs(30, 96)
    torch.testing.assert_close(layer(x), functional.linear(x, expected, bias), rtol=1e-5, atol=1e-5)


def test_state_goes_round() -> None:
    source = PackedLinear.from_dense(weight(dtype=torch.bfloat16), "4:8", inputs(12).bfloat16())
    order = torch.randperm(96).to(torch.int32)
    source = PackedLinear.from_packed(
        source.weight_values, source.weight_mask, in_features=96, bias=source.bias, permutation=order
    )
    state = source.state_dict()
    assert list(state) == ["weight_values", "weight_mask", "bias", "input_permutation"]
    target = PackedLinear(96, 12, "4:8", permuted=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="a mask does not keep 48 values"):
        target(inputs(1, 96))  # empty so far
    target.load_state_dict(state)
    for layer in (target, copy.deepcopy(source)):
        assert torch.equal(layer(inputs(3, 96)), source(inputs(3, 96)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PackedLinear(96, 12, "1:8", permuted=True).load_state_dict(state)


def test_the_arithmetics_dtype_is_the_inputs() -> None:
    layer = PackedLinear.from_dense(weight())
    assert layer(inputs(2, 96).bfloat16()).dtype == torch.bfloat16
    half = layer.half()
    assert (half.weight_values.dtype, half.weight_mask.dtype) == (torch.float16, torch.uint8)
    assert half(inputs(2, 96)).dtype == torch.float32


def test_repr_shows_pattern_and_shape() -> None:
    assert repr(PackedLinear.from_dense(weight(12, 96, torch.bfloat16), "1:4")) == (
        "PackedLinear(in_features=96, out_features=12, pattern=1:4, bias=False, dtype=bfloat16)"
    )
    assert repr(PackedLinear(8, 4, permuted=True)) == (
        "PackedLinear(in_features=8, out_features=4, pattern=2:4, bias=True, permuted, dtype=float32)"
    )


def test_a_model_of_packed_layers_compiles() -> None:
    model = nn.Sequential(PackedLinear.from_dense(weight(64, 96)), nn.ReLU(), PackedLinear.from_dense(weight(8, 64)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs(4, 96)), model(inputs(4, 96)))


PACKED: dict[str, Any] = {
    "values": torch.ones(3, 4),
    "mask": torch.full((3, 1), 0b00110011, dtype=torch.uint8),
    "in_features": 8,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.zeros(3, 2, dtype=torch.uint8)}, r"a mask \[3, 2\] of torch.uint8 does not fit 8 inputs"),
        ({"mask": torch.zeros(3, 1)}, "of torch.float32 does not fit"),
        ({"values": torch.ones(4)}, "does not fit"),
        ({"pattern": "1:4"}, "1:4 of 8 inputs keeps 2 weights a row, the values hold 4"),
        ({"pattern": "2:5"}, "2:5 does not divide 8 input channels"),
        ({"mask": torch.tensor([[0b00110011]] * 2 + [[0b00000111]], dtype=torch.uint8)}, "does not keep N of every M"),
        ({"mask": torch.tensor([[0b00110011]] * 2 + [[0b00011111]], dtype=torch.uint8)}, "does not keep N of every M"),
        ({"bias": torch.zeros(4)}, r"a bias \[4\] does not fit 3 outputs"),
        ({"permutation": torch.arange(8)}, "not an int32 one of 8 channels"),
        ({"permutation": torch.zeros(8, dtype=torch.int32)}, "not an int32 one of 8 channels"),
        ({"permutation": torch.arange(4, dtype=torch.int32)}, "not an int32 one of 8 channels"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_packed_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLinear.from_packed(**{**PACKED, **changes})
    assert PackedLinear.from_packed(**PACKED).pattern == NMPattern(2, 4)


def test_dense_weights_that_cannot_be_ranked_or_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        PackedLinear.from_dense(torch.full((2, 4), float("nan")))
    with pytest.raises(ValueError, match="2:4 does not divide 6 input channels"):
        PackedLinear.from_dense(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"a weight is \[out, in\], not \[4\]"):
        PackedLinear.from_dense(torch.ones(4))
    with pytest.raises(SettingsError, match="is not N:M"):
        PackedLinear.from_dense(torch.ones(2, 4), "half")


def test_a_dense_mask_is_no_pattern() -> None:
    with pytest.raises(ValueError, match="does not keep N of every M"):
        PackedLinear.from_packed(torch.ones(3, 8), torch.full((3, 1), 0xFF, dtype=torch.uint8), in_features=8)


def test_the_layer_is_the_reference_product() -> None:
    layer = PackedLinear.from_dense(weight())
    x = inputs(30, 96)
    expected = reference.nm_linear(x, layer.weight_values, layer.weight_mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
