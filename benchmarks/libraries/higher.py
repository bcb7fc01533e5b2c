"""``higher`` (Grefenstette et al., 2019), which keeps the graph of every step."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
from cases import Problem
from torch import Tensor


def prepare(problem: Problem) -> Callable[[], dict[str, Tensor]]:
    model, loss_fn = problem.model, problem.loss_fn
    params = dict(model.named_parameters())

    def run() -> dict[str, Tensor]:
        losses = []
        for batches, query in zip(problem.batches, problem.queries, strict=True):
            inner = problem.torch_optimizer()
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (
                fast,
                opt,
            ):
                for batch in batches:
                    opt.step(loss_fn(fast, batch))
                losses.append(loss_fn(fast, query))
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
        return dict(zip(params, grads, strict=True))

    return run
