"""Operations that PyTorch cannot differentiate twice, or does wrongly: written out, or refused.

Over all layers of ``torch.nn`` and PyTorch's own table of operations (2.13, CPU, float64), a few of
the second derivatives do not exist and two are silently wrong: that of the fused
``torch._weight_norm`` in the direction, and that of the chunked ``linear_cross_entropy``, which is
taken for zero. 2.14 has that of ``cdist``. ``tests/test_pytorch_derivatives.py`` says what each
version has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._torch.autograd import saved


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``."""
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


_linear_cross_entropy = getattr(F, "linear_cross_entropy", None)  # new in PyTorch 2.13


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Any:
    """``torch.nn.functional.linear_cross_entropy``, in one chunk."""
    assert _linear_cross_entropy is not None
    return _linear_cross_entropy(*args, options=None, **kwargs)


_cdist: Any = torch.cdist
_IF_LARGE = "use_mm_for_euclid_dist_if_necessary"


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = _IF_LARGE) -> Any:
    """``torch.cdist``."""
    large = x1.size(-2) > 25 or x2.size(-2) > 25
    by_product = "donot" not in compute_mode and (large or "necessary" not in compute_mode)
    learning = torch.is_grad_enabled() and (x1.requires_grad or x2.requires_grad)
    if not learning or (p == 2 and by_product):
        return _cdist(x1, x2, p, compute_mode)  # this one can be differentiated, or need not be
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


#: The nodes whose derivatives are silently wrong, and the operations they belong to.
WRONG = {
    "WeightNormInterfaceBackward0": "torch._weight_norm",
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_defaultBackward": (
        "the chunked linear_cross_entropy"
    ),
}

#: The nodes whose second derivatives are silently wrong. A node is the first derivative of the
#: operation, whose third derivative is then wrong.
WRONG_BEYOND = {
    "NativeBatchNormBackwardBackward0": "batch_norm",
    "CudnnBatchNormBackwardBackward0": "batch_norm",
    "MiopenBatchNormBackwardBackward0": "batch_norm",
    "NativeLayerNormBackwardBackward0": "layer_norm",
}


def is_suspect(node: Any) -> bool:
    """Whether a derivative of nodes of this type may be wrong."""
    name = type(node).__name__
    return name in WRONG or name in WRONG_BEYOND


def refuse_wrong(node: Any, before_gradient: bool) -> None:
    """Raise where the derivative of a node that is going to be taken is wrong.

    Args:
        node: of the graph of a step.
        before_gradient: whether the graph is going to be differentiated twice, as that of the loss
            is, and not once.

    Raises:
        NotImplementedError: naming the operation, and what to write instead.
    """
    name = type(node).__name__
    if name in WRONG:
        raise NotImplementedError(
            f"PyTorch's second derivative of {WRONG[name]} is wrong: write that out in other "
            "operations"
        )
    if name in WRONG_BEYOND and before_gradient:
        if saved(node, "train") is False:  # the statistics are constants, as PyTorch takes them
            return
        raise NotImplementedError(
            f"the loss takes a derivative of {WRONG_BEYOND[name]} itself, and PyTorch's third "
            "derivative of that is wrong: take it with torch.func.grad, for which the operation is "
            "written out"
        )


_PHRASES = (  # how PyTorch says that there is no second derivative
    "is not implemented",
    "don't support automatic differentiation",
    "once_differentiable",
    "double backward",
    "Double backward",
    "create_graph=False",  # of a compiled function
)


def refuse_missing(error: RuntimeError, step: int) -> None:
    """Where an error says that there is no second derivative, say of which step and what to do.

    Raises:
        NotImplementedError: so it is.
    """
    message = str(error)
    if any(phrase in message for phrase in _PHRASES):
        raise NotImplementedError(
            f"the gradient of step {step} cannot be differentiated again ({message.strip()}): "
            "replace that operation in the model, or use diffopt.FirstOrder(), which takes no "
            "second derivatives"
        ) from error
