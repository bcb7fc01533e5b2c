"""``monitor``: what flows back through the steps is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from adjoints import EXACT
from helpers import assert_all_close, batches, mse, tiny
from oracle import plain
from torch import Tensor

import diffopt

T = 4
ADJOINTS = [*(adjoint for _, adjoint in EXACT), diffopt.Truncated(T), diffopt.FirstOrder()]


def problem() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    return tiny(), batches(T)


def expected(model: Any, data: list[Any], most: float | None, constant: bool) -> list[Any]:
    """What flows to the weights after each step of a plain loop, as hooks see it."""
    shown: dict[int, dict[str, Tensor]] = {}

    def show(t: int, params: Iterable[tuple[str, Tensor]]) -> None:
        # Hooks of a tensor run before its node's: what comes in is not bounded yet.
        for name, p in params:
            p.register_hook(lambda g, name=name: shown.setdefault(t, {}).update({name: g}))

    def loss_fn(m: Any, item: tuple[int, Any]) -> Tensor:
        t, pair = item
        if t:
            show(t - 1, m.named_parameters())
        return mse(m, pair)

    fast = plain(
        model,
        {"lr": 0.3},
        list(enumerate(data)),
        loss_fn,
        grad_transform=lambda grads: {n: g.detach() if constant else g for n, g in grads.items()},
        max_cotangent_norm=most,
    )
    show(T - 1, fast.params.items())
    shown.clear()  # of the inner gradients
    sum((t + 1) * p.sin().sum() for t, p in enumerate(fast.params.values())).backward()  # type: ignore[union-attr]
    return [(t, shown[t]) for t in reversed(range(T))]


@pytest.mark.parametrize("most", [None, 0.5])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_it_is_shown_what_flows_to_each_steps_parameters(
    adjoint: diffopt.Adjoint, most: float | None
) -> None:
    model, data = problem()
    shown: list[Any] = []
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.3),
        data,
        mse,
        adjoint=adjoint,
        max_cotangent_norm=most,
        monitor=lambda step, cotangent: shown.append((step, cotangent)),
    )
    assert not shown
    outer = sum((t + 1) * p.sin().sum() for t, p in enumerate(fast.params.values()))
    assert isinstance(outer, Tensor)
    outer.backward()
    want = expected(model, data, most, isinstance(adjoint, diffopt.FirstOrder))
    assert [step for step, _ in shown] == [step for step, _ in want]
    for (_, found), (_, right) in zip(shown, want, strict=True):
        assert found.keys() == right.keys()
        assert not any(c.requires_grad for c in found.values())
        assert_all_close(found.values(), [right[n] for n in found], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("compile", [False, True])
def test_it_changes_no_gradient_of_either_order(compile: bool, graphs: list[bool]) -> None:
    model, data = problem()
    shown: list[int] = []

    def monitor(step: int, cotangent: dict[str, Tensor]) -> str:
        torch.rand(3)  # leaves the random numbers of the steps alone
        assert not torch.is_grad_enabled()
        shown.append(step)
        return "not used"

    found = []
    for shows in (None, monitor):
        torch.manual_seed(1)
        fast = diffopt.unroll(
            model,
            diffopt.Adam(model.parameters()),
            data,
            lambda m, pair: mse(m, (pair[0] + 0.1 * torch.randn(5, 2).double(), pair[1])),
            segment=2,
            compile=compile,
            monitor=shows,
        )
        total = mse(fast, data[0])
        params = list(model.parameters())
        first = torch.autograd.grad(total, params, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), params)])
    assert bool(graphs) == compile
    assert shown == [3, 2, 1, 0] * 2  # the second gradient goes back through the loop as well
    assert_all_close(found[1], found[0], rtol=0, atol=0)


def test_steps_are_numbered_on() -> None:
    model, data = problem()
    inner = diffopt.SGD(model.parameters(), lr=0.3)
    shown: list[int] = []
    first = diffopt.unroll(model, inner, data, mse)
    fast = diffopt.unroll(
        model, inner, data, mse, initial=first, monitor=lambda step, _: shown.append(step)
    )
    mse(fast, data[0]).backward()
    assert shown == [7, 6, 5, 4]


def test_nothing_flows_to_the_last_steps_parameters_from_its_loss() -> None:
    model, data = problem()
    shown: dict[int, Any] = {}
    inner = diffopt.SGD(model.parameters(), lr=0.3)
    fast = diffopt.unroll(model, inner, data, mse, segment=2, monitor=shown.__setitem__)
    fast.losses[-1].backward()
    assert shown[T - 1] == {}
    assert shown[T - 2].keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    "adjoint", [diffopt.ForwardMode([torch.ones(1, requires_grad=True)]), diffopt.Implicit()]
)
def test_others_refuse(adjoint: diffopt.Adjoint) -> None:
    model, data = problem()
    inner = diffopt.SGD(model.parameters(), lr=0.3)
    with pytest.raises(ValueError, match="monitor is shown what flows back through each step, but"):
        diffopt.unroll(model, inner, data, mse, adjoint=adjoint, monitor=lambda *_: None)
    with pytest.raises(TypeError, match="monitor is a str: pass a function"):
        diffopt.unroll(model, inner, data, mse, monitor="print")  # type: ignore[arg-type]
