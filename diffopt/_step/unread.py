"""Gradients of weights that nothing reads.

A layer y = x Wᵀ gives its weight the gradient G = Σ δᵀx, where δ is the cotangent of y. On the way
back through a step of SGD, G is read by nothing: its derivative pulls a cotangent C back through
⟨C, G⟩ = ⟨x Cᵀ, δ⟩, which sends x Cᵀ to δ and δ C to x. So one of the nine products of matrices that
a layer takes part in is left out.

A weight is left out where the graph of the loss shows that nothing uses it but products of matrices
(``AddmmBackward0``, ``MmBackward0``), directly or transposed. While the gradient is taken, a hook
on each such node makes a ``_Contraction`` of δ and x: a node that the derivative starts from.

Steps that are computed again are compared by G too (``shadow``): G s, with a vector s of signs, is
δᵀ(x s), two products of a matrix and a vector. So whatever came between δᵀx and the gradient, a
hook for example, ends in an error.

Limits: layers under autocast, in half precision, or mapped over tasks are not left out, and small
ones are not worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from diffopt._step.graph import nodes_behind
from diffopt._torch.autograd import saved

#: So many entries make a matrix large. Fewer are copied faster than gone through one by one.
LARGE = 1 << 14

#: So many multiplications of numbers take longer than what leaving them out costs.
_WORTH = 1 << 22

#: Of each product of matrices: which input its right factor is, and the name of its left one.
_PRODUCTS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}


@dataclass(slots=True)
class _Cotangent:
    """C, set when it is known. It holds nothing that leads back to it, so no cycle keeps it."""

    value: Tensor | None = None


@dataclass(slots=True)
class Unread:
    """A weight whose gradient is left out.

    Attributes:
        weight: the leaf.
        products: the nodes that multiply by it, and whether each takes it transposed.
        tokens: a zero of each node's ``_Contraction``, once the gradient has been taken.
        shadow: the gradient times ``signs``, then.
    """

    weight: Tensor
    products: dict[Any, bool] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)
    shadow: Tensor | None = None
    _cotangent: _Cotangent = field(default_factory=_Cotangent)

    @property
    def is_complete(self) -> bool:
        """Whether the gradient came by every product."""
        return len(self.tokens) == len(self.products)

    def roots(self, cotangent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What to start from, and with which cotangents, to pull one of the gradient back."""
        self._cotangent.value = cotangent
        return ((token, torch.ones_like(token)) for token in self.tokens)

    def _take(self, node: Any, cotangents: Sequence[Tensor | None]) -> None:
        """Take note of ``node``'s share of the gradient while the gradient is taken."""
        (delta,) = cotangents
        if delta is None:
            return
        x = saved(node, _PRODUCTS[node.name()][1])
        transposed = self.products[node]
        token = _Contraction.apply(  # type: ignore[no-untyped-call]
            delta, x, self._cotangent, transposed
        )
        self.tokens.append(token)
        with torch.no_grad():
            rows, columns = (delta, x) if transposed else (x, delta)
            share = rows.T @ (columns @ signs(columns.shape[1], columns))
            self.shadow = share if self.shadow is None else self.shadow + share


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, x: Tensor, cotangent: _Cotangent, transposed: bool
    ) -> Tensor:
        ctx.cotangent, ctx.transposed = cotangent, transposed
        ctx.save_for_backward(delta, x)
        return delta.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        delta, x = ctx.saved_tensors
        c = ctx.cotangent.value
        c = c if ctx.transposed else c.T
        to_delta = x @ c.T if ctx.needs_input_grad[0] else None
        to_x = delta @ c if ctx.needs_input_grad[1] else None
        return to_delta, to_x, None, None


def unread(loss: Tensor, params: Mapping[str, Tensor], since: int) -> dict[str, Unread]:
    """The weights among the leaves ``params`` whose gradients can be left out, by name.

    Args:
        since: the least sequence number of the nodes of ``loss``. Of a graph that goes on into one
            that was there before, nothing is left out.

    Cost: one walk over the graph of ``loss``, where a weight is large.
    """
    weights = {id(p): name for name, p in params.items() if is_large(p) and _is_plain(p)}
    chosen = {name: Unread(params[name]) for name in weights.values()}
    if not chosen:
        return {}
    nodes = list(nodes_behind([loss], ()))
    if any(node._sequence_nr() < since for node in nodes):
        return {}

    def weight_at(node: Any) -> str | None:
        return weights.get(id(getattr(node, "variable", None)))

    transposes = {
        node: name
        for node in nodes
        if node.name() == "TBackward0" and (name := weight_at(node.next_functions[0][0]))
    }
    for node in nodes:
        for i, (following, _) in enumerate(node.next_functions):
            direct = weight_at(following)
            name = direct or transposes.get(following)
            if name is None or node in transposes:
                continue
            if name in chosen and _multiplies(node, i):
                chosen[name].products[node] = direct is None
            else:
                chosen.pop(name, None)
    return {
        name: weight
        for name, weight in chosen.items()
        if sum(map(_rows, weight.products)) * weight.weight.numel() >= _WORTH
    }


@contextmanager
def left_out(weights: Iterable[Unread]) -> Iterator[None]:
    """Where a gradient is taken that is not asked for these weights' part."""
    hooks = [node.register_prehook(partial(w._take, node)) for w in weights for node in w.products]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_large(x: Tensor) -> bool:
    """Whether ``shadow`` serves ``x``: a dense matrix of many numbers."""
    return (
        x.dim() == 2
        and x.numel() >= LARGE
        and x.layout is torch.strided
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
    )


def shadow(gradient: Tensor) -> Tensor:
    """A large gradient times a vector of signs."""
    return gradient @ signs(gradient.shape[1], gradient)


def signs(count: int, like: Tensor) -> Tensor:
    """A vector of signs, the same ones always."""
    return _signs(count, like.dtype, like.device)


@cache
def _signs(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return signs.to(device, dtype)


def _is_plain(weight: Tensor) -> bool:
    exact = weight.is_cpu or weight.dtype is not torch.float32
    return (
        weight.is_leaf
        and type(weight) is Tensor
        and not weight._backward_hooks
        and (exact or torch.get_float32_matmul_precision() == "highest")
    )


def _multiplies(node: Any, i: int) -> bool:
    """Whether ``node`` is a product whose right factor is its input ``i``."""
    name = node.name()
    if name not in _PRODUCTS or _PRODUCTS[name][0] != i:
        return False
    return name == "MmBackward0" or bool(saved(node, "alpha") == 1)


def _rows(node: Any) -> int:
    return int(saved(node, _PRODUCTS[node.name()][1]).shape[0])
