"""Warnings of what a step calls: as a plain loop shows them, and not again on the way back."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from adjoints import EXACT
from torch import Tensor, nn

import diffopt

STEPS = 5
ADJOINTS = [*(adjoint for _, adjoint in EXACT), diffopt.Truncated(3), diffopt.FirstOrder()]


def unrolled(adjoint: diffopt.Adjoint, loss_fn: Any) -> Tensor:
    model = nn.Linear(2, 1).double()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, STEPS, loss_fn, adjoint=adjoint)
    return sum((p.square().sum() for p in fast.params.values()), torch.zeros(()).double())


def loss(model: Any) -> Tensor:
    return (model(torch.ones(3, 2).double()) - 1).square().mean()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_the_way_back_repeats_no_warning(adjoint: diffopt.Adjoint) -> None:
    def loss_fn(model: Any, t: int) -> Tensor:
        with warnings.catch_warnings():  # as libraries do; Python then forgets what it has shown
            pass
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return loss(model)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        outer = unrolled(adjoint, loss_fn)
        assert [str(w.message) for w in shown] == ["old"] * STEPS  # as in a plain loop
        outer.backward()
    assert len(shown) == STEPS


@pytest.mark.parametrize("adjoint", [diffopt.Segmented(2), diffopt.Binomial(2)], ids=repr)
def test_what_comes_only_on_the_way_back_is_shown(adjoint: diffopt.Adjoint) -> None:
    says = ["first"]

    def loss_fn(model: Any, t: int) -> Tensor:
        warnings.warn(says[0], UserWarning, stacklevel=1)
        return loss(model)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        outer = unrolled(adjoint, loss_fn)
        says[0] = "then"
        outer.backward()
    assert [str(w.message) for w in shown] == ["first", "then"]


def test_a_warning_that_is_an_error_is_one_on_the_way_back() -> None:
    def loss_fn(model: Any, t: int) -> Tensor:
        warnings.warn("old", UserWarning, stacklevel=1)
        return loss(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = unrolled(diffopt.Segmented(2), loss_fn)
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="old"):
            outer.backward()


def test_other_threads_warn_as_they_would() -> None:
    def warn() -> None:
        warnings.warn("beside", UserWarning, stacklevel=1)

    def loss_fn(model: Any, t: int) -> Tensor:
        warn()
        other = threading.Thread(target=warn)
        other.start()
        other.join()
        return loss(model)

    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        outer = unrolled(diffopt.Segmented(2), loss_fn)
        first = len(shown)
        outer.backward()
    assert first == 2 * STEPS
    assert len(shown) > first
    assert warnings.showwarning is before
