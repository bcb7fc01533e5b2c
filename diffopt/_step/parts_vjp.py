"""The derivative of a step in parts: its vector-Jacobian products.

One takes what flows to the gradient and to the loss through one part after the other: its loss is
evaluated with its graph, its gradient with a graph of its own, what flows to both is pulled back,
and all of that is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffopt._step.graph import Graph
from diffopt._step.linearization import Linearization, Split
from diffopt._step.observe import Observer
from diffopt._step.parts import Total, attached_values
from diffopt._step.parts_gradients import Gradient
from diffopt._step.result import Checked, Evaluated, StepResult, present
from diffopt._torch.autograd import present_sequence
from diffopt._torch.collectives import no_collectives
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent, State, add_into
from diffopt._values.tree import Sums, add_each, tensors_in, vjp
from diffopt.optim.terms import Hyper

if TYPE_CHECKING:
    from diffopt._step.parts_step import PartsStep


class InParts(Linearization):
    """A step by parts; each vector-Jacobian product evaluates them anew.

    It holds a state, its gradient where that was kept, and what the update is made of where that
    was evaluated.

    Attributes:
        visit: is shown the graph of each part, of the weights and of the update, while it is there.
        again: what the step has given when it was evaluated again, to be compared.
    """

    def __init__(
        self, step: PartsStep, state: State, t: int, gradient: Gradient | None = None
    ) -> None:
        self._parts_step = step
        self._before = state.detach()
        self._t = t
        self._gradient = gradient
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
        evaluated = step.evaluate(state, self._t, [*leaves.values()], False, observer)
        self._update = step.linearized(
            state, self._t, leaves | _as_leaves(evaluated.raw), evaluated, since, observer
        )
        self.checked, self.graph = self._update.checked, self._update.graph
        if observer is None:
            self.again.append(evaluated.checked)
        return self._update

    def advance(self) -> StepResult:
        return self._evaluated().advance()

    def drop_gradients(self) -> None:
        """Keep the values of gradients where ``vjp`` reads them, and no graph of the extras."""
        self.graph = Graph((), retained=False)
        if self._update is None:
            return
        self._update = self._unread() or self._update
        self._update.forget_extras()

    def _without_evaluation(self) -> Linearization | None:
        """The update, from the gradient that was kept, or where it reads none."""
        if self._gradient is None:
            return self._unread()
        gradient, self._gradient = self._gradient, None
        raw = {n: g if g is None else g.detach().requires_grad_() for n, g in gradient.raw.items()}
        return self._update_of(raw, gradient.hyper)

    def _unread(self) -> Linearization | None:
        """The update with any values in the gradients' places, where it reads none of them."""
        step, number = self._parts_step, self._parts_step.first_step + self._t
        names = step.with_gradient.get(number)
        if names is None or step.grad_transform is not None:
            return None
        with torch.enable_grad():
            hyper = step.options_at(number)
        params = self._before.params
        placeholders = {name: params[name].detach().requires_grad_() for name in names}
        if step.reads_gradients(hyper, placeholders, self._before.opt):
            return None
        return self._update_of({name: placeholders.get(name) for name in params}, hyper)

    def _update_of(self, raw: Mapping[str, Tensor | None], hyper: Sequence[Hyper]) -> Linearization:
        """The update from gradients that are leaves, without loss, extras and buffers."""
        step, number = self._parts_step, self._parts_step.first_step + self._t
        state, leaves = step.on_leaves(self._before)
        zero = next(iter(state.params.values())).new_zeros(())
        graph = Graph([*leaves.values(), *present(raw).values()], retained=False)
        step.note_roots(graph, {}, hyper, raw)
        evaluated = Evaluated(zero, None, {}, {}, hyper, raw, raw, Checked(zero), graph)
        return Split(step, number, state, leaves | _as_leaves(raw), evaluated)

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
            update = self._update or self._without_evaluation() or self.evaluate()
            self.visit(update.graph)
            before, others = update.vjp(
                state_cotangent, StepCotangents(), captured, retain_graph=retain_graph
            )
        to_gradients = {path[1]: before.pop(path) for path in list(before) if path[0] == "raw"}
        hyper = update.hyper
        if not retain_graph and step.group is None:  # the gradient is not read again
            self._update = None
            del update
        through_parts, more = self._pulled_through(
            {} if step.first_order else to_gradients, outputs, captured, retain_graph, hyper
        )
        add_into(before, through_parts)
        return before, add_each(others, more)

    def gradient_vjp(
        self, cotangents: Mapping[str, Tensor], captured: Sequence[Any] = ()
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """As for ``Linearization``."""
        to_state, others = self._pulled_through(cotangents, StepCotangents(), captured, True)
        return {path[1]: c for path, c in to_state.items() if path[0] == "params"}, others

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
            shared: Mapping[str, Tensor] = {}
            if step.group is not None and not step.first_order:
                number = step.first_step + t
                shared, cotangents = step.group.pulled_back(cotangents, number, parts.weight)
            learning: list[tuple[Tensor, Tensor | None]] = []
            for loss, c in parts.losses:
                state, leaves = step.on_leaves(self._before)
                if total.buffers:
                    state = State(state.params, state.opt, total.buffers)
                scale = c
                if isinstance(c, Tensor):
                    scale = c.detach().requires_grad_(c.requires_grad)
                part = step.of_part(loss, scale)
                evaluated = part.evaluate_as_begun(state, t, [*leaves.values()], True)
                self.visit(evaluated.graph)
                with torch.enable_grad():
                    value = part.loss.total(evaluated.loss)
                total.add(evaluated, value)
                extras.append(attached_values(evaluated.attached))
                roots: list[tuple[Tensor | None, Tensor | None]]
                roots = [(evaluated.raw.get(name), v) for name, v in cotangents.items()]
                roots.append((value, outputs.loss))
                mine = {i: outputs.aux.get(count + i) for i in evaluated.attached}
                roots += [(evaluated.attached[i], v) for i, v in mine.items()]
                count += sum(1 for _ in tensors_in(evaluated.aux))
                graph = Split(part, step.first_step + t, state, leaves, evaluated)
                learns = isinstance(scale, Tensor) and scale.requires_grad
                wanted = [*captured, scale] if learns else captured
                before, others = graph.pulled(roots, wanted, retain_graph)
                if learns:
                    assert isinstance(c, Tensor)
                    learning.append((c, others.pop()))
                sums.add(before, others)
                del graph, evaluated, value, roots, mine
            if shared and isinstance(parts.weight, Tensor) and parts.weight.requires_grad:
                learning.append((parts.weight, self._flowing_to_weight(shared, total.raw)))
            self._pull_weights(learning, captured, sums)
        if hyper is not None:
            assert total.loss is not None
            apart = step.grad_transform is not None or step.group is not None
            grads = {} if apart else total.raw
            flat = [x for tensors in extras for x in tensors]
            self.again.append(step._checked(total.loss, flat, hyper, grads))
        return sums.state, sums.captured

    def _flowing_to_weight(
        self, shared: Mapping[str, Tensor], grads: Mapping[str, Tensor | None]
    ) -> Tensor:
        """What flows to the weight of this process's share: ⟨c, g − ḡ⟩ (``Group.pulled_back``)."""
        means, products = self._evaluated().raw, []
        for name, c in shared.items():
            mean, g = means[name], grads.get(name)
            assert mean is not None
            products.append((c * ((0 if g is None else g) - mean.detach()).conj()).sum().real)
        return torch.stack(products).sum()

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
        sums.add({}, vjp(pairs, captured, retain_graph=True))


class _Sums:
    """Sums of cotangents over the parts."""

    def __init__(self, captured: int) -> None:
        self._count = captured
        self._state, self._captured = Sums(), Sums()

    @property
    def state(self) -> Cotangent:
        """Those of the state."""
        return dict(self._state)

    @property
    def captured(self) -> list[Tensor | None]:
        """Those of the captured tensors."""
        return [self._captured.get(i) for i in range(self._count)]

    def add(self, state: Cotangent, captured: Iterable[Tensor | None]) -> None:
        for path, c in state.items():
            self._state.add(path, c)
        for i, g in enumerate(captured):
            if g is not None:
                self._captured.add(i, g)


def _as_leaves(raw: Mapping[str, Tensor | None]) -> Cotangent:
    return {("raw", name): g for name, g in present(raw).items()}
