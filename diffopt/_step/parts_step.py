"""A step whose batch is split into parts, of which one has its graph alive at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from diffopt._step.generators import Generators
from diffopt._step.graph import Graph, comes_to
from diffopt._step.linearization import Linearization
from diffopt._step.loss import InnerLoss
from diffopt._step.microbatches import Coefficient
from diffopt._step.observe import Observer
from diffopt._step.parts import Parts, PartsLoss, Total, copies, gathered
from diffopt._step.parts_gradients import Gradient, Gradients
from diffopt._step.parts_vjp import InParts
from diffopt._step.result import Evaluated, StepResult, present
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import present_sequence
from diffopt._torch.collectives import no_collectives
from diffopt._values.outputs import attached
from diffopt._values.state import State
from diffopt.optim.terms import Hyper, tensors_of
from diffopt.optim.vjp import reads_gradients

_NOTHING = nullcontext()


class PartsStep(InnerStep):
    """``InnerStep`` by parts. Where a whole step is recorded by autograd, all parts are."""

    loss: PartsLoss
    generators: Generators
    #: By step number, the parameters that had a gradient when the step was first taken; None where
    #: another process reads gradients on the way back.
    with_gradient: dict[int, list[str] | None]
    gradients: Gradients | None = None

    def keep_gradients(self, of_first_pass: Collection[int]) -> None:
        """Keep gradients that the derivative reads beside states that are held.

        Args:
            of_first_pass: the positions of steps of which that of the first pass is to be kept;
                of the others that of the last time they are taken again.
        """
        self.gradients = Gradients(of_first_pass)

    def __call__(self, state: State, t: int, observer: Observer | None = None) -> StepResult:
        """As for ``InnerStep``."""
        result = super().__call__(state, t, observer)
        if self.gradients is not None:
            self.gradients.keep(state, result.state)
        return result

    def of_part(self, loss: InnerLoss, c: Coefficient) -> InnerStep:
        """The evaluation of one part's loss and of the gradient of ``c`` times it."""
        part = InnerStep.__new__(InnerStep)
        part.__dict__.update(self.__dict__)
        part.loss, part.grad_transform, part.only_gradient = copy(loss), None, True
        part.loss.scale, part._called, part.group = c, [], None
        return part

    @property
    def kind(self) -> Any:
        return type(self), self.loss.microbatches.parts

    def evaluate(
        self,
        state: State,
        t: int,
        own: Sequence[Tensor],
        connected: bool,
        observer: Observer | None = None,
        *,
        values: bool = True,
    ) -> Evaluated:
        """As for ``InnerStep``; unless ``connected``, the graphs of the parts are freed."""
        if connected:
            return super().evaluate(state, t, own, connected, observer, values=values)
        number, extras, since = self.first_step + t, list[Any](), present_sequence()
        if self.group is not None:
            self.group.at(number)
        if observer is not None:
            observer.begin(number, own, since)
        graph, total = Graph(own, retained=False), Total()
        with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
            parts = self.loss.parts(t)
        graph.roots["loss"] = parts.learning
        for loss, c in parts.losses:
            with torch.enable_grad():  # an alias, for hooks of this part
                alias = {name: x.view_as(x) for name, x in state.params.items()}
            if observer is not None:
                self.loss.buffers.look_again(number)
            step = self.of_part(loss, c)
            before = State(alias, state.opt, total.buffers or state.buffers)
            part = step.evaluate_as_begun(before, t, [*own, *alias.values()], False, observer)
            self.loss.check_buffers(t)
            total.add(part, step.loss.total(part.loss))
            extras.append(part.aux)
            if observer is not None:  # which nodes there were, for what the step uses
                graph.roots["loss"] = [*graph.roots["loss"], *part.graph.roots["loss"]]
                graph.in_gradient = [*graph.in_gradient, *part.graph.in_gradient]
            del part
        self.check_gradient(total.raw, number)
        assert total.loss is not None
        with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
            hyper = self.options_at(number)
            if observer is not None:
                observer.see(tensors_of(hyper))
        averaged, others_read = self._over_processes(total.raw, parts, state, number, hyper)
        raw = {n: g if g is None else g.requires_grad_() for n, g in averaged.items()}
        with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
            grads: Mapping[str, Tensor | None] = raw
            if self.grad_transform is not None:
                offered = copies(present(raw))
                if observer is not None:
                    observer.transforms(offered)
                grads = self._transformed(offered, state.params, total.buffers, t)
        self.with_gradient.setdefault(number, None if others_read else list(present(raw)))
        aux = gathered(extras)
        outputs = attached(aux)
        graph.own = [*own, *present(raw).values()]
        self.note_roots(graph, outputs, hyper, grads)
        if (
            self.gradients is not None
            and (observer is None or t in self.gradients.of_first_pass)
            and self.grad_transform is None
            and (others_read or self.reads_gradients(hyper, present(raw), state.opt))
            and self.is_known(hyper)
            and not comes_to(graph.roots["hyper"], own, since)
        ):
            self.gradients.latest = Gradient(raw, hyper)
        checked = self._checked(total.loss, outputs.values(), hyper, grads)
        return Evaluated(total.loss, aux, outputs, total.buffers, hyper, raw, grads, checked, graph)

    def _over_processes(
        self,
        grads: dict[str, Tensor | None],
        parts: Parts,
        state: State,
        number: int,
        hyper: Sequence[Hyper],
    ) -> tuple[dict[str, Tensor | None], bool]:
        """The gradients averaged over the group, and whether one of it reads them on the way back.

        So it is told in time, and they evaluate the step again together or not at all.
        """
        if self.group is None:
            return grads, False
        reads = (
            (isinstance(parts.weight, Tensor) and parts.weight.requires_grad)
            or self.grad_transform is not None
            or self.reads_gradients(hyper, state.params, state.opt)
        )
        with torch.no_grad():
            averaged = self.group.averaged(grads, number, weight=parts.weight, note=reads)
        return averaged.grads, averaged.noted

    def reads_gradients(
        self,
        hyper: Sequence[Hyper],
        grads: Mapping[str, Tensor],
        opt: Mapping[str, Mapping[str, Tensor]],
    ) -> bool:
        """Whether the derivative of the update may need the gradients' values."""
        return not self.is_known(hyper) or reads_gradients(
            self.opt, grads, opt, hyper=hyper, groups=self.groups, tasks=None
        )

    def share_at(self, number: int) -> float | Tensor | None:
        with self.hooks, torch.enable_grad(), no_collectives():
            return self.loss.parts(number - self.first_step).weight

    def linearize(
        self, state: State, t: int, observer: Observer | None = None, *, values: bool = True
    ) -> Linearization:
        """As for ``InnerStep``; nothing is evaluated before it is needed, unless observed."""
        gradient = None if self.gradients is None else self.gradients.taken(state)
        linearization = InParts(self, state, t, gradient)
        if observer is not None:
            linearization.evaluate(observer)
        return linearization
