"""What PyTorch does not see, and a step depends on: the right gradient, or the check's words.

A stored graph was made by the step that ran, so it is right; whoever computes a step again finds
another one, and says which.
"""

from __future__ import annotations

import collections
import itertools
import random
import secrets
import types
from typing import Any

import numpy as np
import pytest
import torch
from observed import (
    ADJOINTS,
    CHANGED,
    Inputs,
    Ours,
    Train,
    cases,
    data,
    every_adjoint,
    impure,
    learned,
    outcome,
    small,
    squares,
)
from torch import Tensor, nn

STEPS = 4

#: A number, from something that is another one each time it is asked.
Source = Any


def _numpy() -> Source:
    return np.random.rand


def _numpy_generator() -> Source:
    made = np.random.default_rng(3)
    return made.normal


def _numpy_state() -> Source:
    made = np.random.RandomState(3)
    return lambda: made.permutation(5)[0]


def _python() -> Source:
    return random.random


def _python_choice() -> Source:
    return lambda: random.choice([0.1, 0.5, 0.9, 1.3, 1.7, 2.1])


def _python_shuffle() -> Source:
    held = [0.1 * i for i in range(20)]
    return lambda: (random.shuffle(held), held[0])[1]


def _python_own() -> Source:
    return random.Random(3).gauss


def _count() -> Source:
    numbers = itertools.count(1)
    return lambda: 0.3 * next(numbers)


def _cycle() -> Source:
    numbers = itertools.cycle([0.2, 0.5, 1.1, 1.7, 2.3])
    return lambda: next(numbers)


def _generator_function() -> Source:
    def numbers() -> Any:
        value = 0.5
        while True:
            value = 3.7 * value * (1 - value)
            yield value

    held = numbers()
    return lambda: next(held)


def _growing_list() -> Source:
    held: list[float] = []
    return lambda: (held.append(1.0), 0.3 * len(held))[1]


def _rotating_deque() -> Source:
    held = collections.deque([0.2, 0.5, 1.1, 1.7, 2.3])
    return lambda: (held.rotate(), held[0])[1]


def _popped_list() -> Source:
    held = [0.1 * i for i in range(200)]
    return lambda: held.pop()


def _growing_set() -> Source:
    held: set[int] = set()
    return lambda: (held.add(len(held)), 0.3 * len(held))[1]


def _attribute() -> Source:
    held = types.SimpleNamespace(n=0)

    def read() -> float:
        held.n += 1
        return 0.3 * held.n

    return read


class Walk:
    """An environment: it moves by what it is given, and remembers where it is."""

    def __init__(self) -> None:
        self.place = 0.1

    def step(self, action: float) -> float:
        self.place = 0.8 * self.place + 0.3 * action + 0.1
        return self.place


def _environment() -> Source:
    made = Walk()
    return lambda: made.step(1.0)


def _annealed() -> Source:
    held = {"temperature": 1.0}

    def read() -> float:
        held["temperature"] *= 0.8
        return held["temperature"]

    return read


def _array_in_place() -> Source:
    held = np.ones(3)

    def read() -> float:
        held[:] *= 0.9
        return float(held[0])

    return read


SOURCES = {
    "numpy.random": _numpy,
    "NumPy's default_rng": _numpy_generator,
    "RandomState": _numpy_state,
    "random.random": _python,
    "random.choice": _python_choice,
    "random.shuffle": _python_shuffle,
    "random.Random": _python_own,
    "itertools.count": _count,
    "itertools.cycle": _cycle,
    "generator function": _generator_function,
    "list that grows": _growing_list,
    "deque that rotates": _rotating_deque,
    "list that is popped": _popped_list,
    "set that grows": _growing_set,
    "counter in an attribute": _attribute,
    "environment": _environment,
    "annealed number": _annealed,
    "NumPy array in place": _array_in_place,
}


def _in_the_loss(x: Tensor, read: Source, rate: Tensor) -> Any:
    return lambda m, t: squares(m(x) - read()), {}


def _as_noise(x: Tensor, read: Source, rate: Tensor) -> Any:
    def loss_fn(m: nn.Module, t: int) -> Tensor:
        noise = torch.tensor([read() for _ in range(len(x))], dtype=x.dtype)
        return squares(m(x + noise[:, None]) - 1)

    return loss_fn, {}


def _in_the_rate(x: Tensor, read: Source, rate: Tensor) -> Any:
    return lambda m, t: squares(m(x) - 1), {"lr": lambda t: rate * (0.5 + read())}


def _in_grad_transform(x: Tensor, read: Source, rate: Tensor) -> Any:
    def scaled(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        number = 0.5 + read()
        return {name: number * g for name, g in grads.items()}

    return lambda m, t: squares(m(x) - 1), {"grad_transform": scaled}


def _in_the_gradient_alone(x: Tensor, read: Source, rate: Tensor) -> Any:
    def loss_fn(m: nn.Module, t: int) -> Tensor:
        out = squares(m(x))
        return squares(m(x) - 1) + read() * (out - out.detach())

    return loss_fn, {}


USES = {
    "in the loss": _in_the_loss,
    "as noise": _as_noise,
    "in the rate": _in_the_rate,
    "in grad_transform": _in_grad_transform,
    "in the gradient alone": _in_the_gradient_alone,
}


def using(source: Any, use: Any) -> Any:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, rate = small(), data(), learned(0.2)
        loss_fn, more = use(x, source(), rate)
        fast = train(model, STEPS, loss_fn, **{"lr": rate, **more})
        return squares(fast(x)), [*model.parameters(), rate]

    return experiment


@cases("source", SOURCES)
@every_adjoint
def test_loss_of_numbers_out_of_sight(adjoint: str, source: Any) -> None:
    words = r"step \d(.|\n)*verify=True"
    outcome(using(source, _in_the_loss), adjoint, impure(adjoint), words)


@cases("source", SOURCES)
@cases("use", {k: v for k, v in USES.items() if v is not _in_the_loss})
@pytest.mark.parametrize("adjoint", ["segmented-1"])
def test_other_parts_of_numbers_out_of_sight(adjoint: str, use: Any, source: Any) -> None:
    # A rate may be kept from the first pass, which is right, too.
    outcome(using(source, use), adjoint, "either", CHANGED)


@cases("use", USES)
@every_adjoint
def test_numpys_numbers_in_any_part(adjoint: str, use: Any) -> None:
    in_loss = use in (_in_the_loss, _as_noise)
    expected = impure(adjoint) if in_loss or adjoint == "store-all" else "either"
    outcome(using(_numpy, use), adjoint, expected, CHANGED)


@cases("source", {"numpy.random": _numpy, "count": _count, "environment": _environment})
@pytest.mark.parametrize("adjoint", [name for name in ADJOINTS if name != "store-all"])
def test_verify_names_the_step(adjoint: str, source: Any) -> None:
    expected = impure(adjoint)
    outcome(using(source, _in_the_loss), adjoint, expected, r"step \d", verify=True)


@pytest.mark.parametrize("differs_at", range(STEPS))
@pytest.mark.parametrize("adjoint", ["segmented-1", "segmented-2", "binomial-2"])
def test_the_first_step_that_differs_is_named(adjoint: str, differs_at: int) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            return squares(m(x) - (random.random() if t == differs_at else 1))

        fast = train(model, STEPS, loss_fn)
        return squares(fast(x)), list(model.parameters())

    # The steps after it differ too, where they are computed again from its result.
    outcome(experiment, adjoint, "refused", rf"step {differs_at}\b")


# State that a module hides in attributes: tensors this time.


class Hidden(nn.Module):
    """A recurrent state between the steps, kept by ``keep``, which is no buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = small(), how
        self.h: Any = torch.full((2,), 0.1, dtype=torch.double)
        self.states: Any = {"h": self.h, "list": [self.h]}

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        new = out.mean(0).tanh()
        if self.how == "attribute":
            out, self.h = out + self.h, new.detach()
        elif self.how == "attribute with its graph":
            out, self.h = out + self.h, new
        elif self.how == "in place":
            out = out + self.h.clone()
            self.h.mul_(0.5).add_(new.detach())
        elif self.how == "in place by copy_":
            out = out + self.h.clone()
            self.h.copy_(new.detach())
        elif self.how == "through .data":
            out = out + self.h.clone()
            self.h.data = new.detach()
        elif self.how == "dictionary":
            out, self.states["h"] = out + self.states["h"], new.detach()
        elif self.how == "list":
            out = out + sum(self.states["list"])
            self.states["list"].append(new.detach())
        elif self.how == "float":
            out, self.h = out + self.h, new.sum().item()
        elif self.how == "NumPy":
            held = torch.as_tensor(np.asarray(self.h))
            out, self.h = out + held, new.detach().numpy()
        elif self.how == "setattr on the class":
            out, Hidden.shared = out + Hidden.shared, new.detach()
        else:
            assert self.how == "loose module"
            out = out + self.states["h"]
            object.__setattr__(self, "states", {"h": new.detach()})
        return out

    shared: Any = None


HOWS = [
    "attribute",
    "attribute with its graph",
    "in place",
    "in place by copy_",
    "through .data",
    "dictionary",
    "list",
    "float",
    "NumPy",
    "setattr on the class",
    "loose module",
]


@pytest.mark.parametrize("how", HOWS)
@every_adjoint
def test_state_hidden_in_attributes(adjoint: str, how: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        Hidden.shared = torch.full((2,), 0.1, dtype=torch.double)
        model, x = Hidden(how), data()
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        net = [fast.params[name] for name in fast.params]
        return sum(squares(p) for p in net), list(model.parameters())  # type: ignore[return-value]

    expected = "exact" if adjoint == "store-all" and "graph" not in how else "either"
    outcome(experiment, adjoint, expected, rf"{CHANGED}|step \d")  # type: ignore[arg-type]


# Effects that change no result must raise no alarm.


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.log: list[Any] = []
        self.calls = 0
        self.last: Any = None
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        key = tuple(x.shape)
        if key not in self.cache:
            self.cache[key] = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        out: Tensor = self.net(x + self.cache[key])
        self.last = out
        self.log.append(out.mean().item())
        return out


def _logging(train: Train) -> tuple[Tensor, Inputs]:
    model, x = Logging(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
    return squares(fast(x)), list(model.parameters())


def _unused_numbers(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        np.random.rand()
        random.random()
        secrets.token_bytes(2)
        return squares(m(x) - 1)

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _seeded_numpy(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - np.random.default_rng(t).normal()))
    return squares(fast(x)), list(model.parameters())


def _constant_loss_is_nan(train: Train) -> tuple[Tensor, Inputs]:
    """NaN equals NaN: it is no difference."""
    model, x = small(), data()
    nan = torch.tensor(float("nan"), dtype=x.dtype)

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        return squares(m(x)) + (nan if t == 2 else 0.0)

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _value_in_attribute_within_a_step(train: Train) -> tuple[Tensor, Inputs]:
    """What a layer leaves for the next one of the same step."""
    model, x, held = small(), data(), types.SimpleNamespace(mask=None)

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        held.mask = torch.rand_like(x)
        return squares(m(x * held.mask) - held.mask)

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


def _schedule_by_the_step_number(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    rates = [0.1, 0.2, 0.3, 0.4]
    fast = train(model, STEPS, lambda m, t: squares(m(x) - t), lr=lambda t: rates[t])
    return squares(fast(x)), list(model.parameters())


def _memo_of_the_weights(train: Train) -> tuple[Tensor, Inputs]:
    """A memo that is filled and emptied within each step."""
    model, x, memo = small(), data(), {}

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        memo["w"] = m[0].weight.square().sum()
        return squares(m(x) - 1) + memo.pop("w")

    fast = train(model, STEPS, loss_fn)
    return squares(fast(x)), list(model.parameters())


HARMLESS = {
    "logs, counters and constant caches": _logging,
    "numbers that nothing uses": _unused_numbers,
    "NumPy, seeded at each step": _seeded_numpy,
    "value within a step": _value_in_attribute_within_a_step,
    "schedule": _schedule_by_the_step_number,
    "memo within a step": _memo_of_the_weights,
}


@cases("experiment", HARMLESS)
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@every_adjoint
def test_no_false_alarm(adjoint: str, verify: bool, experiment: Any) -> None:
    outcome(experiment, adjoint, verify=verify)


@every_adjoint
def test_nan_is_no_difference(adjoint: str) -> None:
    outer, inputs = _constant_loss_is_nan(Ours(ADJOINTS[adjoint]))
    grads = torch.autograd.grad(outer, list(inputs))
    assert grads[0].shape == inputs[0].shape


# What reads the loss of a step by another way than the argument.


def _box(kind: str) -> tuple[Any, Any]:
    """How a loss is put aside, and how it is read."""
    if kind == "list":
        held: Any = []
        return held.append, lambda: held[-1]
    if kind == "list entry":
        entry: Any = [None]
        return lambda x: entry.__setitem__(0, x), lambda: entry[0]
    if kind == "dict":
        table: Any = {}
        return lambda x: table.__setitem__("loss", x), lambda: table["loss"]
    if kind == "deque":
        deque: Any = collections.deque(maxlen=1)
        return deque.append, lambda: deque[0]
    if kind == "namespace":
        space = types.SimpleNamespace()
        return lambda x: setattr(space, "loss", x), lambda: space.loss
    if kind == "number":
        return _box_of_numbers()
    assert kind == "detached"
    value: Any = [None]
    return lambda x: value.__setitem__(0, x.detach()), lambda: value[0]


def _box_of_numbers() -> tuple[Any, Any]:
    held: Any = [None]
    return lambda x: held.__setitem__(0, x.item()), lambda: held[0]


BOXES = ["list", "list entry", "dict", "deque", "namespace", "detached", "number"]


def _polyak_transform(model: nn.Module, x: Tensor, read: Any) -> Any:
    def transform(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = sum(g.square().sum() for g in grads.values())
        return {name: g * (read() / (norm + 0.1)) for name, g in grads.items()}

    return {"grad_transform": transform, "lr": 0.5}


def _polyak_rate(model: nn.Module, x: Tensor, read: Any) -> Any:
    return {"lr": lambda t: 0.2 * read()}


def _polyak_rule(model: nn.Module, x: Tensor, read: Any) -> Any:
    from diffopt.optim import Optimizer

    class Polyak(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.5})

        def _init(self, hyper: Any, param: Tensor) -> dict[str, Tensor]:
            return {}

        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            norm = sum(g.square().sum() for g in grads)
            size = 0.5 * read() / (norm + 0.1)
            return [p - size * g for p, g in zip(params, grads, strict=True)], states

    def rule(params: Any, grads: Any, t: int) -> Any:
        norm = sum(g.square().sum() for g in grads.values())
        return {n: params[n] - 0.5 * read() / (norm + 0.1) * g for n, g in grads.items()}

    return {"by": Polyak, "rule": rule}


READERS = {
    "grad_transform": _polyak_transform,
    "rate": _polyak_rate,
    "rule": _polyak_rule,
}


@pytest.mark.parametrize("box", BOXES)
@cases("reader", READERS)
@every_adjoint
def test_polyak_steps_read_the_loss(adjoint: str, reader: Any, box: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = small(), data()
        put, read = _box(box)
        put(torch.ones((), dtype=x.dtype))

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            loss = squares(m(x) - 1)
            put(loss)
            return loss

        fast = train(model, STEPS, loss_fn, **reader(model, x, read))
        return squares(fast(x)), list(model.parameters())

    constant = box in ("detached", "number")
    outcome(experiment, adjoint, "exact" if constant else "either", rf"{CHANGED}|loss")
