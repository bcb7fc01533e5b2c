"""What ``DTensor``s do not serve, and what is noticed: on two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dtensors import RULES, STEPS, Net, Problem, assert_equal, mesh_of, served, sharded, whole
from helpers import close
from processes import Processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

import diffopt
from diffopt import Segmented, Truncated
from diffopt._model import refused as of_models
from diffopt._torch.dtensors import can_redistribute_twice


def changed_in_place(rank: int, world: int) -> None:
    problem = Problem(mesh_of(world))
    fast = problem.unrolled(RULES["sgd"][0], adjoint=Segmented(2))
    value = problem.outer(fast)
    with torch.no_grad():
        problem.net.w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    for written in (0, 2):

        def loss(model: Any, t: int, written: int = written) -> Tensor:
            value = problem.loss(model, t)
            if t == written:
                with torch.no_grad():
                    model.w.mul_(0.5)
            return value

        before = whole(problem.net.w.detach()).clone()
        with pytest.raises(NotImplementedError, match=f"step {written} changes parameter 'w'"):
            diffopt.unroll(problem.net, diffopt.SGD(problem.net.parameters(), 0.1), 3, loss)
        close(whole(problem.net.w.detach()), before)


def others_differ(rank: int, world: int) -> None:
    """What the processes are about to do, and what they do again."""
    problem = Problem(mesh_of(world))
    with pytest.raises(RuntimeError, match="adjoints differ between the processes"):
        problem.unrolled(RULES["sgd"][0], adjoint=Segmented(2 + rank))
    factor = [1.0]

    def loss(model: Any, t: int) -> Tensor:
        return factor[0] * problem.loss(model, t)

    opt = diffopt.SGD(problem.net.parameters(), lr=0.1)
    fast = diffopt.unroll(problem.net, opt, STEPS, loss, adjoint=Segmented(2))
    factor[0] = 2.0
    with pytest.raises(RuntimeError, match="computed again, gives another loss"):
        (fast(problem.x) - problem.y).square().mean().backward()


class Normed(diffopt.Optimizer):
    """A step of a given length: it reads the norm of the parameter's gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def _init(self, hyper: Any, param: Tensor) -> dict[str, Tensor]:
        return {}

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        pairs = zip(params, grads, strict=True)
        return [p - hyper["lr"] * g / g.norm() for p, g in pairs], states


class LikeSGD(diffopt.SGD):
    """A rule of the user's that does act entry by entry."""

    elementwise = True

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        pairs = zip(params, grads, strict=True)
        return [p - hyper["lr"] * g for p, g in pairs], states


def rules_of_other_kinds(rank: int, world: int) -> None:
    problem, one = Problem(mesh_of(world)), Problem()

    def mine(params: Any, lr: Tensor) -> Any:
        return LikeSGD(params, lr=lr)

    assert_equal(problem.gradient(mine), one.gradient(mine))
    w = problem.net.w
    for opt, name in ((Normed([w]), "Normed"), (diffopt.optim.Muon([w]), "Muon")):
        with pytest.raises(NotImplementedError, match=f"'w' is a DTensor .* rule of {name} is not"):
            diffopt.unroll(problem.net, opt, 2, problem.loss)
    # A parameter that every process has whole is as good as a plain one.
    found = []
    for each in (problem, one):
        fast = diffopt.unroll(each.net, Normed([each.net.shift, each.net.gain]), 3, each.loss)
        found.append(list(torch.autograd.grad(each.outer(fast), each.inputs, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(whole(a), b)


def refused(rank: int, world: int) -> None:
    mesh = mesh_of(world)
    problem = Problem(mesh)
    make = RULES["sgd"][0]
    rates = torch.full((5, 2), 0.1, requires_grad=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"compile": True}, "compile=True would have to compile"),
        ({"tasks": 2}, "tasks maps the loss by torch.vmap"),
        ({"adjoint": diffopt.ForwardMode([problem.lr])}, "ForwardMode carries dual numbers"),
        ({"adjoint": diffopt.Implicit()}, "Implicit solves a linear system"),
        ({"adjoint": Segmented(2, storage=diffopt.Durable("runs"))}, "Durable could take up"),
        (
            {"adjoint": Truncated(2, inner=Segmented(2, storage=diffopt.Durable("runs")))},
            "Durable could take up",
        ),
    ]
    for options, message in cases:
        with pytest.raises(NotImplementedError, match=f"'w' is a DTensor: .*{message}"):
            problem.unrolled(make, **options)
    with pytest.raises(NotImplementedError, match=r"SGD: lr is a Tensor of shape \(5, 2\)"):
        diffopt.unroll(problem.net, diffopt.SGD([problem.net.w], lr=rates), 2, problem.loss)
    with pytest.raises(NotImplementedError, match="returned a DTensor in aux"):
        diffopt.unroll(
            problem.net,
            make(problem.net.parameters(), problem.lr),
            2,
            lambda model, t: (problem.loss(model, t), model.w),
        )
    with pytest.raises(ValueError, match="initial value of 'w' is a plain tensor, and"):
        problem.unrolled(make, initial={"w": torch.zeros(5, 2)})
    with pytest.raises(NotImplementedError, match="'w' is a DTensor, of which each process may"):
        diffopt.distributed.shard(problem.net)
    given = distribute_tensor(torch.zeros(5), mesh, [Replicate()])
    with pytest.raises(ValueError, match="initial value of 'gain' is a DTensor"):
        problem.unrolled(make, initial={"gain": given})
    with pytest.raises(ValueError, match="grad_transform's gradient of 'w' is a plain tensor"):
        problem.unrolled(make, grad_transform=lambda gs: {n: whole(g) for n, g in gs.items()})
    with pytest.raises(ValueError, match=r"gradient of 'w' is a DTensor of shape \(2, 5\), and"):
        problem.unrolled(make, grad_transform=lambda gs: gs | {"w": gs["w"].t()})
    partial = Problem()
    partial.net.shift = nn.Parameter(DTensor.from_local(torch.zeros(5), mesh, [Partial()]))
    with pytest.raises(NotImplementedError, match=r"'shift' that is a DTensor placed as .*Partial"):
        partial.unrolled(make)
    buffered = Net()
    buffered.register_buffer("seen", distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
    with pytest.raises(NotImplementedError, match="'seen' that is a DTensor and a buffer"):
        diffopt.unroll(buffered, diffopt.SGD(buffered.parameters(), 0.1), 2, problem.loss)

    def moved(model: Any, t: int) -> Tensor:
        with torch.no_grad():
            model.shift.mul_(0.9)
        return problem.loss(model, t)

    with pytest.raises(NotImplementedError, match="'shift' in place, a DTensor that is not"):
        diffopt.unroll(problem.net, diffopt.SGD([problem.net.w], lr=0.1), 2, moved)
    from torch.distributed.fsdp import fully_shard

    net: Any = fully_shard(Net(), mesh=mesh)
    with pytest.raises(NotImplementedError, match="sharded by FSDP, whose gathering"):
        diffopt.unroll(net, diffopt.SGD(net.parameters(), 0.1), 2, problem.loss)


CASES = [changed_in_place, others_differ, rules_of_other_kinds, refused]


@served
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_processes(processes: Processes, case: Any) -> None:
    processes.run(case, 2)


def test_a_pytorch_that_cannot_serve_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, before anything runs."""
    if can_redistribute_twice():
        monkeypatch.setattr(of_models, "can_redistribute_twice", lambda: False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = sharded(Net(), mesh_of(1))
        opt = diffopt.SGD(net.parameters(), lr=0.1)
        with pytest.raises(NotImplementedError, match="cannot differentiate twice"):
            diffopt.unroll(net, opt, 1, lambda m, t: m(torch.randn(6, 3)).sum())
    finally:
        dist.destroy_process_group()
