"""The plain loop that diffopt is compared with. It shares no code with it, and keeps every graph.

``torch.autograd.grad(..., create_graph=True)`` step by step, on the module itself, in whose places
the values of each step stand. (The fuzzer has another one of its own, and whole models are compared
with ``torch.optim`` and finite differences: ``plain.py``.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Options of SGD: for all parameters, or as pairs of a name's beginning and its own options.
Options = Mapping[str, Any] | Sequence[tuple[str, Mapping[str, Any]]]
#: ``rule(params, grads, t)`` gives the new values of those parameters that it changes.
Rule = Callable[[dict[str, Tensor], dict[str, Tensor], int], Mapping[str, Tensor]]
Values = Mapping[str, Tensor | None]


def entries(model: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name, those included that are None."""
    return {
        f"{prefix}.{key}" if prefix else key: x
        for prefix, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for key, x in module._buffers.items()
    }


@contextmanager
def standing(model: nn.Module, values: Values) -> Iterator[None]:
    """Put tensors into the places of parameters and buffers, and all places back afterwards.

    A buffer that is not among ``values`` is not there meanwhile.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    same: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(p), []).append(name)
    names = {group[0]: group for group in same.values()}
    for name in entries(model).keys() - values.keys():
        prefix, _, key = name.rpartition(".")
        del model.get_submodule(prefix)._buffers[key]
    for name, x in values.items():
        for alias in names.get(name, [name]):
            prefix, _, key = alias.rpartition(".")
            owner = model.get_submodule(prefix)
            places: Any = owner._parameters if key in owner._parameters else owner._buffers
            places[key] = x
    try:
        yield
    finally:
        for module, params, buffers in before:
            module._parameters.clear()
            module._parameters.update(params)
            module._buffers.clear()
            module._buffers.update(buffers)


def copies(values: Values) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.clone() for name, x in values.items()}


class Plain:
    """What the plain loop gives, under the names that ``Unrolled`` has.

    Attributes:
        rest: what else the module holds: buffers, and parameters that are not trained.
    """

    def __init__(self, model: nn.Module, params: dict[str, Tensor], rest: Values) -> None:
        self.model, self.params, self.rest = model, params, dict(rest)
        self.opt_state: dict[str, dict[str, Tensor]] = {}
        self.losses = torch.zeros(0)

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.rest.items() if x is not None}

    def apply(self, fn: Callable[..., Any], *args: Any) -> Any:
        with standing(self.model, {**self.params, **copies(self.rest)}):
            return fn(self.model, *args)

    def __call__(self, *args: Any) -> Any:
        return self.apply(lambda model: model(*args))


def plain(
    model: nn.Module,
    options: Options,
    steps: int | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    initial: Plain | Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    rule: Rule | None = None,
    grad_transform: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    max_cotangent_norm: float | None = None,
    adjoint: Any = None,
) -> Plain:
    """Train the parameters that have options, by SGD with momentum or by ``rule``.

    b ← μ b + g + λ θ,  θ ← θ − γ b; ``state`` holds b by parameter name, from 0 where left out.
    """
    groups = [("", options)] if isinstance(options, Mapping) else options
    named = dict(model.named_parameters())
    of = {n: i for n in named for i, (start, _) in enumerate(groups) if n.startswith(start)}
    if isinstance(initial, Plain):
        result = Plain(model, dict(initial.params), initial.rest)
    else:
        inner = {n: p for n, p in named.items() if n in of and p.requires_grad}
        rest = {n: p for n, p in named.items() if n not in inner}
        result = Plain(model, {**inner, **(initial or {})}, {**rest, **entries(model)})
    momentum = dict(state or {})

    def sgd(params: dict[str, Tensor], grads: dict[str, Tensor], t: int) -> dict[str, Tensor]:
        new = {}
        present = [{k: v(t) if callable(v) else v for k, v in group.items()} for _, group in groups]
        for name, g in grads.items():
            at = present[of[name]]
            b = g + at.get("weight_decay", 0.0) * params[name]
            if "momentum" in at:
                b = momentum[name] = at["momentum"] * momentum[name] + b if name in momentum else b
            new[name] = params[name] - at["lr"] * b
        return new

    losses = []
    for t, item in enumerate(range(steps) if isinstance(steps, int) else steps):
        # Views: a weight's other uses are constants of the inner gradient.
        params = {name: x.view_as(x) for name, x in result.params.items()}
        with standing(model, {**params, **copies(result.rest)}):
            loss = loss_fn(model, item)
            after = {n: x for n, x in model.named_parameters() if n not in params}
            result.rest = {**after, **entries(model)}
        losses.append(loss)
        found = torch.autograd.grad(
            loss, list(params.values()), create_graph=True, allow_unused=True
        )
        grads = {n: g for n, g in zip(params, found, strict=True) if g is not None}
        if grad_transform is not None:
            grads = dict(grad_transform(grads))
        new = {**params, **(rule or sgd)(params, grads, t)}
        if max_cotangent_norm is not None:
            new = dict(zip(new, bounded(max_cotangent_norm, list(new.values())), strict=True))
        result.params = new
    if losses:
        result.losses = torch.stack(losses)
    result.opt_state = {n: {"momentum_buffer": b} for n, b in momentum.items()}
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
