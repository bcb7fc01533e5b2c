"""Many tasks with buffers that change, and steps that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import (
    ADJOINTS,
    ByHand,
    Inputs,
    Ours,
    Train,
    cases,
    data,
    every_adjoint,
    gradients,
    learned,
    outcome,
    seed,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

import diffopt

STEPS = 4


# Many tasks at once.


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()


def _batch_norm_in_eval() -> nn.Module:
    return _batch_norm().eval()


class InPlace(nn.Module):
    def __init__(self, advance: Any) -> None:
        super().__init__()
        self.net, self.advance = small(), advance
        self.register_buffer("mean", torch.full((2,), 0.1, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) + self.mean.clone()
        with torch.no_grad():
            self.advance(self.mean, out)
        return out


TASK_MODELS: dict[str, Any] = {
    "BatchNorm": _batch_norm,
    "BatchNorm in eval mode": _batch_norm_in_eval,
    "BatchNorm with another momentum": lambda: nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2)
    ).double(),
    "add_": lambda: InPlace(lambda b, out: b.add_(out.mean(0))),
    "mul_ and add_": lambda: InPlace(lambda b, out: b.mul_(0.9).add_(out.mean(0))),
    "sub_": lambda: InPlace(lambda b, out: b.sub_(0.3 * (b - out.mean(0)))),
    "copy_": lambda: InPlace(lambda b, out: b.copy_(out.mean(0))),
    "+= 1": lambda: InPlace(lambda b, out: b.add_(0.1)),
    "one entry": lambda: InPlace(lambda b, out: b[:1].mul_(0.5)),
    "InstanceNorm with statistics": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)),
        nn.InstanceNorm1d(1, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).double(),
}


@cases("make", TASK_MODELS)
@pytest.mark.parametrize("adjoint", [*ADJOINTS, "truncated"])
def test_many_tasks_with_buffers(adjoint: str, make: Any) -> None:
    tasks = 3
    seed()
    model, rate = make(), learned(0.2)
    batches = [torch.randn(tasks, 4, 2, dtype=torch.double) for _ in range(STEPS)]
    inputs = [*model.parameters(), rate]

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return squares(m(x) - 1)

    parts = []
    for i in range(tasks):
        fast = ByHand()(model, [b[i] for b in batches], loss_fn, lr=rate)
        parts.append(sum(squares(p) for p in fast.params.values()) + fast.losses.sum())
        buffers = {n: x.detach() for n, x in fast.buffers.items()}
    want = gradients(torch.stack(parts).mean(), inputs)

    whole = diffopt.Truncated(STEPS + 1, inner=diffopt.StoreAll())
    train = Ours(whole if adjoint == "truncated" else ADJOINTS[adjoint])
    fast = train(model, batches, loss_fn, lr=rate, tasks=tasks)
    per_task = sum(
        p.square().reshape(tasks, -1).mean(1) for p in fast.params.values()
    ) + fast.losses.sum(1)
    got = gradients(per_task.mean(), inputs)
    train.check()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for name, x in buffers.items():  # the last task's
        torch.testing.assert_close(fast.buffers[name][-1].detach(), x, rtol=1e-9, atol=1e-11)


# Steps that are not there.


@cases(
    "steps",
    {
        "iterator used up": lambda: _used_up(iter([data(), data()])),
        "generator used up": lambda: _used_up(data() for _ in range(2)),
        "empty iterator": lambda: iter([]),
        "empty generator": lambda: (data() for _ in range(0)),
        "zip of nothing": lambda: zip([], [], strict=True),
        "map used up": lambda: _used_up(map(torch.clone, [data()])),
        "iterator of a loader": lambda: _used_up(iter(_loader())),
        "enumerate used up": lambda: _used_up(enumerate([data()])),
        "filter of all": lambda: filter(lambda x: False, [data()]),
    },
)
@stored_or_again
def test_exhausted_iterator_is_refused(adjoint: str, steps: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model = small()
        fast = train(model, steps(), lambda m, b: squares(m(b)))
        return squares(fast(data())), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"(?i)iterator|yields? nothing|used up|empty")


def test_exhausted_iterator_is_a_value_error() -> None:
    model = small()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    steps = iter([data()])
    diffopt.unroll(model, inner, steps, lambda m, b: squares(m(b)))
    with pytest.raises(ValueError, match=r"(?i)iterator|used up|nothing"):
        diffopt.unroll(model, inner, steps, lambda m, b: squares(m(b)))


@cases("steps", {"list": lambda: [], "tuple": lambda: (), "int": lambda: 0})
@stored_or_again
def test_no_steps_give_the_start(adjoint: str, steps: Any) -> None:
    model, x = small(), data()
    train = Ours(ADJOINTS[adjoint])
    fast = train(model, steps(), lambda m, b: squares(m(x)))
    assert fast.step == 0
    got = gradients(squares(fast(x)), list(model.parameters()))
    want = gradients(squares(model(x)), list(model.parameters()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    train.check()


@every_adjoint
def test_iterator_is_read_once(adjoint: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model = small()
        steps = (data() for _ in range(STEPS))
        fast = train(model, steps, lambda m, b: squares(m(b) - 1))
        return squares(fast(data())), list(model.parameters())

    outcome(experiment, adjoint)


def _used_up(iterator: Any) -> Any:
    for _ in iterator:
        pass
    return iterator


def _loader() -> Any:
    return torch.utils.data.DataLoader([data(), data()], batch_size=1)
