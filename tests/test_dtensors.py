"""Parameters that are ``DTensor``s, on two and four gloo processes, against one without them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from dtensors import (
    ADJOINTS,
    APPROXIMATE,
    RULES,
    STEPS,
    Problem,
    assert_equal,
    grad_of,
    mesh_of,
    of_plain_loop,
    served,
    whole,
)
from helpers import close
from optimizers import OPTIMIZERS
from oracle import plain
from processes import Processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import diffopt
from diffopt import Binomial, Segmented, StoreAll
from diffopt._loop.loop import Loop
from diffopt._values.state import State

pytestmark = served


def as_a_plain_loop(rank: int, world: int) -> None:
    problem = Problem(mesh_of(world))
    for name in RULES if world == 2 else ("adam",):
        make, expected = RULES[name][0], of_plain_loop(name)
        for adjoint in ADJOINTS if (name, world) == ("adam", 2) else [Segmented(2)]:
            assert_equal(problem.gradient(make, adjoint=adjoint), expected)


def approximate_adjoints(rank: int, world: int) -> None:
    problem, make = Problem(mesh_of(world)), RULES["adam"][0]
    for adjoint in APPROXIMATE:
        expected = Problem().gradient(make, adjoint=adjoint)
        assert_equal(problem.gradient(make, adjoint=adjoint), expected)


def every_optimizer(rank: int, world: int) -> None:
    problem, one = Problem(mesh_of(world)), Problem()
    for case in OPTIMIZERS.values():

        def make(params: Any, lr: Tensor, case: Any = case) -> Any:
            return case.ours(params, lr=lambda t: lr * (1 + 0.1 * t))

        chosen = {"adjoint": Segmented(2)}
        assert_equal(problem.gradient(make, **chosen), one.gradient(make, **chosen))


def clip(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norm = sum(whole(g.square().sum()) for g in grads.values()).sqrt()  # type: ignore[union-attr]
    return {n: g * (0.5 / norm) for n, g in grads.items()}


def options(rank: int, world: int) -> None:
    problem, one = Problem(mesh_of(world)), Problem()
    make = RULES["momentum"][0]
    with tempfile.TemporaryDirectory() as folder:
        for chosen in (
            {"grad_transform": clip},
            {"grad_transform": lambda grads, model, batch: clip(grads)},
            {"max_cotangent_norm": 0.05, "adjoint": Segmented(2)},
            {"max_cotangent_norm": 0.05, "adjoint": StoreAll()},
            {"verify": True},
            {"adjoint": Segmented(2, storage="cpu")},
            {"adjoint": Binomial(2, storage=folder)},
        ):
            assert_equal(problem.gradient(make, **chosen), one.gradient(make, **chosen))
    shown: list[list[dict[str, Tensor]]] = [[], []]
    for each, seen in zip((problem, one), shown, strict=True):
        each.gradient(
            make, monitor=lambda t, c, seen=seen: seen.append({n: whole(x) for n, x in c.items()})
        )
    assert len(shown[0]) == STEPS
    for found, expected in zip(*shown, strict=True):
        assert found.keys() == expected.keys()
        for name, x in found.items():
            close(x, expected[name])


def snapshots_of_parts(rank: int, world: int) -> None:
    """A state that is kept has this process's rows, of the parameters and of Adam's averages."""
    seen: list[State] = []
    keep = Loop.snapshot

    def snapshot(loop: Loop, state: State) -> Any:
        seen.append(state)
        return keep(loop, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "snapshot", snapshot)
        Problem(mesh_of(world)).gradient(RULES["adam"][0], adjoint=Segmented(2))
    assert seen
    for state in seen:
        for x in (state.params["w"], state.opt["w"]["exp_avg"], state.opt["w"]["exp_avg_sq"]):
            assert type(x) is Tensor
            assert x.shape == (3 - rank, 2)


def microbatches(rank: int, world: int) -> None:
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        fast = diffopt.unroll(
            each.net,
            RULES["adam"][0](each.net.parameters(), each.lr),
            [(each.x, each.y)] * 3,
            lambda model, pair: (model(pair[0]) - pair[1]).square().mean(),
            microbatches=2,
            grad_transform=clip,
            adjoint=Segmented(2),
        )
        found.append(list(torch.autograd.grad(each.outer(fast), each.inputs[:-1])))
    assert_equal(*found)


def half(x: Tensor) -> Callable[[int], Tensor]:
    return lambda t: 0.5 * x


def near(x: Tensor) -> Callable[[int], Tensor]:
    return lambda t: 0.9 + 0.01 * x


def learned_options(rank: int, world: int) -> None:
    """Also of parameters that each process has whole, whose share must count once."""
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        beta, decay = torch.tensor(0.8, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        opt = diffopt.Adam(
            [
                {"params": [*each.net.a.parameters(), each.net.shift, each.net.gain]},
                {"params": [each.net.w, *each.net.b.parameters()], "lr": half(each.lr)},
            ],
            lr=each.lr,
            betas=(beta, near(decay)),
            weight_decay=decay,
            eps=1e-3,
        )
        fast = diffopt.unroll(each.net, opt, STEPS, each.loss, adjoint=Segmented(2))
        value = (fast(each.x) - each.y).square().mean()
        found.append(list(torch.autograd.grad(value, [*each.inputs, beta, decay])))
    assert_equal(*found)
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        nets = list(each.net.children())
        rest = [each.net.w, each.net.shift, each.net.gain]
        several = [
            diffopt.SGD([p for m in nets for p in m.parameters()], lr=each.lr),
            diffopt.RMSprop(rest, lr=each.lr),
        ]
        fast = diffopt.unroll(each.net, several, STEPS, each.loss)
        found.append(list(torch.autograd.grad(each.outer(fast), each.inputs)))
    assert_equal(*found)


def state_that_learns(rank: int, world: int) -> None:
    """Optimizer state with entries and without, given requiring grad and used by an outer loss."""
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        beta = torch.tensor(0.8, requires_grad=True)
        opt = diffopt.optim.NAdam(each.net.parameters(), lr=each.lr, betas=(beta, 0.9), eps=1e-3)
        first = diffopt.unroll(each.net, opt, 2, each.loss)
        fast = diffopt.unroll(each.net, opt, 2, each.loss, initial=first, adjoint=Segmented(1))
        value = each.outer(fast)
        for entries in (first.opt_state["w"], fast.opt_state["w"], fast.opt_state["shift"]):
            value = value + whole(entries["exp_avg"].square().sum()) + entries["mu_product"] ** 2
        found.append(list(torch.autograd.grad(value, [*each.inputs, beta])))
    assert_equal(*found)


def results(rank: int, world: int) -> None:
    mesh = mesh_of(world)
    problem, one = Problem(mesh), Problem()
    kept = {n: p.detach().clone() for n, p in problem.net.named_parameters()}
    opt = torch.optim.Adam(problem.net.parameters(), lr=0.1)
    alone = torch.optim.Adam(one.net.parameters(), lr=0.1)
    for o, each in ((opt, problem), (alone, one)):  # a state to start from
        each.loss(each.net, 0).backward()
        o.step()
    fast = diffopt.unroll(problem.net, opt, 3, problem.loss)
    expected = diffopt.unroll(one.net, alone, 3, one.loss)
    own = dict(problem.net.named_parameters())
    for name, x in fast.params.items():
        assert type(x) is type(own[name].data)
        assert getattr(x, "placements", None) == getattr(own[name], "placements", None)
        close(whole(x), expected.params[name])
        for key, entry in fast.opt_state[name].items():
            assert isinstance(entry, DTensor) == (isinstance(x, DTensor) and entry.dim() > 0)
            close(whole(entry), expected.opt_state[name][key])
    assert type(fast.losses) is Tensor
    close(problem.loss(fast, 0), one.loss(expected, 0))
    found = torch.autograd.grad(problem.outer(fast), problem.inputs, allow_unused=True)
    wanted = torch.autograd.grad(one.outer(expected), one.inputs, allow_unused=True)
    assert_equal([x for x in found if x is not None], [x for x in wanted if x is not None])
    # To another model and optimizer, through a state dict, and on from there.
    again = diffopt.unroll(problem.net, opt, 0)
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    more = diffopt.unroll(problem.net, opt, 2, problem.loss, initial=again)
    other = diffopt.unroll(one.net, alone, 2, one.loss, initial=expected)
    assert more.step == 5
    for name, x in more.params.items():
        close(whole(x), other.params[name])
    for each, o, result in ((problem, opt, more), (one, alone, other)):
        result.detach().load_into(each.net, o)
        o.zero_grad()
        each.loss(each.net, 0).backward()
        o.step()
    for name, p in problem.net.named_parameters():
        close(whole(p.detach()), dict(one.net.named_parameters())[name].detach())
    assert any(not torch.equal(whole(p.detach()), whole(kept[n])) for n, p in own.items())


class Odd(nn.Module):
    """A ``DTensor`` with gaps between its entries, and one that is a number."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        w, k = torch.linspace(-1, 1, 10).view(2, 5).t(), torch.tensor(0.5)
        if mesh is not None:
            w = distribute_tensor(w, mesh, [Shard(0)])
            k = distribute_tensor(k, mesh, [Replicate()])
        self.w, self.k = nn.Parameter(w), nn.Parameter(k)
        self.like = {"w": w.clone()}  # an attribute that holds a tensor

    def forward(self) -> Tensor:
        return (self.w * self.w.sin()).square().sum() * self.k


def odd_shapes(rank: int, world: int) -> None:
    mesh = mesh_of(world)
    makes = [
        lambda ps: torch.optim.Adam(ps, lr=0.1, eps=1e-3),
        lambda ps: diffopt.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: diffopt.optim.ASGD(ps, lr=0.1),
    ]
    for make in makes:
        found = []
        for model in (Odd(mesh), Odd(None)):
            opt = make(model.parameters())
            fast = diffopt.unroll(model, opt, 3, lambda m, t: m(), adjoint=Segmented(2))
            assert fast.like.keys() == {"w"}
            value = whole(fast() + fast.w.pow(3).sum())
            params = [model.w, model.k]
            grads = torch.autograd.grad(value, params, create_graph=True)
            again = torch.autograd.grad(sum(whole(g.square().sum()) for g in grads), params)
            fast.detach().load_into(model, opt)
            whole(model()).backward()
            opt.step()
            found.append([*grads, *again, *(p.detach() for p in params)])
        assert_equal(*found)


def initial_values(rank: int, world: int) -> None:
    """A hypernetwork's output, placed otherwise than the parameter."""
    mesh = mesh_of(world)
    found = []
    for each in (Problem(mesh), Problem()):
        given = torch.linspace(-1, 1, 10).view(5, 2)
        w = distribute_tensor(given, mesh, [Replicate()]) if world_of(each) else given
        z = w.requires_grad_()
        fast = diffopt.unroll(
            each.net,
            diffopt.SGD([each.net.w], lr=each.lr),
            STEPS,
            each.loss,
            initial={"w": z.sin()},
        )
        value = (fast(each.x) - each.y).square().mean()
        found.append(list(torch.autograd.grad(value, [z, each.lr, *each.net.a.parameters()])))
    assert_equal(*found)


def world_of(problem: Problem) -> bool:
    return isinstance(problem.net.w, DTensor)


def losses_that_are_dtensors(rank: int, world: int) -> None:
    mesh = mesh_of(world)
    found = []
    for each in (Problem(mesh), Problem()):

        def loss(model: Any, t: int, each: Problem = each) -> Tensor:
            value: Tensor = (model.w - 1).square().sum()  # on processes, parts of a sum
            return value if t else value + model.shift.square().sum()

        opt = diffopt.SGD([each.net.w, each.net.shift], lr=each.lr)
        fast = diffopt.unroll(each.net, opt, STEPS, loss, adjoint=Segmented(2))
        assert type(fast.losses) is Tensor
        value = fast.losses.square().sum() + whole(fast.params["w"].pow(3).sum())
        inputs = [each.net.w, each.net.shift, each.lr]
        found.append([fast.losses, *torch.autograd.grad(value, inputs)])
    assert_equal(*found)


class Mixed(nn.Module):
    """A plain number among the parameters, which is multiplied with a ``DTensor``."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(w), nn.Parameter(torch.tensor(0.7))

    def forward(self) -> Tensor:
        return (self.scale * self.w).square().sum()


def numbers_beside_dtensors(rank: int, world: int) -> None:
    """A ``DTensor`` flows back to them: to a parameter, a captured number and one in between."""
    mesh = mesh_of(world)
    for adjoint in (StoreAll(), Segmented(2)):
        found = []
        for placed in (True, False):
            w = torch.linspace(-1, 1, 10).view(5, 2)
            model = Mixed(distribute_tensor(w, mesh, [Shard(0)]) if placed else w)
            factor = torch.tensor(0.9, requires_grad=True)
            lr = torch.tensor(0.1, requires_grad=True)

            def loss(model: Any, t: int, factor: Tensor = factor) -> Tensor:
                part: Tensor = factor * model()
                both = torch.stack([part, factor]).square().sum()  # in a list
                with torch._C.DisableTorchFunction():  # where nobody sees it
                    both = both + factor * model.w.cos().sum()
                return whole(both * whole(model.w.sin().sum())) + factor**2

            opt = diffopt.Momentum(model.parameters(), lr=lr)
            fast = diffopt.unroll(model, opt, 3, loss, adjoint=adjoint)
            value = whole(fast.params["w"].pow(3).sum()) + fast.params["scale"]
            inputs = [model.w, model.scale, factor, lr]
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            assert [type(g) for g in grads[1:]] == [Tensor] * 3
            again = torch.autograd.grad(sum(whole(g.square().sum()) for g in grads), inputs)
            found.append([*grads, *again])
        assert_equal(*found)


def twice(rank: int, world: int) -> None:
    """The gradient of a function of the gradient."""
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        fast = each.unrolled(RULES["adam"][0], adjoint=Segmented(2), max_cotangent_norm=50.0)
        grads = torch.autograd.grad(each.outer(fast), each.inputs, create_graph=True)
        value = sum(whole(g.square().sum()) for g in grads)
        found.append([*grads, *torch.autograd.grad(value, each.inputs)])
    assert_equal(*found)


def nested(rank: int, world: int) -> None:
    """An unroll over the rate and the start of an unroll."""
    found = []
    for each in (Problem(mesh_of(world)), Problem()):

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.log_lr = nn.Parameter(torch.tensor(-2.0))

        outer = Outer()

        def outer_loss(model: Any, t: int, each: Problem = each) -> Tensor:
            opt = diffopt.SGD(each.net.parameters(), lr=lambda t: model.log_lr.exp())
            return each.outer(diffopt.unroll(each.net, opt, 2, each.loss))

        done = diffopt.unroll(outer, diffopt.SGD(outer.parameters(), lr=0.001), 2, outer_loss)
        inputs = [outer.log_lr, each.net.w, each.net.shift, each.net.a.weight]
        found.append(list(torch.autograd.grad(done.params["log_lr"], inputs)))
    assert_equal(*found)


def constants(rank: int, world: int) -> None:
    """Those of the model's parameters that are not trained, and a captured ``DTensor``."""
    mesh = mesh_of(world)
    found = []
    for each in (Problem(mesh), Problem()):
        goal: Any = torch.linspace(-1, 1, 10).view(5, 2)
        goal = distribute_tensor(goal, mesh, [Shard(0)]) if world_of(each) else goal
        goal = goal.requires_grad_()

        def loss(model: Any, t: int, each: Problem = each, goal: Tensor = goal) -> Tensor:
            return each.loss(model, t) + whole((model.w - goal).square().sum())

        opt = diffopt.Adam([each.net.w, each.net.gain, each.net.b.weight], lr=each.lr)
        fast = diffopt.unroll(each.net, opt, STEPS, loss, adjoint=Segmented(2))
        inputs = [*each.inputs, goal]
        found.append(list(torch.autograd.grad(each.outer(fast), inputs)))
    assert_equal(*found)
    found = []
    for each in (Problem(mesh), Problem()):  # no DTensor is trained
        opt = diffopt.Adam([each.net.gain], lr=each.lr)
        fast = diffopt.unroll(each.net, opt, STEPS, each.loss)
        found.append(list(torch.autograd.grad(each.outer(fast), each.inputs)))
    assert_equal(*found)


def with_a_group(rank: int, world: int) -> None:
    """Tensor parallel in one dimension of a mesh, and batches shared out in the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    group = mesh["data"].get_group()
    problem, one = Problem(mesh["tensor"]), Problem()
    share = dist.get_rank(group)

    def of(each: Problem, rows: slice) -> Callable[[Any, int], Tensor]:
        return lambda model, t: (model(each.x[rows] + t) - each.y[rows]).square().mean()

    rows = [slice(0, 3), slice(3, 6)]
    make = RULES["adam"][0]
    for chosen in ({}, {"max_cotangent_norm": 0.05, "adjoint": Segmented(2)}):
        fast = diffopt.unroll(
            problem.net,
            make(problem.net.parameters(), problem.lr),
            STEPS,
            of(problem, rows[share]),
            group=group,
            **chosen,
        )
        value = (fast(problem.x[rows[share]]) - problem.y[rows[share]]).square().mean()
        for x in problem.inputs:
            x.grad = None
        value.backward()
        diffopt.distributed.mean_grads(problem.inputs, group)
        averaged = [grad_of(x) for x in problem.inputs[:-1]]
        both = [of(one, part) for part in rows]
        fast = diffopt.unroll(
            one.net,
            make(one.net.parameters(), one.lr),
            STEPS,
            lambda model, t, both=both: (both[0](model, t) + both[1](model, t)) / 2,
            **chosen,
        )
        value = (fast(one.x) - one.y).square().mean()
        assert_equal(averaged, list(torch.autograd.grad(value, one.inputs[:-1])))
    with pytest.raises(NotImplementedError, match="hold different parts of it"):
        problem.unrolled(make, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="of which the processes of group hold different parts"):
        diffopt.distributed.mean_grads(problem.inputs)


def blocks_in_turn(rank: int, world: int) -> None:
    """What an earlier unroll trained stands in the model as a constant."""
    found = []
    for each in (Problem(mesh_of(world)), Problem()):
        one = [each.net.w, *each.net.a.parameters()]
        first = diffopt.unroll(each.net, diffopt.Adam(one, lr=each.lr), 2, each.loss)
        two = [each.net.shift, *each.net.b.parameters()]
        fast = diffopt.unroll(
            each.net, diffopt.SGD(two, lr=each.lr), 2, each.loss, initial=first, adjoint=Segmented()
        )
        found.append(list(torch.autograd.grad(each.outer(fast), each.inputs)))
    assert_equal(*found)


def pytorch_alone(rank: int, world: int) -> None:
    """Why ``DTensor.from_local`` is replaced while a step is evaluated."""
    problem, expected = Problem(mesh_of(world)), of_plain_loop("sgd")
    result = plain(problem.net, {}, STEPS, problem.loss, rule=RULES["sgd"][1](problem.lr))
    found = torch.autograd.grad(problem.outer(result), problem.inputs[:2])
    assert any(not torch.allclose(whole(a), b) for a, b in zip(found, expected[:2], strict=True))


TWO = [
    as_a_plain_loop,
    approximate_adjoints,
    every_optimizer,
    options,
    snapshots_of_parts,
    microbatches,
    learned_options,
    state_that_learns,
    results,
    odd_shapes,
    initial_values,
    losses_that_are_dtensors,
    numbers_beside_dtensors,
    twice,
    nested,
    constants,
    blocks_in_turn,
    pytorch_alone,
]


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.__name__)
def test_two_processes(processes: Processes, case: Any) -> None:
    processes.run(case, 2)


@pytest.mark.parametrize("case", [as_a_plain_loop, with_a_group], ids=lambda case: case.__name__)
def test_four_processes(processes: Processes, case: Any) -> None:
    processes.run(case, 4)
