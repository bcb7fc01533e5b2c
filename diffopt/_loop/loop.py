"""The training loop as a value: what an adjoint is given to run and to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._loop.check import Check
from diffopt._loop.extras import Extras
from diffopt._loop.losses import Losses
from diffopt._loop.progress import Progress
from diffopt._loop.snapshots import Snapshot
from diffopt._loop.verify import Ledger
from diffopt._model.modes import Modes
from diffopt._model.standing import standing
from diffopt._step.capture import Captured, Graph, Part
from diffopt._step.generators import Generators
from diffopt._step.linearization import Linearization
from diffopt._step.observe import Observer
from diffopt._step.parts_vjp import InParts
from diffopt._step.result import Checked, StepResult
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import present_sequence
from diffopt._torch.engine import shielded
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, add
from diffopt.optim.unchanged import UnchangedOptions

_NAMES: dict[Part, str] = {
    "loss": "loss",
    "aux": "aux",
    "transform": "grad_transform",
    "hyper": "hyperparameters",
    "update": "update",
}


#: ``f(step, cotangent)``, called on the way back.
Monitor = Callable[[int, dict[str, Tensor]], object]


class Loop:
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
        return self._session.entered(routed=False)

    def session(self) -> AbstractContextManager[None]:
        """Where steps may be taken: the module and the modes are the call's, and put back.

        A session inside a session is the same one, so the module keeps the weights of the last
        step until its derivative has been taken: layers that recompute themselves need them.
        """
        return self._session.entered(routed=self.observer.replaced)

    def together(self) -> AbstractContextManager[None]:
        """A pass over the steps, which the processes of a group begin and end together."""
        group = self.step.group
        return nullcontext() if group is None else group.during()

    def together_again(self) -> AbstractContextManager[None]:
        """Part of such a pass, or of a backward pass through one that was recorded."""
        group = self.step.group
        return nullcontext() if group is None else group.during_backward()

    # Loops made from this one. They share its captured tensors, losses and session.

    def first_order(self) -> Self:
        """This loop with every inner gradient taken as a constant."""
        loop = copy(self)
        loop.step = self.step.of_first_order()
        return loop

    def rest(self, state: State, t: int) -> Self:
        """The loop from position ``t`` on, where its own positions start again from 0.

        ``state`` is its start, a constant. The steps before have to be taken with ``pass_over``.
        """
        loop = copy(self)
        loop.step = self.step.later(t)
        loop.start, loop.inputs, loop.steps = state, {}, self.steps - t
        return loop

    # Snapshots.

    def snapshot(self, state: State) -> Snapshot:
        """``state``, with the random generators as they are now."""
        return Snapshot(state, self.generators.get())

    def restored(self, snapshot: Snapshot) -> State:
        """The state of a snapshot; the generators are put where they were at it."""
        self.generators.set(snapshot.generators)
        return snapshot.state

    # The first pass: every step is taken once, in order, and is observed.

    def first(self, state: State, t: int) -> State:
        """Take step ``t`` for the first time, without keeping a graph."""
        since = present_sequence()
        with torch.no_grad():
            result = self.step(state, t, self.observer)
        self._note(state, t, result, since)
        if self.ledger is not None:
            self.ledger.note(self.step.first_step + t, result.state, result.loss)
        return self._collect(state, t, result)

    def pass_over(self, state: State, t: int) -> State:
        """Take step ``t`` for its result alone: nothing that it uses is to get a gradient."""
        with torch.no_grad():
            result = self.step(state, t, self.observer)
        return self._collect(state, t, result)

    def first_recorded(self, state: State, t: int) -> tuple[Linearization, State]:
        """Take step ``t`` for the first time and keep its graph."""
        since = present_sequence()
        linearization = self.step.linearize(state, t, self.observer)
        result = linearization.advance()
        linearization.drop_gradients()
        self._note(state, t, result, since)
        if not self.step.first_order:
            self.captured.refuse_unrecorded(result.graph, self.step.first_step + t)
        # Of first order, the graph will not be kept and the step may be computed again.
        if self.ledger is not None and self.step.first_order:
            self.ledger.note(self.step.first_step + t, result.state, result.loss)
        return linearization, self._collect(state, t, result)

    def _note(self, before: State, t: int, result: StepResult, since: int) -> None:
        self.refuse_originals(before, t, result)
        if self.check is None:
            return
        twice = not self.step.first_order
        self.captured.note(result.graph, self.observer, since, twice)
        self.check.first(self.step.first_step + t, result.checked)

    def refuse_originals(self, before: State, t: int, result: StepResult) -> None:
        """Refuse a step that uses a parameter's original where it should use the present value."""
        slots = self.step.loss.slots
        for name, x in self.observer.originals_used.items():
            unused = (
                name in slots.constants
                or result.state.params[name].data_ptr() == before.params[name].data_ptr()
            )
            if unused or slots.holds_apart(x):
                raise NotImplementedError(
                    f"step {self.step.first_step + t} uses the model's own parameter {name!r} and "
                    "not the value that it has in the unroll, which stands in the module: do not "
                    "keep parameters in a list, a closure or a global, but take them from the "
                    "module (an nn.ParameterList holds a list). Where its initial value is meant, "
                    "keep that outside of the model"
                )

    def _collect(self, before: State, t: int, result: StepResult) -> State:
        self.options.check(self.step.first_step + t)
        self.losses.append(result.loss)
        self.extras.append(self.step.first_step + t, result.aux, result.attached)
        self.progress.forward()
        # What the caller is given is the caller's to change, and no snapshot's memory.
        return result.state.apart_from(before) if t + 1 == self.steps else result.state

    # Steps that were taken in another process.

    def given(self, t: int) -> dict[str, Any]:
        """What step ``t`` gave besides its loss that it has to give again, of JSON's kinds."""
        return {} if self.check is None else self.check.noted(self.step.first_step + t)

    def pass_by(self, t: int, loss: Tensor, step: Mapping[str, Any], index: Sequence[int]) -> None:
        """Note a step that is not taken: its loss, what it gave, and what it used.

        Args:
            step: what ``given`` and ``Captured.use`` said of it.
            index: the index here of each captured tensor there.
        """
        self.captured.note_use(step, index)
        if self.check is not None:
            number = self.step.first_step + t
            self.check.first(number, Checked(loss))
            self.check.note_again(number, step, loss)
        self.losses.append(loss)
        self.extras.append(self.step.first_step + t, None, ())
        self.progress.forward()

    # On the way back.

    def again(self, state: State, t: int) -> State:
        """Take step ``t`` again. The generators have to be where they were the first time."""
        result = self.step(state, t)
        self.compare(t, result)
        return result.state

    def linearize(self, state: State, t: int, *, values: bool = True) -> Linearization:
        """Take step ``t`` again and keep its graph, for ``vjp`` and nothing else unless ``values``.

        Raises:
            RuntimeError: it used other tensors than the first time, so that a gradient would be
                lost.
        """
        if self.ledger is not None:
            with self.generators.undisturbed():
                self.again(state, t)
        linearization = self.step.linearize(state, t)
        self._compare(t, linearization.checked)
        self._refuse_others(t, linearization.graph)
        if not self.step.first_order:
            self.captured.refuse_unrecorded(linearization.graph, self.step.first_step + t)
        if not values:
            linearization.drop_gradients()
        return linearization

    def recorded(self, state: State, t: int) -> tuple[Linearization, State]:
        """``linearize``, and the state after the step."""
        if self.ledger is None:
            linearization = self.linearize(state, t)
            after = linearization.advance().state
        else:
            # A gradient that is to be differentiated may differ from another in the last bit.
            with self.generators.undisturbed():
                linearization = self.step.linearize(state, t)
            after = self.again(state, t)
        linearization.drop_gradients()
        return linearization, after

    def connected(self, state: State, t: int) -> StepResult:
        """Take step ``t`` again, as a differentiable function where grad mode is on."""
        result = self.step(state, t)
        self._compare(t, result.checked)
        self.settle()
        if torch.is_grad_enabled():
            self._refuse_others(t, result.graph)
        return result

    def compare(self, t: int, result: StepResult) -> None:
        """Compare what step ``t`` gives with what it gave first."""
        self._compare(t, result.checked)
        if self.ledger is not None:
            self.ledger.check(self.step.first_step + t, result.state, result.loss)

    def settle(self) -> None:
        """Raise where a step that was computed again gave something else than at first."""
        if self.check is not None:
            self.check.settle()

    def _compare(self, t: int, checked: Checked | None) -> None:
        if self.check is not None and checked is not None:
            self.check.again(self.step.first_step + t, checked)

    def _refuse_others(self, t: int, graph: Graph) -> None:
        """Refuse a step that uses other tensors than it used at first."""
        part = self.captured.missing(t, graph)
        if part is not None:
            raise self._others(t, part)

    def _others(self, t: int, part: Part) -> RuntimeError:
        return RuntimeError(
            f"step {self.step.first_step + t} does not use the tensors that require grad of "
            f"the forward pass again, in its {_NAMES[part]}: was a variable bound to a new "
            "tensor since, or does it keep tensors from step to step? Call backward "
            "before that, pass the tensor inside the batch, or detach what is kept"
        )

    def vjp(
        self,
        linearization: Linearization,
        t: int,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """One vector-Jacobian product.

        Returns:
            the cotangent of the state before the step, and those of the captured tensors that
            the step uses, in the order of ``captured.at(t)``.
        """
        if self.step.group is not None:
            self.step.group.at(self.step.first_step + t)
        state_cotangent = self.bounded(t, state_cotangent)
        used: dict[Part, set[int]] = {}
        if isinstance(linearization, InParts):
            linearization.visit = lambda graph: self._visit(t, graph, used)
        with self.captured.sealed(t) as shared:
            try:
                before, captured = linearization.vjp(
                    state_cotangent,
                    outputs,
                    self.captured.edges(t),
                    retain_graph=retain_graph or shared,
                )
            except RuntimeError as error:
                self._refuse_other_threads(error, t)
                raise
        if isinstance(linearization, InParts):
            part = self.captured.missing_among(t, used)
            if part is not None:
                raise self._others(t, part)
            for checked in linearization.again:
                self._compare(t, checked)
            linearization.again.clear()
        self.progress.backward()
        return before, captured

    def _visit(self, t: int, graph: Graph, used: dict[Part, set[int]]) -> None:
        """Take note of what a part of the batch of step ``t`` uses, while its graph is there."""
        if not self.step.first_order:
            self.captured.refuse_unrecorded(graph, self.step.first_step + t)
        for part, indices in self.captured.used_by(graph).items():
            used.setdefault(part, set()).update(indices)

    def _refuse_other_threads(self, error: RuntimeError, t: int) -> None:
        """Say what is the matter where a derivative ran on into the caller's graph.

        Nodes are numbered per thread, so a tensor that another thread computed looks like one that
        the step made itself.
        """
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                f"step {self.step.first_step + t} uses a tensor that requires grad and that was "
                "computed on another thread, or whose graph was freed: compute it on the thread "
                "that calls unroll, or pass it inside the batch"
            ) from error

    def bounded(self, t: int, cotangent: Cotangent) -> Cotangent:
        """The cotangent of the state after step ``t`` as it flows back, once it has been shown.

        The parameters' part is scaled to at most ``max_cotangent_norm``.
        """
        if self.monitor is not None:
            shown = {p[1]: g.detach().clone() for p, g in cotangent.items() if p[0] == "params"}
            with torch.no_grad():
                self.monitor(self.step.first_step + t, shown)
        if self.max_cotangent_norm is None:
            return cotangent
        params = {path: g for path, g in cotangent.items() if path[0] == "params"}
        whole = list(params.values())
        if (group := self.step.group) is not None:
            whole = list(group.mean({path[1]: g for path, g in params.items()}).values())
        if not params:
            return cotangent
        scaled = clip_norm(list(params.values()), self.max_cotangent_norm, self.tasks, whole)
        return {**cotangent, **dict(zip(params, scaled, strict=True))}


class _Session:
    """What surrounds the steps of a loop, entered once however deep it is asked for."""

    def __init__(self, step: InnerStep, modes: Modes, progress: Progress) -> None:
        self._step = step
        self._modes = modes
        self._progress = progress
        self._active = False

    @contextmanager
    def entered(self, *, routed: bool) -> Iterator[None]:
        if self._active:
            yield
            return
        step = self._step
        inside = standing(step.loss.slots, self._modes, step.hooks, as_at_call=True, routed=routed)
        with step.session(inside):
            self._active = True
            try:
                with shielded(), self._progress.shown():
                    yield
            finally:
                self._active = False
                self._progress.close()


def _roughness(step: InnerStep, modes: Modes) -> float:
    """The largest machine epsilon among the dtypes that a step is known to compute in."""
    used = {*step.loss.precision.dtypes, *modes.autocast_dtypes}
    return max((torch.finfo(dtype).eps for dtype in used), default=0.0)


class CapturedSum:
    """Sums the cotangents of the captured tensors over the steps."""

    def __init__(self, captured: Captured) -> None:
        self.total: list[Tensor | None] = [None] * len(captured.tensors)

    def add(self, indices: Sequence[int], cotangents: Sequence[Tensor | None]) -> None:
        """Add one step's, as ``Captured.at`` and ``Loop.vjp`` give them."""
        for i, g in zip(indices, cotangents, strict=True):
            self.total[i] = add(self.total[i], g)


def clip_norm(
    tensors: Sequence[Tensor],
    max_norm: float,
    tasks: int | None,
    whole: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``tensors`` times min(1, max_norm / norm), with norm the joint Euclidean norm of ``whole``.

    ``whole`` is by default ``tensors``. With tasks each leads with the task dimension, and each
    task has its own norm.
    """
    count = 1 if tasks is None else tasks
    rows = [x.reshape(count, -1) for x in (tensors if whole is None else whole)]
    device = rows[0].device
    norms = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(row, dim=1).to(device) for row in rows]), dim=0
    )
    scale = max_norm / norms.clamp(min=max_norm)
    return [
        (x.reshape(count, -1) * scale.to(x.device, x.dtype)[:, None]).reshape(x.shape)
        for x in tensors
    ]
