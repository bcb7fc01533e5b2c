"""The inner steps as compiled code: ``compile=True``.

A step and its vector-Jacobian product are each traced once, by running the eager ones under
PyTorch's tracer, and compiled as loops over steps. Everything that may change from one step to the
next is an input: the state, hyperparameters, the batch's tensors, random numbers, and every tensor
that ``loss_fn`` and ``grad_transform`` see. The derivative itself is traced, because PyTorch does
not differentiate compiled code twice. It evaluates the loss again, so what is held of a step is a
state and no graph.

What the code depends on besides is its *structure* (shapes, dtypes, strides, training flags,
Python numbers that the functions see). It is kept with the model, by structure. Steps of a
structure that no code can be made for run uncompiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffopt._compile.block import CompiledBlock, CompiledLinearization
from diffopt._compile.code import Code
from diffopt._compile.environment import Environment, methods_of
from diffopt._compile.hyper_inputs import with_hyper
from diffopt._compile.late import Late
from diffopt._compile.specialise import Call, Layout, Specialisation, flat
from diffopt._compile.step_inputs import ManyInputs, Reader, StepInputs, form_of, nbytes
from diffopt._compile.steps import Steps
from diffopt._compile.trace import Untraceable
from diffopt._derivatives.table import with_second_derivatives
from diffopt._step.generators import Generators
from diffopt._step.linearization import Linearization
from diffopt._step.observe import Observer
from diffopt._step.result import Checked, StepResult, small
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import in_forward_mode
from diffopt._torch.inductor import operations_are_watched
from diffopt._values.state import State
from diffopt.optim import Optimizer
from diffopt.optim.scalars import values_unknown

#: So many structures of one model are compiled; further ones run uncompiled.
MOST_SPECIALISATIONS = 32

#: One loop takes so many steps at most that their batches, which are put side by side, take so many
#: bytes.
MOST_BYTES = 1 << 26


class CompileWarning(UserWarning):
    """Some steps of an ``unroll(..., compile=True)`` run uncompiled; the message says why."""


@dataclass
class _Compilations:
    """Everything that was compiled for one model, and the reasons given for what was not."""

    by_context: dict[Hashable, dict[Hashable, Code | None]] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    count: int = 0


_COMPILATIONS: WeakKeyDictionary[nn.Module, _Compilations] = WeakKeyDictionary()


class CompiledStep(InnerStep):
    """``InnerStep``, with compiled code wherever autograd does not differentiate the step itself.

    Args:
        step: the eager step.
        generators: the random generators of the loop.
        counted: ``loss_fn`` is given the step number, not a batch.
        indexed: batches are made when they are asked for.
        given: the tensors that the state stands for in the module.
    """

    def __init__(
        self,
        step: InnerStep,
        *,
        generators: Generators,
        counted: bool,
        indexed: bool,
        given: Collection[Tensor],
    ) -> None:
        self.__dict__.update(step.__dict__)
        loss, opt, groups = step.loss, step.opt, step.groups
        self._eager = step
        self._generators = generators
        self._counted = counted
        model = loss.slots.model
        rules = list(dict.fromkeys(opt.rules))
        of_rules = [(type(rule), _own_attributes(rule), *methods_of(rule)) for rule in rules]
        functions = (loss.loss_fn, step.grad_transform)
        seen = Environment(model, *functions, *chain.from_iterable(of_rules), given=given)
        self.environment = seen.tensors
        for generator in seen.generators:
            generators.meet(generator)
        inner = {id(x) for x in loss.slots.inner.values()}
        self._originals = {i for i, x in enumerate(seen.tensors) if id(x) in inner}
        places = {id(x): i for i, x in enumerate(seen.tensors)}
        self._reader = Reader(step, places, counted=counted, indexed=indexed)
        self._compilations = _COMPILATIONS.setdefault(model, _Compilations())
        context = (
            seen.structure,
            tuple(map(form_of, seen.tensors)),
            tuple(map(tuple, groups)),
            loss.tasks,
            _arithmetic(),
        )
        self._known = self._compilations.by_context.get(context, {})
        self._context = context
        self.scheduled = self._reader.scheduled
        self._module = Late()
        if self.scheduled or indexed:  # what the user's functions may look at
            self._module.enter()

    def of_first_order(self) -> InnerStep:
        """The uncompiled step: there the values of the gradients are wanted."""
        self._module.enter()
        return self._eager.of_first_order()

    def session(self, standing: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """As for ``InnerStep``, but entered only when a step is traced or runs uncompiled."""
        return self._module.of(standing)

    def later(self, by: int) -> Self:
        """As for ``InnerStep``."""
        step = super().later(by)
        step._reader = self._reader.of(step)
        return step

    def __call__(self, state: State, t: int, observer: Observer | None = None) -> StepResult:
        """Take step ``t``: by compiled code where grad mode is off."""
        if torch.is_grad_enabled() or _transformed():
            self._module.enter()
            return super().__call__(state, t, observer)
        given = self._reader.at(t, observer)
        call, code = self._matched(state, t, given)
        if code is None:
            self._module.enter()
            return super().__call__(state, t, observer)
        generators = self._generators.get() if code.step.draws else ()
        try:
            result = code.run(call, given, code.step.draw())
        except Untraceable as reason:
            self.warn(t, reason)
            return self.eager(state, t, generators).advance()
        return result

    def linearize(
        self, state: State, t: int, observer: Observer | None = None, *, values: bool = True
    ) -> Linearization:
        """As for ``InnerStep``, except that nothing is evaluated before it is needed."""
        if _transformed():
            self._module.enter()
            return super().linearize(state, t, observer, values=values)
        given = self._reader.at(t, observer)
        call, code = self._matched(state, t, given)
        if code is None:
            self._module.enter()
            return super().linearize(state, t, observer, values=values)
        generators = self._generators.get() if code.step.draws else ()
        return CompiledLinearization(self, code, call, given, generators, code.step.draw())

    def together(
        self, state: State, start: int, stop: int, *, keep: bool, observer: Observer | None = None
    ) -> CompiledBlock | None:
        """Take some of the steps from ``start`` on, ``stop`` at most, in one compiled loop."""
        if torch.is_grad_enabled() or _transformed():
            return None
        first = self._reader.at(start, observer)
        call, code = self._matched(state, start, first)
        if code is None:
            return None
        most = code.most(call, keep=keep)
        if most is not None:
            stop = min(stop, start + most)
        many = None if code.step.draws else self._reader.many(first, start, stop, MOST_BYTES)
        if many is None:
            steps, before = self._gathered(code.step, call, first, stop, observer)
        else:
            steps, before = Steps(call, many, [()] * len(many)), [self._generators.get()]
        block = code.block(steps, keep=keep)
        if block is None:
            self._generators.set(before[0])
            return None
        return CompiledBlock(self, code, block, before)

    def _gathered(
        self,
        code: Specialisation,
        call: Call,
        first: StepInputs,
        stop: int,
        observer: Observer | None,
    ) -> tuple[Steps, list[tuple[Tensor, ...]]]:
        """The steps that are like the first, looked at one by one, and where generators were."""
        before = [self._generators.get()]
        each, drawn, taken = [first], [code.draw()], 0
        for t in range(call.t + 1, stop):
            given = self._reader.at(t, observer)
            if given.batch is not each[-1].batch:
                taken += nbytes(given.batch)
            if given.key is not first.key or taken > MOST_BYTES:
                break
            if code.draws:
                before.append(self._generators.get())
            each.append(given)
            drawn.append(code.draw())
        return Steps(call, ManyInputs(each), drawn), before

    def eager(self, state: State, t: int, before: tuple[Tensor, ...]) -> Linearization:
        """The uncompiled linearization, with the random generators as they were ``before``."""
        self._module.enter()
        with self._generators.undisturbed(), with_second_derivatives:
            if before:
                self._generators.set(before)
            return super().linearize(state, t)

    def generators(self) -> tuple[Tensor, ...]:
        """Where the random generators are."""
        return self._generators.get()

    def checked(self, loss: Tensor, given: StepInputs) -> Checked:
        """What a step has to give again: its loss, and what schedules gave for it."""
        return Checked(loss, [small(given.options[i][key]) for i, key in self._called])

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

    def call(self, state: State, t: int, given: StepInputs) -> Call:
        """Step ``t`` with its inputs."""
        tensors = list(map(_regular, flat(state)))
        tensors = [x.detach() if x.requires_grad else x for x in tensors]

        def bound(hyper: Sequence[Tensor], *, traced: bool) -> InnerStep:
            if traced:
                loss = self.loss.traced(given.item)
            else:
                loss = self.loss.of_item(self.first_step + t if self._counted else given.item)
            step = InnerStep(
                loss,
                with_hyper(self.opt, given.options, hyper),
                self.groups,
                first_step=self.first_step,
                grad_transform=self.grad_transform,
            )
            step.hooks = self.hooks
            return step

        return Call(
            t,
            Layout.of(state),
            tensors,
            given.hyper,
            given.constant,
            [*self.environment, *given.batch],
            len(self.environment),
            bound,
            self._undisturbed,
        )

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Where steps are traced."""
        self._module.enter()
        return self._generators.undisturbed()

    def _matched(self, state: State, t: int, given: StepInputs) -> tuple[Call, Code | None]:
        call = self.call(state, t, given)
        forms = tuple(map(form_of, call.state))
        tracked = len(self.loss.buffers.tracked)  # it only grows
        key = call.layout, forms, given.key, tracked
        code = self._known.get(key, _UNKNOWN)
        if code is _UNKNOWN:
            code = self._known[key] = self._made(call, given)
        if code is not None and not self._originals.isdisjoint(code.step.ends):
            code = None  # an uncompiled step is refused
        if code is not None:
            self.loss.buffers.note(code.step.tracked, code.step.changing)
        return call, code

    def _made(self, call: Call, given: StepInputs) -> Code | None:
        try:
            if self._compilations.count >= MOST_SPECIALISATIONS:
                raise Untraceable(
                    f"{MOST_SPECIALISATIONS} kinds of step were compiled for this model, and this "
                    "is another: something that compiled code takes for granted keeps changing, "
                    "such as the shapes in a batch or a Python number that loss_fn uses"
                )
            self._compilations.count += 1
            self._compilations.by_context[self._context] = self._known
            with call.undisturbed():
                return Code(call, given)
        except Untraceable as reason:
            self.warn(call.t, reason)
            return None


_UNKNOWN: Any = object()


def _regular(x: Tensor) -> Tensor:
    """A tensor of the state in the memory layout that it has after other steps."""
    if 0 in x.stride():  # what several tasks share at the start they do not share after a step
        return x.clone(memory_format=torch.contiguous_format)
    if 1 in x.shape and x.is_contiguous():  # whatever the strides of dimensions of size 1 are
        return x.view(-1).view(x.shape)
    return x


# What every optimizer has and no rule is made of.
_EVERY_OPTIMIZERS = {"defaults", "param_groups", "state"}


def _own_attributes(rule: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in vars(rule).items() if k[0] != "_" and k not in _EVERY_OPTIMIZERS}


def _transformed() -> bool:
    """Whether more is wanted of a step than its values: it is traced, batched or has tangents."""
    return values_unknown() or in_forward_mode() or operations_are_watched()


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
