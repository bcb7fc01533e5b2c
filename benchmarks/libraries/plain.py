"""A loop written by hand with ``torch.autograd.grad(..., create_graph=True)``: the reference.

It uses nothing but PyTorch, and its rules are written down from the documentation of
``torch.optim``; in float64 it is what every other library's gradient is compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Batch, Problem
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

Values = dict[str, Tensor]


def prepare(problem: Problem, *, checkpointed: bool = False) -> Callable[[], Values]:
    """``checkpointed`` keeps only the states between the steps, for very long loops."""
    start = dict(problem.model.named_parameters())
    update = RULES[problem.case.optimizer]

    def loss_at(params: Values, batch: Batch) -> Tensor:
        return problem.loss_fn(lambda x: functional_call(problem.model, params, (x,)), batch)

    def step(params: Values, state: list[Values], batch: Batch, t: int):
        with torch.enable_grad():
            loss = loss_at(params, batch)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return update(params, dict(zip(params, grads, strict=True)), state, t, **problem.options)

    def run() -> Values:
        losses = []
        for batches, query in zip(problem.batches, problem.queries, strict=True):
            params = start
            state = [{n: torch.zeros_like(x) for n, x in start.items()} for _ in range(2)]
            for t, batch in enumerate(batches):
                if checkpointed:
                    params, state = checkpoint(
                        step,
                        params,
                        state,
                        batch,
                        t,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    params, state = step(params, state, batch, t)
            losses.append(loss_at(params, query))
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))
        return dict(zip(start, grads, strict=True))

    return run


def sgd(params: Values, grads: Values, state: list[Values], t: int, *, lr: float):
    return {n: x - lr * grads[n] for n, x in params.items()}, state


def momentum(
    params: Values,
    grads: Values,
    state: list[Values],
    t: int,
    *,
    lr: float,
    momentum: float,
):
    buffer = {n: momentum * state[0][n] + g for n, g in grads.items()}
    return {n: x - lr * buffer[n] for n, x in params.items()}, [buffer, state[1]]


def adam(params: Values, grads: Values, state: list[Values], t: int, *, lr: float):
    mean = {n: 0.9 * state[0][n] + 0.1 * g for n, g in grads.items()}
    square = {n: 0.999 * state[1][n] + 0.001 * g * g for n, g in grads.items()}
    new = {}
    for n, x in params.items():
        root = _root(square[n] / (1 - 0.999 ** (t + 1)))
        new[n] = x - lr * (mean[n] / (1 - 0.9 ** (t + 1))) / (root + 1e-8)
    return new, [mean, square]


def rmsprop(params: Values, grads: Values, state: list[Values], t: int, *, lr: float):
    square = {n: 0.99 * state[0][n] + 0.01 * g * g for n, g in grads.items()}
    new = {n: x - lr * grads[n] / (_root(square[n]) + 1e-8) for n, x in params.items()}
    return new, [square, state[1]]


def _root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0: the weights there have had zero gradients only.

    A moment of exactly 0 belongs to a weight without influence (behind a dead ReLU); the limit
    of the derivative of g / (sqrt(v) + eps) through v is 0 there.
    """
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


RULES = {"sgd": sgd, "momentum": momentum, "adam": adam, "rmsprop": rmsprop}
