"""Every layer of ``torch.nn``, differentiated twice, against finite differences of its gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from layers import LAYERS, Layer
from torch import Tensor, nn

import diffopt


class Behind(nn.Module):
    """A linear map of the last dimension and then the layer, and a curved loss of its output."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.shape[-1], layer.shape[-1])
        self.layer = layer.make()
        self._call = layer.call

    def forward(self, x: Tensor) -> Tensor:
        y = self._call(self.layer, self.linear(x).sin())
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
        return (weights * (y + 0.5 * y.square())).sum()


def build(layer: Layer) -> tuple[Behind, Tensor]:
    torch.manual_seed(1)
    model = Behind(layer).double()
    return model, torch.randn(layer.shape, dtype=torch.double)


def gradient_along(
    layer: Layer, c: list[Tensor], shift: list[Tensor], shift_x: Tensor, h: float
) -> float:
    """c times the loss's gradient in the parameters, at a moved place, by one backward pass."""
    model, x = build(layer)
    with torch.no_grad():
        for p, u in zip(model.parameters(), shift, strict=True):
            p.add_(u, alpha=h)
    torch.manual_seed(2)
    loss = model(x + h * shift_x)
    g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dot(c, g)


def meta_gradient(
    layer: Layer, c: list[Tensor], lr: float, steps: int, adjoint: diffopt.Adjoint
) -> tuple[Tensor, ...]:
    """Of c times the trained parameters, in the initial ones and in the input."""
    model, x = build(layer)
    x.requires_grad_()
    torch.manual_seed(2)
    inner = diffopt.SGD(model.parameters(), lr=lr)
    fast = diffopt.unroll(model, inner, [x] * steps, adjoint=adjoint)
    outer = sum((v * p).sum() for v, p in zip(c, fast.params.values(), strict=True))
    return torch.autograd.grad(outer, [*model.parameters(), x], materialize_grads=True)


def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


def random_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [torch.randn_like(x) for x in tensors]


def over(layers: Iterable[Layer]) -> Any:
    """A parameter of a test: each of the layers that this PyTorch has."""
    skip = pytest.mark.skip(reason="this PyTorch has no such layer")
    params = [
        pytest.param(layer, id=layer.name, marks=[skip] if layer.missing else [])
        for layer in layers
    ]
    return pytest.mark.parametrize("layer", params)


@over(LAYERS)
def test_second_derivative(layer: Layer) -> None:
    """One step of gradient descent with rate 1: c·θ′ has the gradient c - c·(dg/dθ)."""
    model, x = build(layer)
    c = random_like(model.parameters())
    if layer.refused:
        with pytest.raises(NotImplementedError) as error:
            meta_gradient(layer, c, 1.0, 1, diffopt.Segmented())
        assert layer.refused in str(error.value)
        return
    found = meta_gradient(layer, c, 1.0, 1, diffopt.Segmented())
    h = 1e-4
    for _ in range(2):
        u, u_x = random_like(c), torch.randn_like(x)
        if layer.constant is not None:
            layer.constant(u)
        f = {k: gradient_along(layer, c, u, u_x, k * h) for k in (-2, -1, 1, 2)}
        slope = dot(c, u) - (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        along = dot(found, [*u, u_x])
        assert abs(along - slope) <= 1e-6 * abs(slope) + 1e-8, (along, slope)


@over(layer for layer in LAYERS if not layer.refused)
def test_recomputed_to_the_last_bit(layer: Layer) -> None:
    c = random_like(build(layer)[0].parameters())
    stored = meta_gradient(layer, c, 0.01, 3, diffopt.StoreAll())
    for g, other in zip(
        stored, meta_gradient(layer, c, 0.01, 3, diffopt.Segmented(3)), strict=True
    ):
        if layer.rounds:
            torch.testing.assert_close(g, other, rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(g, other)


def test_the_table_has_every_layer() -> None:
    without_derivative_of_their_own = {
        *("Module", "Container", "Sequential", "ModuleList", "ModuleDict", "ParameterList"),
        *("ParameterDict", "DataParallel", "RNNBase", "RNNCellBase", "NLLLoss2d"),
    }
    layers = {
        name
        for name in dir(nn)
        if isinstance(kind := getattr(nn, name), type) and issubclass(kind, nn.Module)
    }
    lazy = {name for name in layers if name.startswith("Lazy")}  # becomes the layer it is named for
    tested = {type(layer.make()).__name__ for layer in LAYERS if not layer.missing}
    assert layers - lazy - without_derivative_of_their_own == tested
