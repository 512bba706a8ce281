"""Random packed layers and inputs, and what a product must keep to."""

from dataclasses import dataclass

import torch

from streamprune_kernels.reference import pack_mask, pack_values, select_groups


@dataclass(frozen=True)
class Layer:
    """A packed weight and what it stands for: dense float64 [out, in] with zeros, and the bias."""

    dense: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    bias: torch.Tensor
    kept: int
    group_size: int


def random_layer(
    out_features: int, in_features: int, kept: int, group_size: int, dtype: torch.dtype, seed: int = 0
) -> Layer:
    """Normal weights, of which each group keeps those that random scores pick."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    keep = select_groups(torch.rand(weight.shape, generator=generator), kept, group_size)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    return Layer(weight.double() * keep, pack_values(weight, keep), pack_mask(keep), bias, kept, group_size)


def random_inputs(tokens: int, in_features: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_product(x: torch.Tensor, layer: Layer, bias: bool = True) -> torch.Tensor:
    """In float64."""
    product = x.double() @ layer.dense.T
    return product + layer.bias.double() if bias else product


def assert_accurate(y: torch.Tensor, x: torch.Tensor, layer: Layer, bias: bool = True) -> None:
    """y's error is at most twice that of torch's own float32 computation, rounded to y's type; norms over all of y."""
    plain = x.float() @ layer.dense.float().T
    plain = (plain + layer.bias.float() if bias else plain).to(y.dtype)
    exact = exact_product(x, layer, bias)
    assert y.shape == exact.shape
    error, plain_error = ((result.double() - exact).norm().item() for result in (y, plain))
    assert error <= 2 * plain_error, f"error {error:.3g}, of the plain computation {plain_error:.3g}"


def assert_error_sums(y: torch.Tensor, reference: torch.Tensor, error: torch.Tensor, norm: torch.Tensor) -> None:
    """Sums [out] float64 of (y - reference)^2 and reference^2 are those of what was returned; tiles sum in float32."""
    for sums, squares in ((error, y.double() - reference.double()), (norm, reference.double())):
        expected = squares.square().flatten(0, -2).sum(dim=0)
        torch.testing.assert_close(
            sums, expected, rtol=1e-5, atol=0, msg=lambda text: f"sums of squares differ: {text}"
        )
