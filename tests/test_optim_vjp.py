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


def _by_autograd(opt, params, grads, state, cot_params, cot_state, groups, step):
    """The derivative of ``update``, as autograd takes it, by (kind, name, entry)."""
    leaves = {("params", n, ""): x for n, x in params.items()}
    leaves.update({("grads", n, ""): x for n, x in grads.items() if x is not None})
    leaves.update({("state", n, k): x for n in state for k, x in state[n].items() if k != "step"})
    leaves = {place: x.detach().requires_grad_() for place, x in leaves.items()}

    def at(kind, name, key, x):
        return leaves.get((kind, name, key), x)

    after, entries = opt.update(
        {n: at("params", n, "", x) for n, x in params.items()},
        {n: at("grads", n, "", x) for n, x in grads.items()},
        {n: {k: at("state", n, k, x) for k, x in state[n].items()} for n in state},
        step=step,
        groups=groups,
    )
    pairs = [(after[n], c) for n, c in cot_params.items()]
    pairs += [(entries[n][k], c) for n in cot_state for k, c in cot_state[n].items()]
    pairs = [(x, c) for x, c in pairs if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True
    )
    return {
        p: torch.zeros_like(x) if c is None else c
        for (p, x), c in zip(leaves.items(), found, strict=True)
    }


def _assert_equals_autograd(found, expected):
    for (kind, name, key), c in expected.items():
        got = getattr(found, kind).get(name)
        got = got.get(key) if kind == "state" and got is not None else got
        torch.testing.assert_close(
            torch.zeros_like(c) if got is None else got, c, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_equals_the_derivative_that_autograd_takes(
    case: Case, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, params, grads, state, groups = _arguments(case, steps)
    _, after = opt.update(params, grads, state, step=steps, groups=groups)
    cotangents = _cotangents(params, after)
    want = _by_autograd(opt, params, grads, state, *cotangents, groups, steps)
    if case.name in BY_HAND and not any(case.options.get(option) for option in NOT_COVERED):
        owner = next(cls for cls in type(opt).__mro__ if "_update" in vars(cls))
        monkeypatch.setattr(owner, "_update", None)  # not called where a rule states its derivative
    found = vjp.update_vjp(
        opt, params, grads, state, *cotangents, hyper=opt.hyperparameters(steps), groups=groups
    )
    _assert_equals_autograd(found, want)


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_a_group_with_tensors_does_not_slow_down_the_others(name: str) -> None:
    """One group is differentiated by hand, one by autograd; the rate gets its derivative."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt, params, grads, state, groups = _arguments(Case(name, {"lr": 0.1}), 1)
    cotangents = _cotangents(params, opt.update(params, grads, state, step=1, groups=groups)[1])
    want = _by_autograd(opt, params, grads, state, *cotangents, groups, 1)
    opt.param_groups[1]["lr"] = lr
    called = []
    own = type(opt)._vjp

    def counted(self, pullback):
        called.append(len(pullback.params))
        return own(self, pullback)

    opt.__class__ = type("Counted", (type(opt),), {"_vjp": counted})
    hyper = opt.hyperparameters(1)
    arguments = (opt, params, grads, state, *cotangents)
    found = vjp.update_vjp(*arguments, hyper=hyper, groups=groups, captured=[lr])
    assert called == [1]
    _assert_equals_autograd(found, want)
    h = 1e-6
    ends = []
    for rate in (0.1 + h, 0.1 - h):
        opt.param_groups[1]["lr"] = rate
        after, entries = opt.update(params, grads, state, step=1, groups=groups)
        ends.append(
            sum((c * after[n]).sum() for n, c in cotangents[0].items())
            + sum((c * entries[n][k]).sum() for n in entries for k, c in cotangents[1][n].items())
        )
    torch.testing.assert_close(
        found.captured[0], (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_missing_cotangents_and_gradients(case: Case) -> None:
    opt, params, grads, state, groups = _arguments(case, 1)
    grads = {"a": None, "b": grads["b"]}
    cot_params = {"a": torch.ones(3, 2).double(), "b": torch.ones(4).double()}
    found = vjp.update_vjp(
        opt, params, grads, state, cot_params, {}, hyper=opt.hyperparameters(1), groups=groups
    )
    assert "a" not in found.grads
    torch.testing.assert_close(found.params["a"], cot_params["a"])
    want = _by_autograd(opt, params, grads, state, cot_params, {}, groups, 1)
    _assert_equals_autograd(found, want)


def test_tensor_hyperparameters_are_left_to_autograd() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    opt, params, grads, state, groups = _arguments(Case("SGD", {"lr": lr}), 0)
    cot_params, _ = _cotangents(params, {})
    hyper = opt.hyperparameters(0)
    found = vjp.update_vjp(
        opt, params, grads, state, cot_params, {}, hyper=hyper, groups=groups, captured=[lr]
    )
    expected = -sum((cot_params[name] * grads[name]).sum() for name in params)
    torch.testing.assert_close(found.captured[0].double(), expected)


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
