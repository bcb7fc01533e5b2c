"""A parameter outside the optimizer that the forward pass moves is state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from observed import (
    ADJOINTS,
    Inputs,
    Ours,
    Train,
    cases,
    data,
    every_adjoint,
    gradients,
    impure,
    learned,
    outcome,
    seed,
    small,
    squares,
)
from torch import Tensor, nn

import diffopt

STEPS = 4


# Teachers: parameters that the forward pass moves.


class Taught(nn.Module):
    """A student, and a teacher that follows it by ``move`` within the forward pass."""

    def __init__(self, move: Any, *, learns: bool = False, first: bool = False) -> None:
        super().__init__()
        self.net, self.teacher = small(), small()
        self.teacher.requires_grad_(learns)
        self.move, self.first = move, first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.move(self)
        with torch.no_grad():
            aim = self.teacher(x)
        out = F.mse_loss(self.net(x), 0.5 * aim + 0.3)
        if not self.first:
            self.move(self)
        return out


def _pairs(m: Taught) -> Any:
    return zip(m.teacher.parameters(), m.net.parameters(), strict=True)


@torch.no_grad()
def _lerp(m: Taught) -> None:
    for t, s in _pairs(m):
        t.lerp_(s, 0.1)


@torch.no_grad()
def _mul_add(m: Taught) -> None:
    for t, s in _pairs(m):
        t.mul_(0.9).add_(s, alpha=0.1)


@torch.no_grad()
def _copy(m: Taught) -> None:
    for t, s in _pairs(m):
        t.copy_(0.9 * t + 0.1 * s)


def _data(m: Taught) -> None:
    for t, s in _pairs(m):
        t.data = 0.9 * t.data + 0.1 * s.data


def _data_in_place(m: Taught) -> None:
    for t, s in _pairs(m):
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


def _data_copy(m: Taught) -> None:
    for t, s in _pairs(m):
        t.data.copy_(t.data * 0.9 + s.data * 0.1)


def _detached_in_place(m: Taught) -> None:
    for t, s in _pairs(m):
        t.detach().mul_(0.9).add_(s.detach(), alpha=0.1)


@torch.no_grad()
def _foreach_lerp(m: Taught) -> None:
    torch._foreach_lerp_(list(m.teacher.parameters()), list(m.net.parameters()), 0.1)


@torch.no_grad()
def _foreach_mul_add(m: Taught) -> None:
    teachers = list(m.teacher.parameters())
    torch._foreach_mul_(teachers, 0.9)
    torch._foreach_add_(teachers, list(m.net.parameters()), alpha=0.1)


def _load_state_dict(m: Taught) -> None:
    values = m.net.state_dict()
    m.teacher.load_state_dict(
        {k: 0.9 * x + 0.1 * values[k] for k, x in m.teacher.state_dict().items()}
    )


@torch.no_grad()
def _set(m: Taught) -> None:
    for t, s in _pairs(m):
        t[...] = 0.9 * t + 0.1 * s


@torch.no_grad()
def _augmented(m: Taught) -> None:
    for t, s in _pairs(m):
        t *= 0.9
        t += 0.1 * s


@torch.no_grad()
def _out(m: Taught) -> None:
    for t, s in _pairs(m):
        torch.lerp(t, s, 0.1, out=t)


@torch.no_grad()
def _one_row(m: Taught) -> None:
    m.teacher[0].weight[0].lerp_(m.net[0].weight[0], 0.1)


@torch.no_grad()
def _view(m: Taught) -> None:
    for t, s in _pairs(m):
        t.view(-1)[::2].lerp_(s.view(-1)[::2], 0.1)


@torch.no_grad()
def _index_copy(m: Taught) -> None:
    weight = m.teacher[0].weight
    rows = torch.tensor([0, 2])
    weight.index_copy_(0, rows, 0.9 * weight[rows] + 0.1 * m.net[0].weight[rows])


@torch.no_grad()
def _scatter(m: Taught) -> None:
    weight = m.teacher[0].weight
    index = torch.zeros(1, 2, dtype=torch.long)
    weight.scatter_(0, index, 0.9 * weight[:1] + 0.1 * m.net[0].weight[:1])


@torch.no_grad()
def _index_put(m: Taught) -> None:
    weight = m.teacher[0].weight
    weight[weight > 0] *= 0.9


@torch.no_grad()
def _noise(m: Taught) -> None:
    for t in m.teacher.parameters():
        t.add_(torch.randn_like(t), alpha=0.05)


@torch.no_grad()
def _averaged(m: Taught) -> None:
    for t, s in _pairs(m):
        t.copy_(torch.optim.swa_utils.get_ema_avg_fn(0.9)(t, s, torch.tensor(1)))


@torch.no_grad()
def _vector(m: Taught) -> None:
    mixed = 0.9 * nn.utils.parameters_to_vector(m.teacher.parameters())
    mixed += 0.1 * nn.utils.parameters_to_vector(m.net.parameters())
    nn.utils.vector_to_parameters(mixed, m.teacher.parameters())


@torch.no_grad()
def _clamp(m: Taught) -> None:
    for t in m.teacher.parameters():
        t.mul_(1.3).clamp_(-0.5, 0.5)


@torch.no_grad()
def _functional(m: Taught) -> None:
    for t, s in _pairs(m):
        t += 0.1 * s
        F.relu(F.leaky_relu(t, 0.9, inplace=True).neg_(), True).sub_(0.01)
        F.hardtanh(F.dropout(t, 0.3, inplace=True), -0.5, 0.5, True)
        F.normalize(t, dim=-1, out=t).mul_(0.7)


MOVES = {
    "lerp_": _lerp,
    "mul_ and add_": _mul_add,
    "copy_": _copy,
    ".data replaced": _data,
    ".data in place": _data_in_place,
    ".data copy_": _data_copy,
    "detach in place": _detached_in_place,
    "_foreach_lerp_": _foreach_lerp,
    "_foreach_mul_ and _add_": _foreach_mul_add,
    "load_state_dict": _load_state_dict,
    "index assignment": _set,
    "augmented assignment": _augmented,
    "out=": _out,
    "one row": _one_row,
    "a view": _view,
    "index_copy_": _index_copy,
    "scatter_": _scatter,
    "masked": _index_put,
    "random numbers": _noise,
    "swa_utils": _averaged,
    "vector_to_parameters": _vector,
    "clamp_": _clamp,
    "functional": _functional,
}


def taught(make: Any) -> Any:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, rate = make(), data(), learned(0.3)
        fast = train(model, STEPS, lambda m, t: m(x), lr=rate, inner="net")
        names = {n for n, _ in model.named_parameters() if n.startswith("teacher")}
        assert names.isdisjoint(fast.params), "a teacher is no inner variable"
        moved = names & set(fast.buffers)  # under parameter names; what never moves is a constant
        assert "teacher.0.weight" in moved
        state = {n: fast.buffers.get(n, p) for n, p in model.named_parameters() if n in names}
        final = sum(map(squares, state.values()))
        outer = squares(fast.apply(lambda m: m.net(x) - m.teacher(x))) + final
        return outer, [*model.net.parameters(), rate]

    return experiment


@cases("move", MOVES)
@every_adjoint
def test_teacher(adjoint: str, move: Any) -> None:
    outcome(taught(lambda: Taught(move)), adjoint)


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@cases("move", {k: MOVES[k] for k in ("lerp_", ".data in place", "load_state_dict")})
@every_adjoint
def test_teacher_that_may_learn_moves_before_or_after(
    adjoint: str, move: Any, learns: bool, first: bool
) -> None:
    outcome(taught(lambda: Taught(move, learns=learns, first=first)), adjoint)


def _moved_by_the_loss(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.ModuleDict({"net": small(), "teacher": small()}), data()

    def loss_fn(m: Any, t: int) -> Tensor:
        with torch.no_grad():
            for t_, s in zip(m.teacher.parameters(), m.net.parameters(), strict=True):
                t_.lerp_(s, 0.2)
            aim = m.teacher(x)
        return F.mse_loss(m.net(x), aim + 0.5)

    fast = train(model, STEPS, loss_fn, inner="net")
    return squares(fast.apply(lambda m: m.net(x) - m.teacher(x))), list(model.net.parameters())


def _only_at_a_later_step(train: Train) -> tuple[Tensor, Inputs]:
    model, x = nn.ModuleDict({"net": small(), "teacher": small()}), data()

    def loss_fn(m: Any, t: int) -> Tensor:
        with torch.no_grad():
            if t >= 2:
                m.teacher[0].weight.lerp_(m.net[0].weight, 0.5)
            aim = m.teacher(x)
        return F.mse_loss(m.net(x), aim + 0.5)

    fast = train(model, STEPS, loss_fn, inner="net")
    return squares(fast.apply(lambda m: m.net(x) - m.teacher(x))), list(model.net.parameters())


class Codebook(nn.Module):
    """Vectors that follow what is closest to them (VQ-VAE with moving averages)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.codes = nn.Parameter(data(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        with torch.no_grad():
            nearest = torch.cdist(z, self.codes).argmin(1)
            codes = self.codes[nearest]
            for i in nearest.unique():
                mean = z[nearest == i].mean(0, keepdim=True)
                self.codes.index_copy_(0, i[None], 0.8 * self.codes[i] + 0.2 * mean)
        return z + (codes - z).detach() * 0.5


def _codebook(train: Train) -> tuple[Tensor, Inputs]:
    model, x = Codebook(), data()
    fast = train(model, STEPS, lambda m, t: F.mse_loss(m(x), 0.3 * x), inner="net")
    outer = squares(fast(x)) + squares(fast.buffers["codes"])
    return outer, list(model.net.parameters())


class Loss(nn.Module):
    """A teacher inside the layer that the optimizer's parameters are in, and tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.mean = nn.Linear(2, 2).double().requires_grad_(False)
        self.again = nn.Linear(2, 2).double()
        self.again.weight = self.mean.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.weight.mul_(0.9)
        return self.again(self.net(x))


def _tied_teacher(train: Train) -> tuple[Tensor, Inputs]:
    model, x = Loss(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), inner="net")
    return squares(fast(x)), list(model.net.parameters())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.seen = nn.Parameter(torch.zeros((), dtype=torch.double), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(1)
        return self.net(x) * (1 + 0.1 * self.seen.item())


def _counting(train: Train) -> tuple[Tensor, Inputs]:
    model, x = Counting(), data()
    fast = train(model, STEPS, lambda m, t: squares(m(x) - 1), inner="net")
    assert fast.buffers["seen"].item() == STEPS
    return squares(fast.apply(lambda m: m.net(x))), list(model.net.parameters())


class Swapped(nn.Module):
    """Polyak averages that stand in for the weights while an aim is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.old = small(), small()
        self.old.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            new = {k: v.clone() for k, v in self.net.state_dict().items()}
            aim = self.old(x)
            self.old.load_state_dict(new)
        return F.mse_loss(self.net(x), aim + 0.5)


def _swapped(train: Train) -> tuple[Tensor, Inputs]:
    model, x = Swapped(), data()
    fast = train(model, STEPS, lambda m, t: m(x), inner="net")
    final = fast.buffers["old.0.weight"]
    return squares(fast.apply(lambda m: m.net(x) - m.old(x))) + squares(final), [
        *model.net.parameters()
    ]


def _with_a_generator(train: Train) -> tuple[Tensor, Inputs]:
    """Whatever finding out that the teacher moves takes, each number is drawn once."""
    model, x, drawn = Taught(_lerp), data(), torch.Generator().manual_seed(3)

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        return m(x + torch.randn(x.shape, generator=drawn, dtype=x.dtype))

    fast = train(model, STEPS, loss_fn, inner="net")
    after = torch.rand(2, generator=drawn, dtype=x.dtype)
    return squares(fast.apply(lambda m: m.net(x) - m.teacher(x)) - after), [*model.net.parameters()]


TEACHERS = {
    "with a generator": _with_a_generator,
    "moved by the loss": _moved_by_the_loss,
    "only at later steps": _only_at_a_later_step,
    "codebook": _codebook,
    "tied": _tied_teacher,
    "counter": _counting,
    "replaced by the weights": _swapped,
}


@cases("experiment", TEACHERS)
@every_adjoint
def test_other_moving_parameters(adjoint: str, experiment: Any) -> None:
    outcome(experiment, adjoint)


@every_adjoint
def test_teacher_and_a_number_out_of_sight(adjoint: str) -> None:
    """The first pass runs each step once: with stored graphs a counter does no harm."""

    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, numbers = Taught(_lerp), data(), itertools.count()
        fast = train(model, STEPS, lambda m, t: m(x + 0.1 * next(numbers)), inner="net")
        return squares(fast.apply(lambda m: m.net(x))), list(model.net.parameters())

    outcome(experiment, adjoint, impure(adjoint), r"step \d")


@every_adjoint
def test_teacher_goes_on_from_an_earlier_unroll(adjoint: str) -> None:
    """2 + 2 steps are 4, ``load_into`` writes the teacher, ``detach`` keeps it."""
    seed()
    model, x = Taught(_lerp), data()
    train = Ours(ADJOINTS[adjoint])

    def loss_fn(m: nn.Module, t: int) -> Tensor:
        return m(x)

    whole = train(model, 4, loss_fn, inner="net")
    half = train(model, 2, loss_fn, inner="net")
    both = train(model, 2, loss_fn, inner="net", initial=half)
    inputs = list(model.net.parameters())
    outer = [squares(f.apply(lambda m: m.net(x) - m.teacher(x))) for f in (whole, both)]
    torch.testing.assert_close(
        gradients(outer[0], inputs), gradients(outer[1], inputs), rtol=1e-9, atol=1e-11
    )
    train.check()
    for fast in (whole, whole.detach()):
        other = Taught(_lerp)
        fast.load_into(other)
        name = "teacher.0.weight"
        torch.testing.assert_close(dict(other.named_parameters())[name].data, whole.buffers[name])


@pytest.mark.parametrize("move", ["lerp_", ".data in place", "load_state_dict", "_foreach_lerp_"])
@every_adjoint
def test_teacher_within_higher(adjoint: str, move: str) -> None:
    pytest.importorskip("diffopt.higher", exc_type=ImportError)
    import higher

    found = []
    for ours in (False, True):
        seed()
        model, x = Taught(MOVES[move]), data()
        opt = torch.optim.SGD(model.net.parameters(), lr=0.3)
        before = [p.detach().clone() for p in model.parameters()]
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, dopt):
            if ours:
                diffopt.unroll(
                    fmodel, dopt, STEPS, lambda m, t, x=x: m(x), adjoint=ADJOINTS[adjoint]
                )
            else:
                for _ in range(STEPS):
                    dopt.step(fmodel(x))
            outer = squares(fmodel.net(x) - fmodel.teacher(x))
            found.append([outer.detach(), *gradients(outer, list(model.net.parameters()))])
        if ours:
            for p, q in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, q), "the caller's model was changed"
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
