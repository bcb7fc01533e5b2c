"""What is odd beside the weights in a model is no fault."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import scripted
from observed import (
    Inputs,
    Train,
    cases,
    data,
    outcome,
    small,
    squares,
    stored_or_again,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt

STEPS = 4


# Modules that are odd, and no fault.


class NoLength:
    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class NoTruth(NoLength):
    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


class NoEquality:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError("not comparable")


class NoAttributes:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"nothing is to be read here: {name}")


class LongTuple(tuple):  # type: ignore[type-arg]
    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class NoItems(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise NotImplementedError

    def values(self) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class Recursive(list):  # type: ignore[type-arg]
    def __init__(self) -> None:
        super().__init__([self])


class NoSlot:
    __slots__ = ("a",)  # never set


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no representation")


ODD: dict[str, Any] = {
    "len raises": NoLength,
    "truth raises": NoTruth,
    "equality raises": NoEquality,
    "every attribute raises": NoAttributes,
    "tuple whose len raises": LongTuple,
    "dict whose items raise": NoItems,
    "list that holds itself": Recursive,
    "slot that is not set": NoSlot,
    "no representation": NoRepr,
    "infinite iterator": itertools.count,
    "lock": threading.Lock,
    "open file": lambda: sys.stderr,
}


class WithOdd(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.net = small()
        object.__setattr__(self, "held", held)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@cases("make", ODD)
@pytest.mark.parametrize("where", ["model", "closure", "batch", "argument"])
@pytest.mark.parametrize("adjoint", ["store-all", "segmented-2", "memory-budget"])
def test_odd_objects_are_no_fault(adjoint: str, where: str, make: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        held = make()
        model: Any = WithOdd(held) if where == "model" else small()
        x = data()

        def loss_fn(
            m: nn.Module, b: Any, odd: Any = held if where == "argument" else None
        ) -> Tensor:
            kept = held if where == "closure" else odd
            return squares(m(x) - 1) + (0 if kept is None else 0.0)

        class Batch:
            def __init__(self) -> None:
                self.held = held

        steps: Any = [Batch()] * STEPS if where == "batch" else STEPS
        fast = train(model, steps, loss_fn)
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint)


def _traced(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.ones(1, 2, dtype=torch.double))


SCRIPTED: dict[str, Any] = {
    "scripted Tanh": lambda: scripted(nn.Tanh()),
    "scripted Flatten": lambda: scripted(nn.Flatten()),
    "scripted Sequential": lambda: scripted(nn.Sequential(nn.Tanh(), nn.Identity())),
    "traced Softplus": lambda: _traced(nn.Softplus()),
}


@cases("make", SCRIPTED)
@stored_or_again
def test_scripted_submodule_without_parameters(adjoint: str, make: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model = small()
        model.insert(1, make())
        x = data()
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        return squares(fast(x)), list(model.parameters())

    outcome(experiment, adjoint)


class Attention(nn.Module):
    def __init__(self, backends: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 6).double(), nn.Linear(2, 2).double()
        self.backends = backends

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[None, None].chunk(3, dim=-1)
        with sdpa_kernel(self.backends):
            return self.out(F.scaled_dot_product_attention(q, k, v)[0, 0])


@cases(
    "backends",
    {
        "MATH": SDPBackend.MATH,
        "a list of MATH": [SDPBackend.MATH],
        "FLASH and MATH": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
        "MATH and EFFICIENT": [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION],
        "all": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    },
)
@stored_or_again
def test_attention_within_the_models_own_sdpa_kernel(adjoint: str, backends: Any) -> None:
    class Reference(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[None, None].chunk(3, dim=-1)
            weights = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1)
            return self.out((weights @ v)[0, 0])

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model: nn.Module = Attention(backends) if train.ours else Reference(backends)
        x = data()
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        return squares(fast.params["out.weight"]), list(model.parameters())

    outcome(experiment, adjoint)


FORKED = """
    import os, sys, tempfile, torch, diffopt

    model = torch.nn.Linear(2, 2).double()
    x = torch.ones(3, 2, dtype=torch.double)
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    folder = tempfile.mkdtemp()
    loss_fn = lambda m, t: m(x).square().mean()

    def code_of(adjoint, both):
        fast = diffopt.unroll(model, inner, 9, loss_fn, adjoint=adjoint)
        outer = fast(x).square().mean()
        child = os.fork()
        want = diffopt.unroll(model, inner, 9, loss_fn, adjoint=diffopt.StoreAll())
        want = torch.autograd.grad(want(x).square().mean(), list(model.parameters()))
        code = 0
        if child == 0 or both:
            try:
                got = torch.autograd.grad(outer, list(model.parameters()))
                same = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(got, want))
                code = 0 if same else 3
            except RuntimeError as error:
                code = 0 if "fork" in str(error) or "process" in str(error) else 4
        if child == 0:
            os._exit(code)
        _, status = os.waitpid(child, 0)
        return code, os.waitstatus_to_exitcode(status)

    for adjoint, both in [
        (diffopt.Segmented(2, storage=folder), False),
        (diffopt.Segmented(2, storage=folder), True),
        (diffopt.Binomial(2, storage=folder), False),
        (diffopt.Segmented(2, storage="cpu"), True),
        (diffopt.Segmented(2), True),
    ]:
        print(adjoint, both, code_of(adjoint, both), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_between_the_call_and_backward() -> None:
    """The backward pass in the child, and in the parent where it takes it, too."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED)],
        cwd=Path(diffopt.__file__).parents[1],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        told, words = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
        pytest.fail(f"the backward pass after a fork hangs: {told}")
    assert process.returncode == 0, f"{process.returncode}: {words[-2000:]}"
    assert [line.endswith("(0, 0)") for line in told.splitlines()] == [True] * 5, told
