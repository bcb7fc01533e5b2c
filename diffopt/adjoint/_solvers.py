"""Solvers for H x = b, where H is known by its products with vectors: for ``Implicit``.

A vector is a list of tensors. H is a Hessian, hence symmetric; whether it is positive definite
depends on the inner problem. Each product with it costs about two gradients of the inner loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from diffopt.schedule import check_int

Vector = list[Tensor]
Product = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: the approximate solution.
        residual: its relative residual, ‖b − A x‖ / ‖b‖, with A = H + damping · I.
        products: how many products with H were taken.
        trouble: why the solution is not to be trusted, or "".
    """

    x: Vector = field(repr=False)
    residual: float
    products: int
    trouble: str = ""


class Solver(ABC):
    """How ``Implicit`` solves its linear system. A subclass is a solver of your own.

    Its vectors are lists of tensors, one for each inner parameter that the loss depends on, of the
    parameter's shape and device. H is symmetric.
    """

    @abstractmethod
    def solve(self, product: Product, b: Vector) -> Solution:
        """Solve H x = b. ``product(v)`` is H v; ``b`` is not zero.

        A ``Solution`` whose ``trouble`` says something is used all the same, after a
        ``ConvergenceWarning`` that quotes it.
        """

    @property
    @abstractmethod
    def most_products(self) -> int:
        """The most products with H that ``solve`` takes."""


@dataclass(frozen=True)
class _ConjugateGradients(Solver):
    """What both ways of conjugate gradients are told."""

    max_steps: int = 100
    tol: float = 1e-5
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_int("max_steps", self.max_steps, 1, "write max_steps=100")
        for name, value in (("tol", self.tol), ("damping", self.damping)):
            _check_number(name, value)
            if not value >= 0:
                raise ValueError(f"{name} is {value}, but must be at least 0: write {name}=1e-5")

    def _damped(self, product: Product, v: Vector) -> Vector:
        """(H + damping · I) v."""
        return _plus(product(v), self.damping, v)

    @property
    def _unfinished(self) -> str:
        return f"did not reach tol={self.tol} within max_steps={self.max_steps}"


@dataclass(frozen=True)
class CG(_ConjugateGradients):
    """The conjugate gradient method, for a Hessian that is positive definite.

    Solves (H + damping · I) x = b (Hestenes and Stiefel, 1952; Nocedal and Wright, "Numerical
    Optimization", algorithm 5.2). Rajeswaran et al., "Meta-learning with implicit gradients"
    (NeurIPS 2019), use five steps of it.

    Args:
        max_steps: stop after so many steps, each of one product with H.
        tol: stop at this relative residual.
        damping: added to the diagonal of H, which makes the solution a different one.

    Raises:
        TypeError, ValueError: a value is not of its kind, or out of its range.
    """

    @property
    def most_products(self) -> int:
        return self.max_steps

    def solve(self, product: Product, b: Vector) -> Solution:
        size = _norm(b)
        x: Vector = [0 * v for v in b]
        r = p = b
        rho = _dot(r, r)
        trouble = ""
        steps = 0
        while math.sqrt(rho) > self.tol * size:
            if steps == self.max_steps:
                trouble = self._unfinished
                break
            q = self._damped(product, p)
            steps += 1
            curvature = _dot(p, q)
            if not curvature > 0:
                trouble = (
                    "met a direction without positive curvature, as the Hessian is not positive "
                    "definite: use NormalCG, or damping"
                )
                break
            alpha = rho / curvature
            x = _plus(x, alpha, p)
            r = _plus(r, -alpha, q)
            rho, previous = _dot(r, r), rho
            p = _plus(r, rho / previous, p)
        return Solution(x, math.sqrt(rho) / size, steps, trouble)


@dataclass(frozen=True)
class NormalCG(_ConjugateGradients):
    """Conjugate gradients on the normal equations A² x = A b, with A = H + damping · I.

    For a Hessian that may be indefinite, at twice the products a step, and with the square of its
    condition number (Nocedal and Wright, "Numerical Optimization", section 5.1).

    Args:
        max_steps: stop after so many steps, each of two products with H.
        tol: stop at this relative residual of A x = b.
        damping: added to the diagonal of H.

    Raises:
        TypeError, ValueError: a value is not of its kind, or out of its range.
    """

    @property
    def most_products(self) -> int:
        return 2 * self.max_steps + 1

    def solve(self, product: Product, b: Vector) -> Solution:
        size = _norm(b)
        x: Vector = [0 * v for v in b]
        r = b
        s = p = self._damped(product, r)
        gamma, left = _dot(s, s), size
        trouble = ""
        steps = 0
        while left > self.tol * size:
            if steps == self.max_steps or gamma == 0:
                trouble = self._unfinished
                break
            q = self._damped(product, p)
            steps += 1
            alpha = gamma / _dot(q, q)
            x = _plus(x, alpha, p)
            r = _plus(r, -alpha, q)
            left = _norm(r)
            s = self._damped(product, r)
            gamma, previous = _dot(s, s), gamma
            p = _plus(s, gamma / previous, p)
        return Solution(x, left / size, 2 * steps + 1, trouble)


@dataclass(frozen=True)
class Neumann(Solver):
    """The truncated Neumann series, x = scale · Σ (I − scale · H)^i b over i = 0, ..., terms − 1.

    It converges where all eigenvalues of H lie between 0 and 2 / scale, and leaves the directions
    of small curvature out, which regularizes (Lorraine, Vicol and Duvenaud, "Optimizing millions of
    hyperparameters by implicit differentiation", AISTATS 2020). With ``scale`` the learning rate,
    it is what backpropagation through ``terms`` steps of gradient descent at the solution gives.

    Args:
        terms: how many, each of one product with H.
        scale: the step size.

    Raises:
        TypeError, ValueError: a value is not of its kind, or out of its range.
    """

    terms: int = 20
    scale: float = 0.1

    def __post_init__(self) -> None:
        check_int("terms", self.terms, 1, "write terms=20")
        _check_number("scale", self.scale)
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}, but must be above 0: write scale=0.1")

    @property
    def most_products(self) -> int:
        return self.terms

    def solve(self, product: Product, b: Vector) -> Solution:
        x: Vector = [0 * v for v in b]
        v = b  # (I − scale · H)^i b, which is also the residual of the first i terms
        for _ in range(self.terms):
            x = _plus(x, self.scale, v)
            v = _plus(v, -self.scale, product(v))
        residual = _norm(v) / _norm(b)
        trouble = "" if residual < 1 else "diverges: write a smaller scale"
        return Solution(x, residual, self.terms, trouble)


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def _norm(a: Vector) -> float:
    return math.sqrt(_dot(a, a))


def _plus(a: Vector, factor: float, b: Vector) -> Vector:
    """a + factor · b."""
    return [x.add(y, alpha=factor) for x, y in zip(a, b, strict=True)] if factor else a


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise TypeError(f"{name} is {value!r}, of type {kind}, but must be a number")
