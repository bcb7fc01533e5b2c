"""A ``torch.optim.lr_scheduler`` as a schedule: the trajectory is that of the scheduler itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.lr_scheduler as S
from adjoints import every_adjoint
from helpers import assert_all_close, batches, differences, mse, tiny
from torch import Tensor

import diffopt

T = 7
LR = 0.2

MAKERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: S.StepLR(opt, step_size=2, gamma=0.5),
    "cosine": lambda opt: S.CosineAnnealingLR(opt, T_max=5, eta_min=0.01),
    "warm restarts": lambda opt: S.CosineAnnealingWarmRestarts(opt, T_0=3),
    "lambda": lambda opt: S.LambdaLR(opt, lambda t: 1 / (t + 1)),
    "exponential": lambda opt: S.ExponentialLR(opt, gamma=0.9),
    "linear": lambda opt: S.LinearLR(opt, start_factor=0.3, total_iters=4),
    "polynomial": lambda opt: S.PolynomialLR(opt, total_iters=5, power=2.0),
    "one cycle": lambda opt: S.OneCycleLR(opt, max_lr=0.5, total_steps=T + 1),
    "warm-up, then cosine": lambda opt: S.SequentialLR(
        opt, [S.LinearLR(opt, 0.1, total_iters=3), S.CosineAnnealingLR(opt, T_max=4)], [3]
    ),
    "chained": lambda opt: S.ChainedScheduler([S.ConstantLR(opt), S.ExponentialLR(opt, 0.8)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_trajectories(name: str) -> None:
    make, model, data = MAKERS[name], tiny(), batches(T)
    lr = diffopt.from_scheduler(make, T, LR, momentum=0.9)
    momentum = diffopt.from_scheduler(make, T, LR, option="momentum", momentum=0.9)
    inner = diffopt.SGD(model.parameters(), lr=lr, momentum=momentum)
    got = diffopt.unroll(model, inner, data, mse)
    after = copy.deepcopy(model)
    opt = torch.optim.SGD(after.parameters(), lr=LR, momentum=0.9)
    scheduler = make(opt)
    for pair in data:
        opt.zero_grad()
        mse(after, pair).backward()
        opt.step()
        scheduler.step()
    for n, p in after.named_parameters():
        torch.testing.assert_close(got.params[n], p, rtol=1e-12, atol=1e-14)
    assert len({lr(t) for t in range(T)}) > 1


@every_adjoint
def test_learning_the_scale_of_a_schedule(adjoint: diffopt.Adjoint) -> None:
    model, data = tiny(), batches(4)
    shape = diffopt.from_scheduler(MAKERS["cosine"], 4, lr=1.0)
    base = torch.tensor(0.2, dtype=torch.double, requires_grad=True)

    def value() -> Tensor:
        inner = diffopt.SGD(model.parameters(), lr=lambda t: base * shape(t))
        return diffopt.unroll(model, inner, data, mse, adjoint=adjoint).losses[-1]

    got = torch.autograd.grad(value(), [base])
    assert_all_close(got, differences(value, [base]), rtol=1e-6, atol=1e-8)


def test_what_is_refused() -> None:
    step = MAKERS["step"]
    with pytest.raises(TypeError, match="ReduceLROnPlateau sets the rate by the losses"):
        diffopt.from_scheduler(S.ReduceLROnPlateau, 3, LR)  # type: ignore[arg-type]
    made: Any = S.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 2)
    with pytest.raises(TypeError, match="make is a StepLR: pass a function of an optimizer"):
        diffopt.from_scheduler(made, 3, LR)
    with pytest.raises(TypeError, match="make gives a NoneType: pass a function of an optimizer"):
        diffopt.from_scheduler(lambda opt: None, 3, LR)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"steps is 3\.0, of type float, .*: pass how many"):
        diffopt.from_scheduler(step, 3.0, LR)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps is -1, but must be at least 0"):
        diffopt.from_scheduler(step, -1, LR)
    with pytest.raises(ValueError, match="has no option 'betas'"):
        diffopt.from_scheduler(step, 3, LR, option="betas")
    schedule = diffopt.from_scheduler(step, 3, LR)
    with pytest.raises(ValueError, match=r"step 3 is beyond this schedule.*made for 3 steps"):
        schedule(3)
    model = tiny()
    with pytest.raises(ValueError, match="step 3 is beyond this schedule"):
        diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=schedule), batches(4), mse)
