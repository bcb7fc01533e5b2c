"""Small problems, finite differences, and ``diffopt.unroll`` behind the arguments of ``plain``.

A problem is stated once, as a function of ``train``, and is solved by ``diffopt.unroll`` and by
the plain loop of ``oracle.py``.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Options
from torch import Tensor, nn

import diffopt

#: ``train(model, options, steps, loss_fn, **more)`` gives something like an ``Unrolled``.
Train = Callable[..., Any]


def scripted(what: Any) -> Any:
    """A module or function as TorchScript, of which PyTorch warns in ways of its version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(what)


def tiny() -> nn.Sequential:
    """17 float64 parameters, smooth in all of them."""
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2).double(), torch.randn(rows, 2).double()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    return [batch() for _ in range(steps)]


def mse(model: Any, pair: Any) -> Tensor:
    return F.mse_loss(model(pair[0]), pair[1])


def close(a: Tensor, b: Tensor) -> None:
    """Assert that two float64 tensors are equal to rounding."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


class Call(nn.Module):
    """A function of a module as a module, for ``functional_call``."""

    def __init__(self, model: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(self.model, *args)


def called(model: nn.Module, values: Mapping[str, Tensor], fn: Any, *args: Any) -> Any:
    """``fn(model with values, *args)``."""
    named = {f"model.{name}": x for name, x in values.items()}
    return torch.func.functional_call(Call(model, fn), named, args)


def unrolled(adjoint: diffopt.Adjoint, *, compile: bool = False) -> Train:
    """``diffopt.unroll`` behind the arguments of ``plain``."""

    def train(
        model: nn.Module,
        options: Options,
        steps: Any,
        loss_fn: Any,
        *,
        state: Mapping[str, Tensor] | None = None,
        **more: Any,
    ) -> diffopt.Unrolled:
        named = dict(model.named_parameters())
        opt: diffopt.Optimizer
        if isinstance(options, Mapping):
            opt = diffopt.SGD(named.items(), **options)
        else:
            groups = [
                {"params": [p for n, p in named.items() if n.startswith(beginning)], **group}
                for beginning, group in options
            ]
            opt = diffopt.SGD(groups)
        for name, b in (state or {}).items():
            opt.state[named[name]] = {"momentum_buffer": b}
        return diffopt.unroll(model, opt, steps, loss_fn, adjoint=adjoint, compile=compile, **more)

    return train


def differences(
    value: Callable[[], Tensor], inputs: Iterable[Tensor], h: float = 1e-6
) -> list[Tensor]:
    """Central differences of a scalar in each entry of each input, which are changed and put back.

    The error is about h² of truncation and 1e-16 / h of rounding.
    """
    found = []
    for x in inputs:
        flat, grad = x.detach().view(-1), torch.zeros(x.numel(), dtype=x.dtype)
        for i in range(x.numel()):
            before = flat[i].item()
            ends = []
            for moved in (before + h, before - h):
                flat[i] = moved
                ends.append(value().item())
            flat[i] = before
            grad[i] = (ends[0] - ends[1]) / (2 * h)
        found.append(grad.view(x.shape))
    return found


@contextmanager
def new_objects_only() -> Iterator[None]:
    """Where the garbage collector runs only if it is called, and knows only objects made since.

    So ``gc.get_objects()`` and ``gc.collect()`` take no longer where other tests have run before.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def live_bytes() -> int:
    """Of all tensors that Python knows and that have memory, each storage once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, nn.Parameter)
    }
    return sum(storages.values())


def assert_all_close(
    got: Iterable[Tensor | None], want: Iterable[Tensor | None], rtol: float, atol: float
) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is not None
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=rtol, atol=atol)
