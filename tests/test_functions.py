"""Custom autograd Functions: refused where their backward passes cut the second derivative.

The oracle is a plain loop over the same function written in operations of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from adjoints import every_adjoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import diffopt
from diffopt._derivatives.functions import refuse_unrecorded

Function = Any


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeUnrecorded(Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.no_grad():
            return Cube.backward(ctx, g)


class CubeDetached(Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Cube.backward(ctx, g).detach()


class CubeOnce(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return Cube.backward(ctx, g)


class Doubled(torch.autograd.Function):
    """Linear: with a constant cotangent nothing is recorded, and nothing needs to be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g


class Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return torch.zeros_like(g)


class Nothing(Stopped):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None


class WithIndices(torch.autograd.Function):
    """Has a result of integers, and an argument that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Any:
        values, indices = x.sort()
        ctx.save_for_backward(indices, weights)
        ctx.mark_non_differentiable(indices)
        return values * weights, indices

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        indices, weights = ctx.saved_tensors
        unneeded = torch.ones_like(weights)
        return torch.zeros_like(g).scatter(-1, indices, g * weights), unneeded


class HalfCut(torch.autograd.Function):
    """x·y, with the gradient in y recorded, and the one in x not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return (g * y).detach(), g * x


def nodes_behind(*roots: Tensor) -> Iterator[Any]:
    stack, passed = [x.grad_fn for x in roots], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in passed:
            passed.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]


def walked(make: Callable[[Tensor], Tensor], recorded: set[type] | None = None) -> None:
    x = torch.linspace(-1.0, 2.0, 5, dtype=torch.double, requires_grad=True)
    loss = make(x.sin()).sum()
    refuse_unrecorded(nodes_behind(loss), 7, set() if recorded is None else recorded)


@pytest.mark.parametrize("function", [Cube, Doubled, Rounded, Stopped, Nothing])
def test_functions_that_pass(function: Function) -> None:
    walked(function.apply)


def test_results_and_arguments_without_gradients_do_not_count() -> None:
    walked(lambda x: WithIndices.apply(x, torch.ones(5, dtype=torch.double))[0])


@pytest.mark.parametrize("function", [CubeOnce, CubeUnrecorded, CubeDetached])
def test_functions_that_cut_the_second_derivative(function: Function) -> None:
    with pytest.raises(NotImplementedError) as error:
        walked(function.apply)
    message = str(error.value)
    assert f"the loss of step 7 uses {__name__}.{function.__name__}, a custom" in message
    assert "diffopt.FirstOrder()" in message


def test_each_gradient_counts() -> None:
    with pytest.raises(NotImplementedError, match="HalfCut"):
        walked(lambda x: HalfCut.apply(x, x + 1))
    walked(lambda x: HalfCut.apply(x.detach(), x))


def test_functions_mapped_over_tasks() -> None:
    walked(torch.vmap(Cube.apply))
    with pytest.raises(NotImplementedError, match="uses CubeUnrecorded, a custom"):
        walked(torch.vmap(CubeUnrecorded.apply))


def test_what_is_recorded_is_run_once() -> None:
    calls: list[int] = []

    class Counted(Cube):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            calls.append(1)
            return Cube.backward(ctx, g)

    recorded: set[type] = set()
    for _ in range(3):
        walked(lambda x: Counted.apply(Counted.apply(x)), recorded)
    assert recorded == {Counted}
    assert len(calls) == 1


def test_a_pass_of_its_own_leaves_no_gradients_and_no_random_numbers() -> None:
    x = torch.ones(3, requires_grad=True)
    before = torch.get_rng_state()
    y = Cube.apply(x)
    y.register_hook(lambda g: pytest.fail("a hook ran"))
    refuse_unrecorded([y.grad_fn], 0, set())
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), before)


class Adjoint(torch.autograd.Function):
    """tanh of a layer, whose gradient comes from the layer itself, by autograd, in the backward."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *params)
        with torch.no_grad():
            out: Tensor = layer(x).tanh()
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *params = ctx.saved_tensors
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            y = ctx.layer(x).tanh()
            found = torch.autograd.grad(
                y, [x, *params], g, create_graph=create, allow_unused=True, materialize_grads=True
            )
        return None, *found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor, custom: bool = True) -> Tensor:
        if custom:
            hidden = Adjoint.apply(self.layer, x, self.layer.weight, self.layer.bias)
        else:
            hidden = self.layer(x).tanh()
        out: Tensor = self.last(hidden)
        return out


@every_adjoint
def test_a_backward_pass_that_reads_the_module_after_the_call(adjoint: diffopt.Adjoint) -> None:
    """``fast(x)`` has given the module back by then."""
    x = torch.linspace(-1, 1, 12, dtype=torch.double).reshape(4, 3).requires_grad_()
    model = Model()
    inner = diffopt.SGD(model.parameters(), lr=0.3)

    def gradients(custom: bool) -> list[Tensor]:
        def loss_fn(m: Any, x: Tensor) -> Tensor:
            out: Tensor = m(x, custom).square().mean()
            return out

        fast = diffopt.unroll(model, inner, [x] * 3, loss_fn, adjoint=adjoint)
        outer = loss_fn(fast, x.cos())
        return list(torch.autograd.grad(outer, [x, *model.parameters()]))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_module_is_given_back_when_such_a_pass_raises() -> None:
    model = Model()
    before = dict(model.named_parameters())

    class Fails(Adjoint):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            assert ctx.layer.weight is not before["layer.weight"]
            raise KeyError("from within")

    x = torch.ones(2, 3, dtype=torch.double)
    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=0.1), [x], lambda m, x: m(x, False).sum()
    )
    y = fast.apply(lambda m: Fails.apply(m.layer, x, m.layer.weight, m.layer.bias).sum())
    with pytest.raises(KeyError, match="from within"):
        y.backward()
    assert all(p is before[name] for name, p in model.named_parameters())


def test_functions_outside_of_the_call_are_left_alone() -> None:
    model = Model()
    x = torch.ones(2, 3, dtype=torch.double, requires_grad=True)
    layer = model.layer
    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=0.1), [x], lambda m, x: m(x, False).sum()
    )

    def gradient(custom: bool) -> Tensor:
        own = Adjoint.apply(layer, x, layer.weight, layer.bias) if custom else layer(x).tanh()
        return torch.autograd.grad(fast(own[:, :3], False).sum(), x, retain_graph=True)[0]

    torch.testing.assert_close(gradient(True), gradient(False))
