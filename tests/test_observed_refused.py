"""What cannot be served is refused, in words that name the cause and what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed import (
    ADJOINTS,
    REFUSALS,
    Inputs,
    Ours,
    Train,
    cases,
    data,
    every_adjoint,
    learned,
    outcome,
    seed,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

import diffopt

STEPS = 4


# Rates that change during a step.


def _scheduler(opt: Any) -> Any:
    made = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    return made.step


def _exponential(opt: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(opt, 0.5).step


def _lambda_lr(opt: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t).step


def _cosine(opt: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS).step


def _plateau(opt: Any) -> Any:
    made = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    return lambda: made.step(1.0)


def _by_hand(opt: Any) -> Any:
    def step() -> None:
        opt.param_groups[0]["lr"] *= 0.5

    return step


def _momentum_by_hand(opt: Any) -> Any:
    def step() -> None:
        opt.param_groups[0]["momentum"] = 0.5

    return step


def _weight_decay(opt: Any) -> Any:
    def step() -> None:
        for group in opt.param_groups:
            group["weight_decay"] += 0.1

    return step


def _another_value(opt: Any) -> Any:
    def step() -> None:
        opt.param_groups[0].update(lr=0.01)

    return step


def _load(opt: Any) -> Any:
    values = opt.state_dict()
    values["param_groups"][0]["lr"] = 0.01
    return lambda: opt.load_state_dict(values)


def _one_cycle(opt: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=50).step


CHANGES = {
    "StepLR": _scheduler,
    "ExponentialLR": _exponential,
    "LambdaLR": _lambda_lr,
    "CosineAnnealingLR": _cosine,
    "ReduceLROnPlateau": _plateau,
    "OneCycleLR": _one_cycle,
    "lr by hand": _by_hand,
    "momentum by hand": _momentum_by_hand,
    "weight decay by hand": _weight_decay,
    "update": _another_value,
    "load_state_dict": _load,
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("where", ["loss", "grad_transform"])
@pytest.mark.parametrize("maker", [diffopt.SGD, torch.optim.SGD], ids=["ours", "torch"])
@cases("change", CHANGES)
@pytest.mark.parametrize("adjoint", ["store-all", "segmented-2", "memory-budget"])
def test_rates_that_change_during_a_step(adjoint: str, change: Any, maker: Any, where: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()
        made: list[Any] = []

        def by(named: Any) -> Any:
            opt = maker(named, lr=0.3, momentum=0.1)
            made.append(change(opt))
            return opt

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            if where == "loss":
                made[0]()
            return squares(m(x) - 1)

        def transform(grads: dict[str, Tensor]) -> dict[str, Tensor]:
            made[0]()
            return grads

        more: Any = {"grad_transform": transform} if where != "loss" else {}
        fast = train(model, STEPS, loss_fn, by=by, **more)
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"lambda t|param_groups|callable")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_the_words_about_a_scheduler_say_what_to_write() -> None:
    model, x = small(), data()
    inner = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        scheduler.step()
        return squares(m(x))

    with pytest.raises(REFUSALS, match=r"lr=lambda t"):
        squares(diffopt.unroll(model, inner, STEPS, loss_fn)(x)).backward()


# Dual numbers around an unroll.


def _dual(x: Tensor) -> Tensor:
    return torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))


def _dual_rate(model: nn.Module, x: Tensor) -> Any:
    opt = diffopt.SGD(model.parameters(), lr=_dual(torch.tensor(0.3, dtype=x.dtype)))
    return diffopt.unroll(model, opt, STEPS, lambda m, t: squares(m(x) - 1))(x)


def _unrolled(model: nn.Module, steps: Any, loss_fn: Any, **more: Any) -> diffopt.Unrolled:
    inner = diffopt.SGD(model.parameters(), lr=more.pop("lr", 0.3))
    return diffopt.unroll(model, inner, steps, loss_fn, **more)


DUALS: dict[str, Any] = {
    "rate": lambda m, x: _unrolled(
        m, STEPS, lambda m, t: squares(m(x)), lr=_dual(torch.ones((), dtype=x.dtype))
    ),
    "rate by a callable": lambda m, x: _unrolled(
        m, STEPS, lambda m, t: squares(m(x)), lr=lambda t: _dual(torch.ones((), dtype=x.dtype))
    ),
    "batch": lambda m, x: _unrolled(m, [_dual(x)] * STEPS, lambda m, b: squares(m(b))),
    "batch in a dict": lambda m, x: _unrolled(
        m, [{"x": _dual(x)}] * STEPS, lambda m, b: squares(m(b["x"]))
    ),
    "captured": lambda m, x: _captured_dual(m, x, 0),
    "captured at a later step": lambda m, x: _captured_dual(m, x, 2),
    "initial": lambda m, x: _unrolled(
        m,
        STEPS,
        lambda m, t: squares(m(x)),
        initial={"0.weight": _dual(m[0].weight)},
    ),
    "grad_transform": lambda m, x: _dual_transform(m, x),
    "buffer": lambda m, x: _dual_buffer(m, x),
    "frozen parameter's place": lambda m, x: _dual_attribute(m, x),
}


def _captured_dual(m: Any, x: Tensor, first: int) -> Any:
    k = _dual(torch.ones((), dtype=x.dtype))
    return _unrolled(m, STEPS, lambda m, t: squares(m(x) - (k if t >= first else 1)))


def _dual_transform(m: Any, x: Tensor) -> Any:
    k = _dual(torch.ones((), dtype=x.dtype))
    scaled = lambda grads: {n: k * g for n, g in grads.items()}  # noqa: E731
    return _unrolled(m, STEPS, lambda m, t: squares(m(x)), grad_transform=scaled)


def _dual_buffer(m: Any, x: Tensor) -> Any:
    m.register_buffer("shift", _dual(torch.ones(2, dtype=x.dtype)))
    return _unrolled(m, STEPS, lambda m, t: squares(m(x) - m.shift))


def _dual_attribute(m: Any, x: Tensor) -> Any:
    m.shift = _dual(torch.ones(2, dtype=x.dtype))
    return _unrolled(m, STEPS, lambda m, t: squares(m(x) - m.shift))


@cases("call", DUALS)
@stored_or_again
def test_dual_numbers_are_refused(adjoint: str, call: Any) -> None:
    seed()
    model, x = small(), data()

    def choose(*args: Any, **more: Any) -> Any:
        return diffopt_unroll(*args, **{**more, "adjoint": ADJOINTS[adjoint]})

    diffopt_unroll = diffopt.unroll
    patch = pytest.MonkeyPatch()
    patch.setattr(diffopt, "unroll", choose)
    with patch.context(), torch.autograd.forward_ad.dual_level():
        try:
            with pytest.raises(NotImplementedError, match="ForwardMode"):
                call(model, x)
        finally:
            patch.undo()


# torch.func transforms around an unroll.


def _of_rate(model: nn.Module, x: Tensor, adjoint: Any) -> Any:
    def outer(rate: Tensor) -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=rate)
        fast = diffopt.unroll(model, opt, 2, lambda m, t: squares(m(x) - 1), adjoint=adjoint)
        return squares(fast(x))

    return outer


def _rates(x: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.3, 3, dtype=x.dtype)


TRANSFORMS: dict[str, Any] = {
    "grad": lambda f, x: torch.func.grad(f)(_rates(x)[0]),
    "vmap": lambda f, x: torch.func.vmap(f)(_rates(x)),
    "jvp": lambda f, x: torch.func.jvp(f, (_rates(x)[0],), (_rates(x)[1],)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(_rates(x)[0]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(_rates(x)[0]),
    "vjp": lambda f, x: torch.func.vjp(f, _rates(x)[0])[1](_rates(x)[1]),
    "hessian": lambda f, x: torch.func.hessian(f)(_rates(x)[0]),
    "linearize": lambda f, x: torch.func.linearize(f, _rates(x)[0])[1](_rates(x)[1]),
}


@cases("transform", TRANSFORMS)
@stored_or_again
def test_transforms_around_an_unroll_are_refused(adjoint: str, transform: Any) -> None:
    seed()
    model, x = small(), data()
    with pytest.raises(NotImplementedError, match=r"torch\.func|ForwardMode|functional"):
        transform(_of_rate(model, x, ADJOINTS[adjoint]), x)


# Values that end in NaN or in another error's words today.


def _call(**more: Any) -> Any:
    model, x = small(), data()
    inner = more.pop("inner", None) or diffopt.SGD
    options = more.pop("options", {"lr": 0.1})
    loss_fn = more.pop("loss_fn", lambda m, t: squares(m(x) - 1))
    fast = diffopt.unroll(model, inner(model.parameters(), **options), STEPS, loss_fn, **more)
    squares(fast(x)).backward()


def _loss_backward(m: nn.Module, t: int) -> Tensor:
    loss = squares(m(data()))
    loss.backward(retain_graph=True)
    return loss


OPTIONS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "negative lr, tensor": (diffopt.SGD, {"lr": torch.tensor(-1.0)}, r"lr|learning rate"),
    "negative lr, callable": (diffopt.SGD, {"lr": lambda t: -1.0}, r"lr|learning rate"),
    "lr of a later step": (diffopt.SGD, {"lr": lambda t: 0.1 - t}, r"lr|learning rate"),
    "lr is a word": (diffopt.SGD, {"lr": lambda t: "fast"}, r"lr"),
    "lr is None": (diffopt.SGD, {"lr": lambda t: None}, r"lr"),
    "lr is a list": (diffopt.SGD, {"lr": lambda t: [0.1]}, r"lr"),
    "lr is complex": (diffopt.SGD, {"lr": lambda t: torch.tensor(1j)}, r"lr|complex"),
    "momentum, tensor": (diffopt.SGD, {"momentum": torch.tensor(-0.5)}, "momentum"),
    "weight decay, callable": (
        diffopt.SGD,
        {"weight_decay": lambda t: torch.tensor(-0.5)},
        "weight.decay",
    ),
    "beta, tensor": (diffopt.Adam, {"betas": (torch.tensor(1.5), 0.999)}, "beta"),
    "beta, callable": (diffopt.Adam, {"betas": (0.9, lambda t: 1.5)}, "beta"),
    "beta of one": (diffopt.AdamW, {"betas": (torch.tensor(1.0), 0.999)}, "beta"),
    "no betas": (diffopt.Adam, {"betas": None}, "betas"),
    "one beta": (diffopt.Adam, {"betas": (0.9,)}, "betas"),
    "beta is a number": (diffopt.Adam, {"betas": 0.9}, "betas"),
    "eps, tensor": (diffopt.Adam, {"eps": torch.tensor(-1e-3)}, "eps"),
    "alpha, callable": (diffopt.RMSprop, {"alpha": lambda t: -0.5}, "alpha"),
}


@cases("case", OPTIONS)
def test_hyperparameters_of_a_wrong_kind_or_out_of_range(case: Any) -> None:
    inner, options, words = case
    with pytest.raises((TypeError, ValueError), match=f"(?i){words}"):
        _call(inner=inner, options={"lr": 0.1, **options})


def _other_dtype(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g.float() for n, g in grads.items()}


def _half(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g.half() for n, g in grads.items()}


def _complex(m: nn.Module, t: int) -> Tensor:
    return torch.complex(squares(m(data())), squares(m(data())))


VALUES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "complex loss": (REFUSALS, {"loss_fn": _complex}, "complex"),
    "loss.backward() in the loss": (REFUSALS, {"loss_fn": _loss_backward}, r"backward\(\)"),
    "storage is empty": (ValueError, {"storage": ""}, "storage"),
    "grad_transform in float32": (REFUSALS, {"grad_transform": _other_dtype}, "dtype|float32"),
    "grad_transform in float16": (REFUSALS, {"grad_transform": _half}, "dtype|float16"),
}


@cases("case", VALUES)
def test_values_that_cannot_be_used(case: Any) -> None:
    error, more, words = case
    if "storage" in more:
        with pytest.raises(error, match=words):
            _call(adjoint=diffopt.Segmented(2, storage=more["storage"]))
        with pytest.raises(error, match=words):
            _call(adjoint=diffopt.Binomial(2, storage=more["storage"]))
        return
    with pytest.raises(error, match=words):
        _call(**more)


@every_adjoint
def test_backward_within_the_loss_leaves_the_model_alone(adjoint: str) -> None:
    seed()
    train = Ours(ADJOINTS[adjoint])  # asserts that .grad stays None
    with pytest.raises(REFUSALS, match=r"backward\(\)"):
        train(small(), STEPS, _loss_backward)


@pytest.mark.parametrize("target", [None, 3, "model", {}], ids=str)
def test_load_into_something_else(target: Any) -> None:
    model, x = small(), data()
    fast = _unrolled(model, 1, lambda m, t: squares(m(x)))
    with pytest.raises(TypeError, match=r"(?i)module"):
        fast.load_into(target)


def test_parameters_on_meta_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(REFUSALS, match=r"(?s)1.*weight.*meta"):
        diffopt.unroll(model, inner, 1, lambda m, t: squares(m(torch.ones(1, 2))))


def test_learned_rate_of_a_wrong_sign_is_named_with_its_step() -> None:
    rate = learned(0.1)
    model, x = small(), data()
    inner = diffopt.SGD(model.parameters(), lr=lambda t: rate - 0.2 * (t == 2))
    with pytest.raises(ValueError, match=r"(?s)lr|learning rate"):
        squares(diffopt.unroll(model, inner, STEPS, lambda m, t: squares(m(x)))(x)).backward()
