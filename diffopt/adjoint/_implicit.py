"""Differentiate the condition that training has converged."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from diffopt import schedule
from diffopt._loop.loop import Loop
from diffopt._loop.snapshots import Snapshot
from diffopt._loop.way_back import CapturedSum
from diffopt._torch.batched import any_batched
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.adjoint._base import Adjoint, refuse_way_back
from diffopt.adjoint._solvers import CG, Product, Solution, Solver, Vector
from diffopt.schedule import Plan, check_kind


class ConvergenceWarning(RuntimeWarning):
    """An implicit derivative was taken where its conditions do not hold."""


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The derivative at a stationary point, by the implicit function theorem.

    Where training ends at θ* with ∇_θ L(θ*, φ) = 0, L being the last step's loss, that equation
    alone ties θ* to everything that L uses:

        dθ*/dφ = −H⁻¹ ∂²L/∂θ∂φ,   H = ∂²L/∂θ².

    How training got there has no influence. So nothing is delivered to the start, and nothing to
    what only the optimizer uses, its learning rate and weight decay among them: regularization
    belongs into the loss. iMAML is the loss with λ/2 ‖θ − θ₀‖² added, where θ₀ are the module's own
    parameters, captured; these then get their gradient (Rajeswaran, Finn, Kakade and Levine,
    "Meta-learning with implicit gradients", NeurIPS 2019). The system is solved by products with H
    (Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016).

    Only ``params`` of the result are differentiated, and ``grad_transform`` plays no part. The last
    loss is evaluated at the last parameters and buffers, with the random numbers of the last step.

    Args:
        solver: ``CG``, ``NormalCG`` or ``Neumann``, or a ``Solver`` of your own.
        gradient_tol: the largest norm of ∇_θ L at the end that passes for zero.
        report: called after each solve with its ``Solution``: residual, products with H, and what
            went wrong, if anything.

    Warns:
        ConvergenceWarning: in the backward pass, where the norm of ∇_θ L is above
            ``gradient_tol``, or the solver did not converge. It points to the call of ``unroll``,
            and Python shows it once for each.

    Raises:
        TypeError: ``solver`` is no ``Solver``.
        ValueError: ``gradient_tol`` is below 0; when unrolling, ``max_cotangent_norm`` or
            ``monitor`` is given.
        NotImplementedError: in the backward pass, where a gradient flows to ``losses``,
            ``aux``, ``opt_state`` or ``buffers`` of the result, or is to be differentiated again.

    Cost: one state and the graph of one step; two gradients and the solver's products with H, of
    about two gradients each, for any number of steps.
    """

    solver: Solver = field(default_factory=CG)
    gradient_tol: float = 1e-3
    report: Callable[[Solution], Any] | None = None

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "pass one such as diffopt.CG()")
        if not self.gradient_tol >= 0:
            raise ValueError(f"gradient_tol is {self.gradient_tol}: pass a number from 0 on")

    def plan(self, steps: int) -> Plan:
        """One way, with the most products with H that the solver may take, and the last graph."""
        return schedule.one_way(steps, more_work=4.0 + 2 * self.solver.most_products)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        refuse_way_back(self, loop)
        state = loop.start
        if loop.steps == 0:
            return state, None
        for t in range(loop.steps - 1):
            state = loop.pass_over(state, t)
        last = loop.rest(state, loop.steps - 1)
        generators = loop.generators.get()
        state = last.first(state, 0)
        return state, _Kept(last, Snapshot(state, generators), _Place.of_the_call())

    def backward(
        self,
        loop: Loop,
        kept: _Kept | None,
        cotangent: Cotangent,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        unused: list[Tensor | None] = [None] * len(loop.captured.tensors)
        if kept is None:
            return {}, unused
        _refuse_all_but_params(cotangent, outputs)
        if any_batched(cotangent.values()):
            raise NotImplementedError(
                "is_grads_batched=True gives Implicit many cotangents as one, but its solver "
                "decides by the values of each when to stop: call torch.autograd.grad for each"
            )
        last, snapshot = kept.last, kept.end
        # Not the last step again, which a check for that would refuse, but its loss at the end.
        linearization = last.step.linearize(last.restored(snapshot), 0)
        gradient = {n: g for n, g in linearization.raw.items() if g is not None}
        self._check_stationary(gradient.values(), kept.place)

        def product(v: Vector) -> Vector:
            cotangents, _ = linearization.gradient_vjp(dict(zip(gradient, v, strict=True)))
            return [cotangents.get(n, torch.zeros_like(x)) for n, x in gradient.items()]

        b = [cotangent.get(("params", n), torch.zeros_like(g)) for n, g in gradient.items()]
        if not any(x.any() for x in b):
            return {}, unused
        solution = self._solved(product, b, kept.place)
        x = {name: -v for name, v in zip(gradient, solution.x, strict=True)}
        with last.captured.sealed(0):
            _, to_captured = linearization.gradient_vjp(x, last.captured.edges(0))
        captured = CapturedSum(last.captured)
        captured.add(last.captured.at(0), to_captured)
        return {}, captured.total

    def _solved(self, product: Product, b: Vector, place: _Place) -> Solution:
        solution = self.solver.solve(product, b)
        if self.report is not None:
            self.report(solution)
        if solution.trouble:
            place.warn(
                f"the solver of Implicit, {self.solver!r}, {solution.trouble}. The first time its "
                f"relative residual was {solution.residual:.1e} after {solution.products} products "
                "with the Hessian; report=print shows each time's",
                kind=solution.trouble,
            )
        return solution

    def _check_stationary(self, gradient: Iterable[Tensor], place: _Place) -> None:
        norm = math.sqrt(sum(float(g.detach().square().sum()) for g in gradient))
        if not norm <= self.gradient_tol:
            place.warn(
                f"Implicit differentiates a stationary point, but the last step's inner gradient "
                f"is above gradient_tol={self.gradient_tol} at the end: its norm was {norm:.1e} "
                "the first time. Take more steps; train on all data and not on minibatches, whose "
                "gradient is not zero where that of all data is; put weight decay into the loss; "
                "or use diffopt.Segmented(), which needs no convergence",
                kind="gradient",
            )


@dataclass(frozen=True)
class _Kept:
    """The last step as a loop of its own, the state after it, and where unroll was called."""

    last: Loop
    end: Snapshot
    place: _Place


@dataclass(frozen=True)
class _Place:
    """A line of the caller's, which warnings point to: a backward pass may be on another thread.

    Attributes:
        file, line, module: where it is.
        shown: the module's register of the warnings that Python has shown.
    """

    file: str
    line: int
    module: str
    shown: dict[Any, Any] = field(repr=False, compare=False, hash=False)

    @classmethod
    def of_the_call(cls) -> _Place:
        """The line of the innermost caller outside of this package and PyTorch."""
        frame = sys._getframe()
        while frame.f_back is not None and _name(frame).split(".")[0] in ("diffopt", "torch"):
            frame = frame.f_back
        shown = frame.f_globals.setdefault("__warningregistry__", {})
        return cls(frame.f_code.co_filename, frame.f_lineno, _name(frame), shown)

    def warn(self, message: str, kind: str) -> None:
        """Warn of trouble of some kind, with the words of the first time.

        Python shows a warning of the same words once for each line.
        """
        message = _said.setdefault((self, kind), message)
        warnings.warn_explicit(
            message, ConvergenceWarning, self.file, self.line, self.module, self.shown
        )


_said: dict[tuple[_Place, str], str] = {}


def _name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _refuse_all_but_params(cotangent: Cotangent, outputs: OutputCotangents) -> None:
    refused = ["losses"] if outputs.losses is not None else []
    refused += ["aux"] if outputs.aux else []
    refused += [
        "opt_state" if path[0] == "opt" else "buffers" for path in cotangent if path[0] != "params"
    ]
    if refused:
        raise NotImplementedError(
            f"a gradient flows to {refused[0]} of the result, but Implicit() differentiates its "
            f"params only: compute the outer loss from these, or detach {refused[0]}"
        )
