"""Parameters that are not trained and that the forward pass itself moves: they are state.

A mean teacher, a momentum encoder, a codebook: ``with torch.no_grad(): t.lerp_(s, 0.1)``. Such a
parameter is treated as a buffer is. Which are such shows when a step is about to change one in
place; then the loop is begun again with the parameter in its state, and with the parameters beside
it. From then on it is known of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffopt._step.generators import Generators
from diffopt._step.observe import Moved
from diffopt._unroll.problem import InnerProblem

R = TypeVar("R")

_MOVING: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def with_moving(
    problem: InnerProblem,
    known: Collection[str],
    devices: Iterable[torch.device],
    run: Callable[[Mapping[str, Tensor]], R],
) -> R:
    """``run(moving)``, with the parameters that move in ``moving``.

    Args:
        known: names of parameters that are known to move.
        devices: whose generators are put back where ``run`` has to begin again.
    """
    constants = problem.constants
    if not constants:
        return run({})
    names = _MOVING.setdefault(problem.model, set())
    names |= constants.keys() & known
    generators = Generators(devices)
    at_call = generators.get()
    while True:
        try:
            return run({name: constants[name] for name in names & constants.keys()})
        except Moved as moved:
            root = moved.name.partition(".")[0]
            names |= {name for name in constants if name.partition(".")[0] == root}
            generators.set(at_call)
