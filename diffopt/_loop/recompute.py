"""A function whose derivatives, of any order, are computed by running it again.

Like ``torch.utils.checkpoint``, with two differences: the recomputation is itself recomputed when
it is differentiated (so the second derivative through T steps holds T states, not T graphs), and
tensors that the function merely sees get their gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diffopt._values.tree import vjp as pulled

#: Its results carry a graph exactly where grad mode is enabled.
Function = Callable[..., tuple[Tensor | None, ...]]


class Seen:
    """Tensors that a recomputed function uses without being given them.

    Attributes:
        edges: what to differentiate with respect to.
        context: what every evaluation and differentiation runs in; yields whether the graph is
            shared with the caller's and has to be retained.
    """

    def __init__(
        self,
        edges: Sequence[Tensor | GradientEdge],
        context: Callable[[], AbstractContextManager[bool]],
    ) -> None:
        self.edges = edges
        self.context = context


def recomputed(
    function: Function, seen: Seen, seen_tensors: Sequence[Tensor], args: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """``function(*args)``, connected to ``args`` and to ``seen_tensors``, holding only those."""
    result: tuple[Tensor | None, ...] = _Recomputed.apply(function, seen, *seen_tensors, *args)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, seen: Seen, *tensors: Tensor) -> Any:
        ctx.function, ctx.seen = function, seen
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with seen.context():
            results = function(*(x.detach() for x in tensors[len(seen.edges) :]))
        # Aliases: what the function itself may hold on to must not come to hold this node.
        return tuple(x if x is None else x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        function, seen, k = ctx.function, ctx.seen, len(ctx.seen.edges)
        tensors = ctx.saved_tensors
        present = [i for i, c in enumerate(cotangents) if c is not None]
        n = len(tensors) - k

        def vjp(*args: Tensor) -> tuple[Tensor | None, ...]:
            connected = torch.is_grad_enabled()
            leaves = [
                x if connected and x.requires_grad else x.detach().requires_grad_()
                for x in args[:n]
            ]
            with seen.context() as shared:
                with torch.enable_grad():
                    outputs = function(*leaves)
                pairs = [
                    (out, c)
                    for i, c in zip(present, args[n:], strict=True)
                    if (out := outputs[i]) is not None and out.requires_grad
                ]
                inputs, retain = [*seen.edges, *leaves], connected or shared
                return tuple(pulled(pairs, inputs, create_graph=connected, retain_graph=retain))

        given = [c for c in cotangents if c is not None]
        if torch.is_grad_enabled():
            grads = recomputed(vjp, seen, tensors[:k], [*tensors[k:], *given])
        else:
            grads = vjp(*(x.detach() for x in tensors[k:]), *given)
        return (None, None, *grads)
