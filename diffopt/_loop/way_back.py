"""The way back: steps are taken again, compared with the first pass and differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt._loop.setting import Setting
from diffopt._step.capture import Captured
from diffopt._step.graph import Graph, Part
from diffopt._step.linearization import Linearization
from diffopt._step.parts_vjp import InParts
from diffopt._step.result import Checked, StepResult
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import add

_NAMES: dict[Part, str] = {
    "loss": "loss",
    "aux": "aux",
    "transform": "grad_transform",
    "hyper": "hyperparameters",
    "update": "update",
}


class WayBack(Setting):
    """Taking the steps of a loop again, and their vector-Jacobian products."""

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
        linearization = self.step.linearize(state, t, values=values)
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
        shards = self.step.loss.slots.shards
        if self.monitor is not None:
            shown = {p[1]: g.detach().clone() for p, g in cotangent.items() if p[0] == "params"}
            with torch.no_grad():
                if shards is not None:
                    shown = shards.standing(shown)
                self.monitor(self.step.first_step + t, shown)
        if self.max_cotangent_norm is None:
            return cotangent
        params = {path: g for path, g in cotangent.items() if path[0] == "params"}
        whole = list(params.values())
        if (group := self.step.group) is not None or shards is not None:
            named = {path[1]: g for path, g in params.items()}
            named = named if group is None else group.mean(named)
            whole = list(named.values()) if shards is None else shards.norms(named)
        if not params:
            return cotangent
        scaled = clip_norm(list(params.values()), self.max_cotangent_norm, self.tasks, whole)
        return {**cotangent, **dict(zip(params, scaled, strict=True))}


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
    max_norm: float | Tensor,
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
