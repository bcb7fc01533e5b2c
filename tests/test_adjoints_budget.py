"""MemoryBudget: exact, within its budget by an independent count, and as fast as that allows."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import diffopt
from diffopt import MemoryBudget, StoreAll
from diffopt.adjoint import _budget

MIB = 2**20


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each loop had of which one was measured."""
    measured: list[int] = []

    def measure(loop: Any, original: Callable[..., Any] = _budget.take_first_step) -> Any:
        measured.append(loop.steps)
        return original(loop)

    monkeypatch.setattr(_budget, "take_first_step", measure)
    return measured


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    return nn.Sequential(*model, nn.Linear(64, 8)), torch.randn(256, 64)


def convolutional() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    ), torch.randn(16, 1, 20, 20)


def attention() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return layer, torch.randn(8, 16, 32)


def wide() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), torch.randn(4, 256)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for _ in range(10):
            h = self.cell(x, h)
        return h


def recurrent() -> tuple[nn.Module, Tensor]:
    return Recurrent(), torch.randn(64, 16)


def attention_over_many() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return layer, torch.randn(2, 96, 32)


MODELS = {
    "mlp": mlp,
    "convolutional": convolutional,
    "attention": attention,
    "wide": wide,
    "recurrent": recurrent,
    "attention over many": attention_over_many,
}


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def gradients(
    model: nn.Module, x: Tensor, steps: int, adjoint: diffopt.Adjoint, opt: str = "Adam"
) -> list[Tensor]:
    torch.manual_seed(1)
    inner = getattr(diffopt, opt)(model.parameters(), lr=0.01)
    fast = diffopt.unroll(model, inner, [x] * steps, loss_fn, adjoint=adjoint)
    total = torch.stack([p.square().sum() for p in fast.params.values()]).sum()
    return list(torch.autograd.grad(total, list(model.parameters())))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The most bytes allocated at once by PyTorch on the CPU: by its profiler's log."""
    result: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        yield result
    held = peak = 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    result.append(peak)


def smallest(model: nn.Module, x: Tensor, steps: int, opt: str = "Adam") -> int:
    with pytest.raises(ValueError, match="is too small for") as error:
        gradients(model, x, steps, MemoryBudget(1), opt)
    return least_in(error)


def least_in(error: pytest.ExceptionInfo[ValueError]) -> int:
    return int(str(error.value).split("MemoryBudget(")[2].split(")")[0])


@pytest.mark.filterwarnings("ignore:.*profiler")
@pytest.mark.parametrize(
    ("name", "opt"), [("mlp", "Adam"), ("convolutional", "SGD"), ("attention", "AdamW")]
)
def test_a_run_stays_within_its_prediction_and_its_budget(name: str, opt: str) -> None:
    model, x = MODELS[name]()
    least = smallest(model, x, 12, opt)
    gradients(model, x, 1, StoreAll(), opt)
    kinds = set()
    for budget in (least, int(1.3 * least), 2 * least, 4 * least, 20 * least):
        adjoint = MemoryBudget(budget)
        with counted() as peak:
            gradients(model, x, 12, adjoint, opt)
        plan = adjoint.measured(model).plan(12)
        assert plan.predicted_peak_bytes is not None
        assert peak[0] <= plan.predicted_peak_bytes <= budget
        assert peak[0] >= plan.predicted_peak_bytes / 4
        kinds.add((plan.peak_graphs, plan.peak_states))
    assert len(kinds) >= 3
    assert (12, 1) in kinds


@pytest.mark.filterwarnings("ignore:.*profiler")
@pytest.mark.parametrize(
    ("name", "opt"),
    [
        *(("wide", opt) for opt in ("SGD", "Momentum", "Adam", "Adadelta", "NAdam", "Adamax")),
        ("recurrent", "RMSprop"),
        ("attention over many", "SGD"),
    ],
)
def test_the_workspace_of_a_step_is_predicted_on_the_safe_side(name: str, opt: str) -> None:
    """The smallest budget of two steps is nearly all workspace."""
    model, x = MODELS[name]()
    least = smallest(model, x, 2, opt)
    gradients(model, x, 1, StoreAll(), opt)
    with counted() as peak:
        gradients(model, x, 2, MemoryBudget(least), opt)
    assert least / 4 <= peak[0] <= least


def test_exact_whatever_the_budget() -> None:
    torch.set_default_dtype(torch.float64)
    model, x = attention()
    exact = gradients(model, x, 9, StoreAll())
    least = smallest(model, x, 9)
    for factor in (1, 1.5, 3, 30):
        found = gradients(model, x, 9, MemoryBudget(int(factor * least)))
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_more_memory_is_never_slower_and_enough_is_as_storing_all() -> None:
    model, x = mlp()
    least = smallest(model, x, 15)
    costs = []
    for factor in (1, 1.2, 1.5, 2, 3, 5, 10, 40):
        adjoint = MemoryBudget(int(factor * least))
        gradients(model, x, 1, adjoint)
        costs.append(adjoint.measured(model).plan(15).relative_cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.2
    assert costs[-1] == 1


@pytest.mark.parametrize("steps", [1, 12])
def test_the_smallest_that_the_message_names_is_the_smallest(steps: int) -> None:
    model, x = mlp()
    least = smallest(model, x, steps)
    gradients(model, x, steps, MemoryBudget(least))
    with pytest.raises(ValueError, match=rf"write MemoryBudget\({least}\), which is"):
        gradients(model, x, steps, MemoryBudget(least - 1))


@pytest.mark.parametrize("of_batch", [True, False], ids=["batches", "int"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "later"])
def test_a_short_loop_calls_the_loss_once_a_step(of_batch: bool, again: bool) -> None:
    """Buffers, aux and random numbers are a plain loop's, also where the first step is measured."""
    model, x = convolutional()
    calls = []

    def loss_and_count(model: nn.Module, item: Any) -> tuple[Tensor, int]:
        calls.append(item)
        return model(nn.functional.dropout(x)).square().mean(), len(calls)

    def run(adjoint: diffopt.Adjoint | None) -> tuple[diffopt.Unrolled, Tensor]:
        calls.clear()
        torch.manual_seed(5)
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        steps: Any = [x] * 3 if of_batch else 3
        fast = diffopt.unroll(model, opt, steps, loss_and_count, adjoint=adjoint)
        return fast, torch.rand(2)

    if again:
        run(None)
    (fast, random) = run(None)
    fast.losses.sum().backward()
    assert len(calls) == 3
    expected, expected_random = run(StoreAll())
    assert torch.equal(fast.losses, expected.losses)
    assert torch.equal(random, expected_random)
    assert fast.aux == [1, 2, 3]
    for name, x in fast.buffers.items():
        assert torch.equal(x, expected.buffers[name])


def test_a_long_loop_keeps_to_its_plan_from_the_first_step_on() -> None:
    model, x = attention()
    calls = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return loss_fn(m, batch)

    least = smallest(model, x, 12, "SGD")
    for factor in (1, 1.5, 3, 100):
        for _ in range(2):  # the first step is measured, or was
            adjoint = MemoryBudget(int(factor * least))
            calls.clear()
            inner = diffopt.SGD(model.parameters(), lr=0.01)
            fast = diffopt.unroll(model, inner, [x] * 12, loss, adjoint=adjoint)
            fast.losses.sum().backward()
            plan = adjoint.measured(model).plan(12)
            # A first step that was recorded to be measured and is not in the plan as recorded
            # counts as the one that the plan advances over.
            assert len(calls) == plan.counts.advanced + 12


@pytest.mark.parametrize("opt", ["SGD", "Adam"])
def test_verified_bit_for_bit_from_the_first_step_on(opt: str) -> None:
    model, x = attention()
    inner = getattr(diffopt, opt)(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="is too small for") as error:
        diffopt.unroll(model, inner, [x] * 6, loss_fn, adjoint=MemoryBudget(1), verify=True)
    for budget in (least_in(error), "1GiB"):
        for _ in range(2):  # the first step is measured, or was
            fast = diffopt.unroll(
                model, inner, [x] * 6, loss_fn, adjoint=MemoryBudget(budget), verify=True
            )
            fast.losses.sum().backward()


def test_a_first_step_that_changes_is_found_by_verify() -> None:
    model, x = mlp()
    factor = [1.0]
    least = smallest(model, x, 6, "SGD")
    inner = diffopt.SGD(model.parameters(), lr=0.01)
    fast = diffopt.unroll(
        model,
        inner,
        6,
        lambda m, t: loss_fn(m, x) * (factor[0] if t == 0 else 1.0),
        adjoint=MemoryBudget(2 * least),
        verify=True,
    )
    factor[0] = 1 + 1e-6
    with pytest.raises(RuntimeError, match="step 0, computed again, gives another"):
        fast.losses.sum().backward()


def test_measures_once_for_steps_that_are_alike(measured: list[int]) -> None:
    model, x = mlp()
    gradients(model, x, 3, MemoryBudget("1GiB"))
    gradients(model, x, 5, MemoryBudget("2GiB"))
    assert measured == [3]
    gradients(model, x[:50], 4, MemoryBudget("1GiB"))
    gradients(model, x, 6, MemoryBudget("1GiB"), "SGD")
    gradients(mlp()[0], x, 7, MemoryBudget("1GiB"))
    assert measured == [3, 4, 6, 7]
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # What a function of the step number works on is not known.
        diffopt.unroll(model, inner, 8, lambda m, t: loss_fn(m, x), adjoint=MemoryBudget("1GiB"))
    assert measured == [3, 4, 6, 7, 8, 8]


def test_a_method_is_the_same_loss_in_every_call(measured: list[int]) -> None:
    class Learner:
        def loss(self, m: nn.Module, batch: Tensor) -> Tensor:
            return loss_fn(m, batch)

    model, x = mlp()
    inner, learner = diffopt.SGD(model.parameters(), lr=0.1), Learner()
    for steps in (2, 3):
        diffopt.unroll(model, inner, [x] * steps, learner.loss, adjoint=MemoryBudget("1GiB"))
    assert measured == [2]


def test_a_loss_that_has_no_hash() -> None:
    @dataclass
    class Scaled:
        by: float

        def __call__(self, m: nn.Module, batch: Tensor) -> Tensor:
            return self.by * loss_fn(m, batch)

    model, x = mlp()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, [x], Scaled(2.0), adjoint=MemoryBudget("1GiB"))
    fast.losses.sum().backward()


def test_what_was_measured_does_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    """The sizes of the functions used last are known, and no others."""
    monkeypatch.setattr(_budget, "_MOST_KNOWN", 3)
    model, x = mlp()
    inner = diffopt.SGD(model.parameters(), lr=0.1)

    def measure(loss: Callable[..., Tensor]) -> int:
        before = len(measured)
        diffopt.unroll(model, inner, [x], loss, adjoint=MemoryBudget("1GiB"))
        return len(measured) - before

    losses = [
        lambda m, batch: loss_fn(m, batch),
        lambda m, batch: 2 * loss_fn(m, batch),
        lambda m, batch: 3 * loss_fn(m, batch),
        lambda m, batch: 4 * loss_fn(m, batch),
    ]
    assert [measure(loss) for loss in losses] == [1, 1, 1, 1]
    assert [measure(losses[i]) for i in (1, 2, 3, 0, 2, 3, 1)] == [0, 0, 0, 1, 0, 0, 1]


def test_what_was_measured_goes_with_the_model() -> None:
    model, x = mlp()
    gradients(model, x, 2, MemoryBudget("1GiB"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_first_steps_graph_goes_where_the_plan_does_not_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = []

    def taken(loop: Any, original: Callable[..., Any] = _budget.take_first_step) -> Any:
        begun, *more = original(loop)
        held.append(weakref.ref(begun.graph.grads["0.weight"]))
        return begun, *more

    monkeypatch.setattr(_budget, "take_first_step", taken)
    model, x = mlp()
    alive = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        alive.extend(ref() is not None for ref in held)
        return loss_fn(m, batch)

    least = smallest(model, x, 3)
    held.clear()
    gc.disable()
    try:
        inner = diffopt.Adam(model.parameters(), lr=0.01)
        fast = diffopt.unroll(model, inner, [x] * 3, loss, adjoint=MemoryBudget(least))
        assert alive == [False, False]
        del fast
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, 1000),
        ("512MiB", 512 * MIB),
        ("2GiB", 2**31),
        (" 1.5 KiB ", 1536),
        ("3kB", 3000),
        ("2MB", 2 * 10**6),
        ("7B", 7),
        ("1TiB", 2**40),
    ],
)
def test_ways_to_write_a_budget(budget: int | str, expected: int) -> None:
    assert MemoryBudget(budget).bytes == expected


@pytest.mark.parametrize("budget", ["2", "GiB", "2 gib", "-1MiB", "1e3MiB", ""])
def test_other_ways_are_refused(budget: str) -> None:
    with pytest.raises(ValueError, match='is not a number of bytes: write it like "512MiB"'):
        MemoryBudget(budget)


def test_left_out_it_is_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp()
    asked: list[set[torch.device]] = []
    free = [2**40]

    def free_bytes(devices: Any) -> int:
        asked.append(set(devices))
        return free[0]

    monkeypatch.setattr(_budget, "free_bytes", free_bytes)
    gradients(model, x, 3, MemoryBudget())
    assert asked == []  # so little is free anywhere
    known = MemoryBudget().measured(model)
    assert known.plan(1000).relative_cost == 1
    assert asked == [{torch.device("cpu")}]
    free[0] = 2**30
    plan = known.plan(1000)
    assert plan == replace(known, budget=2**28).plan(1000)
    assert plan.relative_cost > 1
    assert plan.predicted_peak_bytes is not None
    assert 2**28 / 1.1 < plan.predicted_peak_bytes <= 2**28
    free[0] = 0
    assert known.plan(1000) == replace(known, budget=2**24).plan(1000)


def test_too_little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_budget, "free_bytes", lambda devices: 4 * MIB)
    monkeypatch.setattr(_budget, "_ALWAYS", 1000)
    model, x = wide()
    with pytest.raises(ValueError, match=r"MemoryBudget\(budget=None\), 1.00 MiB at this call,"):
        gradients(model, x, 3, MemoryBudget())


def test_wrong_budgets_are_refused() -> None:
    with pytest.raises(TypeError, match="budget is a float: pass a number of bytes, an int"):
        MemoryBudget(1e9)  # type: ignore[arg-type]
    for budget in (0, -5, "0MiB"):
        with pytest.raises(ValueError, match="holds nothing: pass more than 0 bytes"):
            MemoryBudget(budget)


def test_a_plan_needs_a_step_to_be_measured() -> None:
    adjoint = MemoryBudget("1GiB")
    model, x = mlp()
    with pytest.raises(ValueError, match=r"write MemoryBudget\(.*\).measured\(model\).plan\(10\)"):
        adjoint.plan(10)
    with pytest.raises(ValueError, match="a step of this Sequential takes is not known yet"):
        adjoint.measured(model)
    with pytest.raises(TypeError, match="step is a int: leave it out"):
        MemoryBudget("1GiB", step=5)  # type: ignore[arg-type]
    gradients(model, x, 1, adjoint)
    assert "MiB predicted" in str(adjoint.measured(model).plan(10_000))


def test_another_models_unroll_changes_no_answer(measured: list[int]) -> None:
    (small, x), (large, y) = mlp(), attention()
    adjoint = MemoryBudget("5MiB")
    gradients(small, x, 3, adjoint)
    known = adjoint.measured(small)
    first = known.plan(50)
    gradients(large, y, 4, adjoint)
    assert known.plan(50) == adjoint.measured(small).plan(50) == first
    assert adjoint.measured(large).plan(50) != first
    assert measured == [3, 4]
    gradients(small, x, 5, known)
    gradients(copy.deepcopy(small), x, 5, known)
    assert measured == [3, 4]


def test_no_steps() -> None:
    model, _ = mlp()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 0, loss_fn, adjoint=MemoryBudget(1))
    assert torch.equal(fast.params["0.weight"], model[0].weight)
