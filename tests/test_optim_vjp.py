"""The hand-derived vector-Jacobian products of the rules, against autograd of the rules."""

from __future__ import annotations

import pytest
import torch
from optimizers import CASES, Case
from torch import Tensor

from diffopt.optim import SGD, vjp

BY_HAND = {"SGD", "Momentum", "Adam", "AdamW", "RMSprop"}
NOT_COVERED = ("amsgrad", "centered")


def _arguments(case: Case, steps: int) -> tuple[object, ...]:
    torch.manual_seed(0)
    params = {"a": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    opt = case.ours([{"params": [params["a"]]}, {"params": [params["b"]]}])
    groups = [["a"], ["b"]]
    state = opt.init(params, groups=groups)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    grads["b"][:2] = 0.0  # second moments that are exactly zero
    for step in range(steps):
        params, state = opt.update(params, grads, state, step=step, groups=groups)
    return opt, params, grads, state, groups


def _cotangents(params: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> tuple:
    cot_params = {name: torch.randn_like(p) for name, p in params.items()}
    cot_state = {
        name: {k: torch.randn_like(x) for k, x in held.items() if k != "step"}
        for name, held in state.items()
    }
    return cot_params, cot_state


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in BY_HAND], ids=lambda c: c.id)
def test_equals_the_derivative_that_autograd_takes(case: Case, steps: int) -> None:
    opt, params, grads, state, groups = _arguments(case, steps)
    _, after = opt.update(params, grads, state, step=steps, groups=groups)
    cot_params, cot_state = _cotangents(params, after)
    hyper = opt.hyperparameters(steps)
    arguments = (opt, params, grads, state, cot_params, cot_state, hyper, groups)
    hand = vjp._by_hand(*arguments)
    covered = not any(case.options.get(option) for option in NOT_COVERED)
    assert (hand is not None) == covered
    auto = vjp._by_autograd(*arguments, seen=(), retain_graph=False)
    if hand is None:
        return
    for name in params:
        torch.testing.assert_close(hand.params[name], auto.params[name], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(hand.grads[name], auto.grads[name], rtol=1e-12, atol=1e-13)
        assert set(hand.state[name]) == set(auto.state[name])
        for key, c in hand.state[name].items():
            torch.testing.assert_close(c, auto.state[name][key], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in BY_HAND], ids=lambda c: c.id)
def test_missing_cotangents_and_gradients(case: Case) -> None:
    opt, params, grads, state, groups = _arguments(case, 1)
    grads = {"a": None, "b": grads["b"]}
    cot_params = {"a": torch.ones(3, 2).double(), "b": torch.ones(4).double()}
    for hand_or_auto in (vjp._by_hand, vjp._by_autograd):
        more = {} if hand_or_auto is vjp._by_hand else {"seen": (), "retain_graph": False}
        hyper = opt.hyperparameters(1)
        found = hand_or_auto(opt, params, grads, state, cot_params, {}, hyper, groups, **more)
        if found is not None:
            assert found.grads.keys() == {"b"}
            torch.testing.assert_close(found.params["a"], cot_params["a"])


def test_tensor_hyperparameters_are_left_to_autograd() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    opt, params, grads, state, groups = _arguments(Case("SGD", {"lr": lr}), 0)
    cot_params, _ = _cotangents(params, {})
    hyper = opt.hyperparameters(0)
    found = vjp.update_vjp(
        opt, params, grads, state, cot_params, {}, hyper=hyper, groups=groups, seen=[lr]
    )
    expected = -sum((cot_params[name] * grads[name]).sum() for name in params)
    torch.testing.assert_close(found.seen[0].double(), expected)


def test_a_changed_rule_does_not_inherit_the_derivative_of_the_old_one() -> None:
    class Doubling(SGD):
        def _update(self, hyper, params, grads, states):
            return super()._update(hyper, params, [2 * g for g in grads], states)

    weight = torch.ones(1, dtype=torch.float64)
    opt = Doubling([weight], lr=0.1)
    arguments = ({"w": weight}, {"w": weight}, {"w": {}}, {"w": weight}, {})
    found = vjp.update_vjp(opt, *arguments, hyper=opt.hyperparameters(0), groups=[["w"]])
    assert found.grads["w"].item() == pytest.approx(-0.2)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gradients_that_are_not_read_may_hold_anything(case: Case, steps: int) -> None:
    opt, params, grads, state, groups = _arguments(case, steps)
    hyper = opt.hyperparameters(steps)
    read = vjp.reads_gradients(opt, grads, state, hyper=hyper, groups=groups)
    assert read == (case.name not in ("SGD", "Momentum"))
    if read:
        return
    _, after = opt.update(params, grads, state, step=steps, groups=groups)
    cotangents = _cotangents(params, after)
    want = vjp.update_vjp(opt, params, grads, state, *cotangents, hyper=hyper, groups=groups)
    garbage = {name: torch.full_like(g, torch.nan) for name, g in grads.items()}
    got = vjp.update_vjp(opt, params, garbage, state, *cotangents, hyper=hyper, groups=groups)
    for name in params:
        assert torch.equal(got.params[name], want.params[name])
        assert torch.equal(got.grads[name], want.grads[name])
        assert got.state[name].keys() == want.state[name].keys()


def test_a_derivative_of_the_learning_rate_reads_the_gradients() -> None:
    w = torch.ones(2)
    opt = SGD([w], lr=torch.tensor(0.1, requires_grad=True))
    given = {"w": w}
    hyper = opt.hyperparameters(0)
    assert vjp.reads_gradients(opt, given, {"w": {}}, hyper=hyper, groups=[["w"]])
