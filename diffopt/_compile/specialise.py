"""Compiled code for the steps of one structure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diffopt._compile.environment import PLAIN
from diffopt._compile.trace import Draw, Untraceable, trace
from diffopt._step.capture import Captured, Graph, Part
from diffopt._step.result import Checked, StepResult, present
from diffopt._step.step import InnerStep
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path


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
        fixed: the tensors that the functions see, and those of the batch.
        bound: the eager step.
        undisturbed: leaves the random generators where they were.
    """

    t: int
    layout: Layout
    state: list[Tensor]
    hyper: list[Tensor]
    fixed: list[Tensor]
    bound: Bound
    undisturbed: Callable[[], AbstractContextManager[None]]

    def inputs(self) -> list[Tensor]:
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


@dataclass(frozen=True)
class Pulled:
    """What flows back through a step: to the state before, and by index to a call's tensors."""

    before: Cotangent
    fixed: dict[int, Tensor]
    hyper: dict[int, Tensor]


class Specialisation:
    """Compiled code for steps of the structure of ``call``.

    Cost: an eager step, one that is traced and the compilation; as much again at the first
    vector-Jacobian product.

    Attributes:
        parts: which of ``Call.fixed`` each part of a step's graph depends on.
        tracked: names of the buffers that derivatives flow through.
        changing: names of those that the step changes, or may change.

    Raises:
        Untraceable: there can be none.
    """

    def __init__(self, call: Call) -> None:
        self.parts = _parts(call)
        self._ends = sorted({i for part in self.parts.values() for i in part})
        self._vjps: dict[Hashable, _Vjp | str] = {}
        found: list[Any] = []

        def forward(*inputs: Tensor) -> list[Tensor]:
            before, hyper = call.parted(inputs)
            step = call.bound(hyper, traced=True)
            with torch.no_grad():
                result = step(before, call.t)
            leaves, spec = pytree.tree_flatten(result.aux)
            found[:] = result.state, leaves, spec, frozenset(step.loss.buffers.tracked)
            old = before.tensors()
            values = [_as(x, old.get(path)) for path, x in result.state.tensors().items()]
            return [*values, result.loss, *(x.detach() for x in leaves if isinstance(x, Tensor))]

        self._forward = trace(forward, call.examples())
        state, leaves, self._aux_spec, self.tracked = found
        for x in leaves:
            if not isinstance(x, (Tensor, *PLAIN)):
                raise Untraceable(
                    f"the extras that loss_fn returns hold a {type(x).__name__}: return tensors "
                    "and numbers, in tuples, lists and dicts"
                )
        self._aux = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        self._layout = Layout.of(state)
        self._after = {path: _Form.of(path, x) for path, x in state.tensors().items()}
        passed = zip(self._after, self._forward.passed, strict=False)
        self.changing = [path[1] for path, i in passed if path[0] == "buffers" and i is None]
        self._forward.compile([*call.inputs(), *self.draw()])

    @property
    def draws(self) -> list[Draw]:
        """The random numbers that a step draws."""
        return self._forward.draws

    def draw(self) -> list[Tensor]:
        """Draw them, which advances the random generators as an eager step does."""
        return [draw() for draw in self._forward.draws]

    def run(self, call: Call, drawn: Sequence[Tensor]) -> StepResult:
        """Take the step."""
        outputs = self._forward([*call.inputs(), *drawn])
        n = len(self._after)
        given = iter(outputs[n + 1 :])
        aux = [next(given) if x is _TENSOR else x for x in self._aux]
        return StepResult(
            self._layout.build(outputs[:n]),
            outputs[n],
            pytree.tree_unflatten(aux, self._aux_spec) if aux else None,
            Checked(outputs[n]),
            self.graph(call),
        )

    def graph(self, call: Call) -> Graph:
        """The tensors that the parts of a step depend on, as graphs of their own."""
        graph = Graph(())
        for part, indices in self.parts.items():
            made = call.hyper if part == "hyper" else []
            roots = (*made, *(call.fixed[i] for i in indices))
            graph.roots[part] = [x for x in roots if x.requires_grad]
        return graph

    def vjp(
        self, call: Call, drawn: Sequence[Tensor], cotangent: Cotangent, loss: Tensor | None
    ) -> Pulled:
        """Pull cotangents of the next state and of the loss back through the step.

        Raises:
            Untraceable: no code can be made for it.
        """
        # A missing cotangent of parameters or optimizer state is made zero, so that one piece of
        # code serves the last step of a loop and those before it.
        flowing = [
            path
            for path, form in self._after.items()
            if path in cotangent or (form.flows and path[0] != "buffers")
        ]
        key = loss is None, tuple(flowing)
        given = [self._after[path].fitted(cotangent.get(path)) for path in flowing]
        if loss is not None:
            given.append(loss.contiguous())
        inputs = [*call.inputs(), *given, *drawn]
        if key not in self._vjps:
            self._vjps[key] = self._vjp(call, flowing, given, inputs)
        found = self._vjps[key]
        if isinstance(found, str):
            raise Untraceable(found)
        return found(inputs)

    def _vjp(
        self, call: Call, flowing: list[Path], given: list[Tensor], inputs: list[Tensor]
    ) -> _Vjp | str:
        """Code for it, or why there is none."""
        try:
            with call.undisturbed():
                vjp = _Vjp(call, flowing, given, self._ends)
                if vjp.traced.draws != self.draws:
                    return "its derivative draws random numbers of its own"
                vjp.traced.compile(inputs)
                return vjp
        except Untraceable as reason:
            return str(reason)  # the exception would keep alive what it was raised from


class _Vjp:
    """A step's vector-Jacobian product for some cotangents, traced."""

    def __init__(
        self, call: Call, flowing: list[Path], given: Sequence[Tensor], ends: Sequence[int]
    ) -> None:
        found: list[Any] = []

        def vjp(*inputs: Tensor) -> list[Tensor]:
            before, hyper = call.parted(inputs)
            cots = inputs[len(call.inputs()) :]
            seen = [_edge(call.fixed[i]) for i in ends]
            wanted = [i for i, x in enumerate(hyper) if x.requires_grad]
            linearization = call.bound(hyper, traced=True).linearize(before, call.t)
            back, others = linearization.vjp(
                dict(zip(flowing, cots, strict=False)),
                cots[len(flowing)] if len(cots) > len(flowing) else None,
                [*seen, *(hyper[i] for i in wanted)],
                retain_graph=True,
            )
            old = before.tensors()
            fixed = _present(ends, others[: len(ends)])
            options = _present(wanted, others[len(ends) :])
            found[:] = list(back), list(fixed), list(options)
            values = [_as(c, old[path]) for path, c in back.items()]
            return [*values, *fixed.values(), *options.values()]

        with torch.no_grad():
            self.traced = trace(vjp, [*call.examples(), *(x.detach() for x in given)])
        self._before, self._fixed, self._hyper = found

    def __call__(self, inputs: Sequence[Tensor]) -> Pulled:
        outputs = iter(self.traced(inputs))
        return Pulled(
            {path: next(outputs) for path in self._before},
            {i: next(outputs) for i in self._fixed},
            {i: next(outputs) for i in self._hyper},
        )


@dataclass(frozen=True)
class _Form:
    """The memory of a state's tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    flows: bool

    @classmethod
    def of(cls, path: Path, x: Tensor) -> _Form:
        flows = x.is_floating_point() and path[-1] != "step"
        return cls(x.shape, x.stride(), x.dtype, x.device, flows)

    def fitted(self, cotangent: Tensor | None) -> Tensor:
        """The cotangent in this memory layout; None stands for zero."""
        if cotangent is not None and cotangent.stride() == self.stride:
            return cotangent
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.zero_() if cotangent is None else x.copy_(cotangent)


_TENSOR = object()  # the place of a tensor among the extras


def end_of(x: Tensor | GradientEdge) -> Hashable:
    """What a captured tensor is known by to autograd."""
    if isinstance(x, Tensor):
        if x.is_leaf:
            return x
        x = get_gradient_edge(x)
    return x.node, x.output_nr


def _edge(x: Tensor) -> Tensor | GradientEdge:
    return x if x.is_leaf else get_gradient_edge(x)


def _present(keys: Sequence[int], values: Sequence[Tensor | None]) -> dict[int, Tensor]:
    return {key: x for key, x in zip(keys, values, strict=True) if x is not None}


def _as(x: Tensor, like: Tensor | None) -> Tensor:
    """``x`` in the memory layout of ``like``, so that all steps have their states in one."""
    if like is None or x.shape != like.shape or x.stride() == like.stride():
        return x
    return torch.empty_like(like).copy_(x)


def _parts(call: Call) -> dict[Part, list[int]]:
    """Which of ``call.fixed`` each part of a step's graph ends at, found by an eager step."""
    hyper = [x.detach().requires_grad_(x.requires_grad) for x in call.hyper]
    captured = Captured()
    captured.offer(call.fixed)
    places = {end_of(x): i for i, x in enumerate(call.fixed) if x.requires_grad}
    step = call.bound(hyper, traced=False)
    linearization = step.linearize(call.layout.build(call.state), call.t)
    graph = linearization.graph

    def ends_of(roots: Iterable[Tensor]) -> list[int]:
        ends = captured.walk(roots, [*graph.own, *hyper]).captured
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
