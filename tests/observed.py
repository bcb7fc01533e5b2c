"""Experiments that are solved twice: by ``diffopt`` and by a plain training loop.

An experiment is a function of ``train``. It builds everything anew, trains, and gives the outer
loss and the tensors whose gradients are wanted. ``outcome`` runs it with the plain loop below,
which shares no code with diffopt and keeps every graph, and with ``diffopt.unroll``, and knows two
outcomes: the same gradient, or an error whose message names the cause. Either way the model is
afterwards what it was before.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
import random
import re
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from oracle import Plain, plain
from torch import Tensor, nn

import diffopt

ADJOINTS: dict[str, diffopt.Adjoint] = {
    "store-all": diffopt.StoreAll(),
    "segmented-1": diffopt.Segmented(1),
    "segmented-2": diffopt.Segmented(2),
    "segmented": diffopt.Segmented(),
    "binomial-2": diffopt.Binomial(2),
    "memory-budget": diffopt.MemoryBudget("1GiB"),
}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS)
#: Where it can only matter whether a step is stored or computed again.
stored_or_again = pytest.mark.parametrize("adjoint", ["store-all", "segmented-1"])

REFUSALS = (RuntimeError, ValueError, NotImplementedError, TypeError)
Expected = Literal["exact", "refused", "either"]
Inputs = Sequence[Tensor]
Experiment = Callable[["Train"], tuple[Tensor, Inputs]]

#: What the check of recomputed steps has to say.
CHANGED = r"step \d|step number|changed|verify=True|another|other tensor|in ?place"


def impure(adjoint: str) -> Expected:
    """What a step that is another when computed again has to give."""
    return {"store-all": "exact", "memory-budget": "either"}.get(adjoint, "refused")


def small() -> nn.Sequential:
    """17 float64 parameters, smooth in all of them."""
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def data(rows: int = 4, columns: int = 2) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.double)


def learned(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.double, requires_grad=True)


def squares(x: Tensor) -> Tensor:
    return x.square().mean()


def ids(table: Iterable[str]) -> list[str]:
    return [name.replace(" ", "-") for name in table]


def cases(name: str, table: Mapping[str, Any]) -> Any:
    """Parametrize over the values of a table, with its keys as names."""
    return pytest.mark.parametrize(name, list(table.values()), ids=ids(table))


class Train:
    """``train(model, steps, loss_fn, lr=...)``: gradient descent, by one of two ways."""

    #: Whether ``diffopt`` trains.
    ours = False

    def __call__(
        self,
        model: nn.Module,
        steps: int | Iterable[Any],
        loss_fn: Callable[..., Any],
        *,
        lr: Any = 0.3,
        inner: str = "",
        by: Callable[[list[Any]], Any] | None = None,
        rule: Callable[[dict[str, Tensor], dict[str, Tensor], int], dict[str, Tensor]]
        | None = None,
        **more: Any,
    ) -> Any:
        """Train the parameters whose names begin with ``inner``.

        ``by`` makes the optimizer that diffopt takes, where it is not SGD with ``lr``; ``rule``
        says in the plain loop what it does.
        """
        raise NotImplementedError


class ByHand(Train):
    """The plain loop."""

    def __call__(
        self,
        model: nn.Module,
        steps: Any,
        loss_fn: Any,
        *,
        lr: Any = 0.3,
        inner: str = "",
        by: Any = None,
        rule: Any = None,
        **more: Any,
    ) -> Plain:
        return plain(model, [(inner, {"lr": lr})], steps, loss_fn, rule=rule, **more)


class Guard:
    """What a module was like, to be compared later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = self._tensors()
        self.values = {name: x.detach().clone() for name, x in self.tensors.items()}
        self.flags = self._flags()

    def check(self, when: str) -> None:
        now = self._tensors()
        assert now.keys() == self.tensors.keys(), f"other parameters or buffers after {when}"
        for name, x in now.items():
            assert x is self.tensors[name], f"{name} is another tensor after {when}"
            same = torch.equal(x.detach(), self.values[name])
            assert same, f"the caller's {name} was changed by {when}"
            assert x.grad is None, f"{name}.grad was filled by {when}"
        assert self._flags() == self.flags, f"flags were changed by {when}"

    def _tensors(self) -> dict[str, Tensor]:
        found = dict(self.model.named_parameters(remove_duplicate=False))
        found.update(self.model.named_buffers(remove_duplicate=False))
        return found

    def _flags(self) -> list[Any]:
        requires = [x.requires_grad for x in self._tensors().values()]
        modules = [m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        places = [(list(m._parameters), list(m._buffers)) for m in modules]
        return [requires, places, [m.training for m in self.model.modules()]]


class Ours(Train):
    """``diffopt.unroll``, watched: the model must be the same after the call and after backward."""

    ours = True

    def __init__(self, adjoint: diffopt.Adjoint, **more: Any) -> None:
        self.adjoint, self.more = adjoint, more
        self.guards: dict[nn.Module, Guard] = {}  # the model before its first call

    def __call__(
        self,
        model: nn.Module,
        steps: Any,
        loss_fn: Any,
        *,
        lr: Any = 0.3,
        inner: str = "",
        by: Any = None,
        rule: Any = None,
        **more: Any,
    ) -> diffopt.Unrolled:
        named = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad and n.startswith(inner)
        ]
        opt = diffopt.SGD(named, lr=lr) if by is None else by(named)
        guard = Guard(model)
        self.guards.setdefault(model, guard)
        options = {"adjoint": self.adjoint, **self.more, **more}
        try:
            return diffopt.unroll(model, opt, steps, loss_fn, **options)
        finally:
            guard.check("the call")

    def check(self) -> None:
        for guard in self.guards.values():
            guard.check("the backward pass")


def seed(number: int = 0) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def gradients(outer: Tensor, inputs: Inputs) -> list[Tensor]:
    found = torch.autograd.grad(outer, list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def outcome(
    experiment: Experiment,
    adjoint: str,
    expected: Expected = "exact",
    words: str = CHANGED,
    **more: Any,
) -> str:
    """Compare diffopt with the plain loop; returns "exact" or "refused".

    Args:
        words: a regular expression that the message of an error has to match.
        more: further arguments of ``diffopt.unroll``.
    """
    want: list[Tensor] = []
    if expected != "refused":
        seed()
        outer, inputs = experiment(ByHand())
        want = [outer.detach(), *gradients(outer, inputs)]
        assert any(bool(g.abs().sum() > 0) for g in want[1:]), "the experiment has no gradient"
    seed()
    ours = Ours(ADJOINTS[adjoint], **more)
    message: str | None = None
    try:
        outer, inputs = experiment(ours)
        got = [outer.detach(), *gradients(outer, inputs)]
    except REFUSALS as error:
        if expected == "exact":
            raise
        message = str(error)
    ours.check()
    if message is not None:
        assert re.search(words, message), f"the message does not name the cause: {message}"
        return "refused"
    assert expected != "refused", "no error was raised"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return "exact"


# Holders: where a program keeps what a step uses, and how the name is bound anew.

Read = Callable[[], Any]
Bind = Callable[[Any], None]


@dataclasses.dataclass(slots=True)
class Slotted:
    value: Any


class ClassHolder:
    value: Any = None


class Bound:
    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self) -> Any:
        return self.value


class Key:
    """Something that can be a key, weakly."""


_VARIABLE: contextvars.ContextVar[Any] = contextvars.ContextVar("_VARIABLE")
_GLOBAL: Any = None


def _closure(value: Any) -> tuple[Read, Bind]:
    def bind(new: Any) -> None:
        nonlocal value
        value = new

    return lambda: value, bind


def _global(value: Any) -> tuple[Read, Bind]:
    def bind(new: Any) -> None:
        global _GLOBAL
        _GLOBAL = new

    bind(value)
    return lambda: _GLOBAL, bind


def _entry(make: Callable[[Any], Any], key: Any) -> Callable[[Any], tuple[Read, Bind]]:
    def holder(value: Any) -> tuple[Read, Bind]:
        held = make(value)
        return lambda: held[key], lambda new: held.__setitem__(key, new)

    return holder


def _attribute(make: Callable[[Any], Any], name: str = "value") -> Callable[[Any], Any]:
    def holder(value: Any) -> tuple[Read, Bind]:
        held = make(value)
        setattr(held, name, value)
        return lambda: getattr(held, name), lambda new: setattr(held, name, new)

    return holder


def _default(value: Any) -> tuple[Read, Bind]:
    def read(held: Any = value) -> Any:
        return held

    return read, lambda new: setattr(read, "__defaults__", (new,))


def _keyword_default(value: Any) -> tuple[Read, Bind]:
    def read(*, held: Any = value) -> Any:
        return held

    return read, lambda new: setattr(read, "__kwdefaults__", {"held": new})


def _partial(value: Any) -> tuple[Read, Bind]:
    read = functools.partial(lambda held: held, held=value)
    return read, lambda new: read.keywords.__setitem__("held", new)


def _bound_method(value: Any) -> tuple[Read, Bind]:
    held = Bound(value)
    return held.read, lambda new: setattr(held, "value", new)


def _context_variable(value: Any) -> tuple[Read, Bind]:
    _VARIABLE.set(value)
    return _VARIABLE.get, lambda new: (_VARIABLE.set(new), None)[1]


def _weak_dictionary(value: Any) -> tuple[Read, Bind]:
    key, held = Key(), weakref.WeakKeyDictionary[Key, Any]()
    held[key] = value
    return lambda: held[key], lambda new: held.__setitem__(key, new)


def _class_attribute(value: Any) -> tuple[Read, Bind]:
    ClassHolder.value = value
    return lambda: ClassHolder.value, lambda new: setattr(ClassHolder, "value", new)


def _function_attribute(value: Any) -> tuple[Read, Bind]:
    def read() -> Any:
        return read.value  # type: ignore[attr-defined]

    read.value = value  # type: ignore[attr-defined]
    return read, lambda new: setattr(read, "value", new)


def _inner_function(value: Any) -> tuple[Read, Bind]:
    read, bind = _closure(value)
    return lambda: (lambda: read())(), bind


def _cell(value: Any) -> tuple[Read, Bind]:
    cell = types.CellType(value)
    return lambda: cell.cell_contents, lambda new: setattr(cell, "cell_contents", new)


HOLDERS: dict[str, Callable[[Any], tuple[Read, Bind]]] = {
    "closure": _closure,
    "global": _global,
    "dict entry": _entry(lambda v: {"k": v}, "k"),
    "list entry": _entry(lambda v: [v], 0),
    "entry 64 of a list": _entry(lambda v: [None] * 64 + [v], 64),
    "deque": _entry(lambda v: collections.deque([v]), 0),
    "UserDict": _entry(lambda v: collections.UserDict({"k": v}), "k"),
    "ordered dict in a dict": _entry(lambda v: collections.OrderedDict(k=v), "k"),
    "ChainMap": _entry(lambda v: collections.ChainMap({}, {"k": v}), "k"),
    "mapping of defaults": _entry(lambda v: collections.defaultdict(lambda: v), "k"),
    "UserList": _entry(lambda v: collections.UserList([v]), 0),
    "SimpleNamespace": _attribute(lambda v: types.SimpleNamespace()),
    "slots dataclass": _attribute(Slotted),
    "class attribute": _class_attribute,
    "attribute of a module object": _attribute(lambda v: types.ModuleType("held")),
    "attribute of a loose nn.Module": _attribute(lambda v: nn.Module()),
    "function attribute": _function_attribute,
    "default argument": _default,
    "keyword default": _keyword_default,
    "partial": _partial,
    "bound method": _bound_method,
    "context variable": _context_variable,
    "weak dictionary": _weak_dictionary,
    "inner function": _inner_function,
    "cell": _cell,
}

every_holder = cases("holder", HOLDERS)
