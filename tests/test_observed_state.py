"""State is what the forward pass moves: buffers, and parameters outside the optimizer too."""

from __future__ import annotations

import itertools
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


# Buffers of every kind.


class Stateful(nn.Module):
    """A network whose output is shifted by its state, which ``advance`` moves."""

    def __init__(self, build: Any, advance: Any) -> None:
        super().__init__()
        self.net, self.advance = small(), advance
        build(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out + self.advance(self, out)


def _none(m: Any) -> None:
    m.register_buffer("mean", None)


def _zero(m: Any) -> None:
    m.register_buffer("mean", torch.full((2,), 0.1, dtype=torch.double))


def _no_buffer(m: Any) -> None:
    pass


def _moving(m: Any, out: Tensor) -> Tensor:
    new = out.detach().mean(0)
    m.mean = new if m.mean is None else 0.5 * m.mean + 0.5 * new
    return m.mean


def _moving_with_its_graph(m: Any, out: Tensor) -> Tensor:
    new = out.mean(0)
    m.mean = new if m.mean is None else 0.5 * m.mean + 0.5 * new
    return m.mean


def _registered(m: Any, out: Tensor) -> Tensor:
    if "mean" not in m._buffers:
        m.register_buffer("mean", out.detach().mean(0))
    else:
        m.mean = 0.5 * m.mean + 0.5 * out.detach().mean(0)
    return m.mean


def _registered_not_persistent(m: Any, out: Tensor) -> Tensor:
    if not hasattr(m, "mean"):
        m.register_buffer("mean", torch.zeros(2, dtype=out.dtype), persistent=False)
    m.mean.mul_(0.5).add_(out.detach().mean(0))
    return m.mean.clone()


def _in_a_submodule(m: Any, out: Tensor) -> Tensor:
    layer = m.net[0]
    if "mean" not in layer._buffers:
        layer.register_buffer("mean", out.detach().mean(0))
    layer.mean = 0.5 * layer.mean + 0.5 * out.detach().mean(0)
    return layer.mean


def _bank(m: Any, out: Tensor) -> Tensor:
    m.mean = torch.cat([m.mean, out.detach().mean()[None]])
    return m.mean.mean()


def _queue(m: Any, out: Tensor) -> Tensor:
    m.mean = torch.cat([m.mean[1:], out.detach().mean()[None]])
    return m.mean[0]


@torch.no_grad()
def _resized(m: Any, out: Tensor) -> Tensor:
    n = len(m.mean)
    m.mean.resize_(n + 1)
    m.mean[n] = out.mean()
    return m.mean.sum()


@torch.no_grad()
def _resized_as(m: Any, out: Tensor) -> Tensor:
    old = m.mean.clone()
    m.mean.resize_as_(torch.zeros(len(old) + 2, dtype=out.dtype)).fill_(out.mean())
    m.mean[: len(old)] = old
    return m.mean.mean()


@torch.no_grad()
def _shrunk(m: Any, out: Tensor) -> Tensor:
    m.mean.fill_(out.mean())
    m.mean.resize_(1)
    return m.mean.clone()


@torch.no_grad()
def _set_to(m: Any, out: Tensor) -> Tensor:
    m.mean.set_(torch.cat([m.mean, out.mean()[None]]))
    return m.mean.sum()


def _data_of_a_buffer(m: Any, out: Tensor) -> Tensor:
    m.mean.data = torch.cat([m.mean.data, out.detach().mean()[None]])
    return m.mean.sum()


def _other_dtype(m: Any, out: Tensor) -> Tensor:
    m.mean = (1000 * out.detach().mean(0)).round().long()
    return m.mean / 1000.0


def _none_again(m: Any, out: Tensor) -> Tensor:
    if m.mean is None:
        m.mean = out.detach().mean(0)
        return m.mean
    m.mean = None
    return torch.zeros(2, dtype=out.dtype)


def _deleted(m: Any, out: Tensor) -> Tensor:
    if "mean" in m._buffers:
        del m.mean
        return torch.ones(2, dtype=out.dtype)
    return torch.zeros(2, dtype=out.dtype)


def _strided(m: Any) -> None:
    m.register_buffer("mean", torch.full((4,), 0.1, dtype=torch.double)[::4])


def _expanded(m: Any) -> None:
    m.register_buffer("mean", torch.full((1,), 0.1, dtype=torch.double).expand(2))


def _strided_step(m: Any, out: Tensor) -> Tensor:
    m.mean.mul_(0.5).add_(out.detach().mean())
    return m.mean.clone()


BUFFERS = {
    "None, filled": (_none, _moving),
    "None, filled with its graph": (_none, _moving_with_its_graph),
    "with its graph": (_zero, _moving_with_its_graph),
    "registered at the first step": (_no_buffer, _registered),
    "registered, not persistent": (_no_buffer, _registered_not_persistent),
    "registered in a submodule": (_no_buffer, _in_a_submodule),
    "a bank that grows": (_zero, _bank),
    "a queue": (_zero, _queue),
    "resize_": (_zero, _resized),
    "resize_as_": (_zero, _resized_as),
    "resize_ to less": (_zero, _shrunk),
    "another dtype": (_zero, _other_dtype),
    "one element, strided": (_strided, _strided_step),
}

ODD = {
    "None every other step": (_none, _none_again),
    "deleted": (_zero, _deleted),
    "set_": (_zero, _set_to),
    ".data of a buffer": (_zero, _data_of_a_buffer),
}


def stateful(build: Any, advance: Any) -> Any:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Stateful(build, advance), data()
        inputs = list(model.parameters())
        fast = train(model, STEPS, lambda m, t: squares(m(x) - 1))
        outer = squares(fast.apply(lambda m: m.net(x)))
        for value in fast.buffers.values():
            if value is not None:
                outer = outer + squares(value.double())
        return outer, inputs

    return experiment


@cases("kind", BUFFERS)
@every_adjoint
def test_buffer(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint)


@cases("kind", BUFFERS)
@pytest.mark.parametrize("adjoint", ["segmented-1", "binomial-2"])
def test_buffer_is_verified(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint, verify=True)


@cases("kind", ODD)
@every_adjoint
def test_odd_buffer(adjoint: str, kind: Any) -> None:
    outcome(stateful(*kind), adjoint, "either", r"mean")


def _strided_parameter(train: Train) -> tuple[Tensor, Inputs]:
    model, x = small(), data()
    model.scale = nn.Parameter(torch.ones(6, dtype=x.dtype)[::6])
    fast = train(model, STEPS, lambda m, t: squares(m(x) * m.scale - 1))
    return squares(fast(x)), list(model.parameters())


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@every_adjoint
def test_strided_parameter_of_one_element(adjoint: str, verify: bool) -> None:
    outcome(_strided_parameter, adjoint, verify=verify)


# ``initial=`` carries the graph of buffers.

SPLITS = {
    "2 + 2": [2, 2],
    "1 + 3": [1, 3],
    "3 + 1": [3, 1],
    "1 + 1 + 1 + 1": [1, 1, 1, 1],
    "0 + 4": [0, 4],
    "4 + 0": [4, 0],
    "2 + 0 + 2": [2, 0, 2],
    "1 + 2 + 1": [1, 2, 1],
}


@cases("split", SPLITS)
@pytest.mark.parametrize("kind", ["with its graph", "None, filled with its graph"])
@every_adjoint
def test_parts_are_the_whole_where_buffers_carry_a_graph(
    adjoint: str, kind: str, split: list[int]
) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x, k = Stateful(*BUFFERS[kind]), data(), learned(0.7)
        inputs = [*model.parameters(), k]
        fast = None
        for steps in split if train.ours else [sum(split)]:
            batches = [k * x] * steps
            fast = train(model, batches, lambda m, b: squares(m(b) - 1), initial=fast)
        assert fast is not None
        outer = squares(fast.apply(lambda m: m.net(x))) + squares(fast.buffers["mean"])
        return outer, inputs

    outcome(experiment, adjoint)


@every_adjoint
def test_detached_unroll_cuts_the_graph_of_its_buffers(adjoint: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model, x = Stateful(*BUFFERS["with its graph"]), data()
        rate = learned(0.3)
        first = train(model, 2, lambda m, t: squares(m(x) - 1), lr=rate)
        if train.ours:
            first = first.detach()
        else:
            first.params = {n: p.detach().requires_grad_() for n, p in first.params.items()}
            first.rest = {n: b.detach() for n, b in first.buffers.items()}
        second = train(model, 2, lambda m, t: squares(m(x) - 1), lr=rate, initial=first)
        return squares(second.apply(lambda m: m.net(x))), [rate]

    outcome(experiment, adjoint)


# Many tasks at once.


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()


def _batch_norm_in_eval() -> nn.Module:
    return _batch_norm().eval()


class InPlace(nn.Module):
    def __init__(self, advance: Any) -> None:
        super().__init__()
        self.net, self.advance = small(), advance
        self.register_buffer("mean", torch.full((2,), 0.1, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x) + self.mean.clone()
        with torch.no_grad():
            self.advance(self.mean, out)
        return out


TASK_MODELS: dict[str, Any] = {
    "BatchNorm": _batch_norm,
    "BatchNorm in eval mode": _batch_norm_in_eval,
    "BatchNorm with another momentum": lambda: nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2)
    ).double(),
    "add_": lambda: InPlace(lambda b, out: b.add_(out.mean(0))),
    "mul_ and add_": lambda: InPlace(lambda b, out: b.mul_(0.9).add_(out.mean(0))),
    "sub_": lambda: InPlace(lambda b, out: b.sub_(0.3 * (b - out.mean(0)))),
    "copy_": lambda: InPlace(lambda b, out: b.copy_(out.mean(0))),
    "+= 1": lambda: InPlace(lambda b, out: b.add_(0.1)),
    "one entry": lambda: InPlace(lambda b, out: b[:1].mul_(0.5)),
    "InstanceNorm with statistics": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)),
        nn.InstanceNorm1d(1, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(2, 2),
    ).double(),
}


@cases("make", TASK_MODELS)
@pytest.mark.parametrize("adjoint", [*ADJOINTS, "truncated"])
def test_many_tasks_with_buffers(adjoint: str, make: Any) -> None:
    tasks = 3
    seed()
    model, rate = make(), learned(0.2)
    batches = [torch.randn(tasks, 4, 2, dtype=torch.double) for _ in range(STEPS)]
    inputs = [*model.parameters(), rate]

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return squares(m(x) - 1)

    parts = []
    for i in range(tasks):
        fast = ByHand()(model, [b[i] for b in batches], loss_fn, lr=rate)
        parts.append(sum(squares(p) for p in fast.params.values()) + fast.losses.sum())
        buffers = {n: x.detach() for n, x in fast.buffers.items()}
    want = gradients(torch.stack(parts).mean(), inputs)

    whole = diffopt.Truncated(STEPS + 1, inner=diffopt.StoreAll())
    train = Ours(whole if adjoint == "truncated" else ADJOINTS[adjoint])
    fast = train(model, batches, loss_fn, lr=rate, tasks=tasks)
    per_task = sum(
        p.square().reshape(tasks, -1).mean(1) for p in fast.params.values()
    ) + fast.losses.sum(1)
    got = gradients(per_task.mean(), inputs)
    train.check()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    for name, x in buffers.items():  # the last task's
        torch.testing.assert_close(fast.buffers[name][-1].detach(), x, rtol=1e-9, atol=1e-11)


# Steps that are not there.


@cases(
    "steps",
    {
        "iterator used up": lambda: _used_up(iter([data(), data()])),
        "generator used up": lambda: _used_up(data() for _ in range(2)),
        "empty iterator": lambda: iter([]),
        "empty generator": lambda: (data() for _ in range(0)),
        "zip of nothing": lambda: zip([], [], strict=True),
        "map used up": lambda: _used_up(map(torch.clone, [data()])),
        "iterator of a loader": lambda: _used_up(iter(_loader())),
        "enumerate used up": lambda: _used_up(enumerate([data()])),
        "filter of all": lambda: filter(lambda x: False, [data()]),
    },
)
@every_adjoint
def test_exhausted_iterator_is_refused(adjoint: str, steps: Any) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model = small()
        fast = train(model, steps(), lambda m, b: squares(m(b)))
        return squares(fast(data())), list(model.parameters())

    outcome(experiment, adjoint, "refused", r"(?i)iterator|yields? nothing|used up|empty")


def test_exhausted_iterator_is_a_value_error() -> None:
    model = small()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    steps = iter([data()])
    diffopt.unroll(model, inner, steps, lambda m, b: squares(m(b)))
    with pytest.raises(ValueError, match=r"(?i)iterator|used up|nothing"):
        diffopt.unroll(model, inner, steps, lambda m, b: squares(m(b)))


@cases("steps", {"list": lambda: [], "tuple": lambda: (), "int": lambda: 0})
@every_adjoint
def test_no_steps_give_the_start(adjoint: str, steps: Any) -> None:
    model, x = small(), data()
    train = Ours(ADJOINTS[adjoint])
    fast = train(model, steps(), lambda m, b: squares(m(x)))
    assert fast.step == 0
    got = gradients(squares(fast(x)), list(model.parameters()))
    want = gradients(squares(model(x)), list(model.parameters()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    train.check()


@every_adjoint
def test_iterator_is_read_once(adjoint: str) -> None:
    def experiment(train: Train) -> tuple[Tensor, Inputs]:
        model = small()
        steps = (data() for _ in range(STEPS))
        fast = train(model, steps, lambda m, b: squares(m(b) - 1))
        return squares(fast(data())), list(model.parameters())

    outcome(experiment, adjoint)


def _used_up(iterator: Any) -> Any:
    for _ in iterator:
        pass
    return iterator


def _loader() -> Any:
    return torch.utils.data.DataLoader([data(), data()], batch_size=1)
