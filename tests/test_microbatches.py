"""``microbatches``: a step whose batch is split into parts equals the step of one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import EXACT, every_adjoint
from helpers import assert_all_close, batch, mse, tiny
from oracle import plain
from torch import Tensor, nn

import diffopt

T = 4


class Problem:
    """Seven examples a step, with weights of their own; everything in sight gets a gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = tiny()
        self.phi = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
        self.made = self.phi.exp()
        self.lr = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
        self.data = [(*batch(7), torch.rand(7).double().requires_grad_()) for _ in range(T)]
        self.wanted = [*self.model.parameters(), self.phi, self.lr, *(b[2] for b in self.data)]
        self.query = batch()

    def loss_fn(self, model: Any, item: Any) -> Tensor:
        x, y, weights = item
        losses = (model(x) - y).square().mean(1)
        penalty = self.phi * sum(p.square().sum() for p in model.parameters())
        found: Tensor = (weights * losses * self.made).mean() + 0.01 * penalty
        return found

    def outer(self, fast: Any) -> Tensor:
        found: Tensor = mse(fast, self.query) + fast.losses.sin().sum()
        return found

    def unrolled(self, parts: Any, adjoint: diffopt.Adjoint, **more: Any) -> Any:
        inner = diffopt.SGD(self.model.parameters(), lr=self.lr, momentum=0.5)
        return diffopt.unroll(
            self.model, inner, self.data, self.loss_fn, microbatches=parts, adjoint=adjoint, **more
        )

    def plain(self, **more: Any) -> Any:
        return plain(self.model, {"lr": self.lr, "momentum": 0.5}, self.data, self.loss_fn, **more)


@every_adjoint
@pytest.mark.parametrize("parts", [1, 3, 20])
def test_uneven_parts_equal_one_batch(adjoint: diffopt.Adjoint, parts: int) -> None:
    problem = Problem()
    want = torch.autograd.grad(problem.outer(problem.plain()), problem.wanted, retain_graph=True)
    fast = problem.unrolled(parts, adjoint)
    torch.testing.assert_close(fast.losses, problem.plain().losses, rtol=1e-12, atol=0)
    for _ in range(2):
        got = torch.autograd.grad(problem.outer(fast), problem.wanted, retain_graph=True)
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@every_adjoint
def test_second_order(adjoint: diffopt.Adjoint) -> None:
    problem = Problem()
    found = []
    for fast in (problem.plain(), problem.unrolled(3, adjoint)):
        first = torch.autograd.grad(problem.outer(fast), problem.wanted, create_graph=True)
        total = sum(g.sin().sum() for g in first)
        assert isinstance(total, Tensor)
        found.append([*first, *torch.autograd.grad(total, problem.wanted, retain_graph=True)])
    assert_all_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", ["grads", "model"])
@every_adjoint
def test_with_a_transform_a_bound_and_verify(adjoint: diffopt.Adjoint, transform: str) -> None:
    problem = Problem()

    def changed(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (g * problem.phi).tanh() for name, g in grads.items()}

    def with_model(grads: dict[str, Tensor], model: Any, item: Any) -> dict[str, Tensor]:
        assert len(item[0]) == 7
        return changed(grads)

    want = torch.autograd.grad(
        problem.outer(problem.plain(grad_transform=changed, max_cotangent_norm=0.3)),
        problem.wanted,
        retain_graph=True,
    )
    fast = problem.unrolled(
        3,
        adjoint,
        grad_transform=changed if transform == "grads" else with_model,
        max_cotangent_norm=0.3,
        verify=True,
    )
    got = torch.autograd.grad(problem.outer(fast), problem.wanted)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


OPTIMIZERS: list[Any] = [
    lambda p, lr: diffopt.Adam(p, lr=lr, eps=1e-3),
    lambda p, lr: diffopt.AdamW(p, lr=lambda t: lr / (t + 1), eps=1e-3, amsgrad=True),
    lambda p, lr: diffopt.RMSprop(p, lr=lr, eps=1e-3, momentum=0.5),
    lambda p, lr: diffopt.SGD(p, lr=lr, weight_decay=0.1, nesterov=True, momentum=0.5),
    lambda p, lr: diffopt.Adagrad(p, lr=lr),
    lambda p, lr: torch.optim.NAdam(p, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(2)])
def test_every_rule(adjoint: diffopt.Adjoint, make: Any) -> None:
    problem = Problem()
    found = []
    for parts in (None, 3):
        opt = make(problem.model.parameters(), problem.lr)
        fast = diffopt.unroll(
            problem.model, opt, problem.data, problem.loss_fn, microbatches=parts, adjoint=adjoint
        )
        found.append(
            torch.autograd.grad(
                problem.outer(fast), problem.wanted, materialize_grads=True, retain_graph=True
            )
        )
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)


def test_forward_mode_first_order_truncated_and_implicit() -> None:
    problem = Problem()
    some = [problem.made, problem.lr, problem.data[1][2]]
    cases: list[tuple[diffopt.Adjoint, Any]] = [
        (diffopt.ForwardMode(some), some),
        (diffopt.FirstOrder(), problem.wanted),
        (diffopt.Truncated(2), problem.wanted),
        (diffopt.Truncated(2, inner=diffopt.StoreAll()), problem.wanted),
    ]
    for adjoint, wanted in cases:
        found = [
            torch.autograd.grad(
                problem.outer(problem.unrolled(parts, adjoint)),
                wanted,
                materialize_grads=True,
                retain_graph=True,
            )
            for parts in (None, 3)
        ]
        assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    implicit = diffopt.Implicit(diffopt.NormalCG(200, 1e-12), gradient_tol=1e9)
    phi = problem.phi
    ends = [
        torch.autograd.grad(
            mse(problem.unrolled(n, implicit), problem.query), phi, retain_graph=True
        )
        for n in (None, 3)
    ]
    assert_all_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)


def masked(learned: bool) -> tuple[Any, list[Any], Tensor]:
    torch.manual_seed(1)
    w = torch.rand(T, 8).double()
    w[:, 2:4] = 0 if not learned else w[:, 2:4]
    w.requires_grad_(learned)
    data = [{"x": batch(8), "mask": w[t]} for t in range(T)]

    def loss_fn(model: Any, item: Any) -> Tensor:
        x, y = item["x"]
        losses = (model(x) - y).square().mean(1)
        found: Tensor = (item["mask"] * losses).sum() / item["mask"].sum()
        return found

    return loss_fn, data, w


@every_adjoint
@pytest.mark.parametrize("learned", [False, True])
def test_means_over_what_a_mask_leaves(adjoint: diffopt.Adjoint, learned: bool) -> None:
    model, query = tiny(), batch()
    loss_fn, data, w = masked(learned)
    wanted = [*model.parameters(), *([w] if learned else [])]
    parts = diffopt.Microbatches(4, weight=lambda part: part["mask"].sum())
    want = torch.autograd.grad(
        mse(plain(model, {"lr": 0.3}, data, loss_fn), query), wanted, retain_graph=True
    )
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.3),
        data,
        loss_fn,
        microbatches=parts,
        adjoint=adjoint,
    )
    got = torch.autograd.grad(mse(fast, query), wanted)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("learned", [False, True])
def test_learned_weights_in_forward_mode_and_twice(learned: bool) -> None:
    model, query = tiny(), batch()
    loss_fn, data, _ = masked(True)
    scale = torch.tensor(1.5, dtype=torch.double, requires_grad=True)
    parts = diffopt.Microbatches(
        3, weight=lambda part: part["mask"].sum() + scale * part["mask"][0]
    )
    found = []
    for adjoint in (diffopt.ForwardMode([scale]), diffopt.Segmented(2), diffopt.StoreAll()):
        fast = diffopt.unroll(
            model,
            diffopt.SGD(model.parameters(), lr=0.3),
            data,
            loss_fn,
            microbatches=parts,
            adjoint=adjoint,
        )
        total = mse(fast, query) + fast.losses.sum()
        (first,) = torch.autograd.grad(total, scale, create_graph=learned)
        found.append([first, *torch.autograd.grad(first, scale)] if learned else [first])

    def by_parts(model: Any, item: Any) -> Tensor:
        x, y = item["x"]
        total, weight = 0, 0
        for i, j in ((0, 2), (2, 5), (5, 8)):
            part = {"x": (x[i:j], y[i:j]), "mask": item["mask"][i:j]}
            w = part["mask"].sum() + scale * part["mask"][0]
            total, weight = total + w * loss_fn(model, part), weight + w
        return total / weight

    end = plain(model, {"lr": 0.3}, data, by_parts)
    (want,) = torch.autograd.grad(mse(end, query) + end.losses.sum(), scale, create_graph=learned)
    wants = [want, *torch.autograd.grad(want, scale)] if learned else [want]
    for got in found:
        assert_all_close(got, wants, rtol=1e-9, atol=1e-12)


@every_adjoint
def test_sums(adjoint: diffopt.Adjoint) -> None:
    model, data, query = tiny(), [batch(7) for _ in range(T)], batch()

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return F.mse_loss(model(pair[0]), pair[1], reduction="sum")

    want = torch.autograd.grad(
        mse(plain(model, {"lr": 0.02}, data, loss_fn), query), list(model.parameters())
    )
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.02),
        data,
        loss_fn,
        adjoint=adjoint,
        microbatches=diffopt.Microbatches(3, reduction="sum"),
    )
    got = torch.autograd.grad(mse(fast, query), list(model.parameters()))
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


class Noisy(nn.Module):
    """Dropout, a counter, and a parameter that only some examples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.4)
        self.extra = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.last(self.drop(self.first(x).tanh()))
        return y * self.extra if x[0, 0] > 0 else y


@every_adjoint
def test_random_numbers_buffers_and_aux_go_part_by_part(adjoint: diffopt.Adjoint) -> None:
    torch.manual_seed(0)
    model, data = Noisy().double(), [batch(6) for _ in range(T)]
    extras: list[Any] = []

    def loss_fn(model: Any, pair: Any) -> Any:
        loss = mse(model, pair)
        return loss, {"loss": loss * 2, "n": len(pair[0])}

    def by_parts(model: Any, pair: Any) -> Tensor:
        found = [loss_fn(model, (pair[0][i : i + 2], pair[1][i : i + 2])) for i in (0, 2, 4)]
        extras.append([aux for _, aux in found])
        total: Tensor = sum(loss for loss, _ in found) / 3
        return total

    def outer(end: Any, aux: Any) -> Tensor:
        total: Tensor = sum(p.sin().sum() for p in end.params.values()) + sum(
            (t + k) * part["loss"] for t, parts in enumerate(aux) for k, part in enumerate(parts)
        )
        return total

    torch.manual_seed(5)
    end = plain(model, {"lr": 0.3, "momentum": 0.5}, data, by_parts)
    after = torch.get_rng_state()
    want = torch.autograd.grad(outer(end, extras), list(model.parameters()))
    torch.manual_seed(5)
    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.3, momentum=0.5),
        data,
        loss_fn,
        adjoint=adjoint,
        microbatches=3,
    )
    assert torch.equal(torch.get_rng_state(), after)
    assert fast.buffers["calls"] == 3 * T
    assert [part["n"] for part in fast.aux[0]] == [2, 2, 2]
    got = torch.autograd.grad(outer(fast, fast.aux), list(model.parameters()))
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), after)


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()

    def run(model: Any = None, steps: Any = None, parts: Any = 2, **more: Any) -> Any:
        model = model or tiny()
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(model, opt, steps or [batch()], mse, microbatches=parts, **more)

    with pytest.raises(NotImplementedError, match="submodule '1' is a BatchNorm1d in training"):
        run(model)
    run(model.eval())
    with pytest.raises(ValueError, match="steps is an int"):
        run(steps=3)
    for options in ({"tasks": 2}, {"compile": True}):
        with pytest.raises(NotImplementedError, match=r"microbatches=2 and .* do not go together"):
            run(**options)
    for parts, kind in (("2", TypeError), (True, TypeError), (0, ValueError)):
        with pytest.raises(kind, match="microbatches"):
            run(parts=parts)
    x, y = batch()
    with pytest.raises(ValueError, match="first dimension, in which they have to agree"):
        run(steps=[(x, y[:-1])])
    with pytest.raises(ValueError, match=r'reduction="max"|reduction=.max.'):
        diffopt.Microbatches(2, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is for a mean"):
        diffopt.Microbatches(2, weight=len, reduction="sum")
    with pytest.raises(ValueError, match="sum to 0"):
        run(parts=diffopt.Microbatches(2, weight=lambda part: 0))
    with pytest.raises(TypeError, match="weight returned a str"):
        run(parts=diffopt.Microbatches(2, weight=lambda part: "x"))


def test_a_buffer_that_learns_is_refused() -> None:
    class Averages(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.mean = 0.5 * self.mean + y.mean(0)
            return y

    model = Averages().double()
    with pytest.raises(NotImplementedError, match="computes the buffer 'mean' with gradients"):
        diffopt.unroll(
            model, diffopt.SGD(model.parameters(), lr=0.1), [batch()], mse, microbatches=2
        )


@pytest.mark.parametrize("adjoint", [a for _, a in EXACT], ids=[name for name, _ in EXACT])
def test_what_changed_since_is_an_error(adjoint: diffopt.Adjoint) -> None:
    model, data = tiny(), [batch(6) for _ in range(T)]
    held = {"scale": torch.tensor(1.5, dtype=torch.double, requires_grad=True), "number": 1.0}

    def loss_fn(model: Any, pair: Any) -> Any:
        return held["number"] * held["scale"] * mse(model, pair)

    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=0.1),
        data,
        loss_fn,
        microbatches=2,
        adjoint=adjoint,
    )
    total = mse(fast, data[0])
    first, held["scale"] = held["scale"], held["scale"].detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match="does not use the tensors that require grad"):
        torch.autograd.grad(total, first, retain_graph=True)
    held["scale"], held["number"] = first, 2.0
    with pytest.raises(RuntimeError, match="computed again, gives another"):
        torch.autograd.grad(total, first, retain_graph=True)
    held["number"] = 1.0
    torch.autograd.grad(total, first)


def test_one_parts_graph_is_alive() -> None:
    alive, most = [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.held = _Held(alive, most)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g.clone()

    model, data = tiny(), [batch(8) for _ in range(3)]

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return F.mse_loss(Counted.apply(model(pair[0])), pair[1])

    for adjoint in (diffopt.Segmented(2), diffopt.StoreAll()):
        for inner in (diffopt.SGD(model.parameters(), lr=0.1), diffopt.Adam(model.parameters())):
            fast = diffopt.unroll(model, inner, data, loss_fn, microbatches=4, adjoint=adjoint)
            most[0] = 0
            mse(fast, data[0]).backward()
            assert most[0] == 1


class _Held:
    def __init__(self, alive: list[int], most: list[int]) -> None:
        self.alive = alive
        alive[0] += 1
        most[0] = max(most[0], alive[0])

    def __del__(self) -> None:
        self.alive[0] -= 1
