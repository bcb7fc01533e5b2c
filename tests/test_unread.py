"""Gradients of weights that the way back leaves out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import Train, close, new_objects_only, unrolled
from oracle import plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffopt
from diffopt._step import result, unread
from diffopt._step import step as inner_step

#: Which weights each evaluation of a step has left out.
LeftOut = list[set[str]]


@pytest.fixture(autouse=True)
def small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here small matrices count as large."""
    monkeypatch.setattr(unread, "LARGE", 1)
    monkeypatch.setattr(result, "LARGE", 1)
    monkeypatch.setattr(unread, "_WORTH", 0)


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> LeftOut:
    noted: LeftOut = []

    def noting(*args: Any) -> dict[str, unread.Unread]:
        found = unread.unread(*args)
        noted.append(set(found))
        return found

    monkeypatch.setattr(inner_step, "unread", noting)
    return noted


class Model(nn.Module):
    """Two layers and a head, called as ``forward`` says."""

    def __init__(self, forward: Callable[[Model, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4, bias)
        self.second = nn.Linear(4, 4, bias)
        self.head = nn.Linear(4, 2, bias)
        self.called = forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self, x)


def chain(m: Model, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.second(torch.tanh(m.first(x)))))


def in_three_dimensions(m: Model, x: Tensor) -> Tensor:
    return chain(m, x.reshape(2, 3, -1)).reshape(6, -1)


def twice(m: Model, x: Tensor) -> Tensor:
    h = torch.tanh(m.first(x))
    return m.head(torch.tanh(m.second(torch.tanh(m.second(h)) + h)))


def by_product(m: Model, x: Tensor) -> Tensor:
    h = torch.tanh(torch.addmm(m.second.bias, m.first(x), m.second.weight))
    return m.head(h @ m.second.weight)


def by_both_sides(m: Model, x: Tensor) -> Tensor:
    return m.head(m.first(x) @ m.second.weight + F.linear(m.first(x).sin(), m.second.weight))


def on_the_left(m: Model, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.second.weight @ m.first(x)[:4]))


def scaled(m: Model, x: Tensor) -> Tensor:
    return m.head(torch.addmm(m.second.bias, m.first(x), m.second.weight, alpha=0.5, beta=2.0))


def with_penalty(m: Model, x: Tensor) -> Tensor:
    return chain(m, x) + m.second.weight.square().sum()


def with_gradient(m: Model, x: Tensor) -> Tensor:
    y = chain(m, x)
    (slope,) = torch.autograd.grad(y.sum(), m.second.weight, create_graph=True)
    return y + 0.01 * slope.square().sum()


def in_place(m: Model, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).tanh_()).mul_(2).tanh_())


def checkpointed(m: Model, x: Tensor) -> Tensor:
    hidden = checkpoint(lambda h: torch.tanh(m.second(h)), m.first(x), use_reentrant=False)
    return m.head(hidden)


def cast(m: Model, x: Tensor) -> Tensor:
    return F.linear(m.second(m.first(x)).tanh(), m.head.weight.float().double())


def transposed_by_hand(m: Model, x: Tensor) -> Tensor:
    turned = m.second.weight.t()
    return m.head((m.first(x) @ turned).sin() @ turned)


#: Each way to use the weights, and which of their gradients are left out.
ALL = {"first.weight", "second.weight", "head.weight"}
OTHERS = ALL - {"second.weight"}
CALLS: dict[str, tuple[Callable[[Model, Tensor], Tensor], set[str]]] = {
    f.__name__: (f, names)
    for f, names in [
        (chain, ALL),
        (in_three_dimensions, ALL),
        (twice, ALL),
        (by_product, ALL),
        (by_both_sides, ALL),
        (transposed_by_hand, ALL),
        (in_place, ALL),
        (on_the_left, OTHERS),
        (scaled, OTHERS),
        (with_penalty, OTHERS),
        (with_gradient, ALL - {"head.weight"}),
        (cast, OTHERS - {"head.weight"} | {"second.weight"}),
    ]
}


def batches(steps: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 3, dtype=torch.float64).requires_grad_() for _ in range(steps)]


def loss_fn(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    return y.square().mean() + y.cos().mean()


def descended(model: Model, data: Sequence[Tensor]) -> diffopt.Unrolled:
    opt = diffopt.SGD(model.parameters(), lr=0.3)
    return diffopt.unroll(model, opt, data, loss_fn, adjoint=diffopt.Segmented(1))


def derivatives(
    train: Train, forward: Callable[[Model, Tensor], Tensor], bias: bool = True, **options: float
) -> list[Tensor]:
    """Of a number computed from the trained model: by its parameters and by the batches."""
    model, data = Model(forward, bias), batches()
    fast = train(model, {"lr": 0.3, **options}, data, loss_fn)
    number = fast(torch.ones(6, 3, dtype=torch.float64)).sin().sum()
    inputs = [*model.parameters(), *data]
    return [*torch.autograd.grad(number, inputs, materialize_grads=True)]


def agree(train: Train, forward: Callable[[Model, Tensor], Tensor], **more: Any) -> None:
    # The plain loop has no way to compute a layer again with the values of its step.
    reference = without_checkpoint if forward is checkpointed else forward
    for a, b in zip(
        derivatives(train, forward, **more), derivatives(plain, reference, **more), strict=True
    ):
        close(a, b)


def without_checkpoint(m: Model, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.second(m.first(x))))


@every_adjoint
@pytest.mark.parametrize("forward", [f for f, _ in CALLS.values()], ids=[*CALLS])
def test_exact(adjoint: diffopt.Adjoint, forward: Callable[[Model, Tensor], Tensor]) -> None:
    agree(unrolled(adjoint), forward)


@every_adjoint
def test_layers_that_are_computed_again_keep_theirs(
    adjoint: diffopt.Adjoint, left_out: LeftOut
) -> None:
    """What they saved is not read twice."""
    agree(unrolled(adjoint), checkpointed)
    assert left_out == []


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
@pytest.mark.parametrize(("forward", "names"), CALLS.values(), ids=[*CALLS])
def test_left_out(
    forward: Callable[[Model, Tensor], Tensor],
    names: set[str],
    options: dict[str, float],
    left_out: LeftOut,
) -> None:
    agree(unrolled(diffopt.Segmented(1)), forward, **options)
    assert left_out == [names] * 4


def test_without_biases_the_first_layer_is_not_left_out(left_out: LeftOut) -> None:
    """Fed by data, nothing but the weight asks for its part of the gradient."""
    model, x = Model(chain, bias=False), batches()[0].detach()
    fast = descended(model, [x] * 3)
    found = torch.autograd.grad(fast(x).sum(), [*model.parameters()])
    reference = plain(model, {"lr": 0.3}, [x] * 3, loss_fn)
    for a, b in zip(
        found, torch.autograd.grad(reference(x).sum(), [*model.parameters()]), strict=True
    ):
        close(a, b)
    assert left_out == [ALL] * 3


@pytest.mark.parametrize("optimizer", [diffopt.Adam, diffopt.RMSprop])
def test_a_rule_that_reads_gradients_has_them(
    optimizer: type[diffopt.optim.Optimizer], left_out: LeftOut
) -> None:
    model, data = Model(chain), batches()
    diffopt.unroll(
        model, optimizer(model.parameters(), lr=0.1), data, loss_fn, adjoint=diffopt.Segmented(1)
    )(data[0]).sum().backward()
    assert left_out == []


def test_a_learned_rate_has_them(left_out: LeftOut) -> None:
    def by_rate(train: Train) -> Tensor:
        rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        model, data = Model(chain), batches()
        fast = train(model, {"lr": rate}, data, loss_fn)
        return torch.autograd.grad(fast(data[0]).sin().sum(), rate)[0]

    close(by_rate(unrolled(diffopt.Segmented(1))), by_rate(plain))
    assert left_out == []


class Reversed(torch.autograd.Function):
    """The identity, whose cotangent is multiplied by what a list holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: list[float]) -> Tensor:
        ctx.factor = factor[0]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.factor, None


@pytest.mark.parametrize("after", [-1.0, 1.01])
def test_another_gradient_of_the_same_loss_is_an_error(after: float, left_out: LeftOut) -> None:
    factor = [1.0]

    def forward(m: Model, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.second(Reversed.apply(m.first(x), factor))))  # type: ignore[no-untyped-call]

    model, data = Model(forward), batches()
    fast = descended(model, data)
    number = fast(data[0]).sum()
    factor[0] = after
    if after == -1.0:  # norms are as they were: `verify=True` is for that
        number.backward()
    else:
        with pytest.raises(RuntimeError, match="gives another gradient"):
            number.backward()
    assert ALL in left_out


def test_a_hook_on_a_node_is_an_error_or_has_its_way(left_out: LeftOut) -> None:
    """It changes the weight's gradient alone, where no hook on a tensor can be seen."""

    def forward(m: Model, x: Tensor) -> Tensor:
        y = m.second(m.first(x))
        y.grad_fn.register_hook(lambda to, _: (*to[:2], None if to[2] is None else 2 * to[2]))
        return m.head(torch.tanh(y))

    model, data = Model(forward), batches()
    fast = descended(model, data)
    with pytest.raises(RuntimeError, match="gives another gradient"):
        fast(data[0]).sum().backward()


def test_hooks_on_weights_have_their_way(left_out: LeftOut) -> None:
    def hooked(m: Model, x: Tensor) -> Tensor:
        if x.requires_grad:  # not the outer call
            m.second.weight.register_hook(lambda g: 2 * g)
        return chain(m, x)

    def doubled(model: Any, options: Any, steps: Any, loss_fn: Any) -> Any:
        name = "second.weight"
        twice = lambda grads: {**grads, name: 2 * grads[name]}  # noqa: E731
        return plain(model, options, steps, loss_fn, grad_transform=twice)

    found = derivatives(unrolled(diffopt.Segmented(1)), hooked)
    for a, b in zip(found, derivatives(doubled, chain), strict=True):
        close(a, b)
    assert not any(left_out)


def test_a_run_that_diverges_gives_nan_and_no_error(left_out: LeftOut) -> None:
    model, data = Model(lambda m, x: chain(m, x).pow(9) * 1e40), batches(8)
    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=1e9), data, loss_fn, adjoint=diffopt.Segmented(1)
    )
    number = fast(data[0]).sum()
    number.backward()
    assert not number.isfinite()
    assert len(left_out) == 8


def test_large_matrices_are_left_out_and_small_ones_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes as they are."""
    monkeypatch.undo()
    torch.manual_seed(0)
    x = torch.randn(512, 128)
    large, small = (torch.randn(n, 128, requires_grad=True) for n in (128, 4))

    def chosen(x: Tensor) -> set[str]:
        loss = F.linear(F.linear(x, large), small).sum()
        return {*unread.unread(loss, {"large": large, "small": small}, 0)}

    assert chosen(x) == {"large"}
    assert chosen(x[:4]) == set()


def test_no_cycle_keeps_what_a_step_has_used() -> None:
    """Otherwise each step's cotangents would stay until the garbage collector runs."""
    model, x = Model(chain), batches()[0].detach()
    with new_objects_only():
        fast = descended(model, [x] * 3)
        fast(x).sum().backward()
        assert not [x for x in gc.get_objects() if isinstance(x, unread._Cotangent)]


def test_of_a_graph_from_before_nothing_is_left_out() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    before = torch.randn(3, 3, requires_grad=True).exp()
    since = before.grad_fn._sequence_nr() + 1  # type: ignore[union-attr]
    assert not unread.unread((before @ weight).sum(), {"weight": weight}, since)
    assert unread.unread((before.detach() @ weight).sum(), {"weight": weight}, since)
