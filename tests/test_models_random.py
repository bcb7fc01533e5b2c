"""Generators of the user's own, and the same models on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from torch import Tensor, nn

import diffopt

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.double).reshape(4, 3)
GLOBAL = torch.Generator()


class Noisy(nn.Module):
    """A linear map of its input with noise from a generator that the module holds."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.double)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is not None:
            x = x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return self.layer(x)


def squared(model: Any, noise: torch.Generator | None) -> Tensor:
    x = X if noise is None else X + torch.randn(X.shape, generator=noise, dtype=X.dtype)
    return model(x).square().mean()


class Loss:
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def method(self, model: Any, t: int) -> Tensor:
        return squared(model, self.generator)

    def __call__(self, model: Any, t: int) -> Tensor:
        return squared(model, self.generator)


def from_global(model: Any, t: int) -> Tensor:
    return squared(model, GLOBAL)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


def through_a_helper(model: Any, t: int) -> Tensor:
    return from_global(model, t)


def within(model: Any, t: int) -> Tensor:
    return sum(squared(model, g) for g in [GLOBAL])


Make = Callable[[torch.Generator], tuple[Any, torch.Generator | None]]

HELD: dict[str, Make] = {
    "closure": lambda g: (lambda m, t: squared(m, g), None),
    "partial": lambda g: (partial(lambda g, m, t: squared(m, g), g), None),
    "method": lambda g: (Loss(g).method, None),
    "callable object": lambda g: (Loss(g), None),
    "module": lambda g: (lambda m, t: squared(m, None), g),
    "decorated": lambda g: (decorated(lambda m, t: squared(m, g)), None),
    "default": lambda g: (lambda m, t, g=g: squared(m, g), None),
    "list": lambda g: ((lambda gs: lambda m, t: squared(m, gs[0]))([g]), None),
    "attribute": lambda g: ((lambda o: lambda m, t: squared(m, o.generator))(Loss(g)), None),
}
GLOBALS = {"global": from_global, "through a helper": through_a_helper, "nested": within}


def trained_in_place(model: Noisy, loss_fn: Any) -> None:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(5):
        opt.zero_grad()
        loss_fn(model, t).backward()
        opt.step()


@every_adjoint
@pytest.mark.parametrize("where", [*HELD, *GLOBALS])
def test_a_generator_that_the_loss_holds(where: str, adjoint: diffopt.Adjoint) -> None:
    def setting() -> tuple[torch.Generator, Any, Noisy]:
        generator = GLOBAL if where in GLOBALS else torch.Generator()
        generator.manual_seed(3)
        loss_fn, own = (GLOBALS[where], None) if where in GLOBALS else HELD[where](generator)
        torch.manual_seed(0)
        return generator, loss_fn, Noisy(own)

    generator, loss_fn, model = setting()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 5, loss_fn, adjoint=adjoint, verify=True)
    after = generator.get_state()
    outer = sum(p.square().sum() for p in fast.params.values())
    found = torch.autograd.grad(outer, list(model.parameters()))
    assert torch.equal(generator.get_state(), after)

    h, u = 1e-5, [torch.ones_like(g) for g in found]

    def moved(by: float) -> float:
        generator, loss_fn, model = setting()
        with torch.no_grad():
            for p, v in zip(model.parameters(), u, strict=True):
                p.add_(v, alpha=by)
        trained_in_place(model, loss_fn)
        if by == 0:
            assert torch.equal(generator.get_state(), after)
        return sum(p.square().sum().item() for p in model.parameters())

    moved(0.0)
    along = sum(g.sum().item() for g in found)
    assert along == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-6)


@every_adjoint
@pytest.mark.parametrize("where", ["grad_transform", "hyperparameter"])
def test_a_generator_beside_the_loss(where: str, adjoint: diffopt.Adjoint) -> None:
    generator = torch.Generator()
    model = Noisy(None)

    def draw(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.double)

    def noisy(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: g * draw(g.shape) for name, g in grads.items()}

    def gradients(adjoint: diffopt.Adjoint) -> list[Tensor]:
        generator.manual_seed(3)
        inner = diffopt.SGD(
            model.parameters(), lr=(lambda t: draw(())) if where == "hyperparameter" else 0.3
        )
        fast = diffopt.unroll(
            model,
            inner,
            6,
            lambda m, t: (m(X).tanh() - 1).square().mean(),
            adjoint=adjoint,
            grad_transform=noisy if where == "grad_transform" else None,
        )
        after = generator.get_state()
        outer = sum(p.square().sum() for p in fast.params.values())
        found = torch.autograd.grad(outer, list(model.parameters()))
        assert torch.equal(generator.get_state(), after)
        return list(found)

    for found, expected in zip(gradients(adjoint), gradients(diffopt.StoreAll()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OnDevice(nn.Module):
    """Attention, a recurrent layer, dropout and batch normalization in one small model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 12)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.each = nn.InstanceNorm1d(3)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = self.rnn(F.scaled_dot_product_attention(q, k, v))[0].mean(1)
        return self.last(self.drop(self.plain(self.norm(seen))))


@pytest.mark.cuda
@needs_cuda
@every_adjoint
def test_on_an_accelerator(adjoint: diffopt.Adjoint) -> None:
    """Masks, buffers and generators there: the gradient is that of finite differences."""
    x = torch.linspace(0, 20, 60, dtype=torch.double, device="cuda").sin().reshape(5, 4, 3)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return OnDevice().double().cuda()

    def loss_fn(m: Any, t: int) -> Tensor:
        return (m(x + 0.1 * t) - 0.3).square().mean()

    start = model()
    torch.manual_seed(1)
    inner = torch.optim.SGD(start.parameters(), lr=0.1)
    fast = diffopt.unroll(start, inner, 4, loss_fn, adjoint=adjoint)
    drawn = torch.cuda.get_rng_state()
    outer = sum(p.square().sum() for p in fast.params.values())
    found = torch.autograd.grad(outer, list(start.parameters()))
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    assert fast.buffers["norm.num_batches_tracked"] == 4

    def moved(by: float) -> float:
        m = model()
        with torch.no_grad():
            for p in m.parameters():
                p.add_(by)
        torch.manual_seed(1)
        opt = torch.optim.SGD(m.parameters(), lr=0.1)
        for t in range(4):
            opt.zero_grad()
            loss_fn(m, t).backward()
            opt.step()
        return sum(p.square().sum().item() for p in m.parameters())

    h = 1e-5
    along = sum(g.sum().item() for g in found)
    assert along == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-6)
