"""Operations whose derivatives are wrong in PyTorch are known by the names of their nodes.

A new version of PyTorch may rename a node: then these fail, and not a meta-gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from torch import Tensor, nn

import diffopt
from diffopt._derivatives.missing import WRONG, WRONG_BEYOND, refuse_wrong


def linear_cross_entropy() -> Any:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    module = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    options = module.LinearCrossEntropyOptions()
    node = F.linear_cross_entropy(x, w, torch.tensor([0, 1, 2, 3]), options=options).grad_fn
    while "cross_entropy" not in type(node).__name__:
        node = node.next_functions[0][0]
    return node


def weight_norm() -> Any:
    return torch._weight_norm(torch.randn(3, 4, requires_grad=True), torch.ones(3, 1)).grad_fn


def of_gradient(norm: Callable[[Tensor], Tensor]) -> Any:
    x = torch.randn(4, 3, requires_grad=True)
    return torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)[0].grad_fn


def batch_norm(training: bool = True) -> Any:
    statistics = torch.zeros(3), torch.ones(3)
    return of_gradient(lambda x: F.batch_norm(x, *statistics, training=training))


def layer_norm() -> Any:
    return of_gradient(lambda x: F.layer_norm(x, [3]))


#: By the names that are looked for. Those of other devices cannot be made here.
NODES: dict[str, Callable[[], Any]] = {
    "WeightNormInterfaceBackward0": weight_norm,
    "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_defaultBackward": (
        linear_cross_entropy
    ),
    "NativeBatchNormBackwardBackward0": batch_norm,
    "NativeLayerNormBackwardBackward0": layer_norm,
}
ELSEWHERE = {"CudnnBatchNormBackwardBackward0", "MiopenBatchNormBackwardBackward0"}


def test_every_name_is_tested() -> None:
    assert NODES.keys() | ELSEWHERE == WRONG.keys() | WRONG_BEYOND.keys()


@pytest.mark.parametrize("name", NODES)
def test_the_node_has_the_name(name: str) -> None:
    node = NODES[name]()
    assert type(node).__name__ == name
    with pytest.raises(NotImplementedError, match=r"derivative of .* is wrong"):
        refuse_wrong(node, True)
    if name in WRONG_BEYOND:
        refuse_wrong(node, False)  # differentiated once, it is right
    else:
        with pytest.raises(NotImplementedError, match="second derivative"):
            refuse_wrong(node, False)


def test_batch_norm_in_evaluation_is_right() -> None:
    refuse_wrong(batch_norm(training=False), True)


@every_adjoint
def test_a_gradient_penalty_through_batch_norm_in_evaluation(adjoint: diffopt.Adjoint) -> None:
    """The oracle writes it out, in a plain loop."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(1, 2)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1)).double().eval()
    x = torch.randn(5, 3).double()

    def penalised(apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = apply(x).square().sum()
            (g,) = torch.autograd.grad(y, x, create_graph=True)
        return y + g.square().sum()

    def written(values: list[Tensor]) -> Callable[[Tensor], Tensor]:
        w, b, scale, shift, v, c = values
        mean, var = norm.running_mean.detach(), norm.running_var.detach()

        def apply(x: Tensor) -> Tensor:
            hidden = (x @ w.T + b - mean) / (var + norm.eps).sqrt()
            return (hidden * scale + shift).tanh() @ v.T + c

        return apply

    inner = diffopt.SGD(model.parameters(), lr=0.02)
    fast = diffopt.unroll(model, inner, [x] * 3, penalised, adjoint=adjoint)
    params = list(model.parameters())
    got = torch.autograd.grad(fast(x).sin().sum(), params)
    values = list(params)
    for _ in range(3):
        loss = penalised(written(values), x)
        grads = torch.autograd.grad(loss, values, create_graph=True)
        values = [p - 0.02 * g for p, g in zip(values, grads, strict=True)]
    want = torch.autograd.grad(written(values)(x).sin().sum(), params)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
