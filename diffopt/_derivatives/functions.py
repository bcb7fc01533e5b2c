"""Custom ``torch.autograd.Function`` classes whose backward pass is not recorded.

The meta-gradient differentiates the inner gradient. A Function that computes its part of the inner
gradient under ``torch.no_grad()``, as adjoint methods for differential equations do, or detaches
it, cuts that derivative, and autograd says nothing. So the backward pass of each Function in the
graph of a loss is run once with a cotangent that requires grad. What is recorded depends on it.

A gradient of zero that is not recorded passes: so do Functions that stop a gradient on purpose.

Limits: what such a pass does besides is done once more. A backward pass that is recorded, but takes
a tensor from elsewhere by ``.detach()``, is taken at its word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffopt._torch.functions import Node, backward_of, cotangents_of, function_of, needed

#: Functions whose full names begin so are known, or raise by themselves when differentiated twice.
_KNOWN = (
    "diffopt.",
    "torch._functorch._aot_autograd.",
    "torch.distributed.tensor._api._ToTorchTensor",
    "torch.distributed.tensor._redistribute.",
    "torch.utils.checkpoint",
)


def refuse_unrecorded(nodes: Iterable[Node], step: int, recorded: set[type]) -> None:
    """Raise where one of the nodes belongs to a Function that cuts the second derivative.

    Call it where the loss was evaluated, as long as its values stand in the module.

    Args:
        nodes: of the graph of a loss. Those that PyTorch made are passed over.
        step: the number of the step, for the message.
        recorded: Functions whose backward pass is known to be recorded. They are passed over, and
            others of which that turns out are added.

    Raises:
        NotImplementedError: naming the Function.

    Cost: one backward pass of each Function not in ``recorded``.
    """
    for node in nodes:
        function = function_of(node)
        if function is None or function in recorded or _named(function).startswith(_KNOWN):
            continue
        is_recorded = _is_recorded(node)
        if is_recorded:
            recorded.add(function)
        elif is_recorded is False:
            raise NotImplementedError(
                f"the loss of step {step} uses {_named(function)}, a custom autograd.Function "
                "whose backward pass is not recorded (it runs under torch.no_grad(), or detaches): "
                "the second derivative would be cut silently. Compute the gradient with grad mode "
                "as it is, from ctx.saved_tensors (with torchdiffeq, call odeint instead of "
                "odeint_adjoint), or use diffopt.FirstOrder(), which takes no second derivatives"
            )


def is_own(function: type) -> bool:
    """Whether a Function is this package's."""
    return function.__module__.startswith("diffopt.")


def _is_recorded(node: Node) -> bool | None:
    """Whether the results depend on the cotangents; None where every result is zero."""
    cotangents = cotangents_of(node)
    if cotangents is None:
        return False
    with torch.enable_grad():
        results: Any = backward_of(node)(*cotangents)
    results = results if isinstance(results, tuple) else (results,)
    gradients = [g for g, wanted in zip(results, needed(node), strict=False) if wanted]
    tensors = [g for g in gradients if isinstance(g, Tensor)]
    cut = [g for g in tensors if not g.requires_grad or _raises(g)]
    if any(bool(g.detach().ne(0).any()) for g in cut):
        return False
    return True if tensors and not cut else None


def _raises(x: Tensor) -> bool:
    """Whether ``x`` comes from ``once_differentiable``, and raises where it is differentiated.

    It does so only where a cotangent requires grad. The one of a loss does not, and there the
    derivative would be cut without a word.
    """
    return x.grad_fn is not None and x.grad_fn.name() == _ERROR


_ERROR = "torch::autograd::Error"


def _named(function: type) -> str:
    name = function.__qualname__
    if function.__module__ == "torch._functorch.autograd_function":  # mapped over tasks
        return name.removeprefix("Vmapped")
    return f"{function.__module__}.{name}"
