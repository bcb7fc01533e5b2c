"""Snapshots and runs in folders that fsspec reaches by an address, here in its ``memory://``."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt import Binomial, Durable, Segmented, StoreAll
from diffopt._loop.files import Elsewhere, OnDisk, folder_of

fsspec = pytest.importorskip("fsspec")

STEPS = 9
AT = "memory://bucket/states"


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system, empty before and after."""
    torch.set_default_dtype(torch.float64)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.makedirs("/bucket/states", exist_ok=True)
    yield system
    system.store.clear()


def files(system: Any) -> list[str]:
    return sorted(system.find("/bucket/states"))


def gradients(adjoint: diffopt.Adjoint, during: Callable[[int], Any] = lambda n: None) -> Any:
    """Of a network with dropout and running statistics, trained by Adam."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)
    model, x = nn.Sequential(*layers), torch.randn(8, 3)
    lr = torch.tensor(0.05, requires_grad=True)
    calls = 0

    def loss(model: nn.Module, t: int) -> Tensor:
        nonlocal calls
        calls += 1
        during(calls)
        return model(x).square().mean()

    fast = diffopt.unroll(
        model, diffopt.Adam(model.parameters(), lr=lr), STEPS, loss, adjoint=adjoint
    )
    total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
    return list(torch.autograd.grad(total, [lr, *model.parameters()], allow_unused=True))


ADJOINTS: dict[str, Callable[[Any], diffopt.Adjoint]] = {
    "segmented": lambda s: Segmented(4, s),
    "every-state": lambda s: Segmented(1, s),
    "binomial": lambda s: Binomial(3, s),
}
every_adjoint = pytest.mark.parametrize("make", ADJOINTS.values(), ids=ADJOINTS)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@every_adjoint
def test_the_gradient_is_the_same(make: Any, memory: Any) -> None:
    seen: list[int] = []
    found = gradients(make(AT), lambda n: seen.append(len(files(memory))))
    assert any(seen)
    assert files(memory) == []
    assert_same(found, gradients(make(None)))
    for a, b in zip(found, gradients(StoreAll()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_nothing_is_left_behind(memory: Any) -> None:
    model = nn.Linear(3, 1)
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 3)
    steps = [x] * STEPS
    gc.disable()
    try:
        fast = diffopt.unroll(
            model, opt, steps, lambda m, x: m(x).square().mean(), adjoint=Segmented(1, AT)
        )
        assert memory.ls("/bucket/states")
        del fast
        assert memory.ls("/bucket/states") == []
    finally:
        gc.enable()

    def stop(n: int) -> None:
        if n == 5:
            raise Stop

    with pytest.raises(Stop):
        gradients(Segmented(1, AT), stop)
    assert files(memory) == []


def test_a_folder_that_cannot_be_removed_is_told_of(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(AT)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(memory), "rm", refuse)
    with pytest.warns(UserWarning, match=r"snapshots in 'memory://bucket/states' could not be rem"):
        folder.discard()


@pytest.mark.parametrize("cause", [OSError("the service is busy"), OSError(28, "No space left")])
def test_a_file_that_cannot_be_written(
    memory: Any, monkeypatch: pytest.MonkeyPatch, cause: OSError
) -> None:
    """Failures of fsspec have a number or none."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise cause

    monkeypatch.setattr(Elsewhere, "open", refuse)
    message = (
        r"could not be written to 'memory://bucket/states/diffopt-.*0.state', (the|No).*: make"
    )
    with pytest.raises(OSError, match=message) as error:
        gradients(Segmented(1, AT))
    assert error.value.errno == cause.errno


def test_a_file_that_was_harmed_or_is_gone(memory: Any) -> None:
    def flip(n: int) -> None:
        if n == STEPS + 1:
            for path in files(memory):
                data = bytearray(memory.cat_file(path))
                data[len(data) // 2] ^= 1
                memory.pipe_file(path, bytes(data))

    with pytest.raises(RuntimeError, match=r"'memory://.*\.state' does not hold what was written"):
        gradients(Segmented(3, AT), flip)

    def remove(n: int) -> None:
        if n == STEPS + 1:
            for path in files(memory):
                memory.rm_file(path)

    with pytest.raises(FileNotFoundError, match=r"'memory://.*\.state' cannot be read, .*: leave"):
        gradients(Segmented(3, AT), remove)


def test_what_is_not_installed_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(folder_of("a/path"), OnDisk)
    with pytest.raises(ValueError, match=r"'nothing://x' is of a kind that fsspec does not know"):
        gradients(Segmented(1, "nothing://x"))

    def missing(address: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match=r"'s3://x' is of a kind .* package for: Install s3fs"):
        gradients(Segmented(1, "s3://x"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for storage in (AT, Durable(AT)):
        with pytest.raises(
            ImportError, match=r"pip install 'torch-diffopt\[remote\]', or pass a p"
        ):
            gradients(Segmented(1, storage))


# --- Runs that survive their process --------------------------------------------------------------


def at(stop: int) -> Callable[[int], None]:
    def during(n: int) -> None:
        if n == stop:
            raise Stop

    return during


@every_adjoint
def test_a_run_is_taken_up(make: Any, memory: Any) -> None:
    pytest.importorskip("safetensors")
    all_of_them: list[int] = []
    expected = gradients(make(None), all_of_them.append)
    for stop in (2, 7, STEPS + 3):
        with pytest.raises(Stop):
            gradients(make(Durable(AT, 1)), at(stop))
        assert any("manifest" in path for path in files(memory))
        taken: list[int] = []
        assert_same(gradients(make(Durable(AT, 1)), taken.append), expected)
        assert files(memory) == []
        assert stop == 2 or len(taken) < len(all_of_them)


def test_the_newest_file_of_a_run_is_damaged(memory: Any) -> None:
    pytest.importorskip("safetensors")
    expected = gradients(Segmented(4))
    for kind in ("manifest", "state", "record"):
        with pytest.raises(Stop):
            gradients(Segmented(4, Durable(AT, 1)), at(7))
        newest = [path for path in files(memory) if f"/{kind}-" in path][-1]
        memory.pipe_file(newest, memory.cat_file(newest)[:-3])
        assert_same(gradients(Segmented(4, Durable(AT, 1))), expected)
        assert files(memory) == []


def test_another_run(memory: Any) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(Stop):
        gradients(Segmented(4, Durable(AT, 1)), at(7))
    with pytest.raises(ValueError, match=r"'memory://bucket/states' holds another run, which diff"):
        gradients(Segmented(3, Durable(AT, 1)))
