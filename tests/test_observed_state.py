"""Buffers of every kind are state, from step to step and from unroll to unroll."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import (
    Inputs,
    Train,
    cases,
    data,
    every_adjoint,
    learned,
    outcome,
    small,
    squares,
)
from torch import Tensor, nn

STEPS = 4


# Buffers of every kind.


class Stateful(nn.Module):
    """A network whose output is shifted by its state, which ``advance`` moves."""

    def __init__(self, build: Any, advance: Any) -> None:
        super().__init__()
        self.net, self.advance = small(), advance
        build(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out + self.advance(self, out)


def _none(m: Any) -> None:
    m.register_buffer("mean", None)


def _zero(m: Any) -> None:
    m.register_buffer("mean", torch.full((2,), 0.1, dtype=torch.double))


def _no_buffer(m: Any) -> None:
    pass


def _moving(m: Any, out: Tensor) -> Tensor:
    new = out.detach().mean(0)
    m.mean = new if m.mean is None else 0.5 * m.mean + 0.5 * new
    return m.mean


def _moving_with_its_graph(m: Any, out: Tensor) -> Tensor:
    new = out.mean(0)
    m.mean = new if m.mean is None else 0.5 * m.mean + 0.5 * new
    return m.mean


def _registered(m: Any, out: Tensor) -> Tensor:
    if "mean" not in m._buffers:
        m.register_buffer("mean", out.detach().mean(0))
    else:
        m.mean = 0.5 * m.mean + 0.5 * out.detach().mean(0)
    return m.mean


def _registered_not_persistent(m: Any, out: Tensor) -> Tensor:
    if not hasattr(m, "mean"):
        m.register_buffer("mean", torch.zeros(2, dtype=out.dtype), persistent=False)
    m.mean.mul_(0.5).add_(out.detach().mean(0))
    return m.mean.clone()


def _in_a_submodule(m: Any, out: Tensor) -> Tensor:
    layer = m.net[0]
    if "mean" not in layer._buffers:
        layer.register_buffer("mean", out.detach().mean(0))
    layer.mean = 0.5 * layer.mean + 0.5 * out.detach().mean(0)
    return layer.mean


def _bank(m: Any, out: Tensor) -> Tensor:
    m.mean = torch.cat([m.mean, out.detach().mean()[None]])
    return m.mean.mean()


def _queue(m: Any, out: Tensor) -> Tensor:
    m.mean = torch.cat([m.mean[1:], out.detach().mean()[None]])
    return m.mean[0]


@torch.no_grad()
def _resized(m: Any, out: Tensor) -> Tensor:
    n = len(m.mean)
    m.mean.resize_(n + 1)
    m.mean[n] = out.mean()
    return m.mean.sum()


@torch.no_grad()
def _resized_as(m: Any, out: Tensor) -> Tensor:
    old = m.mean.clone()
    m.mean.resize_as_(torch.zeros(len(old) + 2, dtype=out.dtype)).fill_(out.mean())
    m.mean[: len(old)] = old
    return m.mean.mean()


@torch.no_grad()
def _shrunk(m: Any, out: Tensor) -> Tensor:
    m.mean.fill_(out.mean())
    m.mean.resize_(1)
    return m.mean.clone()


@torch.no_grad()
def _set_to(m: Any, out: Tensor) -> Tensor:
    m.mean.set_(torch.cat([m.mean, out.mean()[None]]))
    return m.mean.sum()


def _data_of_a_buffer(m: Any, out: Tensor) -> Tensor:
    m.mean.data = torch.cat([m.mean.data, out.detach().mean()[None]])
    return m.mean.sum()


def _other_dtype(m: Any, out: Tensor) -> Tensor:
    m.mean = (1000 * out.detach().mean(0)).round().long()
    return m.mean / 1000.0


def _none_again(m: Any, out: Tensor) -> Tensor:
    if m.mean is None:
        m.mean = out.detach().mean(0)
        return m.mean
    m.mean = None
    return torch.zeros(2, dtype=out.dtype)


def _deleted(m: Any, out: Tensor) -> Tensor:
    if "mean" in m._buffers:
        del m.mean
        return torch.ones(2, dtype=out.dtype)
    return torch.zeros(2, dtype=out.dtype)


def _strided(m: Any) -> None:
    m.register_buffer("mean", torch.full((4,), 0.1, dtype=torch.double)[::4])


def _expanded(m: Any) -> None:
    m.register_buffer("mean", torch.full((1,), 0.1, dtype=torch.double).expand(2))


def _strided_step(m: Any, out: Tensor) -> Tensor:
    m.mean.mul_(0.5).add_(out.detach().mean())
    return m.mean.clone()


BUFFERS = {
    "None, filled": (_none, _moving),
    "None, filled with its graph": (_none, _moving_with_its_graph),
    "with its graph": (_zero, _moving_with_its_graph),
    "registered at the first step": (_no_buffer, _registered),
    "registered, not persistent": (_no_buffer, _registered_not_persistent),
    "registered in a submodule": (_no_buffer, _in_a_submodule),
    "a bank that grows": (_zero, _bank),
    "a queue": (_zero, _queue),
    "resize_": (_zero, _resized),
    "resize_as_": (_zero, _resized_as),
    "resize_ to less": (_zero, _shrunk),
    "another dtype": (_zero, _other_dtype),
    "one element, strided": (_strided, _strided_step),
}

ODD = {
    "None every other step": (_none, _none_again),
    "deleted": (_zero, _deleted),
    "set_": (_zero, _set_to),
    ".data of a buffer": (_zero, _data_of_a_buffer),
}


def stateful(build: Any, advance: Any) -> Any:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Stateful(build, advance), data()
        inputs = list(model.parameters())
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        outer = squares(fast.apply(lambda m: m.net(x)))
        for value in fast.buffers.values():
            if value is not None:
                outer = outer + squares(value.double())
        return outer, inputs

    return experiment


@cases("kind", BUFFERS)
@every_adjoint
def test_buffer(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint)


@cases("kind", BUFFERS)
@pytest.mark.parametrize("adjoint", ["segmented-1", "binomial-2"])
def test_buffer_is_verified(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint, verify=True)


@cases("kind", ODD)
@every_adjoint
def test_odd_buffer(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint, "either", r"mean")


def _strided_parameter(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    model.scale = nn.Parameter(torch.ones(6, dtype=x.dtype)[::6])
    fast = train(model, STEPS, lambda m, t: squares(m(x) * m.scale - 1))
    return squares(fast(x)), list(model.parameters())


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@every_adjoint
def test_strided_parameter_of_one_element(adjoint: str, verify: bool) -> None:
    outcome(_strided_parameter, adjoint, verify=verify)


# ``initial=`` carries the graph of buffers.

SPLITS = {
    "2 + 2": [2, 2],
    "1 + 3": [1, 3],
    "3 + 1": [3, 1],
    "1 + 1 + 1 + 1": [1, 1, 1, 1],
    "0 + 4": [0, 4],
    "4 + 0": [4, 0],
    "2 + 0 + 2": [2, 0, 2],
    "1 + 2 + 1": [1, 2, 1],
}


@cases("split", SPLITS)
@pytest.mark.parametrize("kind", ["with its graph", "None, filled with its graph"])
@every_adjoint
def test_parts_are_the_whole_where_buffers_carry_a_graph(
    adjoint: str, kind: str, split: list[int]
) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, k = Stateful(*BUFFERS[kind]), data(), learned(0.7)
        inputs = [*model.parameters(), k]
        fast = None
        for steps in split if train.ours else [sum(split)]:
            batches = [k * x] * steps
            fast = train(model, batches, lambda m, b: squares(m(b) - 1), initial=fast)
        assert fast is not None
        outer = squares(fast.apply(lambda m: m.net(x))) + squares(fast.buffers["mean"])
        return outer, inputs

    outcome(experiment, adjoint)


@every_adjoint
def test_detached_unroll_cuts_the_graph_of_its_buffers(adjoint: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Stateful(*BUFFERS["with its graph"]), data()
        rate = learned(0.3)
        first = train(model, 2, lambda m, t: squares(m(x) - 1), lr=rate)
        if train.ours:
            first = first.detach()
        else:
            first.params = {n: p.detach().requires_grad_() for n, p in first.params.items()}
            first.rest = {n: b.detach() for n, b in first.buffers.items()}
        second = train(model, 2, lambda m, t: squares(m(x) - 1), lr=rate, initial=first)
        return squares(second.apply(lambda m: m.net(x))), [rate]

    outcome(experiment, adjoint)
