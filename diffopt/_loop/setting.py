"""What both passes over a loop work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffopt._derivatives.table import with_second_derivatives
from diffopt._loop.check import Check
from diffopt._loop.extras import Extras
from diffopt._loop.losses import Losses
from diffopt._loop.progress import Progress
from diffopt._loop.snapshots import Snapshot
from diffopt._loop.verify import Ledger
from diffopt._model.modes import Modes
from diffopt._model.standing import standing
from diffopt._step.capture import Captured
from diffopt._step.generators import Generators
from diffopt._step.observe import Observer
from diffopt._step.step import InnerStep
from diffopt._torch.engine import shielded
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.optim.unchanged import UnchangedOptions

#: ``f(step, cotangent)``, called on the way back.
Monitor = Callable[[int, dict[str, Tensor]], object]


class Setting:
    """``steps`` inner steps from ``start``.

    Attributes:
        start: the state at position 0, cut from any graph.
        inputs: the tensors of the start that gradients are delivered to, as the caller's graph
            knows them.
        steps: T, how many steps there are; positions in the loop run from 0 to T.
        step: the pure inner step.
        captured: the tensors that the steps use without being given them; filled by ``first``.
        observer: sees what the steps of the first pass use.
        check: compares steps computed again with the first pass; None where nothing is to be.
        generators: the random generators, which the forward pass advances.
        losses: those of the steps taken so far, cut from the graph.
        extras: what ``loss_fn`` returned beside them, likewise.
        max_cotangent_norm: the bound on what flows back through a step, or None.
        monitor: the user's function of that, before it is bounded, or None.
        tasks: N where every tensor leads with the task dimension, or None.
        ledger: what every step gave the first time, where recomputations are to be compared.
    """

    def __init__(
        self,
        step: InnerStep,
        start: State,
        steps: int,
        *,
        captured: Captured,
        observer: Observer,
        generators: Generators,
        modes: Modes,
        options: UnchangedOptions,
        progress: Progress,
        connected: bool = True,
        max_cotangent_norm: float | None = None,
        monitor: Monitor | None = None,
        tasks: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.step = step
        self.start = start.detach()
        step.loss.buffers.tracked.update(n for n, x in start.buffers.items() if x.requires_grad)
        self.inputs: Mapping[Path, Tensor] = step.differentiable(start)
        self.steps = steps
        self.captured = captured
        self.observer = observer
        self.check = Check(_roughness(step, modes)) if connected else None
        self.generators = generators
        self.options = options
        self.progress = progress
        self.max_cotangent_norm = max_cotangent_norm
        self.monitor = monitor
        self.tasks = tasks
        self.ledger = ledger
        self.losses = Losses(steps)
        self.extras = Extras()
        self._session = _Session(step, modes, progress)

    def first_session(self) -> AbstractContextManager[None]:
        """``session``, for a first pass, whose observer calls the replacements of operations."""
        return self._session.entered()

    def session(self) -> AbstractContextManager[None]:
        """Where steps may be taken: the module and the modes are the call's, and put back.

        A session inside a session is the same one, so the module keeps the weights of the last
        step until its derivative has been taken: layers that recompute themselves need them.
        """
        replaced = self.observer.replaced
        # A custom Function may call anything in its backward pass, also when the derivative of a
        # step is taken. Nothing else does: there operations need to be seen in evaluations alone.
        return self._session.entered(
            routed=replaced and self.captured.functions,
            within=with_second_derivatives if replaced and not self.captured.functions else None,
        )

    def together(self) -> AbstractContextManager[None]:
        """A pass over the steps, which the processes of a group begin and end together."""
        group = self.step.group
        return nullcontext() if group is None else group.during()

    def together_again(self) -> AbstractContextManager[None]:
        """Part of such a pass, or of a backward pass through one that was recorded."""
        group = self.step.group
        return nullcontext() if group is None else group.during_backward()

    # Snapshots.

    def snapshot(self, state: State) -> Snapshot:
        """``state``, with the random generators as they are now."""
        return Snapshot(state, self.generators.get())

    def restored(self, snapshot: Snapshot) -> State:
        """The state of a snapshot; the generators are put where they were at it."""
        self.generators.set(snapshot.generators)
        return snapshot.state


class _Session:
    """What surrounds the steps of a loop, entered once however deep it is asked for."""

    def __init__(self, step: InnerStep, modes: Modes, progress: Progress) -> None:
        self._step = step
        self._modes = modes
        self._progress = progress
        self._active = False

    @contextmanager
    def entered(
        self, *, routed: bool = False, within: AbstractContextManager[Any] | None = None
    ) -> Iterator[None]:
        if self._active:
            yield
            return
        step = self._step
        step.hooks.within = within or nullcontext()
        inside = standing(step.loss.slots, self._modes, step.hooks, as_at_call=True, routed=routed)
        with step.session(inside):
            self._active = True
            try:
                with shielded(), self._progress.shown():
                    yield
            finally:
                self._active = False
                step.hooks.within = nullcontext()
                self._progress.close()


def _roughness(step: InnerStep, modes: Modes) -> float:
    """The largest machine epsilon among the dtypes that a step is known to compute in."""
    used = {*step.loss.precision.dtypes, *modes.autocast_dtypes}
    return max((torch.finfo(dtype).eps for dtype in used), default=0.0)
