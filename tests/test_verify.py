"""``verify=True``: a step that is computed again is the step computed first, to the last bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from adjoints import every_adjoint
from torch import Tensor, nn

import diffopt
from diffopt._loop.verify import digest

MASK = (1 << 64) - 1
X = torch.linspace(-1.0, 1.0, 12, dtype=torch.double).reshape(4, 3)


def splitmix(data: bytes) -> int:
    """The hash of ``digest``, in Python's integers."""
    data += bytes(-len(data) % 8)
    total = 0
    for i in range(len(data) // 8):
        z = int.from_bytes(data[8 * i : 8 * i + 8], "little") + i * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        total += z ^ z >> 31
    return total & MASK


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5),
        torch.randn(3, 4).double().T,
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.randn(3, dtype=torch.cfloat),
        torch.zeros(0),
        torch.tensor([float("nan"), -0.0]),
    ],
    ids=lambda x: f"{x.dtype}{tuple(x.shape)}",
)
def test_digest_is_the_sum_of_splitmix_over_the_words(x: Tensor) -> None:
    data = bytes(x.contiguous().flatten().view(torch.uint8).tolist()) if x.numel() else b""
    assert digest(x).item() & MASK == splitmix(data)


def test_digest_of_a_large_tensor_sees_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40)
    whole = digest(x)
    monkeypatch.setattr("diffopt._loop.verify._WORDS", 7)
    assert digest(x) == whole
    for i in (0, 13, 39):
        y = x.clone()
        y[i] = torch.nextafter(y[i], torch.tensor(9.0))
        assert digest(y) != whole
    assert digest(x.flip(0)) != whole
    assert digest(x * torch.tensor([-1.0, -1.0] + [1.0] * 38)) != whole


def trained(model: nn.Module, loss_fn: Any, adjoint: diffopt.Adjoint, **more: Any) -> Tensor:
    inner = diffopt.Adam(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 5, loss_fn, adjoint=adjoint, verify=True, **more)
    return fast(X).square().sum()


def model_with_noise() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Mish(), nn.Linear(4, 1)
    ).double()


@every_adjoint
def test_an_honest_loss_passes(adjoint: diffopt.Adjoint) -> None:
    model = model_with_noise()
    outer = trained(model, lambda m, t: (m(X) - t).square().mean(), adjoint)
    first = torch.autograd.grad(outer, list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))


class Stateful:
    """Another loss from its seventh call on, in its forward pass and its first pass back."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, t: int) -> Tensor:
        self.calls += 1
        return (model(X) + 0.1 * (self.calls > 5)).square().mean()


RECOMPUTING = [diffopt.Segmented(1), diffopt.Segmented(3), diffopt.Binomial(2)]


@pytest.mark.parametrize("adjoint", RECOMPUTING, ids=repr)
def test_a_loss_that_keeps_state_is_found(adjoint: diffopt.Adjoint) -> None:
    outer = trained(model_with_noise(), Stateful(), adjoint)
    with pytest.raises(RuntimeError, match=r"step \d, computed again, gives another .* than in"):
        outer.backward()


@pytest.mark.parametrize("adjoint", RECOMPUTING, ids=repr)
def test_random_numbers_that_are_not_pytorchs_are_found(adjoint: diffopt.Adjoint) -> None:
    outer = trained(
        model_with_noise(), lambda m, t: (m(X) + random.random()).square().mean(), adjoint
    )
    with pytest.raises(RuntimeError, match="random numbers that are not PyTorch's"):
        outer.backward()


def test_steps_of_first_order_are_compared_where_they_are_computed_again() -> None:
    model, lr = nn.Linear(3, 1).double(), torch.tensor(0.1, requires_grad=True)
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=lr),
        6,
        lambda m, t: (m(X) + random.random()).square().mean(),
        adjoint=diffopt.FirstOrder(),
        verify=True,
    )
    with pytest.raises(RuntimeError, match="computed again, gives another"):
        fast(X).sum().backward()


def test_the_error_names_step_and_tensor() -> None:
    model = nn.Linear(3, 1).double()
    calls = 0

    def loss_fn(m: Any, t: int) -> Tensor:
        nonlocal calls
        calls += 1
        changed = 0.5 if calls > 5 and t == 3 else 0.0
        return m(X).square().mean() + changed * (m.bias - m.bias.detach()).sum()  # of equal value

    outer = trained(model, loss_fn, diffopt.Segmented(5))
    with pytest.raises(RuntimeError, match="step 3, computed again, gives another params bias"):
        outer.backward()


def test_the_loss_is_compared_unless_more_is_asked() -> None:
    model = model_with_noise()
    inner = diffopt.Adam(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 5, Stateful(), segment=3)
    with pytest.raises(RuntimeError, match=r"step \d, computed again, gives another loss"):
        fast(X).sum().backward()


def test_verify_is_a_bool() -> None:
    model = nn.Linear(3, 1)
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="verify is a str: pass True or False"):
        diffopt.unroll(model, inner, 1, verify="yes")
