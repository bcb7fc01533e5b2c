"""The messages of a group: exact averages, and processes that come apart find it out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import close
from processes import Processes
from torch import Tensor
from torch import distributed as dist

from diffopt._step.apart import GroupError
from diffopt._step.group import Group

NAMES = ("a", "b", "z")


def start() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(3, generator=g),
        "b": torch.randn(2, 2, generator=g),
        "z": torch.randn(2, dtype=torch.complex128, generator=g),
    }


def local_loss(params: dict[str, Tensor], r: int) -> Tensor:
    """Process ``r``'s share of the loss. Only process 0 uses ``z``."""
    a, b, z = (params[name] for name in NAMES)
    value = (a.sin() * (r + 1)).sum() * b.cos().sum() + (b**3).sum() * 0.1 * r
    return value if r else value + (z * z.conj() * (1 + r)).real.sum() ** 2


def outer_loss(params: dict[str, Tensor], r: int) -> Tensor:
    return sum((x * x.conj()).real.sum() for x in params.values()) ** 2 / (r + 2)


def grads_of(loss: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    return dict(zip(params, found, strict=True))


def agreed() -> Group:
    group = Group(dist.group.WORLD)
    group.agree(start(), {"the numbers of steps": 3})
    return group


def averages(rank: int, world: int) -> None:
    """Three steps of descent, whose metagradient is taken twice, against one process."""
    for weights, summed in (
        ([1.0] * world, False),
        ([0.3 + r for r in range(world)], False),
        ([torch.tensor(1.5 + r, requires_grad=True) for r in range(world)], False),
        ([1.0] * world, True),
    ):
        whole = {n: x.clone().requires_grad_() for n, x in start().items()}
        params = whole
        for _ in range(3):
            losses = [local_loss(params, r) * w for r, w in enumerate(weights)]
            gradients = grads_of(sum(losses) / (1 if summed else sum(weights)), params)
            params = {n: x - 0.01 * gradients[n] for n, x in params.items()}
        total = sum(outer_loss(params, r) for r in range(world)) / world
        expected = torch.autograd.grad(total, list(whole.values()), create_graph=True)
        twice = torch.autograd.grad(
            sum((g * g.conj()).real.sum() for g in expected), [*whole.values()]
        )

        group, weight = agreed(), None if summed else weights[rank]
        mine = {n: x.clone().requires_grad_() for n, x in start().items()}
        params, tokens = mine, []
        with group.during():
            for t in range(3):
                own = params["a"]
                grads = grads_of(local_loss(params, rank), params)
                found = group.averaged(grads, t, own, weight=weight)
                tokens.append(found.token)
                params = {n: x - 0.01 * found.grads[n] for n, x in params.items()}
        with group.during():
            first = torch.autograd.grad(
                [outer_loss(params, rank), *tokens],
                list(mine.values()),
                [torch.ones(()), *map(torch.zeros_like, tokens)],
                create_graph=True,
            )
        means = [sum_over(g) / world for g in first]
        for g, e in zip(means, expected, strict=True):
            close(g, e)
        # The squared norm of the mean of the gradients, each process's own being a part of it.
        second = torch.autograd.grad(
            [*first, *tokens],
            list(mine.values()),
            [*(2 * g / world for g in means), *map(torch.zeros_like, tokens)],
        )
        for h, e in zip(second, twice, strict=True):
            close(sum_over(h), e)


@contextmanager
def caught(*kinds: type[BaseException]) -> Iterator[list[BaseException]]:
    """Collects the error that the block has to raise."""
    found: list[BaseException] = []
    try:
        yield found
    except kinds as error:
        found.append(error)
    assert found


def sum_over(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total)
    return total


def nothing_flows_on_one(rank: int, world: int) -> None:
    """A process whose outer loss uses nothing still takes part on the way back."""
    group = agreed()
    mine = {n: x.clone().requires_grad_() for n, x in start().items()}
    with group.during():
        found = group.averaged(grads_of(local_loss(mine, rank), mine), 0, mine["a"])
    outputs = [found.token] if rank else [outer_loss(found.grads, 0), found.token]
    cotangents = [torch.zeros(())] if rank else [torch.ones(()), torch.zeros(())]
    with group.during():
        got = torch.autograd.grad(outputs, list(mine.values()), cotangents, allow_unused=True)
    whole = {n: x.clone().requires_grad_() for n, x in start().items()}
    average = grads_of(sum(local_loss(whole, r) for r in range(world)) / world, whole)
    expected = torch.autograd.grad(outer_loss(average, 0), list(whole.values()))
    for g, e in zip(got, expected, strict=True):
        close(sum_over(torch.zeros_like(e) if g is None else g), e)


def none_stays_none(rank: int, world: int) -> None:
    group = agreed()
    found = group.averaged({"a": torch.ones(3), "b": None, "z": None}, 0, note=rank == 1)
    assert found.token is None
    assert found.noted
    assert found.grads["b"] is None
    close(found.grads["a"], torch.ones(3))
    nan = torch.full((3,), float("nan" if rank else "inf"))
    found = group.averaged({"a": nan}, 1)
    assert found.grads["a"].isnan().all()
    assert not found.noted


def means_of_cotangents(rank: int, world: int) -> None:
    group = agreed()
    cotangents = {n: x * (rank + 1) for n, x in start().items()}
    mean = {n: x * (world + 1) / 2 for n, x in start().items()}
    for n, x in group.mean(cotangents).items():
        close(x, mean[n])
    # A process to which nothing flows takes part, too.
    for n, x in group.mean(cotangents if rank == 0 else {}).items():
        close(x, start()[n] / world)
    assert group.maximum(rank * 2**40 + 5 - rank) == (world - 1) * 2**40 + 6 - world


def what_differs(rank: int, world: int) -> list[str]:
    found = []
    for params, terms in (
        (start(), {"the numbers of steps": rank + 3}),
        ({**start(), "b": torch.zeros(2 + rank)}, {}),
        (dict(reversed(start().items())) if rank else start(), {"plans": "Segmented(2)"}),
    ):
        group = Group(dist.group.WORLD)
        with caught(GroupError) as errors, group.meeting():
            group.agree(params, terms)
        found.append(str(errors[0]))
    group = Group(dist.group.WORLD)
    with caught(GroupError, KeyError) as errors, group.meeting():
        if rank:
            raise KeyError("wrong argument")
        group.agree(start(), {})
    found.append(str(errors[0]))
    agreed()  # the group is as good as before
    return found


def fail_at_step_one(rank: int, world: int) -> tuple[str, list[str]]:
    group = agreed()
    with caught(GroupError, ZeroDivisionError) as errors, group.during():
        for t in range(3):
            group.at(t)
            if t == 1 and rank == 1:
                raise ZeroDivisionError("one process")
            group.averaged({"a": torch.ones(3)}, t)
    group = agreed()
    with group.during():
        group.averaged({"a": torch.ones(3)}, 0)
    return str(errors[0]), getattr(errors[0], "__notes__", [])


def fail_after_the_last_step(rank: int, world: int) -> str:
    group = agreed()
    with caught(GroupError, ZeroDivisionError) as errors, group.during():
        group.averaged({"a": torch.ones(3)}, 0)
        if rank == 0:
            raise ZeroDivisionError("after the exchange")
    return str(errors[0])


def come_apart(rank: int, world: int) -> list[str]:
    found = []
    group = agreed()
    with caught(GroupError) as errors, group.during():
        for t in range(2 + rank):
            group.averaged({"a": torch.ones(3)}, t)
    found.append(str(errors[0]))
    group = agreed()
    with group.during():
        group.averaged({"a": torch.ones(3)}, 0)
    with caught(GroupError) as errors, group.during():
        group.mean({}) if rank else group.averaged({"a": torch.ones(3)}, 0)
    found.append(str(errors[0]))
    return found


def die(rank: int, world: int) -> str:
    group = agreed()
    with caught(GroupError) as errors, group.during():
        group.averaged({"a": torch.ones(3)}, 0)
        if rank == 1:
            os._exit(1)
        group.averaged({"a": torch.ones(3)}, 1)
    return str(errors[0])


def bad_weights(rank: int, world: int) -> str:
    group = agreed()
    with caught(ValueError, GroupError) as errors, group.during():
        group.averaged({"a": torch.ones(3)}, 2, weight=0.0 if rank else 1.0)
    return str(errors[0])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "case", [averages, nothing_flows_on_one, none_stays_none, means_of_cotangents]
)
def test_together(case: Any, world: int, processes: Processes) -> None:
    processes.run(case, world)


def test_what_differs_is_named_on_all(processes: Processes) -> None:
    zero, one = processes.run(what_differs, 2)
    assert zero[:3] == one[:3]
    same = ". Call unroll on all of them with the same model"
    steps, shapes, order, failure = zero
    assert (
        "the numbers of steps differ between the processes of the group: process 0 has 3, "
        "process 1 has 4" + same
    ) in steps
    assert (
        "inner parameters differ between the processes of the group: process 0 has 'b': (2,), "
        "torch.float64, process 1 has 'b': (3,), torch.float64"
    ) in shapes
    assert "inner parameters differ" in order
    assert "their order on process 1 is another" in order
    assert "process 1 stopped before the first step with KeyError: 'wrong argument'" in failure
    assert one[3] == "'wrong argument'"


def test_a_failure_on_one_ends_all(processes: Processes) -> None:
    (zero, _), (one, notes) = processes.run(fail_at_step_one, 2)
    assert "process 1 stopped at step 1 with ZeroDivisionError: one process. So this" in zero
    assert one == "one process"
    assert "process 1 stopped" in notes[0]
    zero, one, *rest = processes.run(fail_after_the_last_step, 4)
    assert zero == "after the exchange"
    assert {one, *rest} == {
        "process 0 stopped at step 0 with ZeroDivisionError: after the exchange. So this unroll "
        "has ended on all processes of the group"
    }


def test_processes_that_come_apart_are_told(processes: Processes) -> None:
    zero, one = processes.run(come_apart, 2)
    assert zero == one
    assert (
        "process 0 is at the end of the forward pass; process 1 is computing step 2 in the "
        "forward pass"
    ) in zero[0]
    assert "process 0 is computing step 0 in a backward pass; process 1 is differ" in zero[1]


def test_a_process_that_dies(processes: Processes) -> None:
    message, _ = processes.run(die, 2, dying=(1,))
    assert "the exchange at step 1 could not be completed: a process of the group" in message


def test_a_weight_has_to_be_positive(processes: Processes) -> None:
    zero, one = processes.run(bad_weights, 2)
    assert "the weight of this process's share at step 2 is 0.0: it has to be a finite" in one
    assert "process 1 stopped at step 2 with ValueError" in zero


def test_what_is_no_group() -> None:
    with pytest.raises(TypeError, match="group is a str: pass a torch"):
        Group("world")
