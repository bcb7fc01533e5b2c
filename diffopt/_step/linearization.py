"""A step whose graph is kept: its vector-Jacobian products.

Two ways: ``Split`` differentiates the update of a known rule on its own, from the values of the
gradients, and takes what flows to these through the graph of the loss. ``Whole`` keeps the graph of
the whole step, for rules that may use more than they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diffopt._derivatives.table import refuse_missing
from diffopt._model.standing import load_again
from diffopt._step.graph import Graph
from diffopt._step.result import Checked, Evaluated, StepResult, other_extras, present
from diffopt._torch.autograd import gradient_edge
from diffopt._torch.engine import pulled_back
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, add_each
from diffopt.optim.vjp import reads_gradients, update_vjp

if TYPE_CHECKING:
    from diffopt._step.step import InnerStep

#: A tensor, or the edge of the graph where one was.
_Root = Tensor | GradientEdge | None


class Linearization(ABC):
    """A step whose gradients were evaluated with their graph kept: one step's graph is its cost.

    Attributes:
        raw: the gradients of the loss, by name, with their graph.
        grads: what the update is given: the same after ``grad_transform``.
        hyper: the hyperparameters at the step.
        checked: what is compared when the step is computed again; None where it is not known yet.
        graph: where the graph begins.
    """

    def __init__(
        self,
        step: InnerStep,
        number: int,
        state: State,
        leaves: dict[Path, Tensor],
        evaluated: Evaluated,
    ) -> None:
        self._step = step
        self._number = number
        self._state = state
        self._leaves = leaves
        self._loss = evaluated.loss
        self._buffers = evaluated.buffers
        self._aux, self._attached = evaluated.aux, evaluated.attached
        self._loaded = step.loss.slots.loaded
        self.hyper = evaluated.hyper
        self.raw = evaluated.raw
        self.grads = evaluated.grads
        self.checked: Checked | None = evaluated.checked
        self.graph = evaluated.graph
        self._token = evaluated.token

    @abstractmethod
    def advance(self) -> StepResult:
        """What the step gives, cut from the graph."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Keep no values of gradients that ``vjp`` does not read."""

    @abstractmethod
    def vjp(
        self,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Pull cotangents of the next state, of the loss and of extras back through the step.

        Args:
            captured: further tensors or gradient edges to differentiate with respect to.

        Returns:
            the cotangent of the state the step started from, and those of ``captured``, None
            where there is no influence.
        """

    def gradient_vjp(
        self, cotangents: Mapping[str, Tensor], captured: Sequence[Any] = ()
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Pull cotangents of ``raw`` back through the graph of the loss, which is kept.

        Returns:
            the product of the loss's Hessian with ``cotangents``, by parameter name, and the
            cotangents of ``captured``.
        """
        roots = [(self.raw[name], c) for name, c in cotangents.items()]
        to_leaves, others = self.pulled(roots, captured, retain_graph=True)
        return {path[1]: c for path, c in to_leaves.items() if path[0] == "params"}, others

    def forget_extras(self) -> None:
        """Keep no graph of the extras."""
        self._aux, self._attached = None, {}
        roots = {part: x for part, x in self.graph.roots.items() if part not in ("loss", "aux")}
        self.graph = Graph(self.graph.own, roots, retained=False)

    def _result(self, state: State) -> StepResult:
        assert self.checked is not None
        state, loss = state.detach(), self._loss.detach()
        return StepResult(state, loss, self._aux, self.checked, self.graph, [*self._attached])

    def _output_roots(self, outputs: StepCotangents) -> Iterator[tuple[_Root, Tensor | None]]:
        yield self._loss, outputs.loss
        for i, c in outputs.aux.items():
            if i not in self._attached:
                raise other_extras(self._number)
            yield self._attached[i], c

    def pulled(
        self,
        roots: Iterable[tuple[_Root, Tensor | None]],
        captured: Sequence[Any],
        retain_graph: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """The cotangents of the leaves and of ``captured``, from results and their cotangents."""
        pairs: list[tuple[Any, Tensor]] = [
            (x, c) for x, c in roots if c is not None and _is_connected(x)
        ]
        if self._token is not None:
            pairs.append((self._token, torch.zeros_like(self._token)))
        if not pairs:
            return {}, [None] * len(captured)
        load_again(self._step.loss.slots, self._loaded)  # for what reads the module on the way back
        try:
            pulled = pulled_back(
                [x for x, _ in pairs],
                [c for _, c in pairs],
                [*self._leaves.values(), *captured],
                retain_graph=retain_graph,
            )
        except RuntimeError as error:
            refuse_missing(error, self._number)
            raise
        to_leaves = zip(self._leaves, pulled, strict=False)
        return {p: c for p, c in to_leaves if c is not None}, list(pulled[len(self._leaves) :])


class Split(Linearization):
    """The update apart from the loss."""

    def __init__(
        self,
        step: InnerStep,
        number: int,
        state: State,
        leaves: dict[Path, Tensor],
        evaluated: Evaluated,
    ) -> None:
        super().__init__(step, number, state, leaves, evaluated)
        self._ends: Mapping[str, _Root] = evaluated.grads
        self._unread = evaluated.unread
        if self._unread:  # their shapes alone
            self.grads = {**self.grads, **{name: state.params[name] for name in self._unread}}

    def advance(self) -> StepResult:
        params = {name: x.detach() for name, x in self._state.params.items()}
        grads = {name: g if g is None else g.detach() for name, g in self.grads.items()}
        with torch.no_grad():
            new_params, new_opt = self._step.update(self.hyper, params, grads, self._state.opt)
        return self._result(State(new_params, new_opt, self._buffers))

    def drop_gradients(self) -> None:
        """Keep the graph of the gradients without their values, where ``vjp`` reads none.

        Those are as large as the parameters. ``grads`` and ``raw`` are gone then.
        """
        grads, step = present(self.grads), self._step
        if not self._unread and reads_gradients(
            step.opt,
            grads,
            self._state.opt,
            hyper=self.hyper,
            groups=step.groups,
            tasks=step.loss.tasks,
        ):
            return
        ends = {n: g for n, g in grads.items() if n not in self._unread and g.requires_grad}
        self._ends = {n: gradient_edge(g) for n, g in ends.items()}
        self.grads = {name: self._state.params[name] for name in grads}  # their shapes alone
        self.raw = {}

    def vjp(
        self,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        flowing = State.of(state_cotangent)
        update = update_vjp(
            self._step.opt,
            self._state.params,
            self.grads,
            self._state.opt,
            flowing.params,
            flowing.opt,
            hyper=self.hyper,
            groups=self._step.groups,
            tasks=self._step.loss.tasks,
            captured=captured,
            retain_graph=retain_graph,
        )
        before: Cotangent = {
            ("opt", name, key): c
            for name, entries in update.state.items()
            for key, c in entries.items()
        }
        roots: list[tuple[_Root, Tensor | None]] = []
        for name, c in update.params.items():  # autograd adds these up with what flows to the loss
            leaf = self._leaves.get(("params", name))
            if leaf is None:
                before["params", name] = c
            else:
                roots.append((leaf, c))
        roots += [(self._ends.get(name), c) for name, c in update.grads.items()]
        for name, weight in self._unread.items():
            if name in update.grads:
                roots += weight.roots(update.grads[name])
        roots += [(x, flowing.buffers.get(name)) for name, x in self._buffers.items()]
        roots += self._output_roots(outputs)
        to_leaves, others = self.pulled(roots, captured, retain_graph)
        before.update(to_leaves)
        return before, add_each(update.captured, others)


class Whole(Linearization):
    """The step as one graph."""

    def __init__(
        self,
        step: InnerStep,
        number: int,
        state: State,
        leaves: dict[Path, Tensor],
        evaluated: Evaluated,
    ) -> None:
        super().__init__(step, number, state, leaves, evaluated)
        with torch.enable_grad():
            params, opt = step.update(evaluated.hyper, state.params, evaluated.grads, state.opt)
        self.after = State(params, opt, evaluated.buffers)

    def advance(self) -> StepResult:
        return self._result(self.after)

    def drop_gradients(self) -> None:
        """Nothing: their values are part of the graph."""

    def vjp(
        self,
        state_cotangent: Cotangent,
        outputs: StepCotangents,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        after = self.after.tensors()
        roots = [(after[path], c) for path, c in state_cotangent.items()]
        return self.pulled([*roots, *self._output_roots(outputs)], captured, retain_graph)


def _is_connected(x: _Root) -> bool:
    return isinstance(x, GradientEdge) or (x is not None and x.requires_grad)
