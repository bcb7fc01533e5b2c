"""A step whose batch is split into parts, of which one has its graph alive at a time.

With the parts' losses l and coefficients c, the loss is L = Σ c l and its gradient g = Σ c ∇l. A
vector-Jacobian product of the step takes what flows to g and to L through one part after the other:
its loss is evaluated with its graph, its gradient with a graph of its own, what flows to both is
pulled back, and all of that is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from diffopt._step.capture import Graph
from diffopt._step.generators import Generators
from diffopt._step.linearization import Linearization, Split
from diffopt._step.loss import Evaluation, InnerLoss
from diffopt._step.microbatches import Coefficient, Microbatches
from diffopt._step.observe import Observer
from diffopt._step.result import Checked, Evaluated, StepResult, present
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import in_forward_mode, present_sequence
from diffopt._torch.collectives import no_collectives
from diffopt._values.outputs import StepCotangents, attached
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import add, tensors_in
from diffopt.optim.terms import Hyper, tensors_of
from diffopt.optim.vjp import reads_gradients

_NOTHING = nullcontext()


class PartsLoss(InnerLoss):
    """The loss of a step's whole batch, evaluated part by part. Its aux is a list of the parts'."""

    microbatches: Microbatches

    def parts(self, t: int) -> list[tuple[InnerLoss, Coefficient]]:
        """The losses of the parts of the batch at position ``t``, and their coefficients."""
        step = self._first_step + t
        items = self.microbatches.split(self.item_at(t), step)
        coefficients = self.microbatches.coefficients(items, step)
        return [
            (self._of_part(item), c)
            for item, c in zip(items, coefficients, strict=True)
            if c is not None
        ]

    def _of_part(self, item: Any) -> InnerLoss:
        loss = InnerLoss.__new__(InnerLoss)
        loss.__dict__.update(self.__dict__)
        loss.item_at = lambda t: item
        return loss

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
        within: AbstractContextManager[Any] = _NOTHING,
    ) -> Evaluation:
        total: Any = 0
        extras, left = [], dict(buffers)
        with within:
            parts = self.parts(t)
        for loss, c in parts:
            value, aux, left = loss(params, left, t, within)
            self.check_buffers(t)
            scaled = copy(loss)
            scaled.scale = c
            total = total + scaled.total(value)
            extras.append(aux)
        return total, gathered(extras), left

    def check_buffers(self, t: int) -> None:
        """Raise where derivatives flow by way of a buffer, which would be from part to part."""
        for name in self.buffers.tracked:
            raise NotImplementedError(
                f"microbatches: step {self._first_step + t} computes the buffer {name!r} with "
                "gradients, which would flow from part to part: compute it from a detached tensor, "
                "or leave microbatches out"
            )


def gathered(extras: list[Any]) -> Any:
    """The extras of a step, from those of its parts."""
    return None if all(aux is None for aux in extras) else extras


class PartsStep(InnerStep):
    """``InnerStep`` by parts. Where a whole step is recorded by autograd, all parts are."""

    loss: PartsLoss
    generators: Generators
    #: By step number, the parameters that had a gradient when the step was first taken.
    with_gradient: dict[int, list[str]]

    def of_part(self, loss: InnerLoss, c: Coefficient) -> InnerStep:
        """The evaluation of one part's loss and of the gradient of ``c`` times it."""
        part = InnerStep.__new__(InnerStep)
        part.__dict__.update(self.__dict__)
        part.loss, part.grad_transform, part.only_gradient = copy(loss), None, True
        part.loss.scale, part._called = c, []
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
    ) -> Evaluated:
        """As for ``InnerStep``; unless ``connected``, the graphs of the parts are freed."""
        if connected:
            return super().evaluate(state, t, own, connected, observer)
        number, extras = self.first_step + t, list[Any]()
        if observer is not None:
            observer.begin(number, own, present_sequence())
        graph, total = Graph(own, retained=False), Total()
        with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
            parts = self.loss.parts(t)
        learning = [c for _, c in parts if isinstance(c, Tensor) and c.requires_grad]
        graph.roots["loss"] = list(learning)
        for loss, c in parts:
            with torch.enable_grad():  # an alias, for hooks of this part
                alias = {name: x.view_as(x) for name, x in state.params.items()}
            if observer is not None:
                self.loss.buffers.look_again(number)
            step = self.of_part(loss, c)
            before = State(alias, state.opt, total.buffers or state.buffers)
            found = step.evaluate_as_begun(before, t, [*own, *alias.values()], False, observer)
            self.loss.check_buffers(t)
            total.add(found, step.loss.total(found.loss))
            extras.append(found.aux)
            if observer is not None:  # which nodes there were, for what the step uses
                graph.roots["loss"] = [*graph.roots["loss"], *found.graph.roots["loss"]]
                graph.in_gradient = [*graph.in_gradient, *found.graph.in_gradient]
            del found
        self.check_gradient(total.raw, number)
        assert total.loss is not None
        raw = {n: g if g is None else g.requires_grad_() for n, g in total.raw.items()}
        with self.hooks, torch.enable_grad(), no_collectives(), observer or _NOTHING:
            hyper = self.options_at(number)
            if observer is not None:
                observer.see(tensors_of(hyper))
            grads: Mapping[str, Tensor | None] = raw
            if self.grad_transform is not None:
                given = copies(present(raw))
                if observer is not None:
                    observer.transforms(given)
                grads = self._transformed(given, state.params, total.buffers, t)
        self.with_gradient.setdefault(number, list(present(raw)))
        aux = gathered(extras)
        outputs = attached(aux)
        graph.own = [*own, *present(raw).values()]
        self.note_roots(graph, outputs, hyper, grads)
        checked = self._checked(total.loss, outputs.values(), hyper, grads, True)
        return Evaluated(total.loss, aux, outputs, total.buffers, hyper, raw, grads, checked, graph)

    def linearize(self, state: State, t: int, observer: Observer | None = None) -> Linearization:
        """As for ``InnerStep``; nothing is evaluated before it is needed, unless observed."""
        linearization = InParts(self, state, t)
        if observer is not None:
            linearization.evaluate(observer)
        return linearization


class Total:
    """The sum over parts."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.raw: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor] = {}

    def add(self, found: Evaluated, loss: Tensor) -> None:
        """Add a part, of which nothing is kept but values."""
        with torch.no_grad():
            self.loss = add(self.loss, values(loss))
            for name, g in found.raw.items():
                self.raw[name] = add(self.raw.get(name), g if g is None else values(g))
        self.buffers = found.buffers


class InParts(Linearization):
    """A step by parts; each vector-Jacobian product evaluates them anew.

    It holds a state, and what the update is made of where that was evaluated.

    Attributes:
        visit: is shown the graph of each part, of the weights and of the update, while it is there.
        again: what the step has given when it was evaluated again, to be compared.
    """

    def __init__(self, step: PartsStep, state: State, t: int) -> None:
        self._parts_step = step
        self._before = state.detach()
        self._t = t
        self._start = step.generators.get()
        self._update: Linearization | None = None
        self.checked: Checked | None = None
        self.again: list[Checked] = []
        self.graph = Graph((), retained=False)
        self.visit: Callable[[Graph], object] = lambda graph: None

    def __getattr__(self, name: str) -> Any:
        """The attributes of a linearization that has been evaluated."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._evaluated(), name)

    def _evaluated(self) -> Linearization:
        return self._update or self.evaluate()

    def evaluate(self, observer: Observer | None = None) -> Linearization:
        """Evaluate the step up to its gradients, from which on the update has a graph."""
        step = self._parts_step
        if observer is None:
            step.generators.set(self._start)
        state, leaves = step.on_leaves(self._before)
        since = present_sequence()
        found = step.evaluate(state, self._t, [*leaves.values()], False, observer)
        self._update = step.linearized(
            state, self._t, leaves | _as_leaves(found.raw), found, since, observer
        )
        self.checked, self.graph = self._update.checked, self._update.graph
        if observer is None:
            self.again.append(found.checked)
        return self._update

    def advance(self) -> StepResult:
        return self._evaluated().advance()

    def drop_gradients(self) -> None:
        """Keep the values of gradients where ``vjp`` reads them, and no graph of the extras."""
        self.graph = Graph((), retained=False)
        if self._update is None:
            return
        self._update = self._placeholder() or self._update
        self._update.forget_extras()

    def _placeholder(self) -> Linearization | None:
        """The update with any values in the gradients' places, where it reads none of them."""
        step, number = self._parts_step, self._parts_step.first_step + self._t
        names = step.with_gradient.get(number)
        if names is None or step.grad_transform is not None:
            return None
        with torch.enable_grad():
            hyper = step.options_at(number)
        state, leaves = step.on_leaves(self._before)
        given = {name: state.params[name].detach().requires_grad_() for name in names}
        if not step.is_known(hyper) or reads_gradients(
            step.opt, given, state.opt, hyper=hyper, groups=step.groups, tasks=None
        ):
            return None
        raw = {name: given.get(name) for name in state.params}
        zero = next(iter(state.params.values())).new_zeros(())
        graph = Graph([*leaves.values(), *given.values()], retained=False)
        step.note_roots(graph, {}, hyper, raw)
        found = Evaluated(zero, None, {}, {}, hyper, raw, raw, Checked(zero), graph)
        return Split(step, number, state, leaves | _as_leaves(raw), found)

    def vjp(
        self,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        step = self._parts_step
        with step.generators.undisturbed():
            update = self._update or self._placeholder() or self.evaluate()
            self.visit(update.graph)
            before, others = update.vjp(
                state_cotangent, StepCotangents(), captured, retain_graph=retain_graph
            )
        given = {path[1]: before.pop(path) for path in list(before) if path[0] == "raw"}
        found, more = self._pulled_through(
            {} if step.first_order else given, outputs, captured, retain_graph, update.hyper
        )
        for path, c in found.items():
            total = add(before.get(path), c)
            assert total is not None
            before[path] = total
        return before, [add(a, b) for a, b in zip(others, more, strict=True)]

    def gradient_vjp(
        self, cotangents: Mapping[str, Tensor], captured: Sequence[Any] = ()
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """As for ``Linearization``."""
        found, others = self._pulled_through(cotangents, StepCotangents(), captured, True)
        return {path[1]: c for path, c in found.items() if path[0] == "params"}, others

    def _pulled_through(
        self,
        cotangents: Mapping[str, Tensor],
        outputs: StepCotangents,
        captured: Sequence[Any],
        retain_graph: bool,
        hyper: Sequence[Hyper] | None = None,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Pull cotangents of the gradient, of the loss and of extras through all parts."""
        step, t = self._parts_step, self._t
        sums = _Sums(len(captured))
        total, extras, count = Total(), list[Any](), 0
        with step.generators.undisturbed():
            step.generators.set(self._start)
            with torch.enable_grad(), step.hooks, no_collectives():
                parts = step.loss.parts(t)
            learning: list[tuple[Tensor, Tensor | None]] = []
            for loss, c in parts:
                state, leaves = step.on_leaves(self._before)
                if total.buffers:
                    state = State(state.params, state.opt, total.buffers)
                scale = c
                if isinstance(c, Tensor):
                    scale = c.detach().requires_grad_(c.requires_grad)
                part = step.of_part(loss, scale)
                found = part.evaluate_as_begun(state, t, [*leaves.values()], True)
                self.visit(found.graph)
                with torch.enable_grad():
                    value = part.loss.total(found.loss)
                total.add(found, value)
                extras.append(attached_values(found.attached))
                roots: list[tuple[Tensor | None, Tensor | None]]
                roots = [(found.raw.get(name), v) for name, v in cotangents.items()]
                roots.append((value, outputs.loss))
                mine = {i: outputs.aux.get(count + i) for i in found.attached}
                roots += [(found.attached[i], v) for i, v in mine.items()]
                count += sum(1 for _ in tensors_in(found.aux))
                graph = Split(part, step.first_step + t, state, leaves, found)
                learns = isinstance(scale, Tensor) and scale.requires_grad
                wanted = [*captured, scale] if learns else captured
                before, others = graph.pulled(roots, wanted, retain_graph)
                if learns:
                    assert isinstance(c, Tensor)
                    learning.append((c, others.pop()))
                sums.add(before, others)
                del graph, found, value, roots, mine
            self._pull_weights(learning, captured, sums)
        if hyper is not None:
            assert total.loss is not None
            grads = {} if step.grad_transform is not None else total.raw
            flat = [x for given in extras for x in given]
            self.again.append(step._checked(total.loss, flat, hyper, grads, True))
        return sums.state, sums.captured

    def _pull_weights(
        self,
        learning: Sequence[tuple[Tensor, Tensor | None]],
        captured: Sequence[Any],
        sums: _Sums,
    ) -> None:
        """Pull what flows to the coefficients of the parts back through the weights."""
        if not learning:
            return
        self.visit(Graph((), {"loss": [c for c, _ in learning]}, retained=False))
        pairs = [(c, v) for c, v in learning if v is not None]
        if pairs and captured:
            found = torch.autograd.grad(
                [c for c, _ in pairs],
                list(captured),
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
            )
            sums.add({}, found)


class _Sums:
    """Sums of cotangents over the parts."""

    def __init__(self, captured: int) -> None:
        self.state: Cotangent = {}
        self.captured: list[Tensor | None] = [None] * captured

    def add(self, state: Cotangent, captured: Iterable[Tensor | None]) -> None:
        for path, c in state.items():
            total = add(self.state.get(path), c)
            assert total is not None
            self.state[path] = total
        self.captured = [add(a, b) for a, b in zip(self.captured, captured, strict=True)]


def values(x: Tensor) -> Tensor:
    """``x`` without its graph; a tangent in forward mode stays."""
    with torch.no_grad():
        return x.clone() if in_forward_mode() else x.detach()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which a function may change in place."""
    return {name: x.clone() for name, x in tensors.items()}


def attached_values(outputs: Mapping[int, Tensor]) -> list[Tensor]:
    """The values of extras."""
    return [x.detach() for x in outputs.values()]


def _as_leaves(raw: Mapping[str, Tensor | None]) -> Cotangent:
    return {("raw", name): g for name, g in present(raw).items()}
