"""The nodes that custom ``torch.autograd.Function`` classes make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Node = Any


def function_of(node: Node) -> type | None:
    """The custom Function that made ``node``, None if PyTorch did."""
    if not isinstance(node, BackwardCFunction):
        return None
    return getattr(node, "_forward_cls", type(node))


def cotangents_of(node: Node) -> list[Tensor | None] | None:
    """A cotangent for each result of ``node``'s Function, which requires grad.

    The numbers are all different: a sum, or what a normalisation leaves out, does not cancel them.
    None where PyTorch does not tell the results' shapes.
    """
    results = getattr(node, "_input_metadata", None)
    return None if results is None else [_cotangent(result) for result in results]


def backward_of(node: Node) -> Callable[..., Any]:
    """The Function's backward pass, of cotangents, without the hooks that surround it."""
    run: Callable[..., Any] = node.apply
    return run


def needed(node: Node) -> Sequence[bool]:
    """Which of the Function's arguments need a gradient."""
    return tuple(node.needs_input_grad)


def run_backward_inside(node: Node, context: Callable[[], Any]) -> None:
    """Run the Function's backward pass inside ``context()`` from now on, for this node alone.

    Autograd looks up ``apply`` on the node. The Function's class of nodes gets one that looks for a
    context, once.
    """
    kind = type(node)
    if "apply" not in vars(kind):
        original = kind.apply

        def apply(self: Any, *cotangents: Any) -> Any:
            around = self.__dict__.get("_diffopt_context")
            if around is None:
                return original(self, *cotangents)
            with around():
                return original(self, *cotangents)

        kind.apply = apply
    node._diffopt_context = context


def _cotangent(result: Any) -> Tensor | None:
    if not (result.dtype.is_floating_point or result.dtype.is_complex):
        return None
    shape = tuple(result.shape)
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).mul(12.9898).sin()
    cotangent = numbers.to(dtype=result.dtype, device=result.device).view(shape)
    return cotangent.requires_grad_()
