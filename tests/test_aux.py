"""What ``loss_fn`` returns beside the loss: its tensors stay connected."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import assert_all_close, batch, batches, mse, new_objects_only, tiny
from oracle import plain
from torch import Tensor, nn

import diffopt

T = 5


def sgd(model: nn.Module, **options: Any) -> diffopt.SGD:
    return diffopt.SGD(model.parameters(), **{"lr": 0.2, "momentum": 0.5, **options})


class Problem:
    """Inner training whose loss returns a query loss, predictions, a weight and the batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = tiny()
        self.phi = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
        self.only = torch.tensor([1.3, -0.4], dtype=torch.double, requires_grad=True)
        self.lr = torch.tensor(0.2, dtype=torch.double, requires_grad=True)
        self.data = [(x, y.requires_grad_()) for x, y in batches(T)]
        self.query = batch()
        self.wanted = [*self.model.parameters(), self.phi, self.only, self.lr]
        self.wanted += [y for _, y in self.data]

    def loss_fn(self, model: Any, pair: Any) -> Any:
        out = model(pair[0])
        aux = {
            "query": mse(model, self.query) * self.phi,
            "out": (out * self.only, "x"),
            "weight": model[0].weight,
            "batch": pair[1],
            "captured": self.only,
            "count": torch.tensor(3),
            "cut": out.detach(),
        }
        return F.mse_loss(out, pair[1]) * self.phi, aux

    @staticmethod
    def outer(losses: Tensor, aux: Any, params: Any) -> Tensor:
        """MAML++'s multi-step loss, and something of everything else."""
        total = losses.square().sum() + sum(p.sin().sum() for p in params.values())
        for t, x in enumerate(aux):
            total = total + (t + 1) * x["query"] + (0.3 + t) * x["out"][0].sin().sum()
            total = total + t * x["weight"].square().sum() + (x["batch"] * x["captured"]).sum()
        return total

    def unrolled(self, adjoint: diffopt.Adjoint, **more: Any) -> Tensor:
        inner = sgd(self.model, lr=self.lr)
        fast = diffopt.unroll(self.model, inner, self.data, self.loss_fn, adjoint=adjoint, **more)
        assert all(x["count"] == 3 and not x["cut"].requires_grad for x in fast.aux)
        assert all(x["out"][1] == "x" for x in fast.aux)
        return self.outer(fast.losses, fast.aux, fast.params)

    def plain(self) -> Tensor:
        extras: list[Any] = []

        def loss_fn(model: Any, pair: Any) -> Tensor:
            loss, aux = self.loss_fn(model, pair)
            extras.append(aux)
            return loss

        end = plain(self.model, {"lr": self.lr, "momentum": 0.5}, self.data, loss_fn)
        return self.outer(end.losses, extras, end.params)


@every_adjoint
def test_every_step_is_connected(adjoint: diffopt.Adjoint) -> None:
    problem = Problem()
    want = torch.autograd.grad(problem.plain(), problem.wanted)
    got = torch.autograd.grad(problem.unrolled(adjoint), problem.wanted)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def test_compiled_steps(graphs: list[bool]) -> None:
    problem = Problem()
    want = torch.autograd.grad(problem.plain(), problem.wanted)
    for adjoint in (diffopt.StoreAll(), diffopt.Segmented(2), diffopt.Binomial(2)):
        got = torch.autograd.grad(problem.unrolled(adjoint, compile=True), problem.wanted)
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    assert graphs


@every_adjoint
def test_second_order(adjoint: diffopt.Adjoint) -> None:
    problem = Problem()
    found = []
    for outer in (problem.plain(), problem.unrolled(adjoint)):
        first = torch.autograd.grad(outer, problem.wanted, create_graph=True)
        squares = sum(g.sin().sum() for g in first)
        assert isinstance(squares, Tensor)
        found.append([*first, *torch.autograd.grad(squares, problem.wanted)])
    assert_all_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjoint", [diffopt.Segmented(2), diffopt.Binomial(2)])
def test_states_in_a_folder(adjoint: Any, tmp_path: Any) -> None:
    stored = type(adjoint)(2, storage=str(tmp_path))
    problem = Problem()
    want = torch.autograd.grad(problem.plain(), problem.wanted)
    got = torch.autograd.grad(problem.unrolled(stored, verify=True), problem.wanted)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def test_forward_mode() -> None:
    problem = Problem()
    wrt = [problem.phi, problem.only, problem.lr]
    want = torch.autograd.grad(problem.plain(), wrt)
    outer = problem.unrolled(diffopt.ForwardMode(wrt))
    assert_all_close(torch.autograd.grad(outer, wrt), want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scripted", [False, True])
def test_forward_mode_from_a_model_without_forward_derivatives(scripted: bool) -> None:
    model, pair = tiny(), batch()
    phi = torch.tensor(0.7, dtype=torch.double, requires_grad=True)

    def loss_fn(model: Any, item: Any) -> Any:
        out = _Square.apply(model(pair[0])) if scripted else model(pair[0]).square()
        return out.mean() * phi, phi * out.sum()

    found = []
    for adjoint in (diffopt.StoreAll(), diffopt.ForwardMode([phi])):
        fast = diffopt.unroll(model, sgd(model), 3, loss_fn, adjoint=adjoint)
        found.append(torch.autograd.grad(sum(fast.aux), [phi]))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)


class _Square(torch.autograd.Function):
    """Has no derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * g


@pytest.mark.parametrize("inner", [diffopt.StoreAll(), diffopt.Segmented(2)])
def test_truncated_takes_the_windows(inner: diffopt.Adjoint) -> None:
    problem = Problem()
    fast = diffopt.unroll(
        problem.model,
        sgd(problem.model, lr=problem.lr),
        problem.data,
        problem.loss_fn,
        adjoint=diffopt.Truncated(2, inner=inner),
    )
    got = torch.autograd.grad(
        problem.outer(fast.losses, fast.aux, fast.params), problem.wanted, materialize_grads=True
    )
    before = diffopt.unroll(
        problem.model, sgd(problem.model, lr=problem.lr), problem.data[:-2], problem.loss_fn
    ).detach()
    last = diffopt.unroll(
        problem.model,
        sgd(problem.model, lr=problem.lr),
        problem.data[-2:],
        problem.loss_fn,
        initial=before,
    )
    losses, aux = torch.cat([before.losses, last.losses]), [*before.aux, *last.aux]
    want = torch.autograd.grad(
        problem.outer(losses, aux, last.params), problem.wanted, materialize_grads=True
    )
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def test_first_order_takes_inner_gradients_for_constants() -> None:
    model, pair = tiny(), batch()
    phi = torch.tensor(0.7, dtype=torch.double, requires_grad=True)

    def loss_fn(model: Any, item: Any) -> Any:
        loss = mse(model, pair) * phi
        return loss, {"query": (model(pair[0]) * phi).sin().sum()}

    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=0.2), T, loss_fn, adjoint=diffopt.FirstOrder()
    )
    wanted = [*model.parameters(), phi]
    got = torch.autograd.grad(sum(x["query"] for x in fast.aux), wanted)
    params = dict(model.named_parameters())
    total: Any = 0
    for _ in range(T):
        loss, aux = torch.func.functional_call(_Call(model, loss_fn), _under(params), (None,))
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        total = total + aux["query"]
        params = {n: p - 0.2 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    assert_all_close(got, torch.autograd.grad(total, wanted), rtol=1e-10, atol=1e-13)


class _Call(nn.Module):
    def __init__(self, model: nn.Module, fn: Any) -> None:
        super().__init__()
        self.model, self.fn = model, fn

    def forward(self, item: Any) -> Any:
        return self.fn(self.model, item)


def _under(params: dict[str, Any]) -> dict[str, Any]:
    return {f"model.{name}": x for name, x in params.items()}


def test_implicit_refuses() -> None:
    model = tiny()
    fast = diffopt.unroll(
        model,
        sgd(model),
        2,
        lambda m, t: (m[0].weight.square().sum(), m[0].weight.sum()),
        adjoint=diffopt.Implicit(gradient_tol=1e9),
    )
    with pytest.raises(NotImplementedError, match="flows to aux of the result"):
        fast.aux[0].backward()


@every_adjoint
def test_tasks_lead(adjoint: diffopt.Adjoint) -> None:
    _check_tasks(adjoint, compile=False)


def test_tasks_lead_in_compiled_steps(graphs: list[bool]) -> None:
    _check_tasks(diffopt.Segmented(2), compile=True)
    assert graphs


def _check_tasks(adjoint: diffopt.Adjoint, compile: bool) -> None:
    torch.manual_seed(0)
    n, model = 3, tiny()
    x, y = torch.randn(n, 6, 2).double(), torch.randn(n, 6, 2).double()

    def loss_fn(model: Any, pair: Any) -> Any:
        return mse(model, pair), model(pair[0]).sin().mean()

    fast = diffopt.unroll(
        model, sgd(model), [(x, y)] * 3, loss_fn, tasks=n, adjoint=adjoint, compile=compile
    )
    assert all(a.shape == (n,) for a in fast.aux)
    got = torch.autograd.grad(
        sum((t + 1) * a.square().sum() for t, a in enumerate(fast.aux)), list(model.parameters())
    )
    total: Any = 0
    for i in range(n):
        extras: list[Tensor] = []

        def each(model: Any, pair: Any, extras: list[Tensor] = extras) -> Tensor:
            loss, aux = loss_fn(model, pair)
            extras.append(aux)
            return loss

        plain(model, {"lr": 0.2, "momentum": 0.5}, [(x[i], y[i])] * 3, each)
        total = total + sum((t + 1) * a.square() for t, a in enumerate(extras))
    want = torch.autograd.grad(total, list(model.parameters()))
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@every_adjoint
def test_a_captured_tensor_of_aux_alone_and_one_computed_from_another(
    adjoint: diffopt.Adjoint,
) -> None:
    model, pair = tiny(), batch()
    leaf = torch.tensor(0.3, dtype=torch.double, requires_grad=True)
    made = leaf.exp()

    def loss_fn(model: Any, t: int) -> Any:
        return mse(model, pair), (made, made * leaf, model[0].bias, made * model[0].bias.sum())

    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=0.0), 2, loss_fn, adjoint=adjoint
    )
    total = sum(a + 2 * b + c.sum() + d for a, b, c, d in fast.aux)
    got = torch.autograd.grad(total, [leaf, model[0].bias])
    bias = model[0].bias
    again = leaf.exp()
    plainly = 2 * (again + 2 * again * leaf + bias.sum() + again * bias.sum())
    assert_all_close(got, torch.autograd.grad(plainly, [leaf, bias]), rtol=1e-12, atol=1e-13)


def test_a_buffer_that_learns() -> None:
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -0.2]).double())
            self.register_buffer("mean", torch.zeros(2).double())

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + self.w * x
            return (self.mean * self.w).sum()

    model, x = Averages(), torch.tensor([1.0, 2.0]).double()

    def loss_fn(model: Any, t: int) -> Any:
        loss = model(x).square()
        return loss, model.mean

    for adjoint in (diffopt.StoreAll(), diffopt.Segmented(1), diffopt.Binomial(2)):
        fast = diffopt.unroll(
            model, diffopt.SGD(model.parameters(), lr=0.1), 3, loss_fn, adjoint=adjoint
        )
        (got,) = torch.autograd.grad(sum(a.sin().sum() for a in fast.aux), [model.w])
        w, mean, total = model.w, torch.zeros(2).double(), 0
        for _ in range(3):
            mean = 0.5 * mean + w * x
            (g,) = torch.autograd.grad((mean * w).sum().square(), [w], create_graph=True)
            total = total + mean.sin().sum()
            # the plain loop's mean is a function of earlier weights; its gradient is the present's
            w = w - 0.1 * g
        assert_all_close([got], torch.autograd.grad(total, [model.w]), rtol=1e-10, atol=1e-13)


def test_detach_cuts_and_no_grad_keeps_nothing() -> None:
    problem = Problem()
    fast = diffopt.unroll(problem.model, sgd(problem.model), problem.data, problem.loss_fn)
    assert fast.aux[0]["query"].requires_grad
    cut = fast.detach()
    assert not any(x["query"].requires_grad or x["weight"].requires_grad for x in cut.aux)
    assert all(
        torch.equal(a["out"][0], b["out"][0]) for a, b in zip(cut.aux, fast.aux, strict=True)
    )
    with torch.no_grad():
        fast = diffopt.unroll(problem.model, sgd(problem.model), problem.data, problem.loss_fn)
    assert not any(x["query"].requires_grad or x["weight"].requires_grad for x in fast.aux)


@every_adjoint
def test_nothing_is_kept_alive(adjoint: diffopt.Adjoint) -> None:
    model, data = tiny(), batches(3)
    fast = diffopt.unroll(
        model, sgd(model), data, lambda m, b: (mse(m, b), m(b[0])), adjoint=adjoint
    )
    ref = weakref.ref(fast.aux[0])
    with new_objects_only():
        del fast
        assert ref() is None


def test_what_cannot_be_connected_is_refused() -> None:
    model, pair = tiny(), batch()

    def loss_fn(model: Any, t: int) -> Any:
        return mse(model, pair), SimpleNamespace(out=[model(pair[0])])

    with pytest.raises(TypeError, match=r"aux of step 0 holds a SimpleNamespace with a tensor"):
        diffopt.unroll(model, sgd(model), 2, loss_fn)
    fast = diffopt.unroll(
        model, sgd(model), 2, lambda m, t: (mse(m, pair), SimpleNamespace(out=m(pair[0]).detach()))
    )
    assert fast.aux[1].out.shape == (5, 2)


@pytest.mark.parametrize("adjoint", [diffopt.Segmented(1), diffopt.Segmented(2)])
def test_an_extra_that_changed_since_is_an_error(adjoint: diffopt.Adjoint) -> None:
    model, pair = tiny(), batch()
    scale = [1.0, True]

    def loss_fn(model: Any, t: int) -> Any:
        aux = [mse(model, pair) * scale[0]]
        return mse(model, pair), aux if scale[1] else []

    fast = diffopt.unroll(model, sgd(model), 3, loss_fn, adjoint=adjoint)
    total = sum(a[0] for a in fast.aux)
    scale[0] = 2.0
    with pytest.raises(RuntimeError, match="gives another aux"):
        total.backward(retain_graph=True)
    scale[:] = [1.0, False]
    with pytest.raises(RuntimeError, match=r"other tensors in aux|gives another aux"):
        total.backward(retain_graph=True)


def test_many_cotangents_at_once() -> None:
    model, data = tiny(), batches(3)
    fast = diffopt.unroll(
        model, sgd(model), data, lambda m, b: (mse(m, b), m(b[0]).sum()), segment=2
    )
    y = torch.stack(fast.aux)
    eye = torch.eye(3).double()
    (got,) = torch.autograd.grad(y, model[0].weight, eye, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (one,) = torch.autograd.grad(y, model[0].weight, eye[i], retain_graph=True)
        torch.testing.assert_close(got[i], one, rtol=1e-10, atol=1e-13)
