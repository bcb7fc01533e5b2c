"""The inner step as compiled code: ``compile=True``.

A step and its vector-Jacobian product are each traced once, by running the eager ones under
PyTorch's tracer, and compiled. Everything that may change from one step to the next is an input:
the state, hyperparameters, the batch's tensors, random numbers, and every tensor that ``loss_fn``
and ``grad_transform`` see. The derivative itself is traced, because PyTorch does not differentiate
compiled code twice. It evaluates the loss again, so a linearization holds a state and no graph.

What the code depends on besides is its *structure* (shapes, dtypes, strides, training flags,
Python numbers that the functions see). It is kept with the model, by structure. Steps of a
structure that no code can be made for run uncompiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffopt._compile.environment import PLAIN, Environment, Same
from diffopt._compile.hyper_inputs import entries, is_input, with_hyper
from diffopt._compile.specialise import Call, Layout, Pulled, Specialisation, end_of, flat
from diffopt._compile.trace import Untraceable
from diffopt._step.generators import Generators
from diffopt._step.linearization import Linearization
from diffopt._step.observe import Observer
from diffopt._step.result import StepResult
from diffopt._step.step import InnerStep
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import add
from diffopt.optim import Optimizer
from diffopt.optim.scalars import values_unknown

#: So many structures of one model are compiled; further ones run uncompiled.
MOST_SPECIALISATIONS = 32


class CompileWarning(UserWarning):
    """Some steps of an ``unroll(..., compile=True)`` run uncompiled; the message says why."""


@dataclass
class _Compilations:
    """Everything that was compiled for one model, and the reasons given for what was not."""

    by_context: dict[Hashable, dict[Hashable, Specialisation | None]] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    count: int = 0


_COMPILATIONS: WeakKeyDictionary[nn.Module, _Compilations] = WeakKeyDictionary()


class CompiledStep(InnerStep):
    """``InnerStep``, with compiled code wherever autograd does not differentiate the step itself.

    Args:
        step: the eager step.
        generators: the random generators of the loop.
        counted: ``loss_fn`` is given the step number, not a batch.
        given: the tensors that the state stands for in the module.
    """

    def __init__(
        self,
        step: InnerStep,
        *,
        generators: Generators,
        counted: bool,
        given: Collection[Tensor],
    ) -> None:
        loss, opt, groups = step.loss, step.opt, step.groups
        super().__init__(
            loss, opt, groups, first_step=step.first_step, grad_transform=step.grad_transform
        )
        self.hooks = step.hooks
        self._eager = step
        self._generators = generators
        self._counted = counted
        model = loss.slots.model
        rules = [(type(rule), _own_attributes(rule)) for rule in dict.fromkeys(opt.rules)]
        functions = (loss.loss_fn, step.grad_transform)
        seen = Environment(model, *functions, *chain.from_iterable(rules), given=given)
        self.environment = seen.tensors
        for generator in seen.generators:
            generators.meet(generator)
        self._places = {id(x): i for i, x in enumerate(seen.tensors)}
        self._compilations = _COMPILATIONS.setdefault(model, _Compilations())
        context = (
            seen.structure,
            tuple(map(_form, seen.tensors)),
            tuple(map(tuple, groups)),
            loss.tasks,
            _arithmetic(),
        )
        self._known = self._compilations.by_context.get(context, {})
        if self._compilations.count < MOST_SPECIALISATIONS:
            self._compilations.by_context[context] = self._known
        self._numbers: dict[float, Tensor] = {}
        self._last_item: tuple[Any, Hashable, list[Tensor]] | None = None

    def of_first_order(self) -> InnerStep:
        """The uncompiled step: there the values of the gradients are wanted."""
        return self._eager.of_first_order()

    def __call__(self, state: State, t: int, observer: Observer | None = None) -> StepResult:
        """Take step ``t``: by compiled code where grad mode is off."""
        if torch.is_grad_enabled() or _transformed():
            return super().__call__(state, t, observer)
        call, specialisation = self._matched(state, t)
        if specialisation is None:
            return super().__call__(state, t, observer)
        return specialisation.run(call, specialisation.draw())

    def linearize(self, state: State, t: int, observer: Observer | None = None) -> Linearization:
        """As for ``InnerStep``, except that nothing is evaluated before it is needed."""
        if _transformed():
            return super().linearize(state, t, observer)
        call, specialisation = self._matched(state, t)
        if specialisation is None:
            return super().linearize(state, t, observer)
        return CompiledLinearization(self, state, call, specialisation)

    def eager(self, state: State, t: int, before: tuple[Tensor, ...]) -> Linearization:
        """The uncompiled linearization, with the random generators as they were ``before``."""
        with self._generators.undisturbed():
            if before:
                self._generators.set(before)
            return super().linearize(state, t)

    def generators(self) -> tuple[Tensor, ...]:
        """Where the random generators are."""
        return self._generators.get()

    def warn(self, t: int, reason: Untraceable) -> None:
        """Say, once for each reason, that steps like ``t`` run uncompiled."""
        if str(reason) in self._compilations.reasons:
            return
        self._compilations.reasons.add(str(reason))
        model = type(self.loss.slots.model).__name__
        warnings.warn(
            f"compile=True, but step {self.first_step + t} of {model} runs uncompiled: {reason}",
            CompileWarning,
            stacklevel=2,
        )

    def _matched(self, state: State, t: int) -> tuple[Call, Specialisation | None]:
        layout = Layout.of(state)
        # What several tasks share at the start they do not share after a step.
        tensors = [x.contiguous() if 0 in x.stride() else x for x in flat(state)]
        tensors = [x.detach() if x.requires_grad else x for x in tensors]
        with torch.enable_grad():  # always, as the code depends on what requires grad
            item, item_key, fixed = self._item(t)
            options = self.opt.hyperparameters(self.first_step + t)
        hyper_key, hyper = self._hyper(options)

        def bound(hyper: Sequence[Tensor], *, traced: bool) -> InnerStep:
            if traced:
                loss = self.loss.traced(item)
            else:
                loss = self.loss.of_item(self.first_step + t if self._counted else item)
            step = InnerStep(
                loss,
                with_hyper(self.opt, options, hyper),
                self.groups,
                first_step=self.first_step,
                grad_transform=self.grad_transform,
            )
            step.hooks = self.hooks
            return step

        undisturbed = self._generators.undisturbed
        call = Call(t, layout, tensors, hyper, fixed, bound, undisturbed)
        tracked = len(self.loss.buffers.tracked)  # it only grows
        forms = tuple(map(_form, tensors))
        key = layout, forms, item_key, hyper_key, tracked
        if key not in self._known:
            self._known[key] = self._specialised(call)
        specialisation = self._known[key]
        if specialisation is not None:
            self.loss.buffers.note(specialisation.tracked, specialisation.changing)
        return call, specialisation

    def _specialised(self, call: Call) -> Specialisation | None:
        try:
            if self._compilations.count >= MOST_SPECIALISATIONS:
                raise Untraceable(
                    f"{MOST_SPECIALISATIONS} kinds of step were compiled for this model, and this "
                    "is another: something that compiled code takes for granted keeps changing, "
                    "such as the shapes in a batch or a Python number that loss_fn uses"
                )
            self._compilations.count += 1
            with call.undisturbed():
                return Specialisation(call)
        except Untraceable as reason:
            self.warn(call.t, reason)
            return None

    def _item(self, t: int) -> tuple[Any, Hashable, list[Tensor]]:
        item = STEP_NUMBER if self._counted else self.loss.item_at(t)
        leaves, spec = pytree.tree_flatten(item)
        if self._last_item is None or not _same(leaves, spec, self._last_item[0]):
            fixed = list(self.environment)
            places = dict(self._places)
            key: list[Hashable] = [spec]
            for x in leaves:
                if isinstance(x, Tensor):
                    if id(x) not in places:
                        places[id(x)] = len(fixed)
                        fixed.append(x)
                    key.append((places[id(x)], _form(x)))
                else:
                    key.append((type(x), x) if isinstance(x, PLAIN) else Same(x))
            self._last_item = (leaves, spec), tuple(key), fixed
        return item, *self._last_item[1:]

    def _hyper(self, options: Sequence[Mapping[str, Any]]) -> tuple[Hashable, list[Tensor]]:
        """What code depends on among the options, and the rest of them as tensors."""
        key: list[Hashable] = []
        tensors = []
        for name, value in entries(options):
            if is_input(name, value):
                x = value if isinstance(value, Tensor) else self._number(value)
                tensors.append(x)
                key.append(_form(x))
            else:
                key.append(value)
        return tuple(key), tensors

    def _number(self, value: float) -> Tensor:
        if value not in self._numbers:
            self._numbers[value] = torch.tensor(value, dtype=torch.float64)
        return self._numbers[value]


class CompiledLinearization(Linearization):
    """A step that is evaluated again, by compiled code, when its derivative is wanted.

    It holds a state and the random numbers that were drawn. What compiled code is not there for,
    such as products with the Hessian alone, is left to the uncompiled linearization.
    """

    def __init__(
        self, step: CompiledStep, state: State, call: Call, specialisation: Specialisation
    ) -> None:
        self._compiled = step
        self._before = state
        self._call = call
        self._specialisation = specialisation
        self._generators = step.generators() if specialisation.draws else ()
        self._drawn = specialisation.draw()
        self.checked = None
        self.graph = specialisation.graph(call)

    @cached_property
    def _uncompiled(self) -> Linearization:
        return self._compiled.eager(self._before, self._call.t, self._generators)

    def __getattr__(self, name: str) -> Any:
        """The attributes of a linearization that has been evaluated."""
        return getattr(self._uncompiled, name)

    def advance(self) -> StepResult:
        """What the step gives."""
        # Copies: compiled code may change what it is given, and the derivative reads it once more.
        return self._specialisation.run(self._call, [x.clone() for x in self._drawn])

    def drop_gradients(self) -> None:
        """There are none."""

    def vjp(
        self,
        state_cotangent: Cotangent,
        loss_cotangent: Tensor | None,
        captured: Sequence[Any],
        *,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """As for ``Linearization``."""
        call = self._call
        try:
            pulled = self._specialisation.vjp(call, self._drawn, state_cotangent, loss_cotangent)
        except Untraceable as reason:
            self._compiled.warn(call.t, reason)
            return self._uncompiled.vjp(
                state_cotangent, loss_cotangent, captured, retain_graph=retain_graph
            )
        return pulled.before, self._through(pulled, captured, retain_graph)

    def _through(
        self, pulled: Pulled, captured: Sequence[Any], retain_graph: bool
    ) -> list[Tensor | None]:
        """Carry what flows to the call's tensors on to the captured ones that they are made of.

        Most are captured themselves. Not so hyperparameters that a callable computes, and batches
        that are indexed out of a tensor.
        """
        if not captured:
            return []
        ends = {end_of(x): i for i, x in enumerate(captured)}
        total: list[Tensor | None] = [None] * len(captured)
        made = []
        for given, cotangents in (
            (self._call.fixed, pulled.fixed),
            (self._call.hyper, pulled.hyper),
        ):
            for i, c in cotangents.items():
                place = ends.get(end_of(given[i]))
                if place is None:
                    made.append((given[i], c))
                else:
                    total[place] = add(total[place], c)
        if made:
            found = torch.autograd.grad(
                [x for x, _ in made],
                captured,
                [c for _, c in made],
                retain_graph=retain_graph,
                allow_unused=True,
            )
            total = [add(a, b) for a, b in zip(total, found, strict=True)]
        return total


class _StepNumber:
    """Stands for the step number while a step is traced; using it is an error."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise Untraceable(
        "loss_fn uses the step number, which would be the same in all steps once compiled: pass "
        "batches instead, such as [torch.tensor(t) for t in range(T)]"
    )


_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_CONVERSIONS = {"__hash__", "__str__", "__format__"}
for _name in {*dir(int)} - {*dir(object)} | _COMPARISONS | _CONVERSIONS:
    setattr(_StepNumber, _name, _refuse)

STEP_NUMBER = _StepNumber()

# What every optimizer has and no rule is made of.
_EVERY_OPTIMIZERS = {"defaults", "param_groups", "state"}


def _own_attributes(rule: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in vars(rule).items() if k[0] != "_" and k not in _EVERY_OPTIMIZERS}


def _form(x: Tensor) -> Hashable:
    """What compiled code takes for granted of an input."""
    return x.dtype, x.device, x.shape, x.stride(), x.requires_grad


def _same(leaves: Sequence[Any], spec: Any, before: tuple[Sequence[Any], Any]) -> bool:
    """Whether a batch is made of the very objects of the one before."""
    if spec != before[1]:
        return False
    return all(a is b for a, b in zip(leaves, before[0], strict=True))


def _transformed() -> bool:
    """Whether more is wanted of a step than its values: it is traced, batched or has tangents."""
    return values_unknown() or forward_ad._current_level >= 0


def _arithmetic() -> Hashable:
    """The settings that code is compiled for."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds),
    )
