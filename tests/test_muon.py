"""Muon: the trajectory of ``torch.optim.Muon``, and the derivative of what it rounds."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from adjoints import EXACT
from helpers import assert_all_close, differences, mse
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import diffopt
from diffopt import optim

SHAPES = {"wide": (3, 5), "tall": (7, 2), "square": (4, 4), "row": (1, 6), "column": (6, 1)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "momentum": 0.5},
    {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "weight_decay": 0.5},
]
every_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Smooth(optim.Muon):
    """Muon without rounding: finite differences are those of its derivative."""

    iteration_dtype = torch.float64


def matrices() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(2, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)
    return nn.Sequential(*layers).double()


def some_batches(steps: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(rows, 2).double(), torch.randn(rows, 3).double()) for _ in range(steps)]


def test_the_constructor_and_the_options_are_those_of_torch_optim() -> None:
    ours = inspect.signature(optim.Muon).parameters.values()
    theirs = inspect.signature(torch.optim.Muon).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    w = [torch.zeros(2, 2)]
    assert optim.Muon(w).defaults == torch.optim.Muon(w).defaults
    assert diffopt.Muon is optim.Muon


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_options
def test_twenty_steps_of_torch_optim(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    start = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    theirs, in_place = ({n: x.clone() for n, x in start.items()} for _ in range(2))
    reference = torch.optim.Muon(theirs.values(), lr=0.05, **options)
    opt = optim.Muon(in_place.values(), lr=0.05, **options)
    params, state = dict(start), opt.init(start)
    learned = {n: x.clone().requires_grad_() for n, x in start.items()}
    recorded, recorded_state = dict(learned), opt.init(learned)
    for t in range(20):
        grads: dict[str, Tensor | None] = {n: torch.randn_like(x) for n, x in start.items()}
        if t in (0, 3):
            grads["tall"] = None
        if t == 4:
            grads["wide"] = torch.zeros(3, 5, dtype=dtype)
        for held in (theirs, in_place):
            for name, p in held.items():
                p.grad = grads[name]
        reference.step()
        opt.step()
        params, state = opt.update(params, grads, state, step=t)
        recorded, recorded_state = opt.update(recorded, grads, recorded_state, step=t)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for name, p in theirs.items():
        torch.testing.assert_close(params[name], p, **tolerance)
        torch.testing.assert_close(in_place[name], p, **tolerance)
        torch.testing.assert_close(recorded[name].detach(), p, **tolerance)
        assert torch.equal(params[name], recorded[name])  # recording changes no value
        buffer = reference.state[p]["momentum_buffer"]
        torch.testing.assert_close(state[name]["momentum_buffer"], buffer, **tolerance)


@every_options
def test_unrolled_and_continued_by_torch_optim(options: dict[str, Any]) -> None:
    data = some_batches(12)

    def train(model: nn.Module, opt: torch.optim.Optimizer, pairs: Any) -> None:
        for pair in pairs:
            opt.zero_grad()
            mse(model, pair).backward()
            opt.step()

    expected = matrices()
    reference = torch.optim.Muon(expected.parameters(), lr=0.05, **options)
    train(expected, reference, data[:4])
    model = copy.deepcopy(expected)
    inner = torch.optim.Muon(model.parameters(), lr=0.05, **options)
    inner.load_state_dict(copy.deepcopy(reference.state_dict()))
    fast = diffopt.unroll(model, inner, data[4:8], mse)
    train(expected, reference, data[4:8])
    for name, p in expected.named_parameters():
        torch.testing.assert_close(fast.params[name], p, rtol=1e-12, atol=1e-14)
        buffer = reference.state[p]["momentum_buffer"]
        torch.testing.assert_close(fast.opt_state[name]["momentum_buffer"], buffer)
    fast.load_into(model, inner)
    train(model, inner, data[8:])
    train(expected, reference, data[8:])
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# The derivative.


def backwards(d: Tensor, z: Tensor, steps: int, abc: tuple[float, ...], eps: float) -> Tensor:
    """The vector-Jacobian product of the iteration, by hand, at the values that it rounds to.

    With x' = a x + u x, u = b G + c G², G = x xᵀ, and the cotangent z of x'.
    """
    a, b, c = abc
    low, f64 = torch.bfloat16, torch.float64
    tall = d.shape[0] > d.shape[1]
    d, z = (d.T, z.T) if tall else (d, z)
    first = d.to(low)
    norm = first.norm()
    least = norm.clamp(min=eps)
    xs = [first / least]
    for _ in range(steps):
        gram = xs[-1] @ xs[-1].T
        change = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        xs.append(torch.addmm(xs[-1], change, xs[-1], beta=a))
    for k in reversed(range(steps)):
        x = xs[k].to(f64)
        gram16 = xs[k] @ xs[k].T
        gram = gram16.to(f64)
        change = torch.addmm(gram16, gram16, gram16, beta=b, alpha=c).to(f64)
        z_change = z @ x.T
        z_gram = b * z_change + c * (z_change @ gram.T + gram.T @ z_change)
        z = a * z + change.T @ z + (z_gram + z_gram.T) @ x
    first, least = first.to(f64), least.to(f64)
    z_least = -(z * first).sum() / least**2
    z = z / least
    if norm.to(f64) >= eps and norm > 0:
        z = z + z_least * first / first.norm()
    return z.T if tall else z


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_options
def test_the_derivative_is_that_of_the_iteration_at_the_rounded_values(
    options: dict[str, Any], shape: tuple[int, int]
) -> None:
    torch.manual_seed(4)
    w, buffer, z = (torch.randn(shape).double() for _ in range(3))
    g = torch.randn(shape).double().requires_grad_()
    opt = optim.Muon([w], lr=0.05, **options)
    new, _ = opt.update({"w": w}, {"w": g}, {"w": {"momentum_buffer": buffer}})
    (found,) = torch.autograd.grad(new["w"], g, z)

    (hyper,) = opt.hyperparameters(0)
    mu = hyper["momentum"]
    m = buffer + (1 - mu) * (g.detach() - buffer)
    d = g.detach() + mu * (m - g.detach()) if hyper["nesterov"] else m
    rows, columns = shape
    ratio = max(1.0, rows / columns) ** 0.5
    if hyper["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * max(rows, columns) ** 0.5
    pulled = backwards(
        d, -0.05 * ratio * z, hyper["ns_steps"], hyper["ns_coefficients"], hyper["eps"]
    )
    factor = (1 - mu) + mu * (1 - mu) if hyper["nesterov"] else 1 - mu
    torch.testing.assert_close(found, factor * pulled, rtol=1e-10, atol=1e-12)


def test_the_rounded_and_the_smooth_derivative_point_the_same_way() -> None:
    torch.manual_seed(5)
    w, g, z = (torch.randn(16, 16).double() for _ in range(3))
    found = []
    for rule in (optim.Muon, Smooth):
        opt = rule([w], lr=1.0)
        leaf = g.clone().requires_grad_()
        new, _ = opt.update({"w": w}, {"w": leaf}, opt.init({"w": w}))
        found += torch.autograd.grad(new["w"], leaf, z)
    assert torch.cosine_similarity(found[0].flatten(), found[1].flatten(), 0) > 0.99


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 3), OPTIONS[0]), *zip([(3, 2), (2, 3), (3, 2), (3, 2)], OPTIONS, strict=True)],
    ids=str,
)
def test_without_rounding_against_finite_differences(
    options: dict[str, Any], shape: tuple[int, int]
) -> None:
    """In parameters, gradients, state and every number; in both modes, and twice."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(6)
    # Of moderate slope: the standard coefficients make the second differences too coarse.
    options = {"ns_coefficients": (1.5, -0.5, 0.1), **options}
    options["ns_steps"] = min(options.get("ns_steps", 2), 2)
    opt = Smooth([torch.zeros(shape)], **options)
    (hyper,) = opt.hyperparameters(0)
    numbers = [torch.tensor(x) for x in (0.1, 0.2, 0.4, *hyper["ns_coefficients"])]

    def step(w: Tensor, g: Tensor, m: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        lr, decay, momentum, *abc = values
        new = {"lr": lr, "weight_decay": decay, "momentum": momentum, "ns_coefficients": tuple(abc)}
        after, state = opt.update(
            {"w": w}, {"w": g}, {"w": {"momentum_buffer": m}}, hyper=[{**hyper, **new}]
        )
        return after["w"], state["w"]["momentum_buffer"]

    inputs = [*(torch.randn(shape) for _ in range(3)), *numbers]
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(step, inputs, check_forward_ad=True)
    assert gradgradcheck(step, inputs, check_fwd_over_rev=True, fast_mode=True)

    def with_numbers(w: Tensor, g: Tensor, m: Tensor) -> Tensor:
        return opt.update({"w": w}, {"w": g}, {"w": {"momentum_buffer": m}})[0]["w"]

    assert gradcheck(with_numbers, inputs[:3], check_forward_ad=True)
    assert gradgradcheck(with_numbers, inputs[:3], check_fwd_over_rev=True, fast_mode=True)


def test_learned_coefficients_take_the_trajectory_of_numbers_to_rounding() -> None:
    torch.manual_seed(7)
    w, g = torch.randn(5, 8), torch.randn(5, 8)
    abc = (3.4445, -4.775, 2.0315)
    after = []
    for coefficients in (abc, tuple(torch.tensor(x, requires_grad=True) for x in abc)):
        opt = optim.Muon([w], lr=1.0, ns_coefficients=coefficients)
        after.append(opt.update({"w": w}, {"w": g}, opt.init({"w": w}))[0]["w"].detach())
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("rule", [optim.Muon, Smooth])
def test_a_zero_gradient_has_finite_derivatives(rule: type[optim.Muon]) -> None:
    w = torch.zeros(2, 3).double()
    opt = rule([w], lr=0.1, eps=1e-2, ns_steps=1)
    g = torch.zeros(2, 3).double().requires_grad_()
    new, _ = opt.update({"w": w}, {"w": g}, opt.init({"w": w}))
    (once,) = torch.autograd.grad(new["w"].sum(), g, create_graph=True)
    # d = (1 − μ²) g with nesterov, x = a d / ε to first order
    least = torch.tensor(1e-2).to(rule.iteration_dtype).double()
    expected = torch.full_like(once, -0.1 * 3.4445 * (1 - 0.95**2)) / least
    torch.testing.assert_close(once, expected, rtol=1e-6, atol=0)
    (twice,) = torch.autograd.grad((once**2).sum(), g)
    assert twice.isfinite().all()


STEPS = 4


@pytest.mark.parametrize("rule", [optim.Muon, Smooth])
def test_every_exact_adjoint_agrees(rule: type[optim.Muon]) -> None:
    model, data, query = matrices(), some_batches(STEPS), some_batches(1)[0]
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), lr]
    results = []
    for _, adjoint in EXACT:
        for verify in (False, True):
            opt = rule(model.parameters(), lr=lr)
            fast = diffopt.unroll(model, opt, data, mse, adjoint=adjoint, verify=verify)
            results.append(torch.autograd.grad(mse(fast, query) + fast.losses[2], inputs))
    for result in results[1:]:
        assert_all_close(result, results[0], rtol=1e-10, atol=1e-14)
    if rule is Smooth:

        def loss() -> Tensor:
            with torch.no_grad():
                opt = rule(model.parameters(), lr=lr)
                fast = diffopt.unroll(model, opt, data, mse)
                total: Tensor = mse(fast, query) + fast.losses[2]
                return total

        assert_all_close(results[0], differences(loss, inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", [optim.Muon, Smooth])
def test_tasks(rule: type[optim.Muon]) -> None:
    """Matrices of all tasks at once, and one task after the other, differ in rounding at most."""
    n = 3
    model = matrices()
    torch.manual_seed(8)
    data = [(torch.randn(n, 5, 2).double(), torch.randn(n, 5, 3).double()) for _ in range(STEPS)]
    inputs = list(model.parameters())
    fast = diffopt.unroll(model, rule(model.parameters(), lr=0.05), data, mse, tasks=n)
    found = torch.autograd.grad(fast.losses.sum(), inputs)
    singles = [
        diffopt.unroll(
            model, rule(model.parameters(), lr=0.05), [(x[i], y[i]) for x, y in data], mse
        )
        for i in range(n)
    ]
    want = torch.autograd.grad(sum(x.losses.sum() for x in singles), inputs)
    exact = rule is Smooth
    for i, single in enumerate(singles):
        for name, x in single.params.items():
            tolerance = 1e-10 if exact else 0.02
            torch.testing.assert_close(fast.params[name][i], x, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, want, strict=True):
        assert (a - b).norm() <= (1e-9 if exact else 0.1) * b.norm()


def test_compiled(graphs: list[bool]) -> None:
    model, data = matrices(), some_batches(STEPS)
    inputs = list(model.parameters())
    results = []
    for compile in (False, True):
        opt = Smooth(model.parameters(), lr=0.05)
        fast = diffopt.unroll(model, opt, data, mse, compile=compile, segment=1)
        results.append(torch.autograd.grad(fast.losses.sum(), inputs))
    assert graphs
    assert_all_close(results[1], results[0], rtol=1e-8, atol=1e-10)


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adjust_lr_fn": "adam"}, ValueError, "adam is not supported: pass 'original'"),
        ({"ns_steps": 100}, ValueError, "ns_steps is 100: pass at least 0 and below 100"),
        ({"ns_steps": -1}, ValueError, "ns_steps is -1"),
        ({"ns_steps": torch.tensor(5)}, NotImplementedError, "ns_steps is a switch"),
        ({"ns_coefficients": 3.0}, TypeError, "ns_coefficients is 3.0: pass a tuple of 3"),
        ({"ns_coefficients": (1.0, 2.0)}, ValueError, "has 2 entries: pass a tuple of 3"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"momentum": -1.0}, ValueError, "Invalid momentum value: -1.0"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.Muon([torch.zeros(2, 2)], **options)


def test_parameters_that_are_no_matrices_are_refused_as_in_torch_optim() -> None:
    for shape in ((), (3,), (2, 2, 2)):
        with pytest.raises(ValueError, match="Muon only supports 2D") as theirs:
            torch.optim.Muon([torch.zeros(shape)])
        with pytest.raises(ValueError, match="Muon only supports 2D") as ours:
            optim.Muon([torch.zeros(shape)])
        assert str(ours.value).startswith(str(theirs.value))
        assert "unroll(model, [Muon(matrices), AdamW(others)], ...)" in str(ours.value)


def test_a_coefficient_for_each_entry_has_no_meaning() -> None:
    w = torch.ones(2, 3)
    opt = optim.Muon([w], eps=torch.full((3,), 1e-7))
    with pytest.raises(ValueError, match="ns_coefficients and eps are one number each"):
        opt.update({"w": w}, {"w": w}, opt.init({"w": w}))


@pytest.mark.parametrize("rule", [optim.Muon, Smooth])
def test_forward_mode(rule: type[optim.Muon]) -> None:
    model, data = matrices(), some_batches(STEPS)
    log_lr = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    found = []
    for adjoint in (diffopt.StoreAll(), diffopt.ForwardMode([log_lr])):
        opt = rule(model.parameters(), lr=lambda t: log_lr.exp())
        fast = diffopt.unroll(model, opt, data, mse, adjoint=adjoint)
        found.append(torch.autograd.grad(fast.losses.sum(), log_lr))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_low_precision(dtype: torch.dtype) -> None:
    model = matrices().to(dtype)
    data = [(x.to(dtype), y.to(dtype)) for x, y in some_batches(STEPS)]
    fast = diffopt.unroll(model, torch.optim.Muon(model.parameters(), lr=0.05), data, mse)
    assert {x.dtype for x in fast.params.values()} == {dtype}
    found = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
    assert all(g.isfinite().all() and (g != 0).any() for g in found)
