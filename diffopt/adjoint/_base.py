"""What every way of computing the derivative has in common.

An adjoint is a small frozen object. It is given the loop as a value, runs it forward and keeps
what it needs, and later carries the cotangents of the results back to the start and to every
tensor that the steps used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from diffopt._loop.executor import run_backward, run_forward
from diffopt._loop.loop import Loop
from diffopt._loop.replay import differentiable_backward
from diffopt._loop.snapshots import Snapshots
from diffopt._loop.storage import Storage, check_storage, open_storage
from diffopt._loop.store import Store
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path
from diffopt.schedule import Plan


@dataclass(frozen=True)
class Adjoint(ABC):
    """How ``diffopt.unroll`` computes the derivative. Subclass it to bring a way of your own."""

    def plan(self, steps: int) -> Plan:
        """What ``steps`` inner steps will take: the order of work, states held, work to do."""
        raise NotImplementedError(
            f"{self!r} makes no plan: define plan(steps) in its class, which returns a diffopt.Plan"
        )

    @abstractmethod
    def forward(self, loop: Loop) -> tuple[State, Any]:
        """Take all steps of ``loop`` from ``loop.start``.

        Returns:
            the final state, and whatever ``backward`` needs.
        """

    @abstractmethod
    def backward(
        self,
        loop: Loop,
        kept: Any,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Carry cotangents of the final state, and of the losses and extras, back.

        Args:
            kept: what ``forward`` returned; to be left intact if ``keep``.

        Returns:
            the cotangent of the start, and the cotangents of ``loop.captured.tensors`` in order;
            None stands for no influence.
        """

    def differentiable_backward(
        self,
        loop: Loop,
        kept: Any,
        start: Mapping[Path, Tensor],
        captured: Sequence[Tensor],
        cotangent: Cotangent,
        outputs: OutputCotangents,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """``backward``, as a differentiable function of its inputs and of the cotangents."""
        raise NotImplementedError(
            f"{self!r} cannot be differentiated twice: use diffopt.Segmented() where a gradient "
            "of a gradient is needed"
        )


@dataclass(frozen=True)
class Checkpoints:
    """What the first pass of an adjoint that follows a plan leaves for the way back.

    Attributes:
        plan: what both passes do.
        generators: the generators' states before the first step.
        store: snapshots and graphs.
        loop: whose steps were taken.
    """

    plan: Plan
    generators: tuple[Tensor, ...]
    store: Store
    loop: Loop


@dataclass(frozen=True)
class Replayed(Adjoint):
    """An adjoint that leaves ``Checkpoints``; a backward pass through its own replays the loop."""

    def differentiable_backward(
        self,
        loop: Loop,
        kept: Checkpoints,
        start: Mapping[Path, Tensor],
        captured: Sequence[Tensor],
        cotangent: Cotangent,
        outputs: OutputCotangents,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        return differentiable_backward(
            kept.loop, kept.generators, start, captured, cotangent, outputs
        )


@dataclass(frozen=True)
class Checkpointed(Replayed):
    """An exact adjoint that follows a plan."""

    @abstractmethod
    def plan(self, steps: int) -> Plan:
        """The order of work for ``steps`` inner steps, with its predicted cost."""

    def new_snapshots(self) -> Snapshots:
        """Make the collection of snapshots: on their device, unless a subclass says otherwise."""
        return Snapshots()

    def plan_for(self, loop: Loop) -> Plan:
        """The plan for ``loop``. An outer loop asks for the same one again and again."""
        try:
            hash(self)
        except TypeError:  # a field of an adjoint of the user's
            return self.plan(loop.steps)
        return _plan(self, loop.steps)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        plan = self.plan_for(loop)
        generators = loop.generators.get()
        state, store = run_forward(loop, plan, self.new_snapshots())
        return state, Checkpoints(plan, generators, store, loop)

    def backward(
        self,
        loop: Loop,
        kept: Checkpoints,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        return run_backward(loop, kept.plan, kept.store, cotangent, outputs, keep=keep)


class Stored(Checkpointed):
    """An adjoint that follows a plan and keeps its states in ``storage``, a field of a subclass."""

    storage: Storage

    def __post_init__(self) -> None:
        self.plan(0)  # refuses what is no positive int
        check_storage(self.storage)

    def new_snapshots(self) -> Snapshots:
        return open_storage(self.storage)


@lru_cache(maxsize=32)
def _plan(adjoint: Checkpointed, steps: int) -> Plan:
    return adjoint.plan(steps)


def refuse_way_back(adjoint: Adjoint, loop: Loop) -> None:
    """Refuse what concerns the way back, for adjoints that take no product of a step."""
    if loop.monitor is not None:
        raise ValueError(
            "monitor is shown what flows back through each step, but "
            f"{type(adjoint).__name__} goes back through none: leave it out, or use an adjoint "
            "that goes back step by step, such as diffopt.Segmented()"
        )
    if loop.max_cotangent_norm is not None:
        raise ValueError(
            f"max_cotangent_norm={loop.max_cotangent_norm} bounds what flows back through each "
            f"step, but {type(adjoint).__name__} goes back through none: leave it out"
        )
