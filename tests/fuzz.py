"""A differential fuzzer: random training problems, by ``diffopt`` and by a loop of its own.

A case is a number: it seeds every choice. The reference shares no code with diffopt, nor with the
other oracles of these tests: a plain loop that keeps every graph, with the optimizers' formulas
written out, and batch normalization by hand (PyTorch's third derivative of it is wrong). A case is
*pure* where a step is a function of what PyTorch sees; then the results have to be equal. Where it
is impure by construction, an error is the other allowed outcome.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from observed import CHANGED, HOLDERS, Guard
from oracle import entries, standing
from torch import Tensor, nn

import diffopt

DOUBLE = torch.double
TOLERANCE = 1e-8
#: What an error of an impure case may be.
REFUSALS = (RuntimeError, ValueError, NotImplementedError, TypeError)

ADJOINTS: list[diffopt.Adjoint] = [
    diffopt.StoreAll(),
    diffopt.Segmented(1),
    diffopt.Segmented(2),
    diffopt.Segmented(3),
    diffopt.Segmented(),
    diffopt.Segmented(2, storage="cpu"),
    diffopt.Binomial(1),
    diffopt.Binomial(2),
    diffopt.Binomial(3),
    diffopt.MemoryBudget("1GiB"),
    diffopt.MemoryBudget("16MiB"),
]

#: A deliberate fault of the reference, for the test that the fuzzer can fail.
Fault = str | None
FAULTS = ("scaled", "cut", "forgets state", "forgets buffers", "late rate", "other noise")


class Mismatch(AssertionError):
    """The two results differ, or a pure case was refused."""


class Net(nn.Module):
    """A small network with what the case wants of it."""

    def __init__(self, case: Case, *, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.wants = by_hand, case.wants
        width = case.width
        self.first = nn.Linear(2, width, bias="norm" not in case.wants)
        self.act: nn.Module = case.activation()
        self.drop = nn.Dropout(0.3 if "dropout" in case.wants else 0.0)
        self.last = nn.Linear(width, 2)
        if "norm" in case.wants:
            self.norm = nn.BatchNorm1d(width, momentum=0.2)
        if "tied" in case.wants:
            self.again = nn.Linear(2, width, bias=False)
            self.again.weight = self.first.weight
        if "outside" in case.wants:  # not the optimizer's: it gets a meta-gradient
            self.outside = nn.Linear(2, 2)
        if "frozen" in case.wants:
            self.frozen = nn.Linear(2, 2).requires_grad_(False)
        if "teacher" in case.wants:
            self.teacher = nn.Linear(2, width, bias=False).requires_grad_(False)
        if "mean" in case.wants:
            self.register_buffer("mean", torch.full((2,), 0.1))
        if "late buffer" in case.wants:
            self.register_buffer("late", None)
        if "count" in case.wants:
            self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.calls = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if "frozen" in self.wants:
            x = x + 0.3 * self.frozen(x)
        if "outside" in self.wants:
            x = x + 0.3 * self.outside(x)
        h = self.first(x)
        if "norm" in self.wants:
            h = self._normalized(h) if self.by_hand else self.norm(h)
        h = self.drop(self.act(h))
        if "tied" in self.wants:
            h = h + 0.2 * self.again(x)
        out: Tensor = self.last(h)
        if "teacher" in self.wants:
            with torch.no_grad():
                aim = self.teacher(x).mean(1, keepdim=True)
                self.teacher.weight.lerp_(self.first.weight, 0.2)
            out = out - aim
        if "mean" in self.wants:
            out = out + self.mean
            self.mean = 0.7 * self.mean + 0.3 * out.mean(0)
        if "late buffer" in self.wants:
            new = out.detach().mean(0)
            self.late = new if self.late is None else 0.5 * self.late + 0.5 * new
            out = out + self.late
        if "count" in self.wants:
            self.count += 1
            out = out * (1 + 0.1 * self.count)
        if "counter" in self.wants:
            out = out + 0.1 * self.calls
        return out

    def _normalized(self, h: Tensor) -> Tensor:
        norm = self.norm
        mean, n = h.mean(0), len(h)
        var = (h - mean).square().mean(0)
        with torch.no_grad():
            norm.running_mean.mul_(0.8).add_(mean, alpha=0.2)
            norm.running_var.mul_(0.8).add_(var * n / (n - 1), alpha=0.2)
            norm.num_batches_tracked += 1
        return (h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


PURE = ["norm", "dropout", "tied", "outside", "frozen", "teacher", "mean", "late buffer", "count"]
IMPURE = ["counter", "numpy", "rebound"]


class Case:
    """Every choice that a seed makes, in words too."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        pick = random.Random(seed)
        self.steps = pick.choice([1, 2, 3, 4, 5])
        self.width = pick.choice([2, 3])
        self.activation = pick.choice([nn.Tanh, nn.Softplus, nn.SiLU, nn.GELU, nn.Sigmoid])
        self.wants = set(pick.sample(PURE, pick.choice([0, 1, 1, 2, 3])))
        if pick.random() < 0.12:
            self.wants.add(pick.choice(IMPURE))
        self.adjoint = pick.choice(ADJOINTS)
        self.verify = pick.random() < 0.1
        self.batch = pick.choice(["int", "pairs", "dicts", "one", "learned", "iterator", "stack"])
        self.optimizer = pick.choice(list(OPTIMIZERS))
        options, kinds = OPTIMIZERS[self.optimizer].options(pick), ["number", "tensor", "callable"]
        self.options = {"lr": round(pick.uniform(0.05, 0.25), 3), **options}
        self.kinds = {key: pick.choice(kinds) for key in self.options}
        self.holders = [pick.choice(list(HOLDERS)) for _ in range(4)]
        self.used = {
            "leaf": _some(pick, self.steps),
            "computed": _some(pick, self.steps),
            "noise": _some(pick, self.steps),
        }
        self.transform = pick.choice([None, None, "scaled", "clipped", "noisy", "partial"])
        self.second = pick.random() < 0.3
        self.most = None if self.second or pick.random() < 0.75 else pick.choice([0.05, 0.5])
        self.outer = pick.choice(["last", "losses", "state"])

    @property
    def impure(self) -> bool:
        return bool(self.wants & set(IMPURE))

    def __str__(self) -> str:
        shown = {key: value for key, value in vars(self).items() if key != "seed"}
        shown["activation"] = self.activation.__name__
        words = "\n".join(f"  {key} = {value}" for key, value in shown.items())
        return f"case {self.seed} ({'impure' if self.impure else 'pure'})\n{words}"


def _some(pick: random.Random, steps: int) -> list[int]:
    """Steps at which something is used: none, all, or only later ones."""
    return pick.choice([[], list(range(steps)), [steps - 1], list(range(1, steps))])


# The optimizers, written out: state and parameters after one step.

State = dict[str, Tensor]
Hyper = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Formula:
    options: Callable[[random.Random], dict[str, Any]]
    step: Callable[[Hyper, Tensor, Tensor, State, int], tuple[Tensor, State]]


def _sgd(h: Hyper, p: Tensor, g: Tensor, s: State, n: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * p
    if "momentum" not in h:
        return p - h["lr"] * g, s
    b = h["momentum"] * s["b"] + (1 - h.get("dampening", 0)) * g if n > 1 else g
    return p - h["lr"] * (g + h["momentum"] * b if h.get("nesterov") else b), {"b": b}


def _adam(h: Hyper, p: Tensor, g: Tensor, s: State, n: int) -> tuple[Tensor, State]:
    return _moments(h, p, g + h["weight_decay"] * p, s, n)


def _adamw(h: Hyper, p: Tensor, g: Tensor, s: State, n: int) -> tuple[Tensor, State]:
    return _moments(h, p * (1 - h["lr"] * h["weight_decay"]), g, s, n)


def _moments(h: Hyper, p: Tensor, g: Tensor, s: State, n: int) -> tuple[Tensor, State]:
    zero = torch.zeros_like(g)
    a, b = h["beta1"], h["beta2"]
    m = a * s.get("m", zero) + (1 - a) * g
    v = b * s.get("v", zero) + (1 - b) * g * g
    size = (v / (1 - b**n)).sqrt() + h["eps"]
    return p - h["lr"] * (m / (1 - a**n)) / size, {"m": m, "v": v}


def _rmsprop(h: Hyper, p: Tensor, g: Tensor, s: State, n: int) -> tuple[Tensor, State]:
    zero = torch.zeros_like(g)
    g = g + h["weight_decay"] * p
    v = h["alpha"] * s.get("v", zero) + (1 - h["alpha"]) * g * g
    mean, spread = s.get("mean", zero), v
    if h.get("centered"):
        mean = h["alpha"] * mean + (1 - h["alpha"]) * g
        spread = v - mean * mean
    change = g / (spread.sqrt() + h["eps"])
    b = change
    if "momentum" in h:
        b = h["momentum"] * s.get("b", zero) + change
    return p - h["lr"] * b, {"v": v, "mean": mean, "b": b}


def _sgd_options(pick: random.Random) -> dict[str, Any]:
    return {"weight_decay": pick.choice([0.0, 0.1])}


def _momentum_options(pick: random.Random) -> dict[str, Any]:
    found = {"weight_decay": pick.choice([0.0, 0.1]), "momentum": 0.8}
    return {**found, **pick.choice([{}, {"nesterov": True}, {"dampening": 0.3}])}


def _adam_options(pick: random.Random) -> dict[str, Any]:
    return {"beta1": 0.8, "beta2": 0.9, "eps": 0.02, "weight_decay": pick.choice([0.0, 0.1])}


def _rmsprop_options(pick: random.Random) -> dict[str, Any]:
    found = {"alpha": 0.8, "eps": 0.02, "weight_decay": pick.choice([0.0, 0.1])}
    return {**found, **pick.choice([{}, {"momentum": 0.5}, {"centered": True}])}


OPTIMIZERS = {
    "SGD": Formula(_sgd_options, _sgd),
    "Momentum": Formula(_momentum_options, _sgd),
    "Adam": Formula(_adam_options, _adam),
    "AdamW": Formula(_adam_options, _adamw),
    "RMSprop": Formula(_rmsprop_options, _rmsprop),
}


# The problem that both solve.


class Problem:
    """A case's tensors and functions, made anew for each of the two."""

    def __init__(self, case: Case, *, by_hand: bool, fault: Fault = None) -> None:
        self.case, self.fault, self.by_hand = case, fault, by_hand
        torch.manual_seed(case.seed)
        np.random.seed(case.seed % 2**32)
        self.model = Net(case, by_hand=by_hand)
        self.x = torch.randn(4, 2, dtype=DOUBLE)
        self.inputs: dict[str, Tensor] = {}
        self.leaf = self._learned("leaf", 0.8)
        self.log = self._learned("log", -0.3)
        self.read_leaf, _ = HOLDERS[case.holders[0]](self.leaf)
        cut = self.log.detach() if fault == "cut" else self.log
        # Two holders of one kind may share what they keep: the second value is kept plainly then.
        read = [HOLDERS[h] if h not in case.holders[:i] else _plain for i, h in _later(case)]
        self.read_computed, _ = read[0](cut.exp())
        noise = torch.Generator().manual_seed(case.seed + (fault == "other noise"))
        self.read_generator, _ = read[1](noise)
        self.read_number, self.bind = read[2](1.0)
        self.hyper = {key: self._hyper(key, value) for key, value in case.options.items()}
        self.steps, self.item = self._batches()

    def _learned(self, name: str, value: float) -> Tensor:
        self.inputs[name] = torch.tensor(value, dtype=DOUBLE, requires_grad=True)
        return self.inputs[name]

    def _hyper(self, key: str, value: Any) -> Any:
        kind = self.case.kinds[key]
        if isinstance(value, bool) or kind == "number":
            return value
        x = self._learned(key, value)
        return x if kind == "tensor" else lambda t: x * (1 - 0.05 * t)

    def _batches(self) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]:
        count, kind = self.case.steps, self.case.batch
        data = torch.randn(count, 2, 4, 2, dtype=DOUBLE)
        pairs = [(x, y) for x, y in data]
        if kind == "int":
            return count, lambda t: pairs[t]
        if kind == "dicts":
            return [{"x": x, "deep": [y]} for x, y in pairs], lambda b: (b["x"], b["deep"][0])
        if kind == "one":
            return [pairs[0]] * count, lambda b: b
        if kind == "learned":
            self.inputs["batch"] = pairs[0][0].requires_grad_()
            self.inputs["batch 2"] = pairs[-1][1].clone().requires_grad_()
            pairs[-1] = (pairs[-1][0], self.inputs["batch 2"])
            return pairs, lambda b: b
        if kind == "iterator":
            return iter(pairs), lambda b: b
        return (data, lambda b: (b[0], b[1])) if kind == "stack" else (pairs, lambda b: b)

    def loss(self, t: int, model: Any, item: Any) -> Tensor:
        used = self.case.used
        x, y = self.item(item)
        if t in used["noise"]:
            x = x + 0.2 * torch.randn(x.shape, generator=self.read_generator(), dtype=DOUBLE)
        loss = F.mse_loss(model(x), y)
        if t in used["leaf"]:
            loss = loss * self.read_leaf()
        if t in used["computed"]:
            loss = loss + self.read_computed() * model.last.weight.square().mean()
        if "numpy" in self.case.wants:
            loss = loss * (1 + np.random.rand())
        return loss * self.read_number() if "rebound" in self.case.wants else loss

    def changed(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kind = self.case.transform
        if kind == "scaled":
            return {n: g * self.read_leaf() for n, g in grads.items()}
        if kind == "clipped":
            norm = sum(g.square().sum() for g in grads.values()).sqrt()  # type: ignore[union-attr]
            return {n: g / (1 + norm) for n, g in grads.items()}
        if kind == "noisy":
            draw = self.read_generator()
            return {
                n: g + 0.1 * torch.randn(g.shape, generator=draw, dtype=DOUBLE)
                for n, g in grads.items()
            }
        return {n: g for n, g in grads.items() if n != "last.bias"}  # "partial"

    @property
    def chosen(self) -> dict[str, Tensor]:
        return {
            n: p
            for n, p in self.model.named_parameters()
            if p.requires_grad and not n.startswith("outside")
        }

    def outer(self, fast: Any) -> Tensor:
        found = F.mse_loss(fast.apply(lambda m, x: m.last(m.first(x)), self.x), self.x)
        if self.case.outer == "losses":
            found = found + fast.losses.sum()
        if self.case.outer == "state" and "mean" in self.case.wants:
            found = found + fast.buffers["mean"].square().sum()
        return found


def _plain(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return HOLDERS["closure"](value)


def _later(case: Case) -> list[tuple[int, str]]:
    return list(enumerate(case.holders))[1:]


# The two ways.


class Reference:
    """The plain loop's result."""

    def __init__(self, problem: Problem) -> None:
        self.model = problem.model
        case, fault = problem.case, problem.fault
        self.params = dict(problem.chosen)
        self.rest = {n: p for n, p in self.model.named_parameters() if n not in self.params}
        self.buffers = dict(self.model.named_buffers())
        states: dict[str, State] = {name: {} for name in self.params}
        taken = dict.fromkeys(self.params, 0)
        losses = []
        steps = problem.steps
        for t, item in enumerate(range(steps) if isinstance(steps, int) else steps):
            values = {name: x.view_as(x) for name, x in self.params.items()}
            constants = {n: x.clone() for n, x in {**self.rest, **self.buffers}.items()}
            with standing(self.model, {**entries(self.model), **values, **constants}):
                loss = problem.loss(t, self.model, item)
                named = dict(self.model.named_parameters())
                self.rest = {n: named[n] for n in self.rest}
                if fault != "forgets buffers":
                    self.buffers = dict(self.model.named_buffers())
            losses.append(loss)
            found = torch.autograd.grad(loss, list(values.values()), create_graph=True)
            grads = dict(zip(values, found, strict=True))
            if case.transform is not None:
                grads = problem.changed(grads)
            late = t + (fault == "late rate")
            hyper = {k: v(late) if callable(v) else v for k, v in problem.hyper.items()}
            for name, g in grads.items():
                taken[name] += 1
                state = {} if fault == "forgets state" else states[name]
                n = 1 if fault == "forgets state" else taken[name]
                formula = OPTIMIZERS[case.optimizer].step
                values[name], states[name] = formula(hyper, values[name], g, state, n)
            if case.most is not None:
                made = _Bounded.apply(case.most, *values.values())  # type: ignore[no-untyped-call]
                values = dict(zip(values, made, strict=True))
            self.params = values
        self.losses = torch.stack(losses)

    def apply(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        copies = {n: x.clone() for n, x in {**self.rest, **self.buffers}.items()}
        with standing(self.model, {**entries(self.model), **self.params, **copies}):
            return fn(self.model, *args)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, most: float, *tensors: Tensor) -> Any:
        ctx.most = most
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        norm = torch.linalg.vector_norm(torch.stack([c.norm() for c in cotangents]))
        factor = min(1.0, ctx.most / float(norm)) if norm > 0 else 1.0
        return (None, *(c * factor for c in cotangents))


def _by_diffopt(problem: Problem) -> diffopt.Unrolled:
    case, hyper = problem.case, dict(problem.hyper)
    if "beta1" in hyper:
        hyper["betas"] = (hyper.pop("beta1"), hyper.pop("beta2"))
    opt = getattr(diffopt, case.optimizer)(problem.chosen.items(), **hyper)
    steps: Any = problem.steps
    counted = isinstance(steps, int)
    if not counted:  # the step number travels with the batch
        numbered = list(enumerate(steps))
        steps = iter(numbered) if case.batch == "iterator" else numbered

    def loss_fn(model: Any, item: Any) -> Tensor:
        t, batch = (item, item) if counted else item
        return problem.loss(t, model, batch)

    return diffopt.unroll(
        problem.model,
        opt,
        steps,
        loss_fn,
        adjoint=case.adjoint,
        verify=case.verify,
        grad_transform=problem.changed if case.transform is not None else None,
        max_cotangent_norm=case.most,
    )


def solve(case: Case, *, by_hand: bool, fault: Fault = None) -> dict[str, Tensor]:
    """The outer loss and all gradients, by name; second ones where the case wants them."""
    problem = Problem(case, by_hand=by_hand, fault=fault)
    guard = Guard(problem.model)
    fast: Any = Reference(problem) if by_hand else _by_diffopt(problem)
    guard.check("the call")
    outer = problem.outer(fast)
    if "rebound" in case.wants:
        problem.bind(1.7)
    named = {n: p for n, p in problem.model.named_parameters() if p.requires_grad}
    inputs = {**named, **problem.inputs}
    found = {"outer": outer.detach()}
    grads = _gradients(outer, inputs, create_graph=case.second)
    if case.second:
        generator = torch.Generator().manual_seed(1)
        value = sum(
            (g * torch.randn(g.shape, generator=generator, dtype=DOUBLE)).sum()
            for g in grads.values()
        )
        second = _gradients(value, inputs, create_graph=False)
        found.update({f"second, {name}": g.detach() for name, g in second.items()})
    guard.check("the backward pass")
    factor = 1 + 1e-6 * (fault == "scaled")
    found.update({name: factor * g.detach() for name, g in grads.items()})
    return found


def _gradients(value: Any, inputs: dict[str, Tensor], *, create_graph: bool) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(
        value,
        list(inputs.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))


def check(seed: int, fault: Fault = None) -> str:
    """Compare both; gives "equal" or "refused", and raises ``Mismatch`` with the case in words."""
    case = Case(seed)
    want = solve(case, by_hand=True, fault=fault)
    if not all(x.isfinite().all() for x in want.values()):
        raise Mismatch(f"the reference is not finite: choose milder numbers\n{case}")
    try:
        got = solve(case, by_hand=False)
    except REFUSALS as error:
        if case.impure and re.search(CHANGED, str(error)):
            return "refused"
        words = f"a pure case was refused, {type(error).__name__}: {error}"
        raise Mismatch(f"{words}\n{case}") from error
    except AssertionError as error:
        raise Mismatch(f"{error}\n{case}") from error
    scale = max(float(x.abs().max()) for name, x in want.items() if name != "outer")
    for name, x in want.items():
        own = max(float(x.abs().max()), 1e-3 * scale, 1e-6)
        error = float((got[name] - x).abs().max()) / own
        if not error <= TOLERANCE:
            raise Mismatch(f"{name} differs by {error:.1e}, relatively\n{case}")
    return "equal"
