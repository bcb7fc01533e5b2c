"""Take the inner gradients as constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from diffopt import schedule
from diffopt._loop.executor import run_backward
from diffopt._loop.loop import Loop
from diffopt._loop.snapshots import Snapshots
from diffopt._loop.store import Store
from diffopt._loop.way_back import clip_norm
from diffopt._step.linearization import Linearization
from diffopt._torch.batched import not_batched
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path, vjp
from diffopt.adjoint._base import Checkpoints, Replayed
from diffopt.optim.lists import one_by_one
from diffopt.schedule import Plan


@dataclass(frozen=True)
class FirstOrder(Replayed):
    """First-order MAML: every inner gradient is taken as a constant.

    What is left of a step's derivative is the update rule's own: for gradient descent without
    weight decay the identity, so that the gradient at the result becomes the gradient of the start
    (Finn, Abbeel and Levine, "Model-agnostic meta-learning", ICML 2017, section 5.2). Learning
    rates and other hyperparameters of the optimizer still get the gradient that the rule gives
    them, and what ``grad_transform`` uses too; ``losses`` and ``aux`` of the result are
    differentiated as ever. What only the loss uses gets nothing through the weights. Approximate,
    by the terms with second derivatives of the loss.

    No second-order graph is built. Where only the weights learn, and the rule is linear in the
    weights, as every rule is without coupled weight decay, one state is kept, and of each step the
    few nodes of the update's graph, without a tensor. Otherwise states are kept as ``Segmented``
    does. Where the way back shows that states are needed, because the gradient of ``losses`` or
    ``aux`` is wanted, the steps are computed once more.

    Cost: one evaluation a step and its update twice; with states, as ``Segmented``, at a gradient
    less for each step.
    """

    def plan(self, steps: int) -> Plan:
        """``Segmented``'s plan: an upper bound, where only the weights learn."""
        return schedule.segmented(steps)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        loop = loop.first_order()
        plan = self.plan(loop.steps)
        wanted = set(_saves(plan))
        store = Store(Snapshots())
        chain = _Chain(loop)
        generators, state = loop.generators.get(), loop.start
        for t in range(loop.steps):
            if t == 0 or (t in wanted and not chain.suffices):
                store.snapshots[t] = loop.snapshot(state)
            linearization, state = loop.first_recorded(state, t)
            chain.extend(linearization, t)
            del linearization
        chain.finish()
        return state, _Checkpoints(plan, generators, store, loop, chain)

    def backward(
        self,
        loop: Loop,
        kept: _Checkpoints,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        if kept.chain.suffices and not outputs:
            return kept.chain.vjp(cotangent, keep), [None] * len(kept.loop.captured.tensors)
        with not_batched():
            _complete(kept)
        return run_backward(kept.loop, kept.plan, kept.store, cotangent, outputs, keep=keep)


def _saves(plan: Plan) -> list[int]:
    """The states that the plan saves in the first pass, by position."""
    return [action.start for action in plan.forward_actions if action.kind == "save"]


@dataclass(frozen=True)
class _Checkpoints(Checkpoints):
    """As in ``Checkpointed``, with the graph of the updates; the loop is the one of first order."""

    chain: _Chain


def _complete(first: _Checkpoints) -> None:
    """Save the states that the plan saves in the first pass and that were not."""
    loop, store = first.loop, first.store
    missing = [t for t in _saves(first.plan) if t not in store.snapshots]
    if not missing:
        return
    state = loop.restored(store.snapshots[0])
    for t in range(missing[-1]):
        state = loop.again(state, t)
        if t + 1 in missing:
            store.snapshots[t + 1] = loop.snapshot(state)


class _Chain:
    """The graph of the updates alone, from the start on, for as long as it holds no tensors.

    The gradients in it are constants. Where the update is linear in what it hands on, autograd has
    nothing to save for its derivative but numbers, and the chain takes the place of the states.

    Attributes:
        suffices: whether it is the whole derivative of the steps so far, losses apart.
    """

    def __init__(self, loop: Loop) -> None:
        self.suffices = loop.monitor is None  # which is shown every step
        self._loop = loop
        self._leaves: dict[Path, Tensor] = {
            path: loop.start.tensors()[path].detach().requires_grad_()
            for path, x in loop.inputs.items()
            if path[0] == "params" or x.requires_grad
        }
        self._state = loop.start.replace(self._leaves)
        self._ends: dict[Path, GradientEdge] = {}

    def extend(self, linearization: Linearization, t: int) -> None:
        """Add the update of a step that was just taken."""
        if not self.suffices:
            return
        loop, sizes = self._loop, [0]  # of what autograd saves

        def packed(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        gradients = {n: None if g is None else g.detach() for n, g in linearization.grads.items()}
        with torch.enable_grad(), one_by_one(), saved_tensors_hooks(packed, lambda x: x):
            params, opt = loop.step.update(
                linearization.hyper, self._state.params, gradients, self._state.opt
            )
            bounded = _bounded(params, loop.max_cotangent_norm, loop.tasks)
        self._state = State(bounded, opt, self._state.buffers)
        learned = loop.captured.used_after_loss(t) or loop.step.loss.buffers.tracked
        self.suffices = not learned and max(sizes) <= 1  # single numbers do not count
        if not self.suffices:
            self._leaves, self._state = {}, loop.start

    def finish(self) -> None:
        """Keep the ends of the graph only, not the values there."""
        self._ends = {
            path: get_gradient_edge(x)
            for path, x in self._state.tensors().items()
            if x.requires_grad
        }
        self._state = self._loop.start

    def vjp(self, cotangent: Cotangent, keep: bool) -> Cotangent:
        """The cotangent of the start."""
        pairs = [(end, cotangent[path]) for path, end in self._ends.items() if path in cotangent]
        cotangents = vjp(pairs, list(self._leaves.values()), retain_graph=keep)
        return {p: c for p, c in zip(self._leaves, cotangents, strict=True) if c is not None}


def _bounded(
    params: Mapping[str, Tensor], max_norm: float | None, tasks: int | None
) -> Mapping[str, Tensor]:
    """``params``, with a bound on what flows back to ``params`` in a first backward pass."""
    if max_norm is None:
        return params
    clipped = _ClipCotangent.apply((max_norm, tasks), *params.values())  # type: ignore[no-untyped-call]
    return dict(zip(params, clipped, strict=True))


class _ClipCotangent(torch.autograd.Function):
    """The identity; its backward bounds the joint norm of what flows back."""

    @staticmethod
    def forward(ctx: Any, bound: tuple[float, int | None], *tensors: Tensor) -> Any:
        ctx.bound = bound
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return (None, *clip_norm(cotangents, *ctx.bound))
