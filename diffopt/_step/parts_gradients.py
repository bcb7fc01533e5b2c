"""The gradients of steps in parts, kept from when the steps were taken to their derivatives.

The derivative of most rules reads the gradient, which is the sum over all parts and so has to be
there before the first part is pulled through. Where it is kept, the parts are evaluated once on the
way back, and not twice. It is as large as the parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from diffopt._step.result import present
from diffopt._values.state import State
from diffopt.optim.terms import Hyper


@dataclass(frozen=True)
class Gradient:
    """The gradient of a step, by parameter name, and the hyperparameters of its update."""

    raw: Mapping[str, Tensor | None]
    hyper: Sequence[Hyper]


@dataclass
class Gradients:
    """Gradients by the state before the step, which keeps them as long as it is held itself.

    Attributes:
        of_first_pass: the positions of steps of which those of the first pass are kept.
        latest: that of the step in progress, if it is to be kept.
    """

    of_first_pass: Collection[int]
    latest: Gradient | None = None
    _of: WeakKeyDictionary[State, Gradient] = field(default_factory=WeakKeyDictionary)

    def keep(self, state: State, after: State) -> None:
        """Keep the latest for ``state``, in memory of its own: what comes ``after`` may change."""
        latest, self.latest = self.latest, None
        if latest is not None:
            apart = State(present(latest.raw), {}, {}).apart_from(after).params
            self._of[state] = Gradient({n: apart.get(n) for n in latest.raw}, latest.hyper)

    def taken(self, state: State) -> Gradient | None:
        """That of the step from ``state``, which is not kept any longer."""
        return self._of.pop(state, None)
