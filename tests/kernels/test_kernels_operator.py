"""The operator streamprune::packed_linear: what it computes, how it compiles, what it refuses."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from streamprune_kernels import expand, native, operator, pack_mask, pack_values, packed_linear, select_groups

OUT, IN = 48, 80
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype: torch.dtype = torch.float32, permuted: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    keep = select_groups(weight.float().abs(), 2, 4)
    tensors = {"values": pack_values(weight, keep), "mask": pack_mask(keep)}
    tensors["bias"] = torch.randn(OUT, generator=generator).to(dtype)
    if permuted:
        tensors["permutation"] = torch.randperm(IN, generator=generator).to(torch.int32)
    return tensors


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def exact(x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    weight = expand(tensors["values"], tensors["mask"], IN, tensors.get("permutation"))
    return functional.linear(x.double(), weight.double(), tensors["bias"].double())


@pytest.fixture(params=["compiled", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as where the package was built without a compiler."""
    assert native.library() is not None
    if request.param == "plain":
        monkeypatch.setattr(operator, "library", lambda: None)
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (40,), (2, 3), (5, 2, 6), (0,)], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_in_the_inputs_dtype_rounded_once(
    dtype: torch.dtype, x_dtype: torch.dtype, shape: tuple[int, ...], permuted: bool
) -> None:
    tensors, x = layer(dtype, permuted), inputs(*shape, dtype=x_dtype)
    y = packed_linear(x, **tensors)
    assert (y.dtype, tuple(y.shape)) == (x_dtype, (*shape, OUT))
    expected = exact(x, tensors)
    half_a_step = torch.finfo(x_dtype).eps / 2 * expected.abs()
    assert ((y.double() - expected).abs() <= half_a_step + 3e-5).all()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend: str, rows: int) -> None:
    tensors, x = layer(), inputs(rows)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, **tensors).relu() + 1

    torch.compiler.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), twice(x))


@pytest.mark.parametrize("names", [(), ("bias",), ("bias", "permutation")], ids=str)
def test_torch_finds_the_operator_sound(names: tuple[str, ...]) -> None:
    tensors = {name: tensor for name, tensor in layer().items() if name in ("values", "mask", *names)}
    for operators in (torch.ops.streamprune.packed_linear, torch.ops.streamprune.packed_linear_no_grad):
        for x in (inputs(3), inputs(2, 40)):
            found = torch.library.opcheck(operators.default, (x,), tensors)
            assert set(found.values()) == {"SUCCESS"}


def test_shapes_without_numbers() -> None:
    tensors = {name: tensor.to("meta") for name, tensor in layer(torch.bfloat16).items()}
    y = packed_linear(torch.empty(7, 3, IN, device="meta", dtype=torch.float16), **tensors)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.float16, (7, 3, OUT))


def test_there_is_no_gradient() -> None:
    tensors = layer()
    y = packed_linear(inputs(2).requires_grad_(), **tensors)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()
    with pytest.raises(ValueError, match="packed_linear has no gradient: its values must not require one; detach it"):
        packed_linear(inputs(2), **{**tensors, "values": tensors["values"].requires_grad_()})


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, IN, dtype=torch.float64)}, "wants x of bfloat16, float16, float32, not float64"),
        ({"x": torch.zeros(2, IN, dtype=torch.int64)}, "wants x of bfloat16, float16, float32, not int64"),
        ({"values": torch.zeros(OUT, IN // 2, dtype=torch.float64)}, "wants values of .* not float64"),
        ({"mask": torch.zeros(OUT, IN // 8, dtype=torch.int8)}, "wants mask of uint8, not int8"),
        ({"permutation": torch.arange(IN)}, "wants permutation of int32, not int64"),
        ({"bias": torch.zeros(OUT, dtype=torch.int32)}, "wants bias of .* not int32"),
        ({"x": torch.zeros(2, IN - 8)}, r"mask \[48, 10\] does not fit 48 x 72"),
        ({"x": torch.zeros(2, IN - 1)}, r"permutation \[80\] does not fit 48 x 79"),
        ({"x": torch.tensor(1.0)}, r"wants x \[\.\.\., in\]"),
        ({"values": torch.zeros(OUT)}, r"and values \[out, kept\], not \[2, 80\] and \[48\]"),
        ({"values": torch.zeros(OUT, 0)}, "0 values a row do not fit 80 input channels"),
        ({"values": torch.zeros(OUT, 81)}, "81 values a row do not fit 80 input channels"),
        ({"values": torch.zeros(OUT + 1, IN // 2)}, r"mask \[48, 10\] does not fit 49 x 80"),
        ({"mask": torch.zeros(OUT, 11, dtype=torch.uint8)}, r"mask \[48, 11\] does not fit 48 x 80"),
        ({"bias": torch.zeros(OUT + 1)}, r"bias \[49\] does not fit 48 x 80"),
        ({"permutation": torch.arange(4, dtype=torch.int32)}, r"permutation \[4\] does not fit 48 x 80"),
        ({"mask": torch.zeros(OUT, 10, dtype=torch.uint8)}, "a mask does not keep 40 values in every row"),
        ({"values": torch.zeros(OUT, 39)}, "a mask does not keep 39 values in every row"),
        ({"x": torch.zeros(2, IN, device="meta")}, "one cpu or cuda device; it got x on meta, values on cpu"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_no_kernel_computes_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        packed_linear(**{"x": inputs(2), **layer(), **changes})
    assert "\n" not in str(caught.value)


def test_other_devices_are_refused() -> None:
    class Elsewhere:
        device = torch.device("xpu")

    with pytest.raises(ValueError, match=r"one cpu or cuda device; it got x on xpu, values on cpu"):
        operator._check(Elsewhere(), **{**layer(), "bias": None, "permutation": None})  # type: ignore[arg-type]


def test_the_way_of_a_gpu_is_the_plain_product_in_the_inputs_dtype() -> None:
    tensors, x = layer(torch.bfloat16), inputs(5)
    y = operator._expanded_on_gpu(x, **tensors)
    torch.testing.assert_close(y.double(), exact(x, tensors), rtol=1e-5, atol=1e-5)
    assert operator._expanded_on_gpu(x.bfloat16(), **tensors).dtype == torch.bfloat16
