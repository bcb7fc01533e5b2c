"""``tasks=N``: all tasks at once equal a Python loop over the tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

N, T = 3, 4


def _model(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers).double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randn(N, 6, 2).double().requires_grad_(), torch.randn(N, 6, 1).double())
        for _ in range(T)
    ]


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _task(batches: list[tuple[Tensor, Tensor]], i: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for x, y in batches]


OPTIMIZERS = {
    "sgd": lambda p, lr: diffopt.SGD(p, lr=lr),
    "momentum": lambda p, lr: diffopt.SGD(p, lr=lr, momentum=0.9, dampening=0.1),
    "adam": lambda p, lr: diffopt.Adam(p, lr=lr),
    "rmsprop": lambda p, lr: diffopt.RMSprop(p, lr=lr, momentum=0.3),
}
ADJOINTS = [diffopt.Segmented(1), diffopt.Segmented(3), diffopt.StoreAll()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_loop_over_tasks(name: str, adjoint: diffopt.Adjoint) -> None:
    model, batches = _model(), _batches()
    log_lr = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), log_lr, *(x for x, _ in batches)]

    def optimizer() -> diffopt.Optimizer:
        return OPTIMIZERS[name](model.parameters(), lambda t: log_lr.exp())

    kwargs: dict[str, Any] = {"adjoint": adjoint, "max_cotangent_norm": 0.5}
    fast = diffopt.unroll(model, optimizer(), batches, _loss, tasks=N, **kwargs)
    query = batches[0]
    together = fast.apply(_loss, query)
    assert together.shape == (N,)
    assert fast.losses.shape == (N, T)
    outcome = together.sum() + fast.losses.square().sum()
    grads = torch.autograd.grad(outcome, inputs)

    expected = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        one = diffopt.unroll(model, optimizer(), _task(batches, i), _loss, **kwargs)
        expected = expected + _loss(one, (query[0][i], query[1][i])) + one.losses.square().sum()
        for key, x in one.params.items():
            torch.testing.assert_close(fast.params[key][i], x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(fast.losses[i], one.losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(outcome, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, inputs)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_against_a_plain_loop_that_shares_no_code() -> None:
    model, batches = _model(), _batches()
    names = [name for name, _ in model.named_parameters()]
    outcome = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        params = dict(model.named_parameters())
        for x, y in _task(batches, i):
            loss = F.mse_loss(torch.func.functional_call(model, params, (x,)), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moved = [p - 0.1 * g for p, g in zip(params.values(), grads, strict=True)]
            params = dict(zip(names, moved, strict=True))
        x, y = batches[0]
        outcome = outcome + F.mse_loss(torch.func.functional_call(model, params, (x[i],)), y[i])
    inputs = [*model.parameters(), batches[1][0]]
    wanted = torch.autograd.grad(outcome, inputs)
    fast = diffopt.unroll(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches, _loss, tasks=N, segment=2
    )
    got = torch.autograd.grad(fast.apply(_loss, batches[0]).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_second_order() -> None:
    model, batches = _model(), _batches()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def hypergradient_norm(tasks: int | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in [None] if tasks else range(N):
            some = batches if i is None else _task(batches, i)
            query = some[0]
            opt = diffopt.SGD(model.parameters(), lr=lr)
            fast = diffopt.unroll(model, opt, some, _loss, tasks=tasks)
            total = total + fast.apply(_loss, query).sum()
        (grad,) = torch.autograd.grad(total, lr, create_graph=True)
        return grad

    inputs = [lr, *model.parameters()]
    got = torch.autograd.grad(hypergradient_norm(N), inputs)
    want = torch.autograd.grad(hypergradient_norm(None), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_buffers_aux_and_optimizer_state_lead_with_the_task() -> None:
    model, batches = _model(norm=True), _batches()

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Any:
        out = model(batch[0])
        return F.mse_loss(out, batch[1]), {"out": out, "note": "same for all"}

    def optimizer() -> diffopt.Optimizer:
        return diffopt.Adam(model.parameters())

    fast = diffopt.unroll(model, optimizer(), batches, loss_fn, tasks=N)
    assert fast.aux[0]["out"].shape == (N, 6, 1)
    assert fast.aux[0]["note"] == "same for all"
    assert fast.buffers["1.num_batches_tracked"].tolist() == [T] * N
    for i in range(N):
        one = diffopt.unroll(model, optimizer(), _task(batches, i), loss_fn)
        for key, x in one.buffers.items():
            torch.testing.assert_close(fast.buffers[key][i], x)
        for key, entries in one.opt_state.items():
            torch.testing.assert_close(fast.opt_state[key]["exp_avg"][i], entries["exp_avg"])
    assert fast(batches[0][0]).shape == (N, 6, 1)


def test_each_task_draws_its_own_dropout_mask_and_recomputes_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 20), nn.Dropout(0.5), nn.Linear(20, 1)).double()
    x = torch.ones(N, 4, 2).double()

    def loss_fn(model: Any, x: Tensor) -> Any:
        hidden = model[1](model[0](x))
        return model[2](hidden).square().mean(), hidden == 0

    grads = []
    for adjoint in (diffopt.StoreAll(), diffopt.Segmented(2)):
        torch.manual_seed(5)
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, [x] * T, loss_fn, tasks=N, adjoint=adjoint)
        masks = fast.aux[0]
        assert not torch.equal(masks[0], masks[1])
        outcome = fast.losses[:, -1].sum()
        grads.append(torch.autograd.grad(outcome, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_continuing_and_initial_values_per_task() -> None:
    model, batches = _model(), _batches()

    def optimizer() -> diffopt.Optimizer:
        return diffopt.Adam(model.parameters(), lr=0.1)

    whole = diffopt.unroll(model, optimizer(), batches, _loss, tasks=N)
    half = diffopt.unroll(model, optimizer(), batches[:2], _loss, tasks=N)
    rest = diffopt.unroll(model, optimizer(), batches[2:], _loss, tasks=N, initial=half)
    assert rest.step == T
    for name, x in whole.params.items():
        torch.testing.assert_close(rest.params[name], x)
    own = {"0.weight": torch.randn(N, 5, 2).double().requires_grad_()}
    fast = diffopt.unroll(model, optimizer(), batches, _loss, tasks=N, initial=own)
    (grad,) = torch.autograd.grad(fast.apply(_loss, batches[0]).sum(), own["0.weight"])
    assert grad.shape == (N, 5, 2)
    with pytest.raises(ValueError, match=r"tasks=3, and cannot be continued with tasks=None"):
        diffopt.unroll(model, optimizer(), 1, _loss, initial=half)


def test_grad_transform_is_each_tasks_own() -> None:
    model, batches = _model(), _batches()

    def clip(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {name: g * (0.1 / norm.clamp(min=0.1)) for name, g in grads.items()}

    def run(some: Any, tasks: int | None) -> diffopt.Unrolled:
        opt = diffopt.SGD(model.parameters(), lr=1.0)
        return diffopt.unroll(model, opt, some, _loss, tasks=tasks, grad_transform=clip)

    fast = run(batches, N)
    for i in range(N):
        for name, x in run(_task(batches, i), None).params.items():
            torch.testing.assert_close(fast.params[name][i], x)


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (0, ValueError, "tasks=0: pass 1 or more"),
        (True, TypeError, "tasks is a bool"),
        (2, ValueError, r"every tensor leads with 2.*batch of step 0 has one of shape \(3, 6, 2\)"),
    ],
)
def test_wrong_tasks(tasks: Any, error: type[Exception], message: str) -> None:
    model = _model()
    with pytest.raises(error, match=message):
        diffopt.unroll(model, diffopt.SGD(model.parameters()), _batches(), _loss, tasks=tasks)


def test_wrong_leading_dimension_when_called() -> None:
    model, batches = _model(), _batches()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters()), batches, _loss, tasks=N)
    with pytest.raises(ValueError, match="an argument has one of shape"):
        fast(torch.zeros(2, 2).double())


def test_grad_transform_may_draw_noise_and_leave_parameters_alone() -> None:
    model, batches = _model(), _batches()

    def noisy(grads: dict[str, Tensor]) -> dict[str, Any]:
        scaled = {n: g * torch.rand_like(g) for n, g in grads.items() if n != "0.bias"}
        return {**scaled, "2.bias": None}

    def gradients(adjoint: diffopt.Adjoint) -> tuple[diffopt.Unrolled, tuple[Tensor, ...]]:
        torch.manual_seed(5)
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(
            model, inner, batches, _loss, tasks=N, grad_transform=noisy, adjoint=adjoint
        )
        return fast, torch.autograd.grad(fast.losses.sum(), list(model.parameters()))

    fast, found = gradients(diffopt.Segmented(2))
    moved = fast.params["2.weight"] - model[2].weight
    assert not torch.allclose(moved[0], moved[1])
    for name in ("0.bias", "2.bias"):
        assert torch.equal(fast.params[name], model.get_parameter(name).expand(N, -1))
    for a, b in zip(found, gradients(diffopt.StoreAll())[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_grad_transform_that_returns_no_dict() -> None:
    model, batches = _model(), _batches()
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="grad_transform returned a list"):
        diffopt.unroll(model, inner, batches, _loss, tasks=N, grad_transform=list)


class Convolutional(nn.Module):
    """Each of the convolutions; the first on what all tasks share, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 2, 3, padding="same")
        self.two = nn.Conv2d(1, 2, (2, 3), stride=2, bias=False)
        self.three = nn.Conv3d(1, 1, 2)
        self.back = nn.ConvTranspose1d(2, 1, 2, stride=2)
        self.shared = torch.linspace(-1, 1, 8, dtype=torch.double).view(1, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(torch.tanh(self.one(x) + self.one(self.shared)))  # (B, 1, 8)
        y = torch.tanh(self.two(y.view(-1, 1, 2, 4).repeat(1, 1, 1, 2)))  # (B, 2, 1, 3)
        return torch.tanh(self.three(y.view(-1, 1, 2, 1, 3).repeat(1, 1, 1, 2, 1))).flatten(1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("graphs")
def test_convolutions_go_task_by_task(compile: bool) -> None:
    torch.manual_seed(0)
    model = Convolutional().double()
    x = torch.randn(N, 3, 2, 4).double().requires_grad_()
    y = torch.randn(N, 3, 2).double()
    before = torch.nn.functional.conv2d

    def gradients(tasks: bool) -> tuple[Tensor, ...]:
        inner = diffopt.SGD(model.parameters(), lr=0.1)
        if tasks:
            fast = diffopt.unroll(model, inner, [(x, y)] * T, _loss, tasks=N, compile=compile)
            loss = fast.apply(_loss, (x, y)).sum() + fast.losses.sum()
        else:
            each = [
                diffopt.unroll(model, inner, [(x[i], y[i])] * T, _loss, adjoint=diffopt.StoreAll())
                for i in range(N)
            ]
            loss = torch.stack(
                [_loss(fast, (x[i], y[i])) + fast.losses.sum() for i, fast in enumerate(each)]
            ).sum()
        return torch.autograd.grad(loss, [x, *model.parameters()])

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.nn.functional.conv2d is before
