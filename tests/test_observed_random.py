"""Random numbers of PyTorch are drawn again as they were, from wherever and by whatever part."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed import (
    CHANGED,
    HOLDERS,
    Inputs,
    Slotted,
    Train,
    cases,
    data,
    every_adjoint,
    every_holder,
    impure,
    learned,
    outcome,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

import diffopt
from diffopt.optim import Optimizer

STEPS = 4


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawing(read: Callable[[], torch.Generator], *kept: Any, model: Any = small) -> Any:
    """An experiment whose loss draws from ``read()`` twice a step."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        g = read()
        g.manual_seed(3)
        net, x = model(), data()

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            g = read()
            noisy = x + torch.randn(x.shape, generator=g, dtype=x.dtype)
            return squares(m(noisy) - torch.rand((), generator=g, dtype=x.dtype))

        fast = train(net, STEPS, loss_fn)
        after = torch.rand(2, generator=g, dtype=x.dtype)  # it has advanced as in a plain loop
        outer = squares(fast(x) - after)
        return outer, list(net.parameters())

    return experiment


@every_holder
@stored_or_again
def test_generator_in_any_holder(adjoint: str, holder: Any) -> None:
    read, _ = holder(generator())
    outcome(drawing(read), adjoint)


def _nested(value: Any) -> Any:
    held = types.SimpleNamespace(a=Slotted({"b": [collections.deque([(value,)])]}))
    return lambda: held.a.value["b"][0][0][0]


def _dispatch(value: Any) -> Any:
    @functools.singledispatch
    def read(_: Any) -> Any:
        return value

    return lambda: read(0)


def _iterated(value: Any) -> Any:
    def forever() -> Any:
        while True:
            yield value

    held = forever()
    return lambda: next(held)


def _cached(value: Any) -> Any:
    @functools.cache
    def read() -> Any:
        return value

    return read


def _slotted_class(value: Any) -> Any:
    class Held:
        __slots__ = ("g",)

    held = Held()
    held.g = value
    return lambda: held.g


def _property(value: Any) -> Any:
    class Held:
        @property
        def g(self) -> Any:
            return value

    held = Held()
    return lambda: held.g


def _getattr(value: Any) -> Any:
    class Held:
        def __getattr__(self, name: str) -> Any:
            return value

    held = Held()
    return lambda: held.anything


def _frozenset(value: Any) -> Any:
    held = frozenset([value])
    return lambda: next(iter(held))


def _exception(value: Any) -> Any:
    held = ValueError(value)
    return lambda: held.args[0]


def _metaclass(value: Any) -> Any:
    class Meta(type):
        g = value

    class Held(metaclass=Meta):
        pass

    return lambda: Held.g


OTHER_HOLDERS = {
    "nested deep": _nested,
    "single dispatch": _dispatch,
    "iterator": _iterated,
    "cache": _cached,
    "slots": _slotted_class,
    "property": _property,
    "__getattr__": _getattr,
    "frozenset": _frozenset,
    "exception": _exception,
    "metaclass": _metaclass,
}


@cases("holder", OTHER_HOLDERS)
@stored_or_again
def test_generator_in_odd_holders(adjoint: str, holder: Any) -> None:
    outcome(drawing(holder(generator())), adjoint)


class Many(nn.Module):
    """More than a thousand submodules, of which three are used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.rest = nn.ModuleList(nn.Identity() for _ in range(1100))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("holder", ["closure", "global", "SimpleNamespace"])
@every_adjoint
def test_generator_beside_a_model_of_a_thousand_modules(adjoint: str, holder: str) -> None:
    read, _ = HOLDERS[holder](generator())
    outcome(drawing(read, model=Many), adjoint)


# Ways to draw.


def _uniform(g: torch.Generator, x: Tensor) -> Tensor:
    return x + torch.empty_like(x).uniform_(generator=g)


def _normal(g: torch.Generator, x: Tensor) -> Tensor:
    return torch.normal(x, torch.ones_like(x), generator=g)


def _bernoulli(g: torch.Generator, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x, 0.5), generator=g)


def _multinomial(g: torch.Generator, x: Tensor) -> Tensor:
    return x[torch.multinomial(torch.ones(len(x)), 3, replacement=True, generator=g)]


def _randperm(g: torch.Generator, x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=g)[:2]]


def _init(g: torch.Generator, x: Tensor) -> Tensor:
    return x + nn.init.orthogonal_(torch.empty_like(x), generator=g)


def _number(g: torch.Generator, x: Tensor) -> Tensor:
    return x * torch.randint(1, 5, (), generator=g).item()


def _positional(g: torch.Generator, x: Tensor) -> Tensor:
    return x + torch.poisson(torch.full_like(x, 2.0), g)


def _sampler(g: torch.Generator, x: Tensor) -> Tensor:
    order = torch.utils.data.RandomSampler(range(len(x)), generator=g)
    return x[list(order)[:2]]


def _random_split(g: torch.Generator, x: Tensor) -> Tensor:
    chosen, _ = torch.utils.data.random_split(range(len(x)), [2, len(x) - 2], generator=g)
    return x[list(chosen)]


def _weighted_sampler(g: torch.Generator, x: Tensor) -> Tensor:
    sampler = torch.utils.data.WeightedRandomSampler([0.5, 0.2, 0.2, 0.1], 3, generator=g)
    return x[list(sampler)]


def _seeds_another(g: torch.Generator, x: Tensor) -> Tensor:
    seed = int(torch.randint(0, 1000, (), generator=g))
    return x + torch.randn(x.shape, generator=generator(seed), dtype=x.dtype)


def _copy(g: torch.Generator, x: Tensor) -> Tensor:
    made = torch.Generator()
    made.set_state(g.get_state())
    g.manual_seed(int(torch.randint(0, 1000, (), generator=g)))
    return x + torch.randn(x.shape, generator=made, dtype=x.dtype)


WAYS = {
    "uniform_": _uniform,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "randperm": _randperm,
    "nn.init": _init,
    "a number": _number,
    "positional": _positional,
    "RandomSampler": _sampler,
    "random_split": _random_split,
    "WeightedRandomSampler": _weighted_sampler,
    "seeds another": _seeds_another,
    "copies its state": _copy,
}


@cases("draw", WAYS)
@stored_or_again
def test_generator_used_in_any_way(adjoint: str, draw: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        held = types.SimpleNamespace(g=generator())
        model, x = small(), data()
        fast = train(model, STEPS, lambda m, t: squares(m(draw(held.g, x)) - 1))
        after = torch.rand(2, generator=held.g, dtype=x.dtype)
        return squares(fast(x) - after), list(model.parameters())

    outcome(experiment, adjoint)


def _sampler_in_a_holder(train: Train) -> tuple[Tensor, Inputs]:
    sampler = torch.utils.data.RandomSampler(range(4), generator=generator())
    model, x = small(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x[list(sampler)[:2]]) - 1))
    return squares(fast(x)), list(model.parameters())


def _only_at_a_later_step(train: Train) -> tuple[Tensor, Inputs]:
    held = Slotted(generator())
    model, x = small(), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        noise = torch.rand((), generator=held.value, dtype=x.dtype) if t in (1, 3) else 0.5
        return squares(m(x) - noise)

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _made_at_the_first_step(train: Train) -> tuple[Tensor, Inputs]:
    held = types.SimpleNamespace(g=None)
    model, x = small(), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        if t == 0:
            held.g = generator(11)
        return squares(m(x) - torch.rand((), generator=held.g, dtype=x.dtype))

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _seeded_at_every_step(train: Train) -> tuple[Tensor, Inputs]:
    held = types.SimpleNamespace(g=generator())
    model, x = small(), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        held.g.manual_seed(t)
        return squares(m(x) - torch.rand((), generator=held.g, dtype=x.dtype))

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _two_and_the_global_one(train: Train) -> tuple[Tensor, Inputs]:
    a, b = types.SimpleNamespace(g=generator(1)), Slotted(generator(2))
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        g = a.g if t % 2 else b.value
        return squares(m(x + torch.rand(x.shape, generator=g, dtype=x.dtype)) - 1)

    fast = train(model, STEPS, loss_fn)
    after = [torch.rand(2, generator=g, dtype=x.dtype) for g in (a.g, b.value, None)]
    return squares(fast(x) - sum(after)), list(model.parameters())


def _fork_rng_inside(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(t)
            noise = torch.rand_like(x)
        return squares(m(x + noise) - 1)

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _in_a_rate(train: Train) -> tuple[Tensor, Inputs]:
    held = types.SimpleNamespace(g=generator())
    model, x, rate = small(), data(), learned(0.5)
    lr = lambda t: rate * torch.rand((), generator=held.g, dtype=x.dtype)  # noqa: E731
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), lr=lr)
    return squares(fast(x)), [*model.parameters(), rate]


def _in_a_rate_globally(train: Train) -> tuple[Tensor, Inputs]:
    model, x, rate = nn.Sequential(small(), nn.Dropout(0.5)), data(), learned(0.5)
    lr = lambda t: rate * torch.rand((), dtype=x.dtype)  # noqa: E731
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), lr=lr)
    return squares(fast(x)), [*model.parameters(), rate]


def _in_grad_transform(train: Train) -> tuple[Tensor, Inputs]:
    held = collections.deque([generator()])
    model, x, size = small(), data(), learned(0.5)

    def noisy(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: g * (1 + size * torch.randn(g.shape, generator=held[0], dtype=g.dtype))
            for n, g in grads.items()
        }

    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), grad_transform=noisy)
    return squares(fast(x)), [*model.parameters(), size]


def _dropout_in_grad_transform(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()

    def dropped(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: nn.functional.dropout(g, 0.5) for n, g in grads.items()}

    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), grad_transform=dropped)
    return squares(fast(x)), list(model.parameters())


SETTINGS = {
    "sampler in a closure": _sampler_in_a_holder,
    "only at later steps": _only_at_a_later_step,
    "seeded at every step": _seeded_at_every_step,
    "two and the global one": _two_and_the_global_one,
    "fork_rng": _fork_rng_inside,
    "in a rate": _in_a_rate,
    "in a rate, globally": _in_a_rate_globally,
    "in grad_transform": _in_grad_transform,
    "dropout in grad_transform": _dropout_in_grad_transform,
}


@cases("experiment", SETTINGS)
@every_adjoint
def test_random_numbers_in_other_parts(adjoint: str, experiment: Any) -> None:
    outcome(experiment, adjoint)


@every_adjoint
def test_generator_made_at_the_first_step(adjoint: str) -> None:
    outcome(_made_at_the_first_step, adjoint, "either", CHANGED)


# A rule with random numbers.


class Noisy(Optimizer):
    """p ← p − lr (g + s ξ), with ξ made by ``draw``, and a momentum where ``beta`` is not 0."""

    def __init__(self, params: Any, draw: Any, lr: Any = 0.1, s: Any = 0.5) -> None:
        self.draw = draw
        super().__init__(params, {"lr": lr, "s": s})

    def _init(self, hyper: Any, param: Tensor) -> dict[str, Tensor]:
        return {}

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        moved = [
            p - hyper["lr"] * self.draw(g, hyper["s"]) for p, g in zip(params, grads, strict=True)
        ]
        return moved, states


HELD = types.SimpleNamespace(g=generator())

DRAWS = {
    "randn_like": lambda g, s: g + s * torch.randn_like(g),
    "rand": lambda g, s: g + s * torch.rand(g.shape, dtype=g.dtype),
    "bernoulli": lambda g, s: g * s * torch.bernoulli(torch.full_like(g, 0.5)),
    "dropout": lambda g, s: s * nn.functional.dropout(g, 0.3),
    "randperm": lambda g, s: g + s * g.flatten()[torch.randperm(g.numel())].view_as(g),
    "exponential_": lambda g, s: g + s * torch.empty_like(g).exponential_(),
    "normal": lambda g, s: torch.normal(0.0, 1.0, g.shape, dtype=g.dtype) * s + g,
    "generator": lambda g, s: g + s * torch.randn(g.shape, generator=HELD.g, dtype=g.dtype),
    "a coin": lambda g, s: g * s if torch.rand(()) < 0.5 else g,
    "multinomial": lambda g, s: g * (1 + s * torch.multinomial(torch.ones(3), 1).item()),
}


@cases("draw", DRAWS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "with-dropout"])
@every_adjoint
def test_random_numbers_in_a_rule(adjoint: str, dropout: bool, draw: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        HELD.g.manual_seed(2)
        model, x, lr, s = small(), data(), learned(0.2), learned(0.4)
        if dropout:
            model.append(nn.Dropout(0.5))

        def rule(params: Any, grads: Any, t: int) -> Any:
            return {n: params[n] - lr * draw(g, s) for n, g in grads.items()}

        fast = train(
            model,
            STEPS,
            lambda m, t: squares(m(x) - 1),
            by=lambda named: Noisy(named, draw, lr=lr, s=s),
            rule=rule,
        )
        after = torch.rand(2, dtype=x.dtype)
        return squares(fast(x) - after), [*model.parameters(), lr, s]

    outcome(experiment, adjoint)


@every_adjoint
def test_numpys_random_numbers_in_a_rule(adjoint: str) -> None:
    import numpy as np

    def draw(g: Tensor, s: Any) -> Tensor:
        return g * (1 + s * np.random.rand())

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, lr = small(), data(), learned(0.2)
        fast = train(
            model,
            STEPS,
            lambda m, t: squares(m(x) - 1),
            by=lambda named: Noisy(named, draw, lr=lr, s=0.5),
            rule=lambda params, grads, t: {
                n: params[n] - lr * draw(g, 0.5) for n, g in grads.items()
            },
        )
        return squares(fast(x)), [*model.parameters(), lr]

    # With a stored graph, the update runs once.
    outcome(experiment, adjoint, impure(adjoint), CHANGED)


def test_unseeded_generator_that_the_loss_makes_is_named() -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            g = torch.Generator()
            g.seed()
            return squares(m(x) - torch.rand((), generator=g, dtype=x.dtype))

        fast = train(model, STEPS, loss_fn)
        return squares(fast(x)), list(model.parameters())

    for adjoint in ("segmented-1", "segmented-2", "binomial-2"):
        outcome(experiment, adjoint, "refused", CHANGED)


def test_the_same_twice() -> None:
    """Backward passes leave every generator alone."""
    model, x, held = small(), data(), Slotted(generator())
    inner = diffopt.SGD(model.parameters(), lr=0.1)

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        return squares(m(x) - torch.rand((), generator=held.value, dtype=x.dtype))

    fast = diffopt.unroll(model, inner, STEPS, loss_fn, adjoint=diffopt.Segmented(2))
    before = held.value.get_state(), torch.get_rng_state()
    outer = squares(fast(x))
    first = torch.autograd.grad(outer, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(outer, list(model.parameters()))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(before[0], held.value.get_state())
    assert torch.equal(before[1], torch.get_rng_state())
