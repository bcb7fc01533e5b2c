"""Steps in parts keep the gradients that their derivatives read: the parts are evaluated once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_all_close, batch, mse, tiny
from torch import Tensor

import diffopt
from diffopt._step.parts_gradients import Gradients

T, PARTS = 9, 3
DATA = [batch(7) for _ in range(T)]
SEGMENTS = pytest.mark.parametrize(
    ("segment", "again", "evaluated"),
    [
        (1, 0, 0),
        (3, 4, 2),
        (4, 6, 2),
        (T, 0, 0),
    ],  # the last segment's states are held from the first pass on
)


def learned_rate() -> Tensor:
    return torch.tensor(-3.0, dtype=torch.double, requires_grad=True)


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, item: Any) -> Tensor:
        self.calls += 1
        return mse(model, item)


@SEGMENTS
@pytest.mark.parametrize("rule", ["Adam", "RMSprop", "learned"])
def test_a_gradient_is_computed_once_where_a_state_is_held(
    segment: int, again: int, evaluated: int, rule: str
) -> None:
    """``again`` steps are taken again; ``evaluated`` are not, and their states not held before."""
    torch.manual_seed(0)
    model, log_lr, loss_fn = tiny(), learned_rate(), Counted()
    if rule == "learned":
        opt: Any = diffopt.SGD(model.parameters(), lr=lambda t: log_lr.exp(), momentum=0.9)
    else:
        opt = getattr(diffopt, rule)(model.parameters(), lr=0.01)
    inputs = [*model.parameters(), *[log_lr] * (rule == "learned")]
    kept = diffopt.unroll(model, opt, DATA, loss_fn, segment=segment, microbatches=PARTS)
    assert loss_fn.calls == PARTS * T
    found = torch.autograd.grad(mse(kept, DATA[0]), inputs)
    assert loss_fn.calls == PARTS * (2 * T + again + evaluated)
    one = diffopt.unroll(model, opt, DATA, mse, adjoint=diffopt.StoreAll())
    assert_all_close(found, torch.autograd.grad(mse(one, DATA[0]), inputs), rtol=1e-10, atol=1e-12)


def test_with_a_storage_none_is_held(tmp_path: Path) -> None:
    model, loss_fn = tiny(), Counted()
    opt = diffopt.Adam(model.parameters(), lr=0.01)
    adjoint = diffopt.Segmented(1, storage=str(tmp_path))
    fast = diffopt.unroll(model, opt, DATA, loss_fn, adjoint=adjoint, microbatches=PARTS)
    torch.autograd.grad(mse(fast, DATA[0]), list(model.parameters()))
    assert loss_fn.calls == PARTS * 3 * T


@pytest.mark.parametrize("segment", [1, 3])
def test_as_many_are_held_as_the_plan_has_states_in_a_segment(
    segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    keep = Gradients.keep

    def counting(self: Gradients, *states: Any) -> None:
        keep(self, *states)
        held.append(len(self._of))

    monkeypatch.setattr(Gradients, "keep", counting)
    model = tiny()
    opt = diffopt.Adam(model.parameters(), lr=0.01)
    fast = diffopt.unroll(model, opt, DATA, mse, segment=segment, microbatches=PARTS)
    torch.autograd.grad(mse(fast, DATA[0]), list(model.parameters()))
    assert max(held) == (T if segment == 1 else segment)


def test_twice_back_and_recorded() -> None:
    torch.manual_seed(0)
    model = tiny()
    opt = diffopt.Adam(model.parameters(), lr=0.01, eps=1e-3)
    params = list(model.parameters())
    results = []
    for more in ({}, {"microbatches": PARTS}):
        fast = diffopt.unroll(model, opt, DATA, mse, segment=1, **more)
        loss = mse(fast, DATA[0])
        first = torch.autograd.grad(loss, params, retain_graph=True)
        again = torch.autograd.grad(loss, params, retain_graph=True)
        recorded = torch.autograd.grad(loss, params, create_graph=True)
        norm: Any = sum(g.square().sum() for g in recorded)
        results.append([*first, *again, *torch.autograd.grad(norm, params)])
    assert_all_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_what_the_caller_changes_is_not_what_is_kept() -> None:
    """After one step the momentum is the gradient itself."""
    torch.manual_seed(0)
    model, log_lr = tiny(), learned_rate()
    found = []
    for changed in (False, True):
        opt = diffopt.Momentum(model.parameters(), lr=lambda t: log_lr.exp())
        fast = diffopt.unroll(model, opt, DATA[:1], mse, segment=1, microbatches=PARTS)
        if changed:
            for entries in fast.opt_state.values():
                entries["momentum_buffer"].detach().mul_(100)
        found.append(torch.autograd.grad(mse(fast, DATA[0]), [*model.parameters(), log_lr]))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-12)
