"""A name that is bound anew between the call and ``backward()``: the right gradient, or an error.

Nothing of the library is assumed but that: the plain loop has its graph when the name changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from observed import (
    CHANGED,
    HOLDERS,
    Inputs,
    Train,
    cases,
    data,
    every_adjoint,
    every_holder,
    learned,
    outcome,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

STEPS = 4


def rebound(holder: Any, first: Any, second: Any, use: Any) -> Any:
    """An experiment: ``use(model, read)`` is the loss, and the name is bound anew after the call.

    ``use`` may give further arguments of ``train`` as well.
    """

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, rate = small(), data(), learned(0.3)
        values = [f() for f in (first, second)]
        read, bind = holder(values[0])
        loss_fn, more = use(x, read, rate)
        fast = train(model, STEPS, loss_fn, **{"lr": rate, **more})
        bind(values[1])
        inputs = [*model.parameters(), rate]
        inputs += [v for v in values[:1] if isinstance(v, Tensor) and v.requires_grad]
        return squares(fast(x) - 0.3), inputs

    return experiment


def _batch(x: Tensor, read: Any, rate: Tensor) -> Any:
    return lambda m, t: F.mse_loss(m(read()), 0.1 * x), {}


def _number(x: Tensor, read: Any, rate: Tensor) -> Any:
    return lambda m, t: read() * squares(m(x) - 1), {}


def _rate(x: Tensor, read: Any, rate: Tensor) -> Any:
    return lambda m, t: squares(m(x) - 1), {"lr": lambda t: read() * rate}


def _transform(x: Tensor, read: Any, rate: Tensor) -> Any:
    def scaled(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: read() * g for name, g in grads.items()}

    return lambda m, t: squares(m(x) - 1), {"grad_transform": scaled}


def _gradient_only(x: Tensor, read: Any, rate: Tensor) -> Any:
    """The loss has the same value, whatever is read: only its gradient differs."""

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        out = m(x).square().sum()
        return squares(m(x) - 1) + read() * (out - out.detach())

    return loss_fn, {}


def _branch(x: Tensor, read: Any, rate: Tensor) -> Any:
    def loss_fn(m: nn.Module, t: int) -> Tensor:
        return squares(m(x) - 1) if read() < 1 else m(x).abs().mean()

    return loss_fn, {}


NUMBER_USES = {
    "in the loss": _number,
    "in the rate": _rate,
    "in grad_transform": _transform,
    "in the loss's gradient alone": _gradient_only,
    "as a branch": _branch,
}


@every_holder
@stored_or_again
def test_batch_bound_anew(adjoint: str, holder: Any) -> None:
    outcome(rebound(holder, data, lambda: data() + 1, _batch), adjoint, "either", CHANGED)


@every_holder
@cases("use", NUMBER_USES)
@pytest.mark.parametrize("adjoint", ["segmented-1"])
def test_number_bound_anew(adjoint: str, use: Any, holder: Any) -> None:
    outcome(rebound(holder, lambda: 0.9, lambda: 2.1, use), adjoint, "either", CHANGED)


@cases("use", NUMBER_USES)
@every_adjoint
def test_number_bound_anew_in_a_closure(adjoint: str, use: Any) -> None:
    holder = HOLDERS["closure"]
    outcome(rebound(holder, lambda: 0.9, lambda: 2.1, use), adjoint, "either", CHANGED)


@every_holder
@cases("use", {k: v for k, v in NUMBER_USES.items() if v is not _branch})
@pytest.mark.parametrize("adjoint", ["segmented-1"])
def test_learned_tensor_bound_anew_to_one_of_the_same_value(
    adjoint: str, use: Any, holder: Any
) -> None:
    """Every value stays the same: only where the gradient goes differs."""
    first = second = lambda: learned(0.9)
    outcome(rebound(holder, first, second, use), adjoint, "either", CHANGED)


@every_holder
@pytest.mark.parametrize("adjoint", ["binomial-2"])
def test_name_bound_to_nothing(adjoint: str, holder: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, k = small(), data(), learned(0.9)
        read, bind = holder(k)
        fast = train(model, STEPS, lambda m, t: read() * squares(m(x) - 1))
        bind(None)
        return squares(fast(x) - 0.3), [*model.parameters(), k]

    outcome(experiment, adjoint, "either", rf"{CHANGED}|NoneType")


@every_holder
@stored_or_again
def test_captured_tensor_in_any_holder(adjoint: str, holder: Any) -> None:
    """No name is bound anew: leaf and non-leaf tensors are found wherever they are kept."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, k, phi = small(), data(), learned(0.9), learned(0.2)
        leaf, _ = holder(k)
        value = leaf()
        computed, _ = HOLDERS["slots dataclass"]({"deep": [(phi.exp(),)]})

        def loss_fn(m: nn.Module, t: int) -> Tensor:
            loss = value * squares(m(x) - 1) if t < 2 else squares(m(x))
            return loss * computed()["deep"][0][0] if t > 1 else loss

        fast = train(model, STEPS, loss_fn)
        return squares(fast(x) - 0.3), [*model.parameters(), k, phi]

    outcome(experiment, adjoint)


# What else may be changed in between.


def _the_first_example(train: Train) -> tuple[Tensor, Inputs]:
    """As in the README of many a meta-learner: support and query under the same names."""
    model = small()
    support, query = (data(), data()), (data(), data())
    x, y = support
    fast = train(model, 9, lambda m, t: F.mse_loss(m(x), y))
    x, y = query
    return F.mse_loss(fast(x), y), list(model.parameters())


def _loop_variable(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    total = torch.zeros((), dtype=torch.double)
    for task in range(3):
        fast = train(model, 2, lambda m, t: squares(m(x) - task))  # noqa: B023
        total = total + squares(fast(x))
    return total, list(model.parameters())


def _array_in_place(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    array = x.numpy().copy()
    fast = train(model, STEPS, lambda m, t: squares(m(torch.from_numpy(array)) - 1))
    array[:] = 7
    return squares(fast(x)), list(model.parameters())


def _through_data(train: Train) -> tuple[Tensor, Inputs]:
    model, x, k = small(), data(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - k))
    k.data.add_(1)
    return squares(fast(x)), list(model.parameters())


def _data_replaced(train: Train) -> tuple[Tensor, Inputs]:
    model, x, k = small(), data(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - k))
    k.data = k + 1
    return squares(fast(x)), list(model.parameters())


def _in_place(train: Train) -> tuple[Tensor, Inputs]:
    model, x, k = small(), data(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - k))
    if train.ours:
        k.add_(1)
    return squares(fast(x)), list(model.parameters())


def _option_of_a_layer(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.CELU(0.5), nn.Linear(3, 2)).double(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
    outer = squares(fast(x))
    model[1].alpha = 2.0
    return outer, list(model.parameters())


def _layer_replaced(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
    outer = squares(fast(x))
    inputs = list(model.parameters())
    if train.ours:
        model[1] = nn.Sigmoid()
    return outer, inputs


def _other_modules_weights(train: Train) -> tuple[Tensor, Inputs]:
    model, other, x = small(), small(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - other(x)))
    outer = squares(fast(x))
    if train.ours:
        other.load_state_dict(small().state_dict())
    return outer, [*model.parameters()]


def _list_of_batches(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    batches = [data() for _ in range(STEPS)]
    fast = train(model, batches, lambda m, b: squares(m(b) - 1))
    batches[1:3] = [data() + 1, data() - 1]
    return squares(fast(x)), list(model.parameters())


def _entry_of_a_batch(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    batches = [{"x": data()} for _ in range(STEPS)]
    fast = train(model, batches, lambda m, b: squares(m(b["x"]) - 1))
    batches[2]["x"] = data() + 1
    return squares(fast(x)), list(model.parameters())


class Rows:
    """Batches that are looked up one by one."""

    def __init__(self) -> None:
        self.rows = [data() for _ in range(STEPS)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.rows[i]


def _row_of_a_dataset(train: Train) -> tuple[Tensor, Inputs]:
    model, x, rows = small(), data(), Rows()
    steps: Any = rows if train.ours else list(rows.rows)
    fast = train(model, steps, lambda m, b: squares(m(b) - 1))
    rows.rows[1] = data() + 1
    return squares(fast(x)), list(model.parameters())


def _patched_function(train: Train) -> tuple[Tensor, Inputs]:
    model, x, scope = small(), data(), {"criterion": F.mse_loss}
    fast = train(model, STEPS, lambda m, t: scope["criterion"](m(x), 0.1 * x))
    scope["criterion"] = F.smooth_l1_loss
    return squares(fast(x)), list(model.parameters())


def _method_replaced(train: Train) -> tuple[Tensor, Inputs]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.scale() * self.layer(x)

        def scale(self) -> float:
            return 1.0

    model, x = Net(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
    outer = squares(fast(x))
    model.scale = lambda: 2.0  # type: ignore[method-assign]
    return outer, list(model.parameters())


def _dtype_by_default(train: Train) -> tuple[Tensor, Inputs]:
    torch.set_default_dtype(torch.float32)
    model, x = small(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - torch.full((), 1 / 3)))
    outer = squares(fast(x))
    torch.set_default_dtype(torch.float64)
    return outer, list(model.parameters())


BETWEEN = {
    "support and query under one name": _the_first_example,
    "loop variable": _loop_variable,
    "NumPy array in place": _array_in_place,
    "through .data": _through_data,
    ".data replaced": _data_replaced,
    "tensor in place": _in_place,
    "option of a layer": _option_of_a_layer,
    "layer replaced": _layer_replaced,
    "weights of another module": _other_modules_weights,
    "list of batches": _list_of_batches,
    "entry of a batch": _entry_of_a_batch,
    "row of a dataset": _row_of_a_dataset,
    "function replaced": _patched_function,
    "method replaced": _method_replaced,
    "default dtype": _dtype_by_default,
}


@cases("experiment", BETWEEN)
@every_adjoint
def test_changed_between_call_and_backward(adjoint: str, experiment: Any) -> None:
    outcome(experiment, adjoint, "either", CHANGED)


@every_adjoint
def test_rates_of_the_optimizer_changed_afterwards(adjoint: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, made = small(), data(), []

        def by(named: Any) -> Any:
            import diffopt

            made.append(diffopt.SGD(named, lr=0.3))
            return made[0]

        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), by=by)
        for opt in made:
            opt.param_groups[0]["lr"] = 5.0
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint, "either", CHANGED)
