"""A parameter that is reached by a second way: ``torch.optim``'s trajectory, or its name."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed import (
    Inputs,
    Slotted,
    Train,
    cases,
    data,
    every_adjoint,
    outcome,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

STEPS = 4
Way = Callable[[Any], Callable[[], Tensor]]


class Tied(nn.Module):
    """Decodes by the transposed weight of its encoder, reached by ``way``."""

    def __init__(self, way: Way | None) -> None:
        super().__init__()
        self.enc = nn.Linear(2, 3).double()
        # The oracle takes the weight from its module, which nobody doubts.
        self.__dict__["weight"] = (lambda: self.enc.weight) if way is None else way(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.enc(x).tanh() @ self.weight()


def _list(m: Any) -> Any:
    m.tied = [m.enc.weight]
    return lambda: m.tied[0]


def _dict(m: Any) -> Any:
    m.tied = {"w": m.enc.weight}
    return lambda: m.tied["w"]


def _tuple(m: Any) -> Any:
    m.tied = (m.enc.weight, m.enc.bias)
    return lambda: m.tied[0]


def _closure(m: Any) -> Any:
    weight = m.enc.weight
    return lambda: weight


def _default(m: Any) -> Any:
    return lambda weight=m.enc.weight: weight


def _partial(m: Any) -> Any:
    return functools.partial(lambda w: w, m.enc.weight)


def _namespace(m: Any) -> Any:
    held = types.SimpleNamespace(w=m.enc.weight)
    return lambda: held.w


def _slotted(m: Any) -> Any:
    held = Slotted(m.enc.weight)
    return lambda: held.value


def _deque(m: Any) -> Any:
    held = collections.deque([m.enc.weight])
    return lambda: held[0]


def _weak(m: Any) -> Any:
    held = weakref.ref(m.enc.weight)
    return held


def _method(m: Any) -> Any:
    return m.enc.weight.clone


def _iterator(m: Any) -> Any:
    held = list(m.parameters())
    return lambda: next(iter(held))


def _dunder(m: Any) -> Any:
    object.__setattr__(m, "_hidden", m.enc.weight)
    return lambda: m._hidden


def _view(m: Any) -> Any:
    held = m.enc.weight.view(-1)
    return lambda: held.view(3, 2)


def _transposed(m: Any) -> Any:
    held = m.enc.weight.t()
    return lambda: held.t()


def _optimizer(m: Any) -> Any:
    held = torch.optim.SGD([m.enc.weight], lr=0.1)
    return lambda: held.param_groups[0]["params"][0]


def _class_attribute(m: Any) -> Any:
    kind = type("Held", (), {"w": m.enc.weight})
    return lambda: kind.w


def _module_without_registration(m: Any) -> Any:
    held = [m.enc]  # the module itself: what stands in it is right
    return lambda: held[0].weight


def _state_dict(m: Any) -> Any:
    held = m.state_dict(keep_vars=True)
    return lambda: held["enc.weight"]


WAYS: dict[str, Way] = {
    "list": _list,
    "dict": _dict,
    "tuple": _tuple,
    "closure": _closure,
    "default argument": _default,
    "partial": _partial,
    "SimpleNamespace": _namespace,
    "slots": _slotted,
    "deque": _deque,
    "weak reference": _weak,
    "method": _method,
    "list of parameters": _iterator,
    "__setattr__": _dunder,
    "view": _view,
    "transposed": _transposed,
    "param_groups": _optimizer,
    "class attribute": _class_attribute,
    "module in a list": _module_without_registration,
    "state_dict": _state_dict,
}


def reached(way: Way, *, beside: bool) -> Any:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Tied(way if train.ours else None), data()
        inputs = list(model.parameters())

        def loss_fn(m: Any, t: int) -> Tensor:
            return squares(m(x) - 1) if beside else squares(m.weight() - 1) + 0 * m.enc.bias.sum()

        fast = train(model, STEPS, loss_fn)
        return sum(squares(p) for p in fast.params.values()), inputs  # type: ignore[return-value]

    return experiment


@pytest.mark.parametrize("beside", [True, False], ids=["beside-its-module", "alone"])
@cases("way", WAYS)
@stored_or_again
def test_parameter_reached_by_a_second_way(adjoint: str, way: Way, beside: bool) -> None:
    outcome(reached(way, beside=beside), adjoint, "either", r"enc\.weight|verify=True")


@cases("way", WAYS)
@pytest.mark.parametrize("adjoint", ["store-all", "segmented-2"])
def test_only_at_a_later_step(adjoint: str, way: Way) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Tied(way if train.ours else None), data()
        inputs = list(model.parameters())

        def loss_fn(m: Any, t: int) -> Tensor:
            return squares(m(x) - 1) if t == 2 else squares(m.enc(x) - 1)

        fast = train(model, STEPS, loss_fn)
        return sum(squares(p) for p in fast.params.values()), inputs  # type: ignore[return-value]

    outcome(experiment, adjoint, "either", r"enc\.weight|verify=True")


@cases("way", {k: WAYS[k] for k in ("list", "closure", "SimpleNamespace", "view")})
@stored_or_again
def test_frozen_parameter_reached_by_a_second_way(adjoint: str, way: Way) -> None:
    """One outside the optimizer that nothing moves is a constant: any way to it is right."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Tied(way), data()
        model.head = nn.Linear(2, 2).double()
        inputs = list(model.parameters())
        fast = train(model, STEPS, lambda m, t: squares(m.head(m(x)) - 1), inner="head")
        return sum(squares(p) for p in fast.params.values()), inputs  # type: ignore[return-value]

    outcome(experiment, adjoint)


# Memory that is shared without being one parameter.


def _shared_data(m: Any) -> None:
    m.second = nn.Parameter(m.first.data)


def _shared_view(m: Any) -> None:
    m.second = nn.Parameter(m.first.data[:1])


def _shared_transposed(m: Any) -> None:
    m.second = nn.Parameter(m.first.data.t())


def _shared_detached(m: Any) -> None:
    m.second = nn.Parameter(m.first.detach())


def _one_flat_vector(m: Any) -> None:
    flat = torch.randn(8, dtype=torch.double)
    m.first, m.second = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[2:6].view(2, 2))


def _expanded(m: Any) -> None:
    m.first = nn.Parameter(torch.ones(1, 2, dtype=torch.double).expand(2, 2))


def _through_numpy(m: Any) -> None:
    m.second = nn.Parameter(torch.from_numpy(m.first.detach().numpy()))


def _set(m: Any) -> None:
    m.second = nn.Parameter(torch.empty(0, dtype=torch.double).set_(m.first.data))


def _buffer_of_a_parameter(m: Any) -> None:
    m.register_buffer("second", m.first.data)


SHARED = {
    ".data": _shared_data,
    "row": _shared_view,
    "transposed": _shared_transposed,
    "detach": _shared_detached,
    "overlapping vector": _one_flat_vector,
    "expanded": _expanded,
    "NumPy": _through_numpy,
    "set_": _set,
    "buffer": _buffer_of_a_parameter,
}


@cases("share", SHARED)
@stored_or_again
def test_parameters_that_share_memory_are_refused_by_name(adjoint: str, share: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = nn.Module(), data()
        model.first = nn.Parameter(torch.randn(2, 2, dtype=x.dtype))
        model.second = None
        del model.second
        share(model)

        def loss_fn(m: Any, t: int) -> Tensor:
            out = x @ m.first
            return squares(out + getattr(m, "second", m.first).sum() - 1)

        fast = train(model, STEPS, loss_fn)
        return squares(fast.params["first"]), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"(?i)(first|second)(.|\n)*(memory|stor|view|overlap)")


def test_parts_of_one_vector_that_do_not_overlap_are_no_fault() -> None:
    """As ``DistributedDataParallel`` and flat optimizers lay parameters out."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = nn.Module(), data()
        flat = torch.randn(8, dtype=x.dtype)
        model.first, model.second = (nn.Parameter(part.view(2, 2)) for part in flat.split(4))
        fast = train(model, STEPS, lambda m, t: squares(x @ m.first @ m.second - 1))
        return squares(fast.params["first"]), list(model.parameters())

    outcome(experiment, "segmented-2")


# A buffer that is a view of another.


class Viewed(nn.Module):
    """``tail`` shows a part of ``bank``, which a step moves in place."""

    def __init__(self, view: Any, *, real: bool, advance: Any) -> None:
        super().__init__()
        self.net, self.view, self.real, self.advance = small(), view, real, advance
        self.register_buffer("bank", torch.linspace(0.1, 0.4, 4, dtype=torch.double))
        if real:
            self.register_buffer("tail", view(self.bank))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        with torch.no_grad():
            self.advance(self.bank, out)
        tail = self.tail if self.real else self.view(self.bank)
        return out + tail.sum()


def _scaled(bank: Tensor, out: Tensor) -> None:
    bank.mul_(0.9).add_(out.mean())


def _entry(bank: Tensor, out: Tensor) -> None:
    bank[-1] = out.mean()


VIEWS: dict[str, Any] = {
    "slice": lambda b: b[2:],
    "stride": lambda b: b[::2],
    "reshaped": lambda b: b.view(2, 2),
    "itself": lambda b: b.view_as(b),
    "detach": lambda b: b.detach(),
    "one entry": lambda b: b[-1],
    "expanded": lambda b: b[-1:].expand(3),
    ".data": lambda b: b.data,
    "NumPy": lambda b: torch.from_numpy(b.numpy()),
    "as_strided": lambda b: b.as_strided((2,), (1,), 2),
}


@cases("view", VIEWS)
@cases("advance", {"scaled": _scaled, "one entry": _entry})
@every_adjoint
def test_buffer_that_is_a_view_of_another(adjoint: str, advance: Any, view: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Viewed(view, real=train.ours, advance=advance), data()
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        outer = squares(fast.apply(lambda m: m.net(x))) + squares(fast.buffers["bank"])
        return outer, list(model.parameters())

    outcome(experiment, adjoint, "either", r"(?i)bank|tail")
