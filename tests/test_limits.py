"""What a step uses out of sight, at the limits of what is observed and checked.

``docs/pages/models.md`` states each limit under the same heading; here each is shown.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import scripted
from observed import (
    ADJOINTS,
    ByHand,
    Ours,
    data,
    gradients,
    learned,
    outcome,
    seed,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn

import diffopt

STEPS = 3
recomputing = pytest.mark.parametrize("adjoint", ["segmented-1", "segmented", "binomial-2"])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def _noisy(a: Tensor) -> Tensor:
    return a + torch.randn_like(a)


def _drawn(a: Tensor, g: torch.Generator) -> Tensor:
    return a + torch.rand(a.shape, generator=g, dtype=a.dtype)


def _follow(teacher: Tensor, student: Tensor) -> None:
    teacher.lerp_(student, 0.1)


# TorchScript is not observed.


@stored_or_again
def test_leaf_that_only_torchscript_is_given_gets_its_gradient(adjoint: str) -> None:
    product = scripted(_product)

    def experiment(train: Any) -> Any:
        model, x, scale = small(), data(), learned(0.8)
        fast = train(model, STEPS, lambda m, t: squares(product(m(x), scale)))
        return squares(fast(x)), [scale, *model.parameters()]

    outcome(experiment, adjoint)


@stored_or_again
def test_computed_tensor_that_only_torchscript_is_given_is_refused(adjoint: str) -> None:
    product = scripted(_product)

    def experiment(train: Any) -> Any:
        model, x, log_scale = small(), data(), learned(0.8)
        scale = log_scale.exp()
        fast = train(model, STEPS, lambda m, t: squares(product(m(x), scale)))
        return squares(fast(x)), [log_scale]

    outcome(experiment, adjoint, "refused", r"TorchScript(.|\n)*inside the batch")


@recomputing
def test_data_that_only_torchscript_is_given_are_checked(adjoint: str) -> None:
    product = scripted(_product)

    def experiment(train: Any) -> Any:
        model, x, scale = small(), data(), torch.tensor(0.8, dtype=torch.double)
        fast = train(model, STEPS, lambda m, t: squares(product(m(x), scale)))
        scale.mul_(2)
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"step \d, computed again, gives another loss")


@recomputing
def test_generator_that_only_torchscript_is_given_is_checked(adjoint: str) -> None:
    drawn = scripted(_drawn)

    def experiment(train: Any) -> Any:
        model, x, g = small(), data(), torch.Generator().manual_seed(1)
        fast = train(model, STEPS, lambda m, t: squares(drawn(m(x), g)))
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"step \d, computed again, gives another loss")


@stored_or_again
def test_global_generator_is_rewound_for_torchscript_too(adjoint: str) -> None:
    noisy = scripted(_noisy)

    def experiment(train: Any) -> Any:
        model, x = small(), data()
        fast = train(model, STEPS, lambda m, t: squares(noisy(m(x))))
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint)


@stored_or_again
def test_parameter_that_torchscript_moves_is_refused(adjoint: str) -> None:
    """Nobody could see it in time: the model stays as TorchScript has left it."""
    follow, x = scripted(_follow), data()
    model = nn.ModuleDict({"net": small(), "teacher": small().requires_grad_(False)})

    def loss_fn(m: Any, t: int) -> Tensor:
        with torch.no_grad():
            for a, b in zip(m.teacher.parameters(), m.net.parameters(), strict=True):
                follow(a, b)
        return squares(m.net(x) - m.teacher(x) - 1)

    inner = diffopt.SGD(model.net.parameters(), lr=0.3)
    with pytest.raises(NotImplementedError, match=r"'teacher\.0\.weight'(.|\n)*TorchScript"):
        diffopt.unroll(model, inner, STEPS, loss_fn, adjoint=ADJOINTS[adjoint])


# Threads of the loss's own are not observed.


def on_another_thread(function: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@recomputing
def test_generator_that_the_loss_uses_on_a_thread_of_its_own_is_checked(adjoint: str) -> None:
    def experiment(train: Any) -> Any:
        model, x, g = small(), data(), torch.Generator().manual_seed(1)

        def noise() -> Tensor:
            return torch.rand(x.shape, generator=g, dtype=x.dtype)

        fast = train(model, STEPS, lambda m, t: squares(m(x) + on_another_thread(noise)))
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"step \d, computed again, gives another loss")


@stored_or_again
def test_tensor_that_another_thread_computed_before_is_captured(adjoint: str) -> None:
    def experiment(train: Any) -> Any:
        model, x, log_scale = small(), data(), learned(0.8)
        scale = on_another_thread(lambda: (log_scale * 1.0).exp())
        fast = train(model, STEPS, lambda m, t: squares(m(x) * scale))
        return squares(fast(x)), [log_scale, *model.parameters()]

    outcome(experiment, adjoint)


# The check compares the loss, the hyperparameters and the norm of the gradient.


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=torch.double))


def with_another_sign(**more: Any) -> Tensor:
    """dw₃/da, where each evaluation of w ← w − 0.1 · (±a) takes the other sign."""
    model, a, calls = One(), learned(1.3), itertools.count()

    def loss_fn(m: Any, t: int) -> Tensor:
        return (-1.0) ** next(calls) * a * (m.w - m.w.detach())  # the value is 0, the gradient ±a

    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=0.1), 3, loss_fn, **more)
    return torch.autograd.grad(fast.params["w"], a)[0]


def test_gradient_of_another_sign_passes_the_check_and_verify_finds_it() -> None:
    assert with_another_sign(adjoint=diffopt.StoreAll()).item() == pytest.approx(-0.1)
    assert with_another_sign(segment=1).item() == pytest.approx(0.1)  # wrong, and not seen
    with pytest.raises(RuntimeError, match=r"step 2, computed again"):
        with_another_sign(verify=True)


def test_difference_within_rounding_passes_the_check_and_verify_finds_it() -> None:
    def run(apart: float, **more: Any) -> None:
        seed()
        model, x, calls = small(), data(), itertools.count()

        def loss_fn(m: Any, t: int) -> Tensor:
            return squares(m(x)) * (1 + apart * next(calls))

        inner = diffopt.SGD(model.parameters(), lr=0.3)
        squares(diffopt.unroll(model, inner, STEPS, loss_fn, **more)(x)).backward()

    run(1e-10, segment=1)
    with pytest.raises(RuntimeError, match=r"step \d, computed again"):
        run(1e-10, verify=True)
    with pytest.raises(RuntimeError, match=r"step \d, computed again, gives another loss"):
        run(1e-6, segment=1)


# State out of sight, and the default adjoint: exact where all graphs fit, an error where not.


def test_default_adjoint_with_state_out_of_sight() -> None:
    def experiment(train: Any) -> Any:
        model, x, calls = small(), data(), itertools.count()
        fast = train(model, 8, lambda m, t: squares(m(x) + 0.1 * next(calls)))
        return squares(fast(x)), list(model.parameters())

    seed()
    outer, inputs = experiment(ByHand())
    want = gradients(outer, inputs)
    seed()
    outer, inputs = experiment(Ours(diffopt.MemoryBudget()))
    for a, b in zip(gradients(outer, inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    seed()
    outer, inputs = experiment(Ours(diffopt.MemoryBudget("400kB")))
    with pytest.raises(RuntimeError, match=r"step \d, computed again(.|\n)*StoreAll"):
        gradients(outer, inputs)


# Hooks of the loss may use what the loss does not.


@stored_or_again
def test_tensor_that_a_hook_alone_uses_gets_its_gradient(adjoint: str) -> None:
    """A plain loop would call the hook once more on the way back: there k scales the gradients."""

    def experiment(train: Any) -> Any:
        model, x, k = small(), data(), learned(1.4)

        def loss_fn(m: Any, t: int) -> Tensor:
            out = m(x)
            if train.ours:
                out.register_hook(lambda g: k * g)
            return squares(out - 1)

        more = {} if train.ours else {"grad_transform": lambda g: {n: k * x for n, x in g.items()}}
        fast = train(model, STEPS, loss_fn, **more)
        return squares(fast(x)), [k, *model.parameters()]

    outcome(experiment, adjoint)
