"""The table of features: what it says of diffopt, and of the peers that are installed, is so."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from fenced import TOP
from torch import nn

import diffopt

PAGE = (TOP / "docs/pages/comparison.md").read_text(encoding="utf-8")


def cell(row: str, library: str) -> str:
    """The text of a cell, without its links."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    header, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    (found,) = [cells for cells in rows if cells[0].split(" [")[0] == row]
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found[header.index(library)])


def square_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_most_optimizers_of_torch_are_there() -> None:
    assert cell("differentiable optimizers", "diffopt").startswith("most of `torch.optim`")
    theirs = {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"}
    ours = {name for name in diffopt.__all__ if is_optimizer(name)}
    assert len(theirs & ours) > len(theirs) / 2


def is_optimizer(name: str) -> bool:
    public = getattr(diffopt, name)
    return isinstance(public, type) and issubclass(public, torch.optim.Optimizer)


@pytest.mark.parametrize("row", ["a limit in bytes", "forward mode", "implicit differentiation"])
def test_what_it_names_there_is(row: str) -> None:
    name = cell(row, "diffopt").split("`")[1]
    assert issubclass(getattr(diffopt, name), diffopt.Adjoint)


def test_it_runs_on_several_processes_and_after_a_kill() -> None:
    assert cell("several processes", "diffopt") == "`group=`, `shard`"
    assert "group" in inspect.signature(diffopt.unroll).parameters
    assert callable(diffopt.distributed.shard)
    assert cell("goes on after a kill", "diffopt") == "`Durable`"
    assert "storage" in inspect.signature(diffopt.Segmented).parameters
    assert callable(diffopt.Durable)


def test_what_it_says_of_torchopt() -> None:
    torchopt = pytest.importorskip("torchopt")
    distributed = pytest.importorskip("torchopt.distributed")
    assert cell("several processes", "TorchOpt").startswith("`torchopt.distributed`")
    assert callable(distributed.auto_init_rpc)
    names = {name for name in dir(torchopt) if name.startswith("Meta")} - {"MetaOptimizer"}
    rules = {getattr(torchopt, name) for name in names}
    assert cell("differentiable optimizers", "TorchOpt") == f"{len(rules)}, and functional ones"
    assert cell("implicit differentiation", "TorchOpt") == "CG, normal CG, Neumann"
    solvers = torchopt.linear_solve
    assert all(map(callable, (solvers.solve_cg, solvers.solve_normal_cg, solvers.solve_inv)))
    assert callable(torchopt.diff.zero_order.zero_order)
    # As it is, its parameters replaced.
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    forward, weight = model.forward, model.weight
    torchopt.MetaSGD(model, lr=0.1).step(square_loss(model, x))
    assert model.forward == forward
    assert model.weight is not weight
    assert model.weight.requires_grad


def test_torchopt_maps_tasks_by_vmap() -> None:
    torchopt = pytest.importorskip("torchopt")
    assert cell("many tasks at once", "TorchOpt") == "`torch.func.vmap`, functional ones"
    xs, starts = torch.randn(3, 2), torch.randn(3, 2)

    def adapted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rule = torchopt.sgd(lr=0.1, momentum=0.9)
        params, state = {"w": w}, rule.init({"w": w})
        for _ in range(2):
            grads = torch.func.grad(lambda p: (p["w"] * x).square().sum())(params)
            updates, state = rule.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params["w"]

    found = torch.func.vmap(adapted)(xs, starts)
    one_by_one = [adapted(x, w) for x, w in zip(xs, starts, strict=True)]
    torch.testing.assert_close(found, torch.stack(one_by_one))


def test_what_it_says_of_higher() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher = pytest.importorskip("higher")
    # `import diffopt.higher`, elsewhere in this process, adds to them.
    own = [rule for rule in higher.optim._opt_mapping.values() if rule.__module__ == "higher.optim"]
    assert cell("differentiable optimizers", "higher").startswith(f"{len(own)}, ")
    assert cell("a learned hyperparameter", "higher") == "`override=`"

    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    beta = torch.tensor(0.9, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)
    inner = torch.optim.Adam(model.parameters())
    override = {"lr": [lr], "betas": [(0.9, beta)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # math.sqrt of a tensor that requires grad
        with higher.innerloop_ctx(model, inner, override=override) as (fast, dopt):
            for _ in range(2):
                dopt.step(square_loss(fast, x))
            by_lr, by_beta = torch.autograd.grad(
                square_loss(fast, x), [lr, beta], allow_unused=True
            )
    exact = diffopt.Adam(model.parameters(), lr=lr, betas=(0.9, beta))
    trained = diffopt.unroll(model, exact, [x] * 2, square_loss)
    _, whole = torch.autograd.grad(square_loss(trained, x), [lr, beta])
    assert by_lr
    # Part of the path is cut.
    assert by_beta is None or (by_beta - whole).abs() > 0.01 * whole.abs()
    with torch.no_grad():
        assert len(list(fast.parameters())) == 2  # a patched copy,
    assert fast is not model  # not the model itself


def test_what_it_says_of_torch_maml() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_maml = pytest.importorskip("torch_maml")
    rules = {name for name in dir(torch_maml) if name.startswith("Ingraph")}
    assert rules == {"IngraphGradientDescent", "IngraphRMSProp"}
    assert cell("differentiable optimizers", "torch_maml") == (
        "gradient descent with momentum, RMSprop"
    )
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    rate = nn.Parameter(torch.tensor(0.1))
    maml = torch_maml.GradientCheckpointMAML(
        model, square_loss, optimizer=torch_maml.IngraphGradientDescent(rate), checkpoint_steps=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.utils.checkpoint asks for use_reentrant
        result = maml([x] * 4, loss_kwargs={})
        square_loss(result.model, x).backward()
    assert rate.grad is not None  # a learned option
    assert result.model is not model  # a copy
