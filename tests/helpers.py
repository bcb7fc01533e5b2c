"""Oracles that share no code with diffopt: a plain loop that keeps its graph, finite differences.

A problem is stated once, as a function of ``train``, and is solved by ``diffopt.unroll`` and by
the plain loop here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

#: Options of SGD: for all parameters, or as pairs of a name's beginning and its own options.
Options = Mapping[str, Any] | Sequence[tuple[str, Mapping[str, Any]]]
#: ``train(model, options, steps, loss_fn, **more)`` gives something like an ``Unrolled``.
Train = Callable[..., Any]


def tiny() -> nn.Sequential:
    """17 float64 parameters, smooth in all of them."""
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2).double(), torch.randn(rows, 2).double()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    return [batch() for _ in range(steps)]


def mse(model: Any, pair: Any) -> Tensor:
    return F.mse_loss(model(pair[0]), pair[1])


class Call(nn.Module):
    """A function of a module as a module, for ``functional_call``."""

    def __init__(self, model: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(self.model, *args)


def called(model: nn.Module, values: Mapping[str, Tensor], fn: Any, *args: Any) -> Any:
    """``fn(model with values, *args)``."""
    named = {f"model.{name}": x for name, x in values.items()}
    return torch.func.functional_call(Call(model, fn), named, args)


class Plain:
    """What the plain loop gives, under the names ``Unrolled`` has."""

    def __init__(
        self, model: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> None:
        self.model, self.params, self.buffers = model, params, buffers
        self.opt_state: dict[str, dict[str, Tensor]] = {}
        self.losses = torch.zeros(0)

    def apply(self, fn: Callable[..., Any], *args: Any) -> Any:
        buffers = {name: x.clone() for name, x in self.buffers.items()}
        return called(self.model, {**self.params, **buffers}, fn, *args)

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.apply(lambda model, x: model(x), x)
        return found


def plain(
    model: nn.Module,
    options: Options,
    steps: int | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    initial: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    grad_transform: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    max_cotangent_norm: float | None = None,
    adjoint: Any = None,
) -> Plain:
    """SGD with momentum, by ``autograd.grad(create_graph=True)``: every step's graph is kept.

    b ← μ b + g + λ θ,  θ ← θ − γ b; ``state`` holds b by parameter name, from 0 where left out.
    """
    groups = [("", options)] if isinstance(options, Mapping) else options
    of = {
        name: group
        for name, _ in model.named_parameters()
        for beginning, group in groups
        if name.startswith(beginning)
    }
    params = {n: p for n, p in model.named_parameters() if n in of and p.requires_grad}
    params.update(initial or {})
    # Views: what else is made of the start's tensors is a constant of the inner gradients.
    start = {name: p.view_as(p) for name, p in params.items()}
    result = Plain(model, start, dict(model.named_buffers()))
    buffers_of_momentum = dict(state or {})
    losses = []
    for t, item in enumerate(range(steps) if isinstance(steps, int) else steps):
        names = list(result.params)
        buffers = {name: x.clone() for name, x in result.buffers.items()}
        values = {**result.params, **buffers}

        def with_buffers(m: Any, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return loss_fn(m, item), dict(m.named_buffers())

        loss, result.buffers = called(model, values, with_buffers, item)
        losses.append(loss)
        found = torch.autograd.grad(
            loss, list(result.params.values()), create_graph=True, allow_unused=True
        )
        grads = {n: g for n, g in zip(names, found, strict=True) if g is not None}
        if grad_transform is not None:
            grads = dict(grad_transform(grads))
        new = dict(result.params)
        for name, g in grads.items():
            at = {k: v(t) if callable(v) else v for k, v in of[name].items()}
            p = result.params[name]
            b = g + at.get("weight_decay", 0.0) * p
            if "momentum" in at:
                if name in buffers_of_momentum:
                    b = at["momentum"] * buffers_of_momentum[name] + b
                buffers_of_momentum[name] = b
            new[name] = p - at["lr"] * b
        if max_cotangent_norm is not None:
            new = dict(zip(new, bounded(max_cotangent_norm, list(new.values())), strict=True))
        result.params = new
    result.losses = torch.stack(losses) if losses else torch.zeros(0)
    result.opt_state = {n: {"momentum_buffer": b} for n, b in buffers_of_momentum.items()}
    return result


class _Bounded(torch.autograd.Function):
    """The identity, whose cotangents are scaled to at most a joint norm."""

    @staticmethod
    def forward(ctx: Any, most: float, *tensors: Tensor) -> Any:
        ctx.most = most
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        norm = sum((g * g).sum() for g in gs).sqrt()  # type: ignore[union-attr]
        return (None, *(g if norm <= ctx.most else g * (ctx.most / norm) for g in gs))


def bounded(most: float, tensors: list[Tensor]) -> Sequence[Tensor]:
    found: Sequence[Tensor] = _Bounded.apply(most, *tensors)  # type: ignore[no-untyped-call]
    return found


def unrolled(adjoint: diffopt.Adjoint, *, compile: bool = False) -> Train:
    """``diffopt.unroll`` behind the arguments of ``plain``."""

    def train(
        model: nn.Module,
        options: Options,
        steps: Any,
        loss_fn: Any,
        *,
        state: Mapping[str, Tensor] | None = None,
        **more: Any,
    ) -> diffopt.Unrolled:
        named = dict(model.named_parameters())
        opt: diffopt.Optimizer
        if isinstance(options, Mapping):
            opt = diffopt.SGD(named.items(), **options)
        else:
            groups = [
                {"params": [p for n, p in named.items() if n.startswith(beginning)], **group}
                for beginning, group in options
            ]
            opt = diffopt.SGD(groups)
        for name, b in (state or {}).items():
            opt.state[named[name]] = {"momentum_buffer": b}
        return diffopt.unroll(model, opt, steps, loss_fn, adjoint=adjoint, compile=compile, **more)

    return train


def differences(
    value: Callable[[], Tensor], inputs: Iterable[Tensor], h: float = 1e-6
) -> list[Tensor]:
    """Central differences of a scalar in each entry of each input, which are changed and put back.

    The error is about h² of truncation and 1e-16 / h of rounding.
    """
    found = []
    for x in inputs:
        flat, grad = x.detach().view(-1), torch.zeros(x.numel(), dtype=x.dtype)
        for i in range(x.numel()):
            before = flat[i].item()
            ends = []
            for moved in (before + h, before - h):
                flat[i] = moved
                ends.append(value().item())
            flat[i] = before
            grad[i] = (ends[0] - ends[1]) / (2 * h)
        found.append(grad.view(x.shape))
    return found


def assert_all_close(
    got: Iterable[Tensor | None], want: Iterable[Tensor | None], rtol: float, atol: float
) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=rtol, atol=atol)
