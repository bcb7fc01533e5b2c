"""``metasmoothness``: against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
Z = torch.tensor([1.0, -3.0]).double()


def quadratic(z: Tensor) -> Tensor:
    return 0.5 * z @ A @ z


def test_a_quadratic() -> None:
    h = 0.3
    g = A @ Z
    v = -g / g.norm()
    found = diffopt.metasmoothness(quadratic, [Z], step=h)
    bend = (v @ A @ v).item()
    assert found.slope == pytest.approx(-g.norm().item())
    assert found.step == h
    assert found.losses == pytest.approx([quadratic(Z + i * h * v).item() for i in range(3)])
    assert found.curvature == pytest.approx(bend)
    one, two = (-h * g.norm().item() + (i + 0.5) * h * h * bend for i in range(2))
    assert found.deviation == pytest.approx(abs(two - one) / (abs(one) + abs(two)))
    assert found.kept == pytest.approx(1 - h * bend / (2 * g.norm().item()))
    assert found.agreement is None


def test_a_line_and_a_kink() -> None:
    found = diffopt.metasmoothness(lambda z: (3 * z).sum() + 1, [Z], step=0.5)
    assert found.curvature == pytest.approx(0, abs=1e-12)
    assert found.deviation == pytest.approx(0, abs=1e-12)
    assert found.kept == pytest.approx(1)
    # |z| from 0.1 downward: past the kink after a step.
    z = torch.tensor(0.1, dtype=torch.double)
    kink = diffopt.metasmoothness(lambda z: (z.abs(), z), [z], step=0.2)
    assert kink.losses == pytest.approx((0.1, 0.1, 0.3))
    assert kink.kept == pytest.approx(0)
    assert kink.deviation == pytest.approx(1)
    assert kink.curvature == pytest.approx(0.2 / 0.2**2)
    assert kink.agreement == pytest.approx(1)


def test_agreement_weighs_the_entries() -> None:
    def outer(z: Tensor) -> Any:
        # Along −1 from 0 by 2 h: the first goes on, and moves by 2; the second goes down by 3 and
        # up by 9, so it moves by 6.
        return z.sum(), {"a": z, "b": [3 * (z + 1) + 12 * F.relu(-z - 1)], "count": torch.tensor(3)}

    found = diffopt.metasmoothness(outer, [torch.zeros(1).double()], step=1.0)
    assert found.agreement == pytest.approx((2 - 6) / (2 + 6))
    back = diffopt.metasmoothness(
        lambda z: (z.sum(), (z + 1).abs()), [torch.zeros(1).double()], step=1.0
    )
    assert back.agreement == -1.0  # at 2 h where it began
    still = diffopt.metasmoothness(lambda z: (z.sum(), 0 * z), [Z], step=1.0)
    assert still.agreement == 1.0


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(2)], ids=str)
def test_a_learning_rate_through_training(adjoint: diffopt.Adjoint) -> None:
    """w ← (1 − η) w, T times, from 1: L(η) = ½ (1 − η)²ᵀ."""
    steps, rate, h = 4, 0.3, 0.1

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()).double())

    model = One()

    def loss_fn(model: Any, t: int) -> Tensor:
        return 0.5 * model.w**2

    def outer(lr: Tensor) -> Any:
        inner = diffopt.SGD(model.parameters(), lr=lr)
        fast = diffopt.unroll(model, inner, steps, loss_fn, adjoint=adjoint)
        return loss_fn(fast, steps), fast.params

    at = torch.tensor(rate, dtype=torch.double)
    found = diffopt.metasmoothness(outer, [at], step=h)
    want = [0.5 * (1 - rate - i * h) ** (2 * steps) for i in range(3)]
    assert found.losses == pytest.approx(want)
    assert found.slope == pytest.approx(-steps * (1 - rate) ** (2 * steps - 1))
    assert found.kept == pytest.approx((want[1] - want[0]) / (h * found.slope))
    assert found.agreement == 1.0
    assert not at.requires_grad
    assert model.w.item() == 1.0


def test_the_weights_as_tensors() -> None:
    """Several tensors, of joint norm."""
    model = nn.Linear(2, 1).double()
    x, y = torch.randn(4, 2).double(), torch.randn(4, 1).double()

    def loss_fn(model: Any, t: int) -> Tensor:
        return (model(x) - y).square().mean()

    def outer(weight: Tensor, bias: Tensor) -> Tensor:
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        start = {"weight": weight, "bias": bias}
        return loss_fn(diffopt.unroll(model, inner, 3, loss_fn, initial=start), 3)

    start = list(model.parameters())
    loss = outer(*start)
    grads = torch.autograd.grad(loss, start)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    found = diffopt.metasmoothness(outer, start, step=1e-5)
    assert found.losses[0] == pytest.approx(loss.item())
    assert found.slope == pytest.approx(-norm)
    assert found.kept == pytest.approx(1, abs=1e-4)
    other = [torch.zeros(1, 2).double(), torch.ones(1).double()]
    along = diffopt.metasmoothness(outer, start, step=1e-5, direction=other)
    assert along.slope == pytest.approx(grads[1].item())


def test_random_numbers_are_the_same_each_time() -> None:
    drawn: list[Tensor] = []

    def outer(z: Tensor) -> Tensor:
        drawn.append(torch.randn(3).double())
        return (z * drawn[-1][:2]).sum()

    torch.manual_seed(3)
    found = diffopt.metasmoothness(outer, [Z], step=0.1)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert found.curvature == pytest.approx(0, abs=1e-12)
    after = torch.randn(2)
    torch.manual_seed(3)
    torch.randn(3)
    assert torch.equal(after, torch.randn(2))


def test_what_is_refused() -> None:
    nan = torch.tensor(float("nan")).double()
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (3, [Z], {}, TypeError, "outer is a int: pass a function of the tensors"),
        (quadratic, [], {}, ValueError, "tensors is empty"),
        (quadratic, [3.0], {}, TypeError, r"tensors\[0\] is a float: pass tensors of floating"),
        (quadratic, [torch.tensor(3)], {}, TypeError, r"tensors\[0\] is a torch.int64"),
        (quadratic, [Z], {"step": 0.0}, ValueError, "step=0.0: pass the distance"),
        (lambda z: z, [Z], {}, ValueError, r"outer loss has shape \(2,\): reduce it"),
        (lambda z: 1.0, [Z], {}, TypeError, r"outer gives a float: return the outer loss"),
        (lambda z: Z.sum(), [Z], {}, ValueError, "depends on none of the tensors"),
        (lambda z: (0 * z).sum(), [Z], {}, ValueError, "the meta-gradient is zero"),
        (lambda z: (nan * z).sum(), [Z], {}, ValueError, r"of tensors\[0\] is not finite"),
        (quadratic, [Z], {"direction": [A]}, ValueError, r"direction has shapes \[\(2, 2\)\], and"),
    ]
    for outer, tensors, more, error, message in cases:
        with pytest.raises(error, match=message):
            diffopt.metasmoothness(outer, tensors, **{"step": 0.1, **more})
