"""A list of optimizers over disjoint parameters: each updates its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from adjoints import EXACT, every_adjoint
from helpers import assert_all_close, batch, batches, differences, mse
from optimizers import Lars
from torch import Tensor, nn

import diffopt
from diffopt import optim

STEPS = 5


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() == 2]


def others(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() != 2]


Make = Callable[[nn.Module], list[torch.optim.Optimizer]]

#: Lists of optimizers; each is given a model.
LISTS: dict[str, Make] = {
    "muon and adamw": lambda m: [
        torch.optim.Muon(matrices(m), lr=0.05),
        torch.optim.AdamW(others(m), lr=0.1),
    ],
    "ours and torch's": lambda m: [
        diffopt.Adam(others(m), lr=0.1),
        torch.optim.SGD(matrices(m), lr=0.1, momentum=0.9, dampening=0.2),
    ],
    "three": lambda m: [
        torch.optim.RMSprop([m[0].weight], lr=0.05),
        diffopt.Rprop([m[2].weight], lr=0.05),
        torch.optim.NAdam(others(m), lr=0.05),
    ],
    "groups": lambda m: [
        torch.optim.SGD([{"params": [m[0].weight], "lr": 0.3}, {"params": [m[2].weight]}], lr=0.1),
        torch.optim.Adagrad([{"params": [p]} for p in others(m)], lr=0.1),
    ],
    "a rule of the user's own": lambda m: [Lars(matrices(m)), diffopt.Adam(others(m), lr=0.1)],
}
every_list = pytest.mark.parametrize("make", LISTS.values(), ids=LISTS)


def train(
    model: nn.Module, opts: Iterable[torch.optim.Optimizer], data: Iterable[Any]
) -> list[Tensor]:
    """The everyday loop of several optimizers."""
    losses = []
    for pair in data:
        for opt in opts:
            opt.zero_grad()
        loss = mse(model, pair)
        loss.backward()
        for opt in opts:
            opt.step()
        losses.append(loss.detach())
    return losses


def state_of(opts: Iterable[torch.optim.Optimizer], p: Tensor) -> dict[str, Tensor]:
    (found,) = [opt.state[p] for opt in opts if p in opt.state] or [{}]
    return {key: torch.as_tensor(x) for key, x in found.items() if x is not None}


@every_list
def test_the_everyday_loop_and_then_it_goes_on(make: Make) -> None:
    torch.set_default_dtype(torch.float64)
    model, data = small(), batches(12)
    expected = copy.deepcopy(model)
    theirs = make(expected)
    losses = train(expected, theirs, data[:4])
    inner = make(model)
    train(model, inner, data[:4])  # so that it starts in the middle
    losses = train(expected, theirs, data[4:8])
    before = copy.deepcopy(model.state_dict())

    fast = diffopt.unroll(model, inner, data[4:8], mse)
    torch.testing.assert_close(fast.losses, torch.stack(losses), rtol=1e-12, atol=0)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(fast.params[name], p, rtol=1e-12, atol=1e-14)
        wanted = state_of(theirs, p)
        assert fast.opt_state[name].keys() == wanted.keys()
        for key, x in wanted.items():
            torch.testing.assert_close(fast.opt_state[name][key], x, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    fast.load_into(model, inner)
    torch.testing.assert_close(
        train(model, inner, data[8:]), train(expected, theirs, data[8:]), rtol=1e-12, atol=0
    )


@every_list
def test_the_gradient_is_that_of_the_everyday_loop(make: Make) -> None:
    torch.set_default_dtype(torch.float64)
    model, data, query = small(), batches(STEPS), batch()
    inputs = [model[0].bias, model[2].weight]

    def by_hand() -> Tensor:
        other = copy.deepcopy(model)
        losses = train(other, make(other), data)
        return (mse(other, query) + losses[2]).detach()

    results = []
    for _, adjoint in EXACT:
        fast = diffopt.unroll(model, make(model), data, mse, adjoint=adjoint)
        results.append(torch.autograd.grad(mse(fast, query) + fast.losses[2], inputs))
    if make is not LISTS["muon and adamw"]:  # which rounds to bfloat16
        assert_all_close(results[0], differences(by_hand, inputs), rtol=2e-5, atol=1e-8)
    for result in results[1:]:
        assert_all_close(result, results[0], rtol=1e-10, atol=1e-15)


@every_adjoint
def test_two_of_a_kind_are_one_with_two_param_groups(adjoint: diffopt.Adjoint) -> None:
    """Rates that both optimizers are made of get what flows through either."""
    model, data = small(), batches(STEPS)
    log_lr = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), log_lr, beta]
    first = {"lr": lambda t: log_lr.exp() / (1 + t), "betas": (0.9, 0.9)}
    second = {"lr": lambda t: log_lr.exp(), "betas": (beta, 0.7)}
    joined = [diffopt.Adam(matrices(model), **first), diffopt.Adam(others(model), **second)]
    grouped = diffopt.Adam(
        [{"params": matrices(model), **first}, {"params": others(model), **second}]
    )
    results = []
    for opt in (joined, grouped, tuple(joined)):
        fast = diffopt.unroll(model, opt, data, mse, adjoint=adjoint)
        loss = sum((x**2).sum() for x in fast.params.values())
        first_order = torch.autograd.grad(loss, inputs, create_graph=True)
        again = sum((g**2).sum() for g in first_order)
        results.append([*first_order, *torch.autograd.grad(again, inputs)])
    assert_all_close(results[0], results[1], rtol=1e-12, atol=1e-15)
    assert_all_close(results[2], results[1], rtol=1e-12, atol=1e-15)


def test_each_param_group_is_differentiated_by_hand_where_its_rule_is() -> None:
    model, data = small(), batches(2)
    by_hand = []

    class Counted(diffopt.Adam):
        def _vjp(self, pullback: Any) -> Any:
            by_hand.append(len(pullback.params))
            return super()._vjp(pullback)

    opts = [Counted(others(model), lr=0.1), diffopt.Rprop(matrices(model))]
    fast = diffopt.unroll(model, opts, data, mse, segment=1)
    sum(x.sum() for x in fast.params.values()).backward()
    assert by_hand == [2, 2]


def test_tasks() -> None:
    n = 3
    model = small()
    torch.manual_seed(1)
    data = [(torch.randn(n, 4, 2).double(), torch.randn(n, 4, 2).double()) for _ in range(STEPS)]
    rates = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), rates]

    def opts(lr: Any) -> list[torch.optim.Optimizer]:
        return [
            Lars([model[0].weight]),
            diffopt.SGD([model[2].weight], lr=0.1, momentum=0.9),
            diffopt.Adam(others(model), lr=lr),
        ]

    singles = [
        diffopt.unroll(model, opts(lambda t, i=i: rates[i]), [(x[i], y[i]) for x, y in data], mse)
        for i in range(n)
    ]
    want = torch.autograd.grad(sum(x.losses.sum() for x in singles), inputs)
    for _, adjoint in EXACT:
        fast = diffopt.unroll(model, opts(lambda t: rates), data, mse, tasks=n, adjoint=adjoint)
        for i, single in enumerate(singles):
            for name, x in single.params.items():
                torch.testing.assert_close(fast.params[name][i], x, rtol=1e-12, atol=1e-14)
        found = torch.autograd.grad(fast.losses.sum(), inputs)
        assert_all_close(found, want, rtol=1e-10, atol=1e-13)


def test_compiled(graphs: list[bool]) -> None:
    model, data = small(), batches(STEPS)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), lr]
    results = []
    for compile in (False, True):
        opts = [Lars(matrices(model)), diffopt.AdamW(others(model), lr=lr)]
        fast = diffopt.unroll(model, opts, data, mse, compile=compile, segment=1)
        results.append(torch.autograd.grad(fast.losses.sum(), inputs))
    assert graphs
    assert_all_close(results[1], results[0], rtol=1e-10, atol=1e-13)


def test_compiled_code_is_not_shared_by_lists_of_other_rules(graphs: list[bool]) -> None:
    class Doubled(Lars):
        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            return super()._update(hyper, params, [2 * g for g in grads], states)

    model, data = small(), batches(2)
    for rule in (Lars, Doubled):
        results = [
            diffopt.unroll(
                model,
                [rule(matrices(model)), diffopt.SGD(others(model), lr=0.1)],
                data,
                mse,
                compile=compile,
            ).params["0.weight"]
            for compile in (False, True)
        ]
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert len(graphs) == 2


def test_continued_saved_and_loaded() -> None:
    model, data = small(), batches(6)
    make = LISTS["muon and adamw"]
    whole = diffopt.unroll(model, make(model), data, mse)
    half = diffopt.unroll(model, make(model), data[:3], mse)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    loaded = diffopt.unroll(model, make(model), 0, lambda m, t: mse(m, data[0]))
    loaded.load_state_dict(torch.load(file))
    for initial in (half, loaded):
        fast = diffopt.unroll(model, make(model), data[3:], mse, initial=initial)
        assert_all_close(fast.params.values(), whole.params.values(), rtol=1e-12, atol=1e-14)
        assert fast.step == 6


def test_schedules_go_on_where_load_into_left_off() -> None:
    model, data = small(), batches(3)
    seen: list[tuple[str, int]] = []

    def rate(name: str) -> Any:
        return lambda t: seen.append((name, t)) or 0.1  # type: ignore[func-returns-value]

    opts = [
        diffopt.SGD(matrices(model), lr=rate("sgd")),
        diffopt.Adam(others(model), lr=rate("adam")),
    ]
    with torch.no_grad():
        fast = diffopt.unroll(model, opts, data, mse)
        assert {t for _, t in seen} == {0, 1, 2}
        fast.load_into(model, opts)
        seen.clear()
        fast = diffopt.unroll(model, opts, data, mse)
    assert {x for x in seen if x[1] > 0} == {(n, t) for n in ("sgd", "adam") for t in (3, 4, 5)}
    assert fast.step == 6
    seen.clear()
    train(model, opts, data[:1])
    assert seen == [("sgd", 3), ("adam", 3)]


def test_a_scheduler_of_one_of_them_is_seen_by_later_unrolls_alone() -> None:
    model, data, query = small(), batches(3), batch()
    opts = [torch.optim.SGD(matrices(model), lr=0.1), torch.optim.SGD(others(model), lr=0.1)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opts[1], 0.5)
    fast = diffopt.unroll(model, opts, data, mse)
    opts[1].step()
    scheduler.step()
    later = diffopt.unroll(model, opts, data, mse)
    steady = [torch.optim.SGD(matrices(model), lr=0.1), torch.optim.SGD(others(model), lr=0.1)]
    found = torch.autograd.grad(mse(fast, query), model[0].weight)
    expected = diffopt.unroll(model, steady, data, mse)
    assert_all_close(
        found, torch.autograd.grad(mse(expected, query), model[0].weight), rtol=1e-12, atol=0
    )
    assert not torch.equal(later.params["0.bias"], expected.params["0.bias"])


def test_parameters_outside_of_all_of_them_are_constants() -> None:
    model, data, query = small(), batches(3), batch()
    opts = [diffopt.SGD([model[0].bias], lr=0.1), diffopt.Adam([model[2].bias], lr=0.1)]
    fast = diffopt.unroll(model, opts, data, mse)
    assert list(fast.params) == ["0.bias", "2.bias"]
    found = torch.autograd.grad(mse(fast, query), model[0].weight)

    def by_hand() -> Tensor:
        other = copy.deepcopy(model)
        mine = [diffopt.SGD([other[0].bias], lr=0.1), diffopt.Adam([other[2].bias], lr=0.1)]
        train(other, mine, data)
        return mse(other, query).detach()

    assert_all_close(found, differences(by_hand, [model[0].weight]), rtol=1e-6, atol=1e-9)


# What is refused.


def test_a_shared_parameter_is_named() -> None:
    model = small()
    opts = [torch.optim.Muon(matrices(model)), torch.optim.AdamW(model.parameters())]
    message = "Muon and AdamW both hold the parameter '0.weight': give each parameter to one"
    with pytest.raises(ValueError, match=message):
        diffopt.unroll(model, opts, batches(1), mse)
    w = nn.Parameter(torch.ones(2))
    for params, name in (([w], r"'0, of shape \(2,\)'"), ([("w", w)], "'w'")):
        with pytest.raises(ValueError, match=f"both hold the parameter {name}"):
            optim.convert([diffopt.SGD([w]), diffopt.Adam(params)])


@pytest.mark.parametrize(
    ("opts", "error", "message"),
    [
        ([], ValueError, "the list of optimizers is empty: pass at least one"),
        (
            [0.1],
            TypeError,
            "opt is a list that holds a builtins.float: pass a diffopt or torch.optim optimizer",
        ),
        ([torch.optim.LBFGS], TypeError, "LBFGS steps: call diffopt.register"),
    ],
    ids=["empty", "number", "unknown"],
)
def test_lists_that_are_refused(opts: Any, error: type[Exception], message: str) -> None:
    model = small()
    given = [each(model.parameters()) if isinstance(each, type) else each for each in opts]
    with pytest.raises(error, match=message):
        diffopt.unroll(model, given, batches(1), mse)


def test_load_into_names_what_no_optimizer_holds() -> None:
    model, data = small(), batches(1)
    make = LISTS["muon and adamw"]
    fast = diffopt.unroll(model, make(model), data, mse)
    with pytest.raises(ValueError, match=r"opt does not hold the model.s parameter .0\.bias."):
        fast.load_into(model, make(model)[:1])
    before = copy.deepcopy(model.state_dict())
    wrong = [torch.optim.Adam(matrices(model)), torch.optim.AdamW(others(model))]
    with pytest.raises(ValueError, match="Adam also needs"):
        fast.load_into(model, wrong)
    assert all(not opt.state for opt in wrong)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_steps_in_place_are_those_of_the_optimizers_themselves() -> None:
    joint = optim.convert([diffopt.SGD([torch.zeros(1)]), diffopt.Adam([torch.zeros(1)])])
    assert isinstance(joint, optim.Joint)
    for call in (joint.step, joint.state_dict, lambda: joint.load_state_dict({})):
        with pytest.raises(NotImplementedError, match="of each of the optimizers"):
            call()
