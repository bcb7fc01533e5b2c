"""A collective in place is no operation to autograd: it is refused where a gradient is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import batches, mse, tiny
from torch import Tensor

import diffopt

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def each(change: Any) -> Any:
    def transform(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(g) for name, g in grads.items()}

    return transform


def in_place(g: Tensor) -> Tensor:
    dist.all_reduce(g)
    return g


def of_a_copy(g: Tensor) -> Tensor:
    flat = g.flatten() * 1.0
    dist.all_reduce(flat)
    return flat.view_as(g)


def broadcast(g: Tensor) -> Tensor:
    x = 2 * g
    dist.broadcast(x, 0)
    return x


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(1)], ids=repr)
@pytest.mark.parametrize("change", [in_place, of_a_copy, broadcast])
def test_in_a_transform(one_process: None, change: Any, adjoint: diffopt.Adjoint) -> None:
    model = tiny()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"collective.*in place.*differentiable"):
        diffopt.unroll(
            model, inner, batches(2), mse, grad_transform=each(change), adjoint=adjoint
        ).losses.sum().backward()


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(1)], ids=repr)
def test_in_a_loss(one_process: None, adjoint: diffopt.Adjoint) -> None:
    def loss_fn(m: Any, pair: Any) -> Tensor:
        loss = mse(m, pair)
        dist.all_reduce(loss)
        return loss

    model = tiny()
    with pytest.raises(NotImplementedError, match="collective"):
        diffopt.unroll(
            model, diffopt.SGD(model.parameters(), lr=0.1), batches(2), loss_fn, adjoint=adjoint
        )


def test_what_is_only_logged_passes(one_process: None) -> None:
    model, data, logged = tiny(), batches(3), []

    def loss_fn(m: Any, pair: Any) -> Tensor:
        loss = mse(m, pair)
        total = loss.detach().clone()
        dist.all_reduce(total)
        logged.append(total)
        return loss

    def outer(loss: Any) -> list[Tensor]:
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, inner, data, loss)
        return list(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))

    torch.testing.assert_close(outer(loss_fn), outer(mse))
    assert len(logged) == 3


def test_a_write_that_is_not_recorded_is_refused() -> None:
    def halved(g: Tensor) -> Tensor:
        with torch.no_grad():
            return g.mul_(0.5)

    model = tiny()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"gradient of '0.weight' in place.*no_grad"):
        diffopt.unroll(model, inner, batches(2), mse, grad_transform=each(halved))


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(1)], ids=repr)
def test_a_write_that_is_recorded_is_exact(adjoint: diffopt.Adjoint) -> None:
    model, data = tiny(), batches(3)
    inner = diffopt.SGD(model.parameters(), lr=0.1)

    def outer(change: Any) -> list[Tensor]:
        fast = diffopt.unroll(model, inner, data, mse, grad_transform=each(change), adjoint=adjoint)
        return list(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))

    torch.testing.assert_close(outer(lambda g: g.mul_(0.5)), outer(lambda g: g * 0.5))
