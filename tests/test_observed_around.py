"""What stands around an unroll does not reach into it."""

from __future__ import annotations

import contextlib
import re
import threading
from typing import Any

import pytest
import torch
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
