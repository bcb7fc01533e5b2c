"""A run keeps to its plan: the literal order of evaluations, and how many states are held."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import new_objects_only
from plans import CountedSnapshots
from torch import Tensor, nn

import diffopt
from diffopt.adjoint import Checkpointed
from diffopt.schedule import Action, Plan

ADJOINTS: list[Any] = [
    diffopt.StoreAll(),
    *(diffopt.Segmented(k) for k in (1, 2, 3, 5, None)),
    *(diffopt.Binomial(c) for c in (1, 2, 3)),
]


def evaluations(plan: Plan) -> tuple[list[int], list[int]]:
    """The steps that the plan has evaluated, in the forward and in the backward pass."""
    passes: tuple[list[int], list[int]] = [], []
    recorded = set()
    for actions, order in zip((plan.forward_actions, plan.backward_actions), passes, strict=True):
        for kind, start, stop in actions:
            if kind == "advance":
                order += range(start, stop)
            elif kind == "record" or (kind == "vjp" and start not in recorded):
                order.append(start)
            if kind == "record":
                recorded.add(start)
    return passes


class Counted(nn.Module):
    """A shape of its own, to count the values alive."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 11).double())


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_run_keeps_to_its_plan(adjoint: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = CountedSnapshots()
    monkeypatch.setattr(type(adjoint), "new_snapshots", lambda adjoint: snapshots)
    model, seen = Counted(), []

    def loss_fn(model: Any, t: int) -> Tensor:
        seen.append(t)
        return model.w.square().sum()

    plan: Plan = adjoint.plan(steps)
    forward, backward = evaluations(plan)
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, steps, loss_fn, adjoint=adjoint)
    assert seen == forward == list(range(steps))
    for repeat in ("retained", "last"):
        seen.clear()
        fast.params["w"].sum().backward(retain_graph=repeat == "retained")
        assert seen == backward
    assert max(snapshots.peak, 1) == plan.peak_states  # the start counts, which the loop holds
    assert not len(snapshots)


@pytest.mark.parametrize("adjoint", ADJOINTS[1:], ids=repr)
def test_states_alive(adjoint: Any) -> None:
    """Counted from outside: those of the plan, and a few that are being worked on."""
    steps, model, alive = 30, Counted(), []

    def loss_fn(model: Any, t: int) -> Tensor:
        shaped = (x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
        alive.append(len({x.data_ptr() for x in shaped if x.shape == (7, 11)}))
        return model.w.square().sum()

    with new_objects_only():
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, steps, loss_fn, adjoint=adjoint)
        fast.params["w"].sum().backward()
    states = adjoint.plan(steps).peak_states
    assert states - 2 <= max(alive) <= states + 4


def test_an_adjoint_of_ones_own() -> None:
    """Any legal plan gives the exact gradient: here the odd steps' graphs are recorded."""

    @dataclass(frozen=True)
    class OddGraphs(Checkpointed):
        def plan(self, steps: int) -> Plan:
            actions = []
            for t in range(steps):
                if t % 2:
                    actions.append(Action("record", t, t + 1))
                else:
                    actions += [Action("save", t, t), Action("advance", t, t + 1)]
            for t in reversed(range(steps)):
                if not t % 2:
                    actions += [Action("load", t, t), Action("free", t, t)]
                actions.append(Action("vjp", t, t + 1))
            return Plan(steps, tuple(actions))

    model = Counted()
    grads = []
    for adjoint in (OddGraphs(), diffopt.StoreAll()):
        fast = diffopt.unroll(
            model,
            diffopt.Adam(model.parameters()),
            5,
            lambda m, t: m.w.sin().sum(),
            adjoint=adjoint,
        )
        grads.append(torch.autograd.grad(fast.params["w"].sum(), model.w)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
