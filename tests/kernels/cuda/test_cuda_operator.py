"""The operator and PackedLinear where CUDA kernels take the products, on the CPU: what is made once, and what runs."""

import copy
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from cuda_tools import host
from cuda_tools.layers import Layer, assert_accurate, assert_error_sums, random_inputs, random_layer
from cuda_tools.stand_in import standing_in

from streamprune import PackedLinear
from streamprune_kernels import gemm, operator, packed_linear, packed_linear_with_error, packed_metadata
from streamprune_kernels.launch import Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host shim needs a C++ compiler")
PATTERNS = ((2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (3, 8))


@pytest.fixture
def launched() -> Iterator[Counter[str]]:
    """Kernels by name, of launches that the CPU takes as a GPU would."""
    counted: Counter[str] = Counter()

    def run(launch: Launch) -> None:
        counted[launch.kernel] += 1
        host.run(launch)

    with standing_in(run):
        yield counted


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often masks are unpacked to be checked."""
    counted: Counter[str] = Counter()
    original = gemm.unpack_mask

    def counting(mask: torch.Tensor, in_features: int) -> torch.Tensor:
        counted["masks"] += 1
        return original(mask, in_features)

    monkeypatch.setattr(gemm, "unpack_mask", counting)
    return counted


def packed(layer: Layer, in_features: int) -> PackedLinear:
    pattern = f"{layer.kept}:{layer.group_size}"
    values, mask, bias = layer.values.clone(), layer.mask.clone(), layer.bias.clone()
    return PackedLinear.from_packed(values, mask, in_features=in_features, pattern=pattern, bias=bias)


def test_metadata_is_made_once_for_a_layer(launched: Counter[str], checked: Counter[str]) -> None:
    layer = random_layer(72, 128, 2, 4, torch.float16)
    module = packed(layer, 128)
    for tokens in (20, 129):
        x = random_inputs(tokens, 128, torch.float16)
        assert_accurate(module(x), x, layer)
    assert launched == {"sparse_metadata": 1, "sparse_gemm_f16_128x32": 1, "sparse_gemm_f16_128x128": 1}
    assert not checked
    assert_accurate(module(x[:2]), x[:2], layer)
    assert launched["decode24_f16_2"] == launched["sparse_metadata"] == 1


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_a_mask_is_checked_once_for_a_layer(
    pattern: tuple[int, int], launched: Counter[str], checked: Counter[str]
) -> None:
    layer = random_layer(24, 96, *pattern, torch.bfloat16)
    module, x = packed(layer, 96), random_inputs(9, 96, torch.bfloat16)
    for _ in range(2):
        assert_accurate(module(x), x, layer)
    assert sum(launched.values()) == 2
    assert checked["masks"] == 1


def test_metadata_follows_the_weights(launched: Counter[str]) -> None:
    """Copied, pickled, cast, loaded, assigned: products are always those of the weights that are there."""
    layers = [random_layer(72, 64, 2, 4, torch.float16, seed) for seed in (0, 1)]
    x = random_inputs(10, 64, torch.float16)
    module = packed(layers[0], 64)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu"), module.half()):
        assert again.weight_metadata is not None
        assert_accurate(again(x), x, layers[0])
    for assign in (False, True):
        for layer in reversed(layers):
            source = packed(layer, 64).state_dict()
            assert "weight_metadata" not in source
            module.load_state_dict({name: tensor.clone() for name, tensor in source.items()}, assign=assign)
            assert module.weight_metadata is not None
            assert_accurate(module(x), x, layer)
    module.weight_mask, module.weight_values, module.bias = layers[1].mask, layers[1].values, layers[1].bias
    assert module.weight_metadata is None
    assert_accurate(module(x), x, layers[1])


def test_weights_that_no_kernel_takes_have_no_metadata(launched: Counter[str]) -> None:
    for dtype, in_features in ((torch.float32, 64), (torch.float16, 60)):
        layer = random_layer(8, in_features, 2, 4, dtype)
        module, x = packed(layer, in_features), random_inputs(12, in_features, dtype)
        assert module.weight_metadata is None
        assert_accurate(module(x), x, layer)
    assert not any("gemm" in name for name in launched)


def test_an_empty_layer_waits_for_its_weights(launched: Counter[str]) -> None:
    layer = random_layer(24, 64, 2, 4, torch.float16)
    module, x = PackedLinear(64, 24, dtype=torch.float16), random_inputs(12, 64, torch.float16)
    assert module.to("cpu").weight_metadata is None
    with pytest.raises(ValueError, match="does not keep two values in every group of four"):
        module(x)
    module.load_state_dict(packed(layer, 64).state_dict())
    assert_accurate(module(x), x, layer)


def test_a_layer_compiles_with_its_metadata(launched: Counter[str]) -> None:
    layer, x = random_layer(72, 64, 2, 4, torch.float16), random_inputs(20, 64, torch.float16)
    module = packed(layer, 64)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), module(x))
    assert launched == {"sparse_metadata": 1, "sparse_gemm_f16_128x32": 4}
    metadata = packed_metadata(layer.values, layer.mask, 64, 4)
    tensors = (layer.values, layer.mask, layer.bias, None, 4, metadata)
    assert set(torch.library.opcheck(torch.ops.streamprune.packed_linear.default, (x, *tensors)).values()) == {
        "SUCCESS"
    }
    on_meta = [one.to("meta") if isinstance(one, torch.Tensor) else one for one in (x, *tensors)]
    assert packed_linear(*on_meta).shape == (20, 72)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_error_beside_the_product(pattern: tuple[int, int], dtype: torch.dtype, launched: Counter[str]) -> None:
    """One launch gives y and its error; a permutation, and x with gaps or at an odd address, are put in order."""
    layer = random_layer(40, 64, *pattern, dtype)
    x, expected = random_inputs(140, 64, dtype), random_inputs(140, 40, dtype, seed=5)
    metadata = packed_metadata(layer.values, layer.mask, 64, pattern[1])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    shuffled = torch.empty_like(x).index_copy_(1, order.long(), x)
    odd = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
    for given, permutation in ((x, None), (shuffled, order), (odd, None), (x.T.contiguous().T, None)):
        launched.clear()
        tensors = (layer.values, layer.mask, expected, layer.bias, permutation, pattern[1], metadata)
        y, error, norm = packed_linear_with_error(given, *tensors)
        assert_accurate(y, x, layer)
        assert_error_sums(y, expected, error, norm)
        assert len(launched) == 1
        assert "gemm" in next(iter(launched))
        product = packed_linear(given, *tensors[:2], *tensors[3:])
        assert torch.equal(product, y)


def test_error_of_a_plain_product_is_its_own() -> None:
    layer = random_layer(40, 64, 2, 4, torch.bfloat16)
    x, expected = random_inputs(30, 64, torch.bfloat16), random_inputs(30, 40, torch.bfloat16, seed=5)
    assert packed_metadata(layer.values, layer.mask, 64, 4) is None
    y, errors, norms = packed_linear_with_error(x, layer.values, layer.mask, expected, layer.bias, group_size=4)
    assert torch.equal(y, packed_linear(x, layer.values, layer.mask, layer.bias))
    torch.testing.assert_close(errors, (y.double() - expected.double()).square().sum(dim=1))
    torch.testing.assert_close(norms, expected.double().square().sum(dim=1))
    for wrong in (expected[:3], expected.float(), expected[:, :3]):
        with pytest.raises(ValueError, match="does not fit a product"):
            packed_linear_with_error(x, layer.values, layer.mask, wrong)


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_metadata_of_another_weight_is_refused(tokens: int, launched: Counter[str]) -> None:
    layer = random_layer(40, 64, 2, 4, torch.float16)
    x = random_inputs(tokens, 64, torch.float16)
    right = packed_metadata(layer.values, layer.mask, 64, 4)
    assert right is not None
    for wrong, message in (
        (right[:, :, :31], r"metadata \[1, 1, 31, 4\] is not \[1, 1, 32, 4\]; see packed_metadata"),
        (right[:0].flatten(), r"metadata \[0\] is not \[1, 1, 32, 4\]"),
        (right.long(), "wants metadata of int32, not int64"),
        (right.to("meta"), "metadata on meta"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            packed_linear(x, layer.values, layer.mask, None, None, 4, wrong)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"is not \[0\]"):
        packed_linear(x, layer.values, layer.mask, None, None, 8, right)
    assert packed_linear(x, layer.values, layer.mask, None, None, 4, right).shape == (tokens, 40)


@pytest.mark.parametrize("group_size", [-4, 3, 48])
def test_groups_that_do_not_come_out_even_are_refused(group_size: int, launched: Counter[str]) -> None:
    layer = random_layer(40, 64, 2, 4, torch.float16)
    with pytest.raises(ValueError, match="32 values a row of 64 are no N of every"):
        packed_linear(random_inputs(9, 64, torch.float16), layer.values, layer.mask, None, None, group_size)


def test_gradients_and_weights_at_an_odd_address_are_refused_in_one_line(launched: Counter[str]) -> None:
    layer, x = random_layer(40, 64, 2, 4, torch.float16), random_inputs(9, 64, torch.float16)
    values = torch.zeros(layer.values.numel() + 1).half()[1:].view(layer.values.shape).copy_(layer.values)
    y = packed_linear(x.clone().requires_grad_(), layer.values, layer.mask, None, None, 4)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()
    with pytest.raises(ValueError, match=r"values is not contiguous and aligned to 16 bytes: pass values.clone\(\)"):
        packed_linear(x, values, layer.mask, None, None, 4)
    assert operator.ALIGNMENT_BYTES == 16
