"""``torch_maml`` (Baranchuk, 2019), storing everything or with its gradient checkpoints.

It has gradient descent with momentum. Its RMSProp is another rule than PyTorch's (epsilon stands
inside the root, and the average starts at the first square), and it has no Adam.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch_maml
from cases import Problem
from torch import Tensor


def prepare(problem: Problem, *, checkpoint: int | None = None) -> Callable[[], dict[str, Tensor]]:
    model, loss_fn = problem.model, problem.loss_fn
    params = dict(model.named_parameters())
    options = dict(problem.options)
    rate = options.pop("lr")
    if problem.case.optimizer == "sgd":
        opt = torch_maml.IngraphGradientDescent(learning_rate=rate)
    elif problem.case.optimizer == "momentum":
        # beta=0 for "no RMS": its default, None, fails.
        opt = torch_maml.IngraphRMSProp(rate, momentum=options["momentum"], beta=0.0)
    else:
        raise NotImplementedError(f"no {problem.case.optimizer} with PyTorch's rule")
    if checkpoint is None:
        maml = torch_maml.NaiveMAML(model, loss_fn, opt)
    else:
        maml = torch_maml.GradientCheckpointMAML(model, loss_fn, opt, checkpoint_steps=checkpoint)

    def run() -> dict[str, Tensor]:
        losses = []
        for batches, query in zip(problem.batches, problem.queries, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it leaves use_reentrant at its default, True
                losses.append(loss_fn(maml(batches).model, query))
        # Reentrant checkpoints work with backward() alone.
        for x in params.values():
            x.grad = None
        torch.stack(losses).mean().backward()
        return {name: x.grad for name, x in params.items()}

    return run
