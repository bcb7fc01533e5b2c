"""A custom Function whose backward pass is not recorded is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import (
    Inputs,
    Train,
    cases,
    data,
    outcome,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

STEPS = 4
Function = torch.autograd.Function


# Custom Functions whose backward pass is not recorded: the second derivative is cut.


class Exp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()


class Sine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()


class InNoGrad(Exp):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return g * x.exp()


class Decorated(Exp):
    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.exp()


class OnceDifferentiable(Exp):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.exp()


class Detached(Sine):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (g * x.cos()).detach()


class ByNumPy(Sine):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * x.detach().cos().numpy())


class ByAutograd(Sine):
    """As an adjoint method does it: a graph of its own, and its gradient without a graph."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(leaf.sin(), leaf, g.detach())
        return gradient


class ThroughData(Sine):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g.data * x.data.cos()


class TwoInputs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.k = k
        return k * x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return ctx.k * g * x.exp(), None


class SetUp(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return g * x.exp()


class OnTheContext(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = x.detach().exp()
        return ctx.factor.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return g * ctx.factor


CUT: dict[str, Any] = {
    "InNoGrad": InNoGrad.apply,
    "Decorated": Decorated.apply,
    "OnceDifferentiable": OnceDifferentiable.apply,
    "Detached": Detached.apply,
    "ByNumPy": ByNumPy.apply,
    "ByAutograd": ByAutograd.apply,
    "ThroughData": ThroughData.apply,
    "TwoInputs": lambda x: TwoInputs.apply(x, 0.5),
    "SetUp": SetUp.apply,
    "OnTheContext": OnTheContext.apply,
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("where", ["loss", "first layer"])
@stored_or_again
def test_function_whose_backward_is_not_recorded(adjoint: str, where: str, name: str) -> None:
    apply = CUT[name]

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = apply(x)
            return out

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()
        if where == "first layer":
            model.insert(1, Act())

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            out = apply(m(x)) if where == "loss" else m(x)
            return squares(out - 1)

        fast = train(model, STEPS, loss_fn)
        return squares(fast(x)), list(model.parameters())

    # PyTorch's own words about once_differentiable name its decorator.
    words = rf"{name}|once_differentiable" if name == "OnceDifferentiable" else name
    outcome(experiment, adjoint, "refused", words)


class Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class Straight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Recorded(Exp):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.exp()


class NoGradient(Function):
    """A sign: its gradient is zero by definition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


@cases(
    "apply",
    {f.__name__: f.apply for f in (Reversed, Straight, Recorded, NoGradient)},
)
@stored_or_again
def test_function_whose_backward_is_recorded(adjoint: str, apply: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()
        fast = train(model, STEPS, lambda m, t: squares(m(x) + 0.3 * apply(m(x)) - 1))
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint)
