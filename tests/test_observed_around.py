"""What stands around an unroll, or beside it in the model, does not reach into it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
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
from observed import (
    ADJOINTS,
    ByHand,
    Inputs,
    Ours,
    Train,
    cases,
    data,
    every_adjoint,
    gradients,
    learned,
    outcome,
    seed,
    small,
    squares,
)
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import diffopt

STEPS = 4


def again(train: Train, fn: Any, *args: Any) -> Any:
    """``fn`` under a checkpoint where diffopt trains: that changes no value."""
    return checkpoint(fn, *args, use_reentrant=False) if train.ours else fn(*args)


def _whole(train: Train) -> tuple[Tensor, Inputs]:
    model, x, rate = small(), data(), learned(0.3)

    def outer(x: Tensor) -> Tensor:
        return squares(train(model, STEPS, lambda m, t: squares(m(x) - 1), lr=rate)(x))

    return again(train, outer, x), [*model.parameters(), rate]


def _with_dropout(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()

    def outer(x: Tensor) -> Tensor:
        return squares(train(model, STEPS, lambda m, t: squares(m(x) - 1))(x))

    return again(train, outer, x), list(model.parameters())


def _call_alone(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()

    def weights(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(train(model, STEPS, lambda m, t: squares(m(x) - 1)).params.values())

    return sum(squares(p) for p in again(train, weights, x)), list(model.parameters())  # type: ignore[return-value]


def _layer_before(train: Train) -> tuple[Tensor, Inputs]:
    encoder, model, x = small(), small(), data()

    def outer(x: Tensor) -> Tensor:
        z = encoder(x)
        return squares(train(model, STEPS, lambda m, t: squares(m(z) - 1))(z))

    return again(train, outer, x), [*encoder.parameters(), *model.parameters()]


def _two_in_one(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()

    def outer(x: Tensor) -> Tensor:
        one = train(model, 2, lambda m, t: squares(m(x) - 1))
        two = train(model, 3, lambda m, t: squares(m(x) + 1))
        return squares(one(x) - two(x))

    return again(train, outer, x), list(model.parameters())


def _one_by_task(train: Train) -> tuple[Tensor, Inputs]:
    model, tasks = small(), [data() for _ in range(3)]

    def outer(x: Tensor) -> Tensor:
        return squares(train(model, 2, lambda m, t: squares(m(x) - 1))(x))

    return sum(again(train, outer, x) for x in tasks), list(model.parameters())  # type: ignore[return-value]


def _checkpoint_within(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()

    def outer(x: Tensor) -> Tensor:
        def loss_fn(m: nn.Module, t: int) -> Tensor:
            return squares(again(train, m, x) - 1)

        return squares(train(model, STEPS, loss_fn)(x))

    return again(train, outer, x), list(model.parameters())


def _twice(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()

    def outer(x: Tensor) -> Tensor:
        return squares(train(model, STEPS, lambda m, t: squares(m(x) - 1))(x))

    return again(train, lambda x: again(train, outer, x), x), list(model.parameters())


def _batches(train: Train) -> tuple[Tensor, Inputs]:
    model, k = small(), learned(0.8)
    parts = [data() for _ in range(STEPS)]

    def outer(k: Tensor) -> Tensor:
        fast = train(model, [k * x for x in parts], lambda m, b: squares(m(b) - 1))
        return squares(fast(parts[0])) + fast.losses.sum()

    return again(train, outer, k), [*model.parameters(), k]


def _buffers(train: Train) -> tuple[Tensor, Inputs]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    x = data()

    def outer(x: Tensor) -> Tensor:
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        return squares(fast(x)) + squares(fast.buffers["1.running_mean"])

    return again(train, outer, x), list(model.parameters())


CHECKPOINTED = {
    "whole": _whole,
    "with dropout": _with_dropout,
    "weights alone": _call_alone,
    "layer before": _layer_before,
    "two in one": _two_in_one,
    "one by task": _one_by_task,
    "checkpoint within": _checkpoint_within,
    "checkpoint around a checkpoint": _twice,
    "batches": _batches,
    "buffers": _buffers,
}


@cases("experiment", CHECKPOINTED)
@every_adjoint
def test_checkpoint_around_an_unroll(adjoint: str, experiment: Any) -> None:
    outcome(experiment, adjoint)


@pytest.mark.parametrize("early", [False, True], ids=["to-the-end", "early-stop"])
@every_adjoint
def test_checkpoint_around_with_and_without_early_stop(adjoint: str, early: bool) -> None:
    with torch.utils.checkpoint.set_checkpoint_early_stop(early):
        outcome(_whole, adjoint)


# Saved-tensor hooks: those around it see nothing of the unroll's own graphs.


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _same(x: Tensor) -> Tensor:
    return x


def _to_list(x: Tensor) -> Any:
    return (x.dtype, x.detach().tolist())


def _from_list(packed: Any) -> Tensor:
    return torch.tensor(packed[1], dtype=packed[0])


def _refusing(x: Tensor) -> Tensor:
    raise AssertionError("a tensor of the unroll's own graph was packed")


AROUND: dict[str, Any] = {
    "identity": lambda: saved_tensors_hooks(_same, _same),
    "clone": lambda: saved_tensors_hooks(lambda x: x.detach().clone(), _same),
    "save_on_cpu": save_on_cpu,
    "lists of numbers": lambda: saved_tensors_hooks(_to_list, _from_list),
    "zeros": lambda: saved_tensors_hooks(_zeros, _same),
    "float32": lambda: saved_tensors_hooks(
        lambda x: x.float() if x.dtype == torch.double else x,
        lambda x: x.double() if x.dtype == torch.float else x,
    ),
    "doubled on the way back": lambda: saved_tensors_hooks(_same, lambda x: 2 * x),
    "refusing": lambda: saved_tensors_hooks(_refusing, _same),
    "two": lambda: _two_hooks(),
    "disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
}


@contextlib.contextmanager
def _two_hooks() -> Any:
    with saved_tensors_hooks(_zeros, _same), saved_tensors_hooks(_same, lambda x: 3 * x):
        yield


@cases("around", AROUND)
@every_adjoint
def test_saved_tensor_hooks_around_the_call(adjoint: str, around: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, rate = small(), data(), learned(0.3)
        with around() if train.ours else contextlib.nullcontext():
            fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), lr=rate)
        return squares(fast(x)), [*model.parameters(), rate]

    outcome(experiment, adjoint)


@cases("around", AROUND)
@every_adjoint
def test_saved_tensor_hooks_around_the_backward_pass(adjoint: str, around: Any) -> None:
    seed()
    model, x = small(), data()
    outer = squares(ByHand()(model, STEPS, lambda m, t: squares(m(x) - 1))(x))
    want = gradients(outer, list(model.parameters()))
    train = Ours(ADJOINTS[adjoint])
    outer = squares(train(model, STEPS, lambda m, t: squares(m(x) - 1))(x))
    with around():
        got = gradients(outer, list(model.parameters()))
    train.check()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


MODES: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "default dtype": lambda: _default_dtype(),
    "deterministic": lambda: _deterministic(),
}


@contextlib.contextmanager
def _default_dtype() -> Any:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cases("mode", MODES)
@every_adjoint
def test_modes_around_the_backward_pass_alone(adjoint: str, mode: Any) -> None:
    """Those of the call are meant: what is active on the way back changes nothing."""
    seed()
    model, x = small(), data()
    loss_fn = lambda m, t: squares(m(x) - torch.full((), 1 / 3))  # noqa: E731
    outer = squares(ByHand()(model, STEPS, loss_fn)(x))
    want = gradients(outer, list(model.parameters()))
    outer = squares(Ours(ADJOINTS[adjoint])(model, STEPS, loss_fn)(x))
    with mode():
        got = [g.clone() for g in gradients(outer, list(model.parameters()))]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@every_adjoint
def test_backward_pass_in_another_thread(adjoint: str) -> None:
    seed()
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()
    outer = squares(ByHand()(model, STEPS, lambda m, t: squares(m(x) - 1))(x))
    want = gradients(outer, list(model.parameters()))
    seed()
    model, x = nn.Sequential(small(), nn.Dropout(0.5)), data()
    outer = squares(Ours(ADJOINTS[adjoint])(model, STEPS, lambda m, t: squares(m(x) - 1))(x))
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(gradients(outer, list(model.parameters()))))
    thread.start()
    thread.join()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


SENTENCE = r"(?i)thread|another unroll|in use|at the same time"


@pytest.mark.parametrize("together", ["calls", "backward passes", "call and backward", "fast"])
@pytest.mark.parametrize("adjoint", ["store-all", "segmented-2", "binomial-2"])
def test_two_threads_on_one_model(adjoint: str, together: str) -> None:
    """A lock, or one clear sentence: never another number, never a model left changed."""
    seed()
    model, x = small(), data()
    inputs = list(model.parameters())
    reached, done = threading.Event(), threading.Event()
    meet = [False]

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        loss = squares(m(x) - 1)
        if meet[0] and threading.current_thread() is not threading.main_thread():
            reached.set()
            done.wait(0.2)  # the other one begins meanwhile
        return loss

    want = gradients(squares(ByHand()(model, STEPS, loss_fn)(x)), inputs)
    before = [p.detach().clone() for p in inputs]

    def call() -> Any:
        inner = diffopt.SGD(model.parameters(), lr=0.3)
        return diffopt.unroll(model, inner, STEPS, loss_fn, adjoint=ADJOINTS[adjoint])

    ready = [call() for _ in range(2)] if together != "calls" else [None, None]
    first = squares(ready[0](x)) if ready[0] is not None else None
    second = squares(ready[1](x)) if ready[1] is not None else None
    results: dict[str, Any] = {}

    def run(key: str, fast: Tensor | None, kind: str) -> None:
        try:
            if kind == "fast":
                results[key] = ready[1](x).detach() if ready[1] is not None else None
                return
            outer = squares(call()(x)) if fast is None else fast
            results[key] = gradients(outer, inputs)
        except Exception as error:
            results[key] = error

    meet[0] = True
    other = threading.Thread(target=run, args=("a", first, "gradient"))
    other.start()
    reached.wait(0.5)
    kind = "fast" if together == "fast" else "gradient"
    run("b", None if together == "call and backward" else second, kind)
    done.set()
    other.join(30)
    assert not other.is_alive(), "a thread hangs"
    for key, found in results.items():
        if isinstance(found, Exception):
            assert isinstance(found, RuntimeError)
            assert re.search(SENTENCE, str(found)), str(found)
        elif key == "a" or kind == "gradient":
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
        else:
            torch.testing.assert_close(found, ready[1](x).detach(), rtol=0, atol=0)
    for p, q in zip(inputs, before, strict=True):
        assert torch.equal(p, q), "the model was left changed"
    assert list(model.parameters()) == inputs or all(
        p is q for p, q in zip(model.parameters(), inputs, strict=True)
    )


def test_two_threads_on_two_models() -> None:
    results: dict[int, Any] = {}

    def run(number: int) -> None:
        with torch.random.fork_rng():
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(4, 2, dtype=torch.double, generator=generator)
        model = models[number]
        outer = squares(Ours(ADJOINTS["segmented-2"])(model, 6, lambda m, t: squares(m(x)))(x))
        got = gradients(outer, list(model.parameters()))
        outer = squares(ByHand()(model, 6, lambda m, t: squares(m(x)))(x))
        results[number] = got, gradients(outer, list(model.parameters()))

    models = [small() for _ in range(3)]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    for got, want in results.values():
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


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


def _scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def _traced(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.ones(1, 2, dtype=torch.double))


SCRIPTED: dict[str, Any] = {
    "scripted Tanh": lambda: _scripted(nn.Tanh()),
    "scripted Flatten": lambda: _scripted(nn.Flatten()),
    "scripted Sequential": lambda: _scripted(nn.Sequential(nn.Tanh(), nn.Identity())),
    "traced Softplus": lambda: _traced(nn.Softplus()),
}


@cases("make", SCRIPTED)
@every_adjoint
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
@every_adjoint
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
    adjoint = {adjoint}
    loss_fn = lambda m, t: m(x).square().mean()
    fast = diffopt.unroll(model, inner, 9, loss_fn, adjoint=adjoint)
    outer = fast(x).square().mean()
    sys.stdout.flush()
    child = os.fork()
    want = diffopt.unroll(model, inner, 9, loss_fn, adjoint=diffopt.StoreAll())
    want = torch.autograd.grad(want(x).square().mean(), list(model.parameters()))
    code = 0
    if child == 0 or {both}:
        try:
            got = torch.autograd.grad(outer, list(model.parameters()))
            same = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(got, want))
            code = 0 if same else 3
        except RuntimeError as error:
            code = 0 if "fork" in str(error) or "process" in str(error) else 4
    if child == 0:
        os._exit(code)
    _, status = os.waitpid(child, 0)
    sys.exit(code or os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(
    ("adjoint", "both"),
    [
        ("diffopt.Segmented(2, storage=folder)", False),
        ("diffopt.Segmented(2, storage=folder)", True),
        ("diffopt.Binomial(2, storage=folder)", False),
        ("diffopt.Segmented(2, storage='cpu')", True),
        ("diffopt.Segmented(2)", True),
    ],
)
def test_fork_between_the_call_and_backward(adjoint: str, both: bool) -> None:
    code = textwrap.dedent(FORKED).replace("{adjoint}", adjoint).replace("{both}", str(both))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(diffopt.__file__).parents[1],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, words = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the backward pass after a fork hangs")
    assert process.returncode == 0, f"{process.returncode}: {words[-2000:]}"
