"""One inner training step as a pure function of the state, and its derivative.

A step maps the state ``s = (params, optimizer state, buffers)`` to the next one,

    g  = grad_transform(dL(params, buffers, batch_t)/dparams)
    s' = update(params, g, optimizer state; hyperparameters at t),

and yields the loss L before the update. ``loss_fn`` sees the user's own module, holding the
values of ``s``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diffopt._derivatives.table import Evaluation, beyond_second_derivatives, refuse_missing
from diffopt._model.standing import InnerHooks, load_again
from diffopt._step.capture import Part
from diffopt._step.loss import InnerLoss
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, add
from diffopt.optim import Optimizer
from diffopt.optim.terms import Hyper, tensors_of
from diffopt.optim.vjp import reads_gradients, update_vjp

GradTransform = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

#: ``watch(part, roots, own)``: shown what a step computes, before a graph is freed. Below ``own``,
#: the step's own tensors, nothing of interest follows.
Watch = Callable[[Part, Iterable[Tensor], Iterable[Tensor]], None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gives: the next state, the loss before the update, and the user's extras."""

    state: State
    loss: Tensor
    aux: Any


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A loss at a state, and what the update is made of besides.

    Attributes:
        loss: before the update.
        aux: the user's extras.
        buffers: as the evaluation left them.
        hyper: the hyperparameters of the step, by param group.
        grads: the gradients, by parameter name; None where the loss does not depend on it.
    """

    loss: Tensor
    aux: Any
    buffers: dict[str, Tensor]
    hyper: list[Hyper]
    grads: dict[str, Tensor | None]


class InnerStep:
    """The step of one unroll, with everything but the state bound.

    Args:
        loss: the user's loss, as a function of values.
        opt: the rule; ``groups`` says which names belong to which of its param groups.
        first_step: the step number of position 0, for schedules and messages.
        grad_transform: the user's change to the inner gradients, or None.
        first_order: take each inner gradient as a constant.
    """

    def __init__(
        self,
        loss: InnerLoss,
        opt: Optimizer,
        groups: Sequence[Sequence[str]],
        *,
        first_step: int = 0,
        grad_transform: GradTransform | None = None,
        first_order: bool = False,
    ) -> None:
        self.loss = loss
        self.opt = opt
        self.groups = groups
        self.first_step = first_step
        self.grad_transform = grad_transform
        self.first_order = first_order
        self.hooks = InnerHooks()

    def of_first_order(self) -> InnerStep:
        """This step with its inner gradients taken as constants."""
        step = copy(self)
        step.first_order = True
        return step

    def later(self, by: int) -> Self:
        """This step with the positions counted from ``by`` on."""
        step = copy(self)
        step.loss = self.loss.later(by)
        step.first_step = self.first_step + by
        return step

    def __call__(self, state: State, t: int, watch: Watch | None = None) -> StepResult:
        """Take step ``t``. The result carries a graph exactly where grad mode is enabled."""
        connected = torch.is_grad_enabled()
        # An alias, so that a hook that the loss registers on a parameter stays within the step.
        params = {
            name: x.view_as(x) if connected and x.requires_grad else x.detach().requires_grad_()
            for name, x in state.params.items()
        }
        own = [*params.values(), *(x for x in state.tensors().values() if x.requires_grad)]
        with beyond_second_derivatives(connected):
            found = self.evaluate(State(params, state.opt, state.buffers), t, own, connected, watch)
        if not connected:
            params = {name: x.detach() for name, x in params.items()}
        with torch.set_grad_enabled(connected or watch is not None):
            grads = self.prepared(found, params, own, watch)
            new_params, new_opt = self.update(found.hyper, params, grads, state.opt)
            if watch is not None:
                own += [*_present(grads).values(), *tensors_of(found.hyper)]
                watch("update", _values(new_params, new_opt), own)
        new = State(new_params, new_opt, found.buffers)
        if connected:
            return StepResult(new, found.loss, found.aux)
        return StepResult(new.detach(), found.loss.detach(), found.aux)

    def evaluate(
        self,
        state: State,
        t: int,
        own: Iterable[Tensor],
        connected: bool,
        watch: Watch | None = None,
        evaluation: Evaluation | None = None,
    ) -> Evaluated:
        """The loss and its gradients, with their graph if ``connected``.

        With ``evaluation`` the gradients are wanted for their graph. If the derivative of the
        update reads no values, they need not have any.
        """
        with self.hooks, torch.enable_grad():
            with nullcontext() if evaluation is None else evaluation.of_loss():
                loss, aux, left = self.loss(state.params, state.buffers, t)
            if watch is not None:
                watch("loss", [loss, *left.values()], own)
            hyper: list[Hyper] = [*self.opt.hyperparameters(self.first_step + t)]
            if evaluation is not None:
                evaluation.unread = not self.reads_gradients(state.params, state.opt, hyper)
            grads = self._gradients(loss, state.params, t, connected, evaluation)
        return Evaluated(loss, aux, left, hyper, grads)

    def _gradients(
        self,
        loss: Tensor,
        params: Mapping[str, Tensor],
        t: int,
        connected: bool,
        evaluation: Evaluation | None,
    ) -> dict[str, Tensor | None]:
        found: Sequence[Tensor | None] = ()
        if loss.requires_grad:
            total = self.loss.total(loss)
            try:
                with nullcontext() if evaluation is None else evaluation.of_gradient(total):
                    found = torch.autograd.grad(
                        total,
                        list(params.values()),
                        create_graph=connected and not self.first_order,
                        retain_graph=connected,
                        allow_unused=True,
                    )
            except RuntimeError as error:
                refuse_missing(error, self.first_step + t)
                raise
        if all(g is None for g in found):
            raise ValueError(
                f"the loss of step {self.first_step + t} does not depend on any inner variable: "
                "compute it with the module that loss_fn is given, whose parameters are being "
                "trained, and do not detach it"
            )
        return dict(zip(params, found, strict=True))

    def reads_gradients(
        self,
        given: Mapping[str, Tensor],
        opt_state: Mapping[str, Mapping[str, Tensor]],
        hyper: Sequence[Hyper],
    ) -> bool:
        """Whether the derivative of the update reads the gradients of the parameters given."""
        return reads_gradients(self.opt, given, opt_state, hyper=hyper, groups=self.groups)

    def prepared(
        self,
        found: Evaluated,
        params: Mapping[str, Tensor],
        own: Iterable[Tensor] = (),
        watch: Watch | None = None,
    ) -> Mapping[str, Tensor | None]:
        """The gradients as the update is given them."""
        grads = self._transformed(found.grads, params)
        if watch is not None:
            own, raw = list(own), _present(found.grads).values()
            watch("gradient", raw, own)
            changed = () if self.grad_transform is None else _present(grads).values()
            watch("transform", changed, [*own, *raw])
            watch("hyper", tensors_of(found.hyper), own)
        return grads

    def _transformed(
        self, grads: Mapping[str, Tensor | None], params: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor | None]:
        if self.grad_transform is None:
            return grads
        changed = self.loss.transform_grads(self.grad_transform, _present(grads))
        return _checked_grads(changed, params)

    def update(
        self,
        hyper: Sequence[Hyper],
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        opt_state: Mapping[str, Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Apply the rule."""
        new, opt = self.opt.update(params, grads, opt_state, hyper=hyper, groups=self.groups)
        return self.loss.precision.rounded(new, grads), opt

    def differentiable(self, state: State) -> dict[Path, Tensor]:
        """The tensors of ``state`` that derivatives flow through.

        Of the buffers only those that were computed with gradients, or given requiring grad: for
        running statistics there is nothing to carry back.
        """
        return {
            path: x
            for path, x in state.differentiable().items()
            if path[0] != "buffers" or path[1] in self.loss.buffers.tracked
        }

    def linearize(
        self, state: State, t: int, watch: Watch | None = None, *, values: bool = True
    ) -> Linearization:
        """Evaluate the gradients of step ``t`` and keep their graph, for vector-Jacobian products.

        Args:
            watch: shown all but the update: see ``Linearization.advance`` for that.
            values: False where ``vjp`` alone is going to be called. What it does not read is left
                out then.
        """
        leaves = {
            path: x.detach().requires_grad_()
            for path, x in self.differentiable(state).items()
            if path[0] != "opt"
        }
        state = state.replace(leaves)
        own = leaves.values()
        evaluation = None if values or self.grad_transform is not None else Evaluation()
        found = self.evaluate(state, t, own, True, watch, evaluation)
        with torch.enable_grad():
            grads = self.prepared(found, state.params, own, watch)
        linearization = Linearization(self, self.first_step + t, state, leaves, found, grads)
        if not values:
            linearization.drop_gradients()
        return linearization


class Linearization:
    """A step whose gradients were evaluated with their graph kept: one step's graph is its cost.

    Its derivative has two parts. The update of the optimizer is differentiated on its own, from
    the values of the gradients; what flows to them goes back through the graph of the loss, which
    is differentiated a second time.

    Attributes:
        inner_grads: the gradients of the loss, by name, with their graph.
        grads: what the update is given: the same after ``grad_transform``.
        hyper: the hyperparameters at the step.
    """

    def __init__(
        self,
        step: InnerStep,
        number: int,
        state: State,
        leaves: dict[Path, Tensor],
        found: Evaluated,
        grads: Mapping[str, Tensor | None],
    ) -> None:
        self._step = step
        self._number = number
        self._state = state
        self._leaves = leaves
        self._loss = found.loss
        self.hyper: Sequence[Hyper] = found.hyper
        self.inner_grads: Mapping[str, Tensor | None] = found.grads
        self.grads = grads
        self._ends: Mapping[str, Tensor | GradientEdge | None] = grads
        self._buffers = found.buffers
        self._aux = found.aux
        self._loaded = step.loss.slots.loaded

    def advance(self, watch: Watch | None = None) -> StepResult:
        """What the step gives, cut from the graph. ``watch`` is shown the graph of the update."""
        params = {name: x.detach() for name, x in self._state.params.items()}
        grads = {name: g if g is None else g.detach() for name, g in self.grads.items()}
        with torch.set_grad_enabled(watch is not None):
            new_params, new_opt = self._step.update(self.hyper, params, grads, self._state.opt)
            if watch is not None:
                watch("update", _values(new_params, new_opt), tensors_of(self.hyper))
        new = State(new_params, new_opt, self._buffers)
        return StepResult(new.detach(), self._loss.detach(), self._aux)

    def drop_gradients(self) -> None:
        """Keep the graph of the gradients without their values, where ``vjp`` reads none.

        Those are as large as the parameters. ``grads`` and ``inner_grads`` are gone then.
        """
        present = _present(self.grads)
        if self._step.reads_gradients(present, self._state.opt, self.hyper):
            return
        self._ends = {n: get_gradient_edge(g) for n, g in present.items() if g.requires_grad}
        self.grads = {name: self._state.params[name] for name in present}  # their shapes alone
        self.inner_grads = {}

    def vjp(
        self,
        state_cotangent: Cotangent,
        loss_cotangent: Tensor | None,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Pull cotangents of the next state and of the loss back through the step.

        Args:
            captured: further tensors or gradient edges to differentiate with respect to.

        Returns:
            the cotangent of the state the step started from, and those of ``captured``, None
            where there is no influence.
        """
        by_kind: dict[str, dict[Any, Any]] = {"params": {}, "buffers": {}, "opt": {}}
        for (kind, name, *key), c in state_cotangent.items():
            if kind == "opt":
                by_kind[kind].setdefault(name, {})[key[0]] = c
            else:
                by_kind[kind][name] = c
        update = update_vjp(
            self._step.opt,
            self._state.params,
            self.grads,
            self._state.opt,
            by_kind["params"],
            by_kind["opt"],
            hyper=self.hyper,
            groups=self._step.groups,
            seen=captured,
            retain_graph=retain_graph,
        )
        before: Cotangent = {("params", name): c for name, c in update.params.items()}
        for name, entries in update.state.items():
            before.update({("opt", name, key): c for key, c in entries.items()})
        candidates: list[tuple[Tensor | GradientEdge | None, Tensor | None]] = [
            (self._ends.get(name), c) for name, c in update.grads.items()
        ]
        candidates += [(x, by_kind["buffers"].get(name)) for name, x in self._buffers.items()]
        candidates += [(self._loss, loss_cotangent)]
        found, seen = self._pulled(candidates, captured, retain_graph)
        for path, c in found.items():
            total = add(before.get(path), c)
            assert total is not None
            before[path] = total
        return before, [add(a, b) for a, b in zip(update.seen, seen, strict=True)]

    def gradient_vjp(
        self, cotangents: Mapping[str, Tensor], captured: Sequence[Any] = ()
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Pull cotangents of ``inner_grads`` back through the graph of the loss, which is kept.

        Returns:
            the product of the loss's Hessian with ``cotangents``, by parameter name, and the
            cotangents of ``captured``.
        """
        candidates = [(self.inner_grads[name], c) for name, c in cotangents.items()]
        found, seen = self._pulled(candidates, captured, retain_graph=True)
        return {path[1]: c for path, c in found.items() if path[0] == "params"}, seen

    def _pulled(
        self,
        candidates: Iterable[tuple[Tensor | GradientEdge | None, Tensor | None]],
        captured: Sequence[Any],
        retain_graph: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """The cotangents of the leaves and of ``captured``, from results and their cotangents."""
        pairs: list[tuple[Any, Tensor]] = [
            (x, c) for x, c in candidates if c is not None and _is_connected(x)
        ]
        if not pairs:
            return {}, [None] * len(captured)
        load_again(self._step.loss.slots, self._loaded)  # for what reads the module on the way back
        try:
            found = torch.autograd.grad(
                [x for x, _ in pairs],
                [*self._leaves.values(), *captured],
                [c for _, c in pairs],
                retain_graph=retain_graph,
                allow_unused=True,
            )
        except RuntimeError as error:
            refuse_missing(error, self._number)
            raise
        cotangents = zip(self._leaves, found, strict=False)
        return {p: c for p, c in cotangents if c is not None}, list(found[len(self._leaves) :])


def _present(grads: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: g for name, g in grads.items() if g is not None}


def _is_connected(x: Tensor | GradientEdge | None) -> bool:
    return isinstance(x, GradientEdge) or (x is not None and x.requires_grad)


def _values(params: Mapping[str, Tensor], opt: Mapping[str, Mapping[str, Tensor]]) -> list[Tensor]:
    return [*params.values(), *(x for entries in opt.values() for x in entries.values())]


def _checked_grads(
    grads: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> Mapping[str, Tensor | None]:
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"grad_transform returned a {type(grads).__name__}: it has to return a dict of "
            "gradients by parameter name, as it was given"
        )
    for name, g in grads.items():
        if name not in params:
            raise ValueError(
                f"grad_transform returned a gradient for {name!r}, which is not an inner "
                f"variable: keep the names it was given"
            )
        if g is not None and not isinstance(g, Tensor):
            raise TypeError(
                f"grad_transform returned a {type(g).__name__} for {name!r}: return a tensor, or "
                "leave the name out where the parameter is to stay as it is"
            )
        if g is not None and g.shape != params[name].shape:
            raise ValueError(
                f"grad_transform returned a gradient of shape {tuple(g.shape)} for {name!r}, "
                f"which has shape {tuple(params[name].shape)}: keep the shapes it was given"
            )
    return grads
