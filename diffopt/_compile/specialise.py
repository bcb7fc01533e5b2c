"""Compiled code for the steps of one structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffopt._compile.environment import PLAIN
from diffopt._compile.trace import Draw, Untraceable, trace
from diffopt._loop.way_back import clip_norm
from diffopt._step.capture import Captured
from diffopt._step.generators import Generators
from diffopt._step.graph import Graph, Part, end_of, leaf_or_edge
from diffopt._step.observe import Observer
from diffopt._step.result import Checked, StepResult, present
from diffopt._step.step import InnerStep
from diffopt._torch.pytree import tree_flatten, tree_unflatten
from diffopt._values.outputs import StepCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, is_differentiable


@dataclass(frozen=True)
class Layout:
    """The names in a state: they make a list of tensors of it, and the other way round."""

    params: tuple[str, ...]
    opt: tuple[tuple[str, tuple[str, ...]], ...]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, state: State) -> Layout:
        opt = tuple((name, tuple(entries)) for name, entries in state.opt.items())
        return cls(tuple(state.params), opt, tuple(state.buffers))

    def paths(self) -> list[Path]:
        """The path of each tensor in the list."""
        return [
            *(("params", name) for name in self.params),
            *(("opt", name, key) for name, keys in self.opt for key in keys),
            *(("buffers", name) for name in self.buffers),
        ]

    def build(self, tensors: Iterable[Tensor]) -> State:
        """The state of these tensors."""
        given = iter(tensors)
        return State(
            {name: next(given) for name in self.params},
            {name: {key: next(given) for key in keys} for name, keys in self.opt},
            {name: next(given) for name in self.buffers},
        )


def flat(state: State) -> list[Tensor]:
    """The tensors of a state, in the order of its layout."""
    tensors = list(state.params.values())
    for entries in state.opt.values():
        tensors += entries.values()
    tensors += state.buffers.values()
    return tensors


class Bound(Protocol):
    """Makes the eager step of a call, with tensors in the place of its hyperparameters."""

    def __call__(self, hyper: Sequence[Tensor], *, traced: bool) -> InnerStep: ...


@dataclass(frozen=True)
class Call:
    """One step with its inputs.

    Attributes:
        t: the position in the loop.
        layout, state: the state before the step, as a list of tensors.
        hyper: the tensors that the optimizer's options consist of.
        constant: which of them are the same in all steps, as no schedule computes them.
        fixed: the tensors that the functions see, and those of the batch.
        shared: how many of them are not the batch's alone.
        bound: the eager step.
        undisturbed: leaves the random generators where they were.
    """

    t: int
    layout: Layout
    state: list[Tensor]
    hyper: list[Tensor]
    constant: Sequence[bool]
    fixed: list[Tensor]
    shared: int
    bound: Bound
    undisturbed: Callable[[], AbstractContextManager[None]]

    @property
    def count(self) -> int:
        """How many inputs there are."""
        return len(self.state) + len(self.hyper) + len(self.fixed)

    def inputs(self) -> list[Tensor]:
        """All of them, in order."""
        return [*self.state, *self.hyper, *self.fixed]

    def examples(self) -> list[Tensor]:
        """The inputs, told apart: a tracer knows a tensor by its identity.

        Those of the batch and the environment stay the objects that the functions will use.
        """
        return [*(x.detach() for x in (*self.state, *self.hyper)), *self.fixed]

    def parted(self, inputs: Sequence[Tensor]) -> tuple[State, list[Tensor]]:
        """State and hyperparameters among inputs; as leaves, where the call's require grad."""
        n = len(self.state)
        hyper = [
            x.detach().requires_grad_() if given.requires_grad else x
            for x, given in zip(inputs[n:], self.hyper, strict=False)
        ]
        return self.layout.build(inputs[:n]), hyper


#: What flows back through steps: the cotangent of the state before them, and pairs of a tensor that
#: they use and what flows to it.
Pulled = tuple[Cotangent, list[tuple[Tensor, Tensor]]]


class Specialisation:
    """The steps of the structure of ``call``, traced; compiled where they are run one by one.

    Cost: an eager step and one that is traced; as much again at the first vector-Jacobian product.

    Attributes:
        traced: the step, from inputs and random numbers to the next state, the loss and the extras.
        layout, after: names and memory of the next state.
        ends: which of ``Call.fixed`` derivatives flow to.
        parts: which of ``Call.fixed`` each part of a step's graph depends on.
        tracked: names of the buffers that derivatives flow through.
        changing: names of those that the step changes, or may change.
        attached: which of the tensors of the extras derivatives flow to.

    Raises:
        Untraceable: there can be none.
    """

    def __init__(self, call: Call) -> None:
        self.parts = _parts(call)
        self.ends = sorted({i for part in self.parts.values() for i in part})
        self._vjps: dict[Flowing, Vjp | str] = {}
        found: list[Any] = []

        def forward(*inputs: Tensor) -> list[Tensor]:
            before, hyper = call.parted(inputs)
            step = call.bound(hyper, traced=True)
            with torch.no_grad():
                result = step(before, call.t)
            leaves, spec = tree_flatten(result.aux)
            found[:] = result.state, leaves, spec, frozenset(step.loss.buffers.tracked)
            old = before.tensors()
            values = [_as(x, old.get(path)) for path, x in result.state.tensors().items()]
            return [*values, result.loss, *(x.detach() for x in leaves if isinstance(x, Tensor))]

        self.traced = trace(forward, call.examples())
        state, leaves, self._aux_spec, self.tracked = found
        for x in leaves:
            if not isinstance(x, (Tensor, *PLAIN)):
                raise Untraceable(
                    f"the extras that loss_fn returns hold a {type(x).__name__}: return tensors "
                    "and numbers, in tuples, lists and dicts"
                )
        self.attached = _attached(leaves)
        self._aux = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        self.layout = Layout.of(state)
        self.after = {path: Form.of(path, x) for path, x in state.tensors().items()}
        passed = zip(self.after, self.traced.passed, strict=False)
        self.changing = [path[1] for path, i in passed if path[0] == "buffers" and i is None]

    @property
    def draws(self) -> list[Draw]:
        """The random numbers that a step draws."""
        return self.traced.draws

    def draw(self) -> list[Tensor]:
        """Draw them, which advances the random generators as an eager step does."""
        return [draw() for draw in self.traced.draws]

    def extras(self, tensors: Sequence[Tensor]) -> Any:
        """What the user returned beside the loss, of its tensors."""
        if not self._aux:
            return None
        given = iter(tensors)
        leaves = [next(given) if x is _TENSOR else x for x in self._aux]
        return tree_unflatten(leaves, self._aux_spec)

    def run(self, call: Call, drawn: Sequence[Tensor]) -> StepResult:
        """Take the step.

        Raises:
            Untraceable: it cannot be compiled.
        """
        outputs = self.traced([*call.inputs(), *drawn])
        n = len(self.after)
        return StepResult(
            self.layout.build(outputs[:n]),
            outputs[n],
            self.extras(outputs[n + 1 :]),
            Checked(outputs[n]),
            self.graph(call.fixed, call.hyper),
            self.attached,
        )

    def graph(self, fixed: Sequence[Tensor], hyper: Sequence[Tensor]) -> Graph:
        """The tensors that the parts of a step depend on, as graphs of their own."""
        graph = Graph(())
        for part, indices in self.parts.items():
            made = hyper if part == "hyper" else ()
            roots = (*made, *(fixed[i] for i in indices))
            graph.roots[part] = [x for x in roots if x.requires_grad]
        return graph

    def flowing(self, cotangent: Cotangent) -> list[Path]:
        """The paths of the cotangents that code is made for.

        A missing one of parameters or optimizer state is made zero, so that one piece of code
        serves the last step of a loop and those before it.
        """
        return [
            path
            for path, form in self.after.items()
            if path in cotangent or (form.flows and path[0] != "buffers")
        ]

    def fitted(self, flowing: Iterable[Path], cotangent: Cotangent) -> list[Tensor]:
        """The cotangents at some paths, in the memory layout of the state."""
        return [self.after[path].fitted(cotangent.get(path)) for path in flowing]

    def vjp(
        self, call: Call, drawn: Sequence[Tensor], cotangent: Cotangent, outputs: StepCotangents
    ) -> Pulled:
        """Pull cotangents of the next state, of the loss and of extras back through the step.

        Raises:
            Untraceable: no code can be made for it.
        """
        if not outputs.aux.keys() <= {*self.attached}:
            raise Untraceable("what something flows back to is not among its extras")
        state = tuple(self.flowing(cotangent))
        flowing = Flowing(state, outputs.loss is not None, tuple(outputs.aux))
        given = self.fitted(state, cotangent)
        given += [c.contiguous() for c in outputs.tensors()]
        if flowing not in self._vjps:
            self._vjps[flowing] = self._vjp(call, flowing, given)
        found = self._vjps[flowing]
        if isinstance(found, str):
            raise Untraceable(found)
        return found(call, given, drawn)

    def _vjp(self, call: Call, flowing: Flowing, given: list[Tensor]) -> Vjp | str:
        """Code for it, or why there is none."""
        try:
            return Vjp(self, call, flowing, given)
        except Untraceable as reason:
            return str(reason)  # the exception would keep alive what it was raised from


@dataclass(frozen=True)
class Flowing:
    """What cotangents flow back to: some of the state, the loss or not, some of the extras.

    Attributes:
        bounded: a bound of the norm of the parameters' part comes after them.
    """

    state: tuple[Path, ...]
    loss: bool
    aux: tuple[int, ...]
    bounded: bool = False

    def parted(
        self, cotangents: Sequence[Tensor], tasks: int | None
    ) -> tuple[Cotangent, StepCotangents]:
        """The cotangents, which are in the order of the attributes."""
        given = iter(cotangents)
        state = {path: next(given) for path in self.state}
        loss = next(given) if self.loss else None
        outputs = StepCotangents(loss, {i: next(given) for i in self.aux})
        params = {path: c for path, c in state.items() if path[0] == "params"}
        if self.bounded and params:
            scaled = clip_norm([*params.values()], next(given), tasks)
            state |= dict(zip(params, scaled, strict=True))
        return state, outputs


class Vjp:
    """A step's vector-Jacobian product for some cotangents, traced.

    Attributes:
        traced: from inputs, cotangents and random numbers to what flows to ``before``, ``fixed``
            and ``hyper``.
        before: paths in the state before the step.
        fixed, hyper: indices among the call's.

    Raises:
        Untraceable: it cannot be traced.
    """

    def __init__(
        self, step: Specialisation, call: Call, flowing: Flowing, given: Sequence[Tensor]
    ) -> None:
        found: list[Any] = []
        ends = step.ends

        def vjp(*inputs: Tensor) -> list[Tensor]:
            before, hyper = call.parted(inputs)
            bound = call.bound(hyper, traced=True)
            state, outputs = flowing.parted(inputs[call.count :], bound.loss.tasks)
            seen = [leaf_or_edge(call.fixed[i]) for i in ends]
            wanted = [i for i, x in enumerate(hyper) if x.requires_grad]
            linearization = bound.linearize(before, call.t)
            back, others = linearization.vjp(
                state,
                outputs,
                [*seen, *(hyper[i] for i in wanted)],
                retain_graph=True,
            )
            old = before.tensors()
            fixed = _present(ends, others[: len(ends)])
            options = _present(wanted, others[len(ends) :])
            found[:] = list(back), list(fixed), list(options)
            values = [_as(c, old[path]) for path, c in back.items()]
            return [*values, *fixed.values(), *options.values()]

        with torch.no_grad(), call.undisturbed():
            self.traced = trace(vjp, [*call.examples(), *(x.detach() for x in given)])
        if self.traced.draws != step.draws:
            raise Untraceable("its derivative draws random numbers of its own")
        self.before: list[Path]
        self.fixed: list[int]
        self.hyper: list[int]
        self.before, self.fixed, self.hyper = found

    def __call__(self, call: Call, given: Sequence[Tensor], drawn: Sequence[Tensor]) -> Pulled:
        outputs = iter(self.traced([*call.inputs(), *given, *drawn]))
        before = {path: next(outputs) for path in self.before}
        pairs = [(call.fixed[i], next(outputs)) for i in self.fixed]
        pairs += [(call.hyper[i], next(outputs)) for i in self.hyper]
        return before, pairs


@dataclass(frozen=True)
class Form:
    """The memory of a state's tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    flows: bool

    @classmethod
    def of(cls, path: Path, x: Tensor) -> Form:
        flows = x.is_floating_point() and path[-1] != "step"
        return cls(x.shape, x.stride(), x.dtype, x.device, flows)

    def fits(self, x: Tensor) -> bool:
        """Whether ``x`` is such a tensor."""
        mine = self.shape, self.stride, self.dtype, self.device
        return mine == (x.shape, x.stride(), x.dtype, x.device)

    def fitted(self, cotangent: Tensor | None) -> Tensor:
        """The cotangent in this memory layout; None stands for zero."""
        if cotangent is not None and cotangent.stride() == self.stride:
            return cotangent
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.zero_() if cotangent is None else x.copy_(cotangent)


_TENSOR = object()  # the place of a tensor among the extras


def _present(keys: Sequence[int], values: Sequence[Tensor | None]) -> dict[int, Tensor]:
    return {key: x for key, x in zip(keys, values, strict=True) if x is not None}


def _as(x: Tensor, like: Tensor | None) -> Tensor:
    """``x`` in the memory layout of ``like``, so that all steps have their states in one."""
    if like is None or x.shape != like.shape or x.stride() == like.stride():
        return x
    return torch.empty_like(like).copy_(x)


def _attached(leaves: Iterable[Any]) -> list[int]:
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return [i for i, x in enumerate(tensors) if x.requires_grad and is_differentiable(x)]


def _parts(call: Call) -> dict[Part, list[int]]:
    """Which of ``call.fixed`` each part of a step's graph ends at, found by an eager step."""
    hyper = [x.detach().requires_grad_(x.requires_grad) for x in call.hyper]
    captured = Captured()
    captured.offer(call.fixed)
    places = {end_of(x): i for i, x in enumerate(call.fixed) if x.requires_grad}
    step = call.bound(hyper, traced=False)
    # It knows the leaves that the step makes itself.
    observer = Observer(Generators(()), {}, {}, _moved)
    linearization = step.linearize(call.layout.build(call.state), call.t, observer)
    graph = linearization.graph

    def ends_of(roots: Iterable[Tensor]) -> list[int]:
        ends = captured.walk(roots, [*graph.own, *hyper], observer=observer).captured
        if any(end not in places for end in ends):
            raise Untraceable(
                "it uses a tensor that requires grad and was not found by looking through what "
                "loss_fn and grad_transform see: pass it inside the batch"
            )
        return sorted(places[end] for end in ends)

    parts = {part: ends_of(roots) for part, roots in graph.roots.items()}
    if not {*ends_of(present(linearization.raw).values())} <= {*parts["loss"]}:
        raise Untraceable("the gradient of the loss depends on a tensor that the loss does not")
    return parts


def _moved(name: str, value: Tensor, step: int) -> None:
    raise Untraceable(f"it changes the parameter {name!r} in place")
