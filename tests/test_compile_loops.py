"""Compiled steps are taken in loops: what a block of them gives is what the steps one by one give.

The loops run uncompiled here, by PyTorch's own loop over their body.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_all_close, batch, batches, mse, tiny
from torch import Tensor, nn

import diffopt
from diffopt import schedule
from diffopt._loop.stretches import Stretch, of_plan, stretches

T = 7

ADJOINTS = [
    diffopt.StoreAll(),
    diffopt.Segmented(1),
    diffopt.Segmented(3),
    diffopt.Binomial(1),
    diffopt.Binomial(2),
    diffopt.Binomial(3),
    diffopt.MemoryBudget("100MiB"),
    diffopt.Segmented(3, storage="cpu"),
]


# Stretches of plans.


def _plans() -> list[schedule.Plan]:
    found = []
    for steps in range(10):
        found += [schedule.store_all(steps)]
        found += [schedule.segmented(steps, k) for k in (1, 2, 3, 5)]
        found += [schedule.binomial(steps, c) for c in (1, 2, 3, 4)]
        found += [
            schedule.budget(steps, state_bytes=1, graph_bytes=3, budget_bytes=b)
            for b in (9, 14, 40)
        ]
    return found


def test_stretches_are_the_plan() -> None:
    for plan in _plans():
        for parts, actions in zip(
            of_plan(plan), (plan.forward_actions, plan.backward_actions), strict=True
        ):
            unrolled = [
                action
                for part in parts
                for action in (part.actions if isinstance(part, Stretch) else [part])
            ]
            assert unrolled == list(actions)


@pytest.mark.parametrize(
    ("plan", "forward", "backward"),
    [
        (schedule.store_all(4), ["record 0 4"], ["vjp 0 4"]),
        (schedule.segmented(4, 1), ["save 0 4"], ["reverse 0 4"]),
        (
            schedule.segmented(6, 3),
            ["save", "advance 0 3", "save 3 6"],
            ["reverse 3 6", "segment 0 3"],
        ),
        (
            schedule.binomial(5, 2),
            ["save", "advance 0 3", "save", "advance 3 5"],
            ["segment 3 5", "segment 0 3"],
        ),
    ],
    ids=["store_all", "every state", "segments", "binomial"],
)
def test_stretches(plan: schedule.Plan, forward: list[str], backward: list[str]) -> None:
    def said(parts: Any) -> list[str]:
        return [f"{p.kind} {p.start} {p.stop}" if isinstance(p, Stretch) else p.kind for p in parts]

    assert said(stretches(plan.forward_actions)) == forward
    assert said(stretches(plan.backward_actions)) == backward


# Blocks.


class Table:
    """Problems in which steps differ in all that may differ: each gives a loss and its inputs."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)
        ).double()
        self.scale = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
        self.log_lr = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
        self.rates = torch.full((4, 2), 0.1, dtype=torch.float64, requires_grad=True)
        self.images = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
        few = batches(3)
        # Three batches in turn, the inputs of which are learned.
        self.data = [(self.images[t % 3], few[t % 3][1]) for t in range(T)]
        self.query = batch()

    def loss(self, model: Any, pair: Any) -> Any:
        out = model(pair[0])
        return (out - pair[1]).square().mean() * self.scale.exp()[0] + out.mean() * self.scale[1], {
            "out": out,
            "text": "kept",
        }

    def optimizer(self) -> diffopt.Optimizer:
        first, rest = self.model[0].weight, [*self.model.parameters()][1:]
        groups = [{"params": [first], "lr": self.rates}, {"params": rest}]
        return diffopt.Adam(
            groups, lr=lambda t: self.log_lr.exp() / (1 + t), eps=1e-3, weight_decay=0.1
        )

    def outcome(self, **more: Any) -> tuple[Any, tuple[Tensor, ...]]:
        torch.manual_seed(5)
        fast = diffopt.unroll(self.model, self.optimizer(), self.data, self.loss, **more)
        after = torch.rand(2)
        inputs = [self.scale, self.log_lr, self.rates, self.images, *self.model.parameters()]
        total = fast.losses.square().sum() + mse(fast, self.query)
        grads = torch.autograd.grad(total, inputs)
        values = [*fast.params.values(), *fast.buffers.values(), fast.losses, after]
        values += [x["out"] for x in fast.aux]
        assert [x["text"] for x in fast.aux] == ["kept"] * T
        return [x.detach().double() for x in values], grads


def beginning_with(number: int) -> list[diffopt.Adjoint]:
    """All adjoints: the first is the one whose steps are traced."""
    return ADJOINTS[number:] + ADJOINTS[:number]


@pytest.mark.parametrize("first", [0, 3])
def test_equals_uncompiled_steps(first: int, graphs: list[bool], subtests: pytest.Subtests) -> None:
    problem = Table()
    for adjoint in beginning_with(first):
        with subtests.test(adjoint=adjoint):
            want_values, want = problem.outcome(adjoint=adjoint)
            got_values, got = problem.outcome(adjoint=adjoint, compile=True)
            assert_all_close(got_values, want_values, rtol=1e-12, atol=1e-13)
            assert_all_close(got, want, rtol=1e-9, atol=1e-12)
    assert graphs == [True, True]


def test_one_pair_of_loops_serves_all_plans_and_lengths(graphs: list[bool]) -> None:
    problem, data = Table(), None
    data = problem.data
    for steps in (1, 2, T):
        problem.data = data[:steps]
        for adjoint in ADJOINTS[:6]:
            torch.manual_seed(0)
            fast = diffopt.unroll(
                problem.model,
                problem.optimizer(),
                problem.data,
                problem.loss,
                adjoint=adjoint,
                compile=True,
            )
            torch.autograd.grad(fast.losses.sum(), problem.log_lr)
    assert graphs == [True, True]


def test_steps_of_other_structure_end_a_block(graphs: list[bool]) -> None:
    model = tiny()
    data = [batch(4), batch(4), batch(6), batch(4), batch(6), batch(6)]
    query = batch()

    def grads(**more: Any) -> tuple[Tensor, ...]:
        opt = diffopt.Momentum(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, mse, **more)
        return torch.autograd.grad(mse(fast, query), list(model.parameters()))

    for adjoint in (diffopt.Segmented(1), diffopt.Segmented(4), diffopt.StoreAll()):
        got = grads(adjoint=adjoint, compile=True)
        assert_all_close(got, grads(adjoint=adjoint), rtol=1e-10, atol=1e-13)
    assert graphs == [True] * 4


def test_a_state_that_grows_in_the_first_step_is_no_loop_there(graphs: list[bool]) -> None:
    model, data = tiny(), batches(4)  # momentum with dampening has no buffer before the first step

    def grads(compile: bool) -> tuple[Tensor, ...]:
        opt = diffopt.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.3)
        fast = diffopt.unroll(model, opt, data, mse, segment=1, compile=compile)
        return torch.autograd.grad(fast.losses.sum(), list(model.parameters()))

    assert_all_close(grads(True), grads(False), rtol=1e-10, atol=1e-13)
    assert sorted(graphs) == [False, False, True, True]


def test_masks_that_are_divided_in_place(graphs: list[bool]) -> None:
    layers = nn.Sequential(*tiny(), nn.Dropout(0.4))
    data = [(torch.randn(3, 5, 2).double(), torch.randn(3, 5, 2).double()) for _ in range(T)]
    found = []
    for compile in (False, True):
        torch.manual_seed(2)
        opt = diffopt.SGD(layers.parameters(), lr=0.1)
        fast = diffopt.unroll(
            layers, opt, data, mse, tasks=3, adjoint=diffopt.StoreAll(), compile=compile
        )
        found.append(torch.autograd.grad(fast.losses.square().sum(), [*layers.parameters()]))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert all(graphs)


def test_a_second_way_back(graphs: list[bool]) -> None:
    model, data = tiny(), batches(T)
    for adjoint in ADJOINTS[:5]:
        opt = diffopt.Adam(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, mse, adjoint=adjoint, compile=True)
        once, again = (
            torch.autograd.grad(fast.losses.sum(), [*model.parameters()], retain_graph=True)
            for _ in range(2)
        )
        assert_all_close(again, once, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bound", "shows", "first"),
    [(None, False, 6), (None, True, 1), (0.3, False, 4), (0.3, True, 3)],
)
def test_between_the_steps(
    bound: float | None,
    shows: bool,
    first: int,
    graphs: list[bool],
    subtests: pytest.Subtests,
) -> None:
    """What flows back is shown and bounded before each step, in the loop."""
    problem = Table()

    def run(**how: Any) -> tuple[tuple[Tensor, ...], list[tuple[int, dict[str, Tensor]]]]:
        events: list[tuple[int, dict[str, Tensor]]] = []
        monitor = (lambda t, c: events.append((t, c))) if shows else None
        return problem.outcome(max_cotangent_norm=bound, monitor=monitor, **how)[1], events

    for adjoint in beginning_with(first):
        with subtests.test(adjoint=adjoint):
            want, expected = run(adjoint=adjoint)
            got, events = run(adjoint=adjoint, compile=True)
            assert_all_close(got, want, rtol=1e-9, atol=1e-12)
            assert [t for t, _ in events] == [*reversed(range(T))] * shows
            for (_, a), (_, b) in zip(events, expected, strict=True):
                assert a.keys() == b.keys()
                assert_all_close([*a.values()], [*b.values()], rtol=1e-9, atol=1e-12)
    # Steps that a plan goes back through alone are bounded outside of their code.
    assert graphs == [True] * (3 if bound or shows else 2)


def test_nothing_is_shown_of_what_nothing_flows_to(graphs: list[bool]) -> None:
    model, data = nn.Sequential(*tiny(), nn.Linear(2, 2).double()), batches(T)
    names = []
    for compile in (False, True):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        seen: list[tuple[int, list[str]]] = []
        fast = diffopt.unroll(
            model,
            opt,
            data,
            mse,
            segment=1,
            compile=compile,
            monitor=lambda t, c: seen.append((t, sorted(c))),  # noqa: B023
        )
        fast.params["0.weight"].sum().backward()
        names.append(seen)
    assert names[0] == names[1]
    assert names[0][0] == (T - 1, ["0.weight"])


def test_another_bound_compiles_nothing_again(graphs: list[bool]) -> None:
    model, data = tiny(), batches(T)
    for bound in (0.1, 0.2, 1e3):
        found = []
        for compile in (False, True):
            opt = diffopt.SGD(model.parameters(), lr=0.1)
            fast = diffopt.unroll(
                model, opt, data, mse, segment=1, compile=compile, max_cotangent_norm=bound
            )
            found.append(torch.autograd.grad(fast.losses.sum(), [*model.parameters()]))
        assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert graphs == [True, True]


def test_compiling_is_shown(graphs: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny(), batches(T)
    shown = []
    for _ in range(2):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, mse, compile=True, progress=True)
        fast.losses.sum().backward()
        shown.append(capsys.readouterr().err)
    assert "unroll, compiling" in shown[0]
    assert "unroll, compiling" not in shown[1]
    assert "unroll, backward" in shown[1]


def test_without_a_graph(graphs: list[bool]) -> None:
    model, data = tiny(), batches(T)
    opt = diffopt.Adam(model.parameters(), lr=0.1)
    with torch.no_grad():
        got = diffopt.unroll(model, opt, data, mse, compile=True)
        want = diffopt.unroll(model, opt, data, mse)
    assert_all_close([*got.params.values()], [*want.params.values()], rtol=1e-12, atol=1e-14)
    assert_all_close([got.losses], [want.losses], rtol=1e-12, atol=0)
    assert graphs == [True]


def test_a_batch_that_is_another_one_when_it_is_read_again_is_an_error(graphs: list[bool]) -> None:
    class Drifting:
        def __init__(self) -> None:
            self.reads = 0
            self.pair = batch()

        def __len__(self) -> int:
            return T

        def __getitem__(self, t: int) -> tuple[Tensor, Tensor]:
            self.reads += 1
            return self.pair[0] + 0.1 * self.reads, self.pair[1]

    model = tiny()
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, Drifting(), mse, segment=3, compile=True)
    with pytest.raises(RuntimeError, match=r"step \d, computed again, gives another loss"):
        fast.losses.sum().backward()


def test_a_schedule_that_changes_before_the_way_back_is_an_error(graphs: list[bool]) -> None:
    model, factor = tiny(), [1.0]
    opt = diffopt.SGD(model.parameters(), lr=lambda t: 0.1 * factor[0])
    fast = diffopt.unroll(model, opt, batches(T), mse, segment=3, compile=True)
    factor[0] = 2.0
    with pytest.raises(RuntimeError, match=r"step \d, computed again, gives another"):
        fast.losses.sum().backward()
    fast = diffopt.unroll(model, opt, batches(T), mse, segment=1, compile=True)
    factor[0] = 3.0
    fast.losses.sum().backward()  # nothing of it is computed again


# What the user's own rules may be made of.


class Switched(diffopt.SGD):
    """SGD with an option that Python decides on, and a factor that a global network gives."""

    def __init__(self, params: Any, lr: Any, doubled: bool) -> None:
        super().__init__(params, lr=lr)
        self.defaults["doubled"] = doubled
        for group in self.param_groups:
            group["doubled"] = doubled

    def update(self, params: Any, grads: Any, state: Any, **more: Any) -> Any:
        factor = _network(torch.ones(1, dtype=torch.float64)).exp()
        if self.param_groups[0]["doubled"]:
            factor = factor * 2
        grads = {name: None if g is None else g * factor for name, g in grads.items()}
        return super().update(params, grads, state, **more)


_network = nn.Linear(1, 1).double()


def test_a_rule_with_a_switch_and_a_global_network(graphs: list[bool]) -> None:
    model, data = tiny(), batches(3)
    inputs = [*model.parameters(), *_network.parameters()]
    for doubled in (False, True):
        found = []
        for compile in (False, True):
            opt = Switched(model.parameters(), 0.1, doubled)
            fast = diffopt.unroll(model, opt, data, mse, compile=compile)
            found.append(torch.autograd.grad(fast.losses.sum(), inputs))
        assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert graphs == [True] * 4


def _reads(model: Any, pair: Any) -> Tensor:
    loss = mse(model, pair)
    return loss * 2 if loss > 0.1 else loss  # the line that is named


def test_a_fallback_names_the_line_that_reads_a_value(graphs: list[bool]) -> None:
    model = tiny()
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    line = _reads.__code__.co_firstlineno + 2
    with pytest.warns(diffopt.CompileWarning, match=rf"test_compile_loops\.py, line {line}"):
        diffopt.unroll(model, opt, batches(2), _reads, compile=True)
    assert not graphs


@pytest.mark.parametrize("strided", [False, True], ids=["", "as_strided"])
@pytest.mark.parametrize("each", [False, True], ids=["one batch", "a batch each"])
@pytest.mark.parametrize("adjoint", [diffopt.Segmented(1), diffopt.MemoryBudget("100MiB")])
def test_tasks_on_parts_of_tensors(
    adjoint: diffopt.Adjoint, each: bool, strided: bool, graphs: list[bool]
) -> None:
    """Batches have gaps in their memory, and weights dimensions of size 1, of any stride."""
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    whole = torch.randn(2, 6, 1 + T, 2, dtype=torch.float64, requires_grad=True)
    data = [(whole[:, :4, t * each, :1], whole[:, 2:, 1, 1:]) for t in range(T)]

    def loss_fn(m: Any, pair: Any) -> Tensor:
        x = pair[0].as_strided((2, 1), (4 * (1 + T), 1)) if strided else pair[0]
        y = pair[1][:2] if strided else pair[1]
        return (m(x) - y).square().mean()

    if strided:  # which torch.vmap does not know with a derivative
        data = [(x[0], y[0]) for x, y in data]
    found = []
    for compile in (False, True):
        more = {} if strided else {"tasks": 2}
        opt = diffopt.Adam(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, loss_fn, adjoint=adjoint, compile=compile, **more)
        total = fast.losses.square().sum() + sum(x.sum() for x in fast.params.values())
        found.append(torch.autograd.grad(total, [whole, *model.parameters()]))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert graphs
    assert all(graphs) != strided
