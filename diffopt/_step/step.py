"""One inner training step as a pure function of the state.

A step maps the state ``s = (params, optimizer state, buffers)`` to the next one,

    g  = grad_transform(dL(params, buffers, batch_t)/dparams)
    s' = update(params, g, optimizer state; hyperparameters at t),

and yields the loss L before the update. ``loss_fn`` sees the user's own module, holding the
values of ``s``. Its derivative is a ``Linearization``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._derivatives.table import beyond_second_derivatives, refuse_missing
from diffopt._model.standing import InnerHooks
from diffopt._step.graph import Graph, comes_to
from diffopt._step.group import Group
from diffopt._step.linearization import Linearization, Split, Whole
from diffopt._step.loss import InnerLoss
from diffopt._step.observe import Observer
from diffopt._step.result import (
    Checked,
    Evaluated,
    StepResult,
    norms_of,
    present,
    small,
)
from diffopt._step.transform import (
    GradTransform,
    arguments_of,
    check_transformed,
    given_to_transform,
)
from diffopt._step.unread import Unread, is_large, left_out, unread
from diffopt._torch.autograd import in_forward_mode, present_sequence
from diffopt._torch.collectives import no_collectives
from diffopt._torch.engine import gradient
from diffopt._values.outputs import attached
from diffopt._values.state import State
from diffopt._values.tree import Path, is_differentiable
from diffopt.optim import Optimizer
from diffopt.optim.mapped import update_over_tasks
from diffopt.optim.options import is_scheduled
from diffopt.optim.terms import Hyper, tensors_of
from diffopt.optim.vjp import is_known, reads_gradients

_NOTHING = nullcontext()


class InnerStep:
    """The step of one unroll, with everything but the state bound.

    Args:
        loss: the user's loss, as a function of values.
        opt: the rule; ``groups`` says which names belong to which of its param groups.
        first_step: the step number of position 0, for schedules and messages.
        grad_transform: the user's change to the inner gradients, or None.
        first_order: take each inner gradient as a constant.
        group: the processes that take the step together, over which its gradients are averaged.

    Attributes:
        only_gradient: whether it is there for its loss and the gradient of that alone.
    """

    only_gradient = False

    def __init__(
        self,
        loss: InnerLoss,
        opt: Optimizer,
        groups: Sequence[Sequence[str]],
        *,
        first_step: int = 0,
        grad_transform: GradTransform | None = None,
        first_order: bool = False,
        group: Group | None = None,
    ) -> None:
        self.group = group
        self.loss = loss
        self.opt = opt
        self.groups = groups
        self.first_step = first_step
        self.grad_transform = grad_transform
        self.first_order = first_order
        self.hooks = InnerHooks()
        self._takes_model = grad_transform is not None and arguments_of(grad_transform) == 3
        self._called = [
            (i, key)
            for i, (rule, group) in enumerate(zip(opt.rules, opt.param_groups, strict=True))
            for key in rule.defaults
            if is_scheduled(group[key])
        ]
        self._constants: Sequence[Hyper] | None = None
        self._has_large: bool | None = None  # whether any parameter is a large matrix
        self._is_pure = opt.is_pure and all(rule.is_pure for rule in opt.rules)

    def of_first_order(self) -> InnerStep:
        """This step with its inner gradients taken as constants."""
        step = copy(self)
        step.first_order = True
        return step

    def session(self, standing: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Where steps are taken, of the context in which values may stand in the module."""
        return standing

    def later(self, by: int) -> Self:
        """This step with the positions counted from ``by`` on."""
        step = copy(self)
        step.loss = self.loss.later(by)
        step.first_step = self.first_step + by
        return step

    def __call__(self, state: State, t: int, observer: Observer | None = None) -> StepResult:
        """Take step ``t``. The result carries a graph exactly where grad mode is enabled."""
        connected = torch.is_grad_enabled()
        # An alias, so that a hook that the loss registers on a parameter stays within the step.
        params = {
            name: x.view_as(x) if connected and x.requires_grad else x.detach().requires_grad_()
            for name, x in state.params.items()
        }
        own = list(params.values())
        if connected:
            own += [x for x in state.each() if x.requires_grad]
        values = state.params
        state = State(params, state.opt, state.buffers)
        with beyond_second_derivatives(connected):
            evaluated = self.evaluate(state, t, own, connected, observer)
        grads = evaluated.grads
        if not connected:
            params = {n: x.detach() if x.requires_grad else x for n, x in values.items()}
            grads = {
                n: g.detach() if g is not None and g.requires_grad else g for n, g in grads.items()
            }
        # A pure rule uses its arguments alone, by operations that are not replaced.
        within = _NOTHING if self._is_pure else observer or self.hooks.within
        shown = within is observer and not self.is_known(evaluated.hyper)
        with torch.set_grad_enabled(connected or shown), within:
            new_params, new_opt = self.update(evaluated.hyper, params, grads, state.opt)
        new = State(new_params, new_opt, evaluated.buffers)
        if shown:
            evaluated.graph.roots["update"] = _learning(new.tensors().values())
        checked = self._with_update(evaluated.checked, new)
        if connected:
            return StepResult(
                new, evaluated.loss, evaluated.aux, checked, evaluated.graph, [*evaluated.attached]
            )
        new, loss = new.detach(), evaluated.loss.detach()
        return StepResult(new, loss, evaluated.aux, checked, evaluated.graph, [*evaluated.attached])

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
        """The loss and its gradients, with their graph if ``connected``.

        Args:
            values: whether those of the gradients are read, and not their derivative alone.
        """
        if self.group is not None:
            self.group.at(self.first_step + t)
        if observer is not None:
            observer.begin(self.first_step + t, own, present_sequence())
        return self.evaluate_as_begun(state, t, own, connected, observer, values=values)

    def evaluate_as_begun(
        self,
        state: State,
        t: int,
        own: Sequence[Tensor],
        connected: bool,
        observer: Observer | None = None,
        *,
        values: bool = True,
    ) -> Evaluated:
        """``evaluate``, of a step that ``observer`` has been told of."""
        number, within = self.first_step + t, observer or _NOTHING
        used: Mapping[int, Tensor] = {}
        token = None
        since = present_sequence()
        with self.hooks, torch.enable_grad(), no_collectives():
            loss, aux, left = self.loss(state.params, state.buffers, t, within)
            if any(x.is_leaf and x.grad is not None for x in state.params.values()):
                raise RuntimeError(
                    f"the loss of step {number} was differentiated into .grad, as where loss_fn "
                    "calls loss.backward(): leave that out and return the loss, whose gradient "
                    "diffopt.unroll takes itself"
                )
            hyper = () if self.only_gradient else self.options_at(number, within)
            if observer is not None:
                tensors = tensors_of(hyper)
                observer.see(tensors)
                observer.refuse_duals([loss, *tensors])
                observer.begin_gradient()
            idle: dict[str, Unread] = {}
            if not values and connected and self._may_leave_out(state, hyper):
                idle = unread(loss, state.params, since)
            raw = self._gradients(loss, state.params, number, connected, within, idle)
            if observer is not None:
                used = observer.end_gradient()
        if self.group is not None:
            raw, token = self._averaged(raw, state.params, number, connected)
        leaves: Sequence[Tensor] = ()
        grads: Mapping[str, Tensor | None] = raw
        if self.grad_transform is not None:
            with self.hooks, torch.enable_grad(), no_collectives(), within:
                leaves, offered = given_to_transform(raw, connected)
                if observer is not None:
                    observer.transforms(offered)
                grads = self._transformed(offered, state.params, left, t)
        graph = Graph([*own, *leaves], in_gradient=[*used.values()])
        graph.roots["loss"] = [loss, *_learning(left.values())]
        outputs = attached(aux)
        self.note_roots(graph, outputs, hyper, grads)
        checked = self._checked(loss, outputs.values(), hyper, grads, idle.values())
        return Evaluated(loss, aux, outputs, left, hyper, raw, grads, checked, graph, token, idle)

    def _may_leave_out(self, state: State, hyper: Sequence[Hyper]) -> bool:
        """Whether nothing reads the values of large gradients, or changes them by a hook."""
        if self._has_large is None:
            self._has_large = any(map(is_large, state.params.values()))
        return (
            self._has_large
            and self.loss.tasks is None
            and not self.first_order
            and self.group is None
            and self.grad_transform is None
            and not self.hooks.registered
            and not self.hooks.recomputes
            and self.is_known(hyper)
            and not reads_gradients(
                self.opt, state.params, state.opt, hyper=hyper, groups=self.groups
            )
        )

    def note_roots(
        self,
        graph: Graph,
        outputs: Mapping[int, Tensor],
        hyper: Sequence[Hyper],
        grads: Mapping[str, Tensor | None],
    ) -> None:
        """Note where the parts of a step's graph beside the loss begin."""
        if outputs:
            graph.roots["aux"] = [*outputs.values()]
        graph.roots["hyper"] = _learning(tensors_of(hyper))
        if self.grad_transform is not None:
            graph.roots["transform"] = _learning(present(grads).values())

    def options_at(
        self, number: int, within: AbstractContextManager[Any] = _NOTHING
    ) -> Sequence[Hyper]:
        """The hyperparameters of a step, for which callables are called ``within``."""
        if self._called or not self._is_pure:
            with within:
                return [*self.opt.hyperparameters(number)]
        if self._constants is None:  # a change to them is an error: `UnchangedOptions`
            self._constants = self.opt.hyperparameters(number)
        return self._constants

    def _gradients(
        self,
        loss: Tensor,
        params: Mapping[str, Tensor],
        number: int,
        connected: bool,
        within: AbstractContextManager[Any],
        idle: dict[str, Unread],
    ) -> dict[str, Tensor | None]:
        """The gradient of the loss, but of ``idle``, from which goes what could not be left out."""
        wanted: Sequence[str] = [*params]
        if idle:
            wanted = [name for name in params if name not in idle]
        raw: dict[str, Tensor | None] = dict.fromkeys(params)
        if loss.requires_grad:
            try:
                total = self.loss.total(loss)
                with within, left_out(idle.values()) if idle else _NOTHING:
                    self._differentiate(total, params, wanted, connected, raw)
                    if idle:
                        wanted = [name for name, weight in idle.items() if not weight.is_complete]
                        for name in wanted:  # no gradient was taken on the way to it
                            del idle[name]
                        self._differentiate(total, params, wanted, connected, raw)
            except RuntimeError as error:
                refuse_missing(error, number)
                if "backward through the graph a second time" in str(error):
                    raise RuntimeError(
                        f"the graph of the loss of step {number} was freed before its gradient was "
                        "taken, as where loss_fn calls loss.backward(): leave that out and return "
                        "the loss, whose gradient diffopt.unroll takes itself"
                    ) from error
                raise
        if not self.only_gradient and not idle:
            self.check_gradient(raw, number)
        return raw

    def _differentiate(
        self,
        total: Tensor,
        params: Mapping[str, Tensor],
        wanted: Sequence[str],
        connected: bool,
        raw: dict[str, Tensor | None],
    ) -> None:
        """Put the gradient of ``total`` by the parameters ``wanted`` into ``raw``."""
        if wanted:
            grads = gradient(
                total,
                [params[name] for name in wanted],
                create_graph=connected and not self.first_order,
                # A transform may take gradients of what the loss has computed.
                retain_graph=connected or self.grad_transform is not None,
            )
            raw.update(zip(wanted, grads, strict=True))

    def check_gradient(self, raw: Mapping[str, Tensor | None], number: int) -> None:
        """Raise where the loss of step ``number`` has no gradient."""
        if all(g is None for g in raw.values()):
            raise ValueError(
                f"the loss of step {number} does not depend on any inner variable: compute it "
                "with the module that loss_fn is given, whose parameters are being trained, and "
                "do not detach it"
            )

    def _averaged(
        self,
        grads: Mapping[str, Tensor | None],
        params: Mapping[str, Tensor],
        number: int,
        connected: bool,
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """``Group.averaged``, with a graph where one is wanted."""
        assert self.group is not None
        own = next(iter(params.values())) if connected and not self.first_order else None
        with torch.set_grad_enabled(own is not None):
            averaged = self.group.averaged(grads, number, own, weight=self.share_at(number))
        return averaged.grads, averaged.token

    def share_at(self, number: int) -> float | Tensor | None:
        """The weight of this process's share of a step's batch; None: gradients are added up."""
        return 1.0

    def _transformed(
        self,
        offered: dict[str, Tensor],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
    ) -> Mapping[str, Tensor | None]:
        """The gradients as the update is given them."""
        assert self.grad_transform is not None
        shards = self.loss.slots.shards
        if shards is not None:
            offered = shards.standing(offered)
        if self._takes_model:
            changed = self.loss.transform_with_model(
                self.grad_transform, offered, params, buffers, t
            )
            if any(x.is_leaf and x.grad is not None for x in params.values()):
                raise RuntimeError(
                    f"grad_transform differentiated into .grad at step {self.first_step + t}, as "
                    "where it calls loss.backward(), which keeps no graph: take the gradient with "
                    "torch.autograd.grad(loss, parameters, create_graph=True)"
                )
        else:
            changed = self.loss.transform_grads(self.grad_transform, offered)
        if shards is not None and isinstance(changed, Mapping):
            changed = shards.parts(changed, "grad_transform's gradient of {name}")
        return check_transformed(changed, params)

    @property
    def kind(self) -> Any:
        """Equal for steps that keep the same of what they compute."""
        return type(self)

    def is_known(self, hyper: Sequence[Hyper]) -> bool:
        """Whether the rule is a function of its arguments alone, whose derivative is known."""
        return self._is_pure or is_known(self.opt, hyper, self.loss.tasks)

    def _checked(
        self,
        loss: Tensor,
        outputs: Collection[Tensor],
        hyper: Sequence[Hyper],
        grads: Mapping[str, Tensor | None],
        idle: Collection[Unread] = (),
    ) -> Checked:
        # The sum over parts is compared, not the part; of dual numbers, norms cannot be taken.
        if self.only_gradient or in_forward_mode():
            return Checked(loss.detach())
        with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
            compared = [*grads.values(), *(w.shadow for w in idle)] if idle else grads.values()
            return Checked(
                loss.detach(),
                [small(hyper[i][key]) for i, key in self._called] if self._called else (),
                norms_of(compared, of_shadows=True),
                norms_of(outputs) if outputs else (),
            )

    def _with_update(self, checked: Checked, after: State) -> Checked:
        """The norms of the new parameters as well, where the rule may use what nobody can see."""
        if self._is_pure:
            return checked
        with torch.no_grad():
            return replace(checked, grads=(*checked.grads, *norms_of(after.params.values())))

    def update(
        self,
        hyper: Sequence[Hyper],
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        opt_state: Mapping[str, Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Apply the rule."""
        new, opt = update_over_tasks(
            self.opt, self.loss.tasks, params, grads, opt_state, hyper=hyper, groups=self.groups
        )
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
        self, state: State, t: int, observer: Observer | None = None, *, values: bool = True
    ) -> Linearization:
        """Evaluate step ``t`` and keep its graph, for vector-Jacobian products.

        Args:
            values: whether anything but ``Linearization.vjp`` is wanted.
        """
        state, leaves = self.on_leaves(state)
        since = present_sequence()
        evaluated = self.evaluate(state, t, [*leaves.values()], True, observer, values=values)
        return self.linearized(state, t, leaves, evaluated, since, observer)

    def on_leaves(self, state: State) -> tuple[State, dict[Path, Tensor]]:
        """``state`` with leaves in it to differentiate with respect to, the optimizer's apart."""
        leaves: dict[Path, Tensor] = {}
        params, buffers = dict(state.params), dict(state.buffers)
        for name, x in params.items():
            if is_differentiable(x):
                leaves["params", name] = params[name] = _leaf(x)
        for name, x in state.buffers.items() if self.loss.buffers.tracked else ():
            if name in self.loss.buffers.tracked and is_differentiable(x):
                leaves["buffers", name] = buffers[name] = _leaf(x)
        return State(params, state.opt, buffers), leaves

    def linearized(
        self,
        state: State,
        t: int,
        leaves: dict[Path, Tensor],
        evaluated: Evaluated,
        since: int,
        observer: Observer | None,
    ) -> Linearization:
        """The linearization of an evaluation, whose nodes are numbered from ``since`` on."""
        number, own = self.first_step + t, list(leaves.values())
        known = self.is_known(evaluated.hyper)
        if known and not comes_to(evaluated.graph.roots["hyper"], own, since):
            return Split(self, number, state, leaves, evaluated)
        flowing = self.differentiable(State({}, state.opt, {}))
        opt = {path: _leaf(x) for path, x in flowing.items()}
        evaluated.graph.own = [*evaluated.graph.own, *opt.values()]
        with observer or self.hooks.within:
            whole = Whole(self, number, state.replace(opt), leaves | opt, evaluated)
        whole.checked = self._with_update(evaluated.checked, whole.after)
        if not known:
            evaluated.graph.roots["update"] = _learning(whole.after.tensors().values())
        return whole


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _learning(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.requires_grad]
