"""Hyperparameters: schedules, tensors, param groups."""

from __future__ import annotations

import numpy as np
import torch
from optimizers import (
    OPTIMIZERS,
    Case,
    assert_same,
    every_optimizer,
    some_params,
    step_in_place,
    step_purely,
)

from diffopt import optim


@every_optimizer
def test_callables_are_called_with_the_step(case: Case) -> None:
    theirs, ours, pure = some_params(), some_params(), some_params()
    reference = case.theirs(theirs.values())
    rates = [0.1 / (1 + t) for t in range(6)]
    opt = case.ours(ours.values(), lr=lambda t: torch.tensor(rates[t], dtype=torch.float64))
    numbers = case.ours(pure.values(), lr=lambda t: np.float64(rates[t]))
    for t, rate in enumerate(rates):
        reference.param_groups[0]["lr"] = rate
        step_in_place(reference, theirs, range(t, t + 1))
    step_in_place(opt, ours, range(6))
    assert_same(ours, theirs)
    assert_same(step_purely(numbers, pure, numbers.init(pure), range(6))[0], theirs)


def test_callables_inside_tuples_and_numpy_scalars() -> None:
    opt = optim.Adam(
        [torch.zeros(1)], lr=np.float32(0.5), betas=(lambda t: 1 / (2 + t), 0.9), eps=lambda t: t
    )
    (options,) = opt.hyperparameters(2)
    assert options["betas"] == (0.25, 0.9)
    assert options["eps"] == 2
    assert type(options["lr"]) is float


@every_optimizer
def test_learning_rate_schedulers(case: Case) -> None:
    theirs, ours = some_params(), some_params()
    for opt, params in ((case.theirs(theirs.values()), theirs), (case.ours(ours.values()), ours)):
        scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        for t in range(6):
            step_in_place(opt, params, range(t, t + 1))
            scheduler.step()
    assert_same(ours, theirs)


def test_a_tensor_of_higher_precision_does_not_upcast() -> None:
    params = some_params(torch.float32)
    for lr in (torch.tensor(0.1).double(), torch.full((1,), 0.1).double()):
        for name in OPTIMIZERS:
            opt: optim.Optimizer = getattr(optim, name)(params.values(), lr=lr)
            new, state = step_purely(opt, params, opt.init(params), range(7))
            entries = [x for s in state.values() for x in s.values()]
            assert {x.dtype for x in (*new.values(), *entries)} == {torch.float32}
            assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in params.items()}


def test_an_elementwise_learning_rate_scales_each_weight() -> None:
    w = torch.zeros(2, 3)
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    opt = optim.SGD([w], lr=lr)
    new, _ = opt.update({"w": w}, {"w": torch.ones(2, 3)}, opt.init({"w": w}))
    assert new["w"].dtype == torch.float32
    assert_same(new["w"].detach(), torch.tensor([[-0.1, -0.2, -0.3]] * 2), rtol=1e-6)
    (slope,) = torch.autograd.grad(new["w"].sum(), lr)
    assert_same(slope, torch.full_like(lr, -2.0))


def test_hyperparameters_are_passed_on_as_they_are() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    opt = optim.SGD([torch.zeros(1)], lr=lr)
    (options,) = opt.hyperparameters(3)
    assert options["lr"] is lr
    assert "params" not in options
    assert options.keys() == opt.defaults.keys()


def test_groups_by_names_by_position_and_as_given() -> None:
    a, b = torch.ones(2), torch.ones(3)
    grads = {"a": torch.ones(2), "b": torch.ones(3)}
    layouts = [
        ([{"params": [("b", b)], "lr": 1.0}, {"params": [("a", a)], "lr": 2.0}], None),
        ([{"params": [b], "lr": 1.0}, {"params": [a], "lr": 2.0}], [["b"], ["a"]]),
        ([{"params": [a], "lr": 2.0}, {"params": [b], "lr": 1.0}], None),
    ]
    for layout, groups in layouts:
        opt = optim.SGD(layout)  # type: ignore[arg-type]
        params = {"a": a, "b": b}
        new, _ = opt.update(params, grads, opt.init(params, groups=groups), groups=groups)
        assert new["a"].tolist() == [-1.0] * 2
        assert new["b"].tolist() == [0.0] * 3
        assert list(new) == ["a", "b"]
