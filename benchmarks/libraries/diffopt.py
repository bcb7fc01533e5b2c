"""diffopt, with each of the ways to compute the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Problem
from torch import Tensor

import diffopt


def prepare(
    problem: Problem,
    *,
    segment: int | None = None,
    default: bool = False,
    store_all: bool = False,
    budget: str | None = None,
    compile: bool = False,
    tasks: bool = False,
) -> Callable[[], dict[str, Tensor]]:
    model, loss_fn = problem.model, problem.loss_fn
    params = dict(model.named_parameters())
    options: dict[str, Any] = {} if default else {"adjoint": diffopt.Segmented(segment)}
    if store_all:
        options["adjoint"] = diffopt.StoreAll()
    if budget is not None:
        options["adjoint"] = diffopt.MemoryBudget(budget)
    if compile:
        options["compile"] = True

    def unrolled(batches: Any, **more: Any) -> diffopt.Unrolled:
        inner = getattr(diffopt, problem.optimizer)(model.parameters(), **problem.options)
        return diffopt.unroll(model, inner, batches, loss_fn, **options, **more)

    def one_by_one() -> Tensor:
        losses = [
            unrolled(batches).apply(loss_fn, query)
            for batches, query in zip(problem.batches, problem.queries, strict=True)
        ]
        return torch.stack(losses).mean()

    def at_once() -> Tensor:
        return unrolled(stacked, tasks=len(problem.queries)).apply(loss_fn, query).mean()

    if tasks:
        *stacked, query = [
            tuple(torch.stack(column) for column in zip(*batches, strict=True))
            for batches in zip(
                *([*b, q] for b, q in zip(problem.batches, problem.queries, strict=True)),
                strict=True,
            )
        ]
        # The same batch again is the same tensor again, as it is for the others.
        first = {id(b): i for i, b in reversed(list(enumerate(problem.batches[0])))}
        stacked = [stacked[first[id(b)]] for b in problem.batches[0]]

    def run() -> dict[str, Tensor]:
        loss = at_once() if tasks else one_by_one()
        return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))

    return run
