"""TorchOpt (Ren et al., 2023): its ``Meta`` optimizers, which keep the graph of every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt
from cases import Problem
from torch import Tensor


def prepare(problem: Problem) -> Callable[[], dict[str, Tensor]]:
    model, loss_fn = problem.model, problem.loss_fn
    params = dict(model.named_parameters())
    meta = {
        "SGD": torchopt.MetaSGD,
        "Adam": torchopt.MetaAdam,
        "RMSprop": torchopt.MetaRMSprop,
    }

    def run() -> dict[str, Tensor]:
        start = torchopt.extract_state_dict(model, by="reference")
        losses = []
        for batches, query in zip(problem.batches, problem.queries, strict=True):
            opt = meta[problem.optimizer](model, **problem.options)
            for batch in batches:
                opt.step(loss_fn(model, batch))
            losses.append(loss_fn(model, query))
            torchopt.recover_state_dict(model, start)
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
        return dict(zip(params, grads, strict=True))

    return run
