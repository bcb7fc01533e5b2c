"""The second derivatives written by hand, compared with PyTorch's own and with formulas.

The formulas matter where PyTorch (2.13) is wrong: in the third derivatives of normalisations, where
the statistics count as constants, and in second ones with a bias but no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffopt._derivatives import batch_norm as _batch_norm
from diffopt._derivatives import gelu as _gelu
from diffopt._derivatives import layer_norm as _layer_norm
from diffopt._derivatives import missing as _missing

Function = Callable[..., Tensor]


def normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def written_batch_norm(
    x: Tensor, mean: Any, var: Any, w: Any, b: Any, eps: float = 1e-5, **rest: Any
) -> Tensor:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = normalised(x, [0, *range(2, x.dim())], eps)
    if mean is not None:
        F.batch_norm(x.detach(), mean, var, eps=eps, **rest)
    y = y if w is None else y * w.view(shape)
    return y if b is None else y + b.view(shape)


def written_instance_norm(
    x: Tensor, mean: Any, var: Any, w: Any, b: Any, use_input_stats: bool = True, **rest: Any
) -> Tensor:
    if mean is not None:
        F.instance_norm(x.detach(), mean, var, **rest)
    y = normalised(x, list(range(2, x.dim())), rest.get("eps", 1e-5))
    return (
        y if w is None else y * w.view(-1, *[1] * (x.dim() - 2)) + b.view(-1, *[1] * (x.dim() - 2))
    )


def written_layer_norm(x: Tensor, shape: list[int], w: Any, b: Any) -> Tensor:
    y = normalised(x, list(range(x.dim() - len(shape), x.dim())), 1e-5)
    y = y if w is None else y * w
    return y if b is None else y + b


def written_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * (1 + torch.erf(x / 2**0.5)) / 2
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def params(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


def batch_norm(function: Function, x: Tensor, w: Any = None, b: Any = None) -> Tensor:
    return function(x, None, None, w, b, training=True)


def batch_norm_tracked(function: Function, x: Tensor, w: Any = None, b: Any = None) -> Tensor:
    statistics = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    y = function(x, *statistics, w, b, training=True, momentum=0.2, eps=0.01)
    return y + statistics[0].sum() + statistics[1].sum()


def instance_norm(function: Function, x: Tensor, w: Any = None, b: Any = None) -> Tensor:
    return function(x, None, None, w, b)


def instance_norm_tracked(function: Function, x: Tensor, w: Any = None, b: Any = None) -> Tensor:
    statistics = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    y = function(x, *statistics, w, b, momentum=0.2, eps=0.01)
    return y + statistics[0].sum() + statistics[1].sum()


def layer_norm(function: Function, x: Tensor, w: Any = None, b: Any = None, n: int = 1) -> Tensor:
    return function(x, list(x.shape[x.dim() - n :]), w, b)


BN = F.batch_norm, _batch_norm.batch_norm, written_batch_norm
IN = F.instance_norm, _batch_norm.instance_norm, written_instance_norm
LN = F.layer_norm, _layer_norm.layer_norm, written_layer_norm
GELU = F.gelu, _gelu.gelu, written_gelu

CASES: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
    "gelu": (GELU, lambda f, x: f(x), [(3, 5)]),
    "gelu, tanh": (GELU, lambda f, x: f(x, approximate="tanh"), [(3, 5)]),
    "batch_norm": (BN, batch_norm, [(4, 3, 2, 5), (3,), (3,)]),
    "batch_norm, tracked": (BN, batch_norm_tracked, [(4, 3, 2, 5), (3,), (3,)]),
    "batch_norm, plain": (BN, batch_norm, [(4, 3, 5)]),
    "batch_norm, no bias": (BN, batch_norm, [(6, 3), (3,)]),
    "batch_norm, no weight": (BN, lambda f, x, b: batch_norm(f, x, None, b), [(6, 3), (3,)]),
    "instance_norm": (IN, instance_norm, [(4, 3, 5), (3,), (3,)]),
    "instance_norm, tracked": (IN, instance_norm_tracked, [(2, 3, 2, 2), (3,), (3,)]),
    "instance_norm, plain": (IN, instance_norm, [(2, 3, 2, 2)]),
    "layer_norm": (LN, layer_norm, [(4, 3, 5), (5,), (5,)]),
    "layer_norm, two dimensions": (LN, partial(layer_norm, n=2), [(4, 3, 5), (3, 5), (3, 5)]),
    "layer_norm, all dimensions": (LN, partial(layer_norm, n=2), [(3, 5), (3, 5), (3, 5)]),
    "layer_norm, plain": (LN, layer_norm, [(4, 3, 5)]),
    "layer_norm, no bias": (LN, layer_norm, [(6, 3), (3,)]),
    "layer_norm, no weight": (LN, lambda f, x, b: layer_norm(f, x, None, b), [(6, 3), (3,)]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    functions, call, shapes = CASES[request.param]
    return (*(partial(call, function) for function in functions), params(*shapes))


def first(function: Function, xs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    y = function(*xs)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    needed = [x for x in xs if x.requires_grad]
    # Not linear in y, so that every cotangent depends on all inputs.
    return y, list(torch.autograd.grad((weights * y.sin()).sum(), needed, create_graph=True))


def assert_equal(ours: list[Tensor], theirs: list[Tensor], *, bits: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if bits else {"rtol": 1e-9, "atol": 1e-10}
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_values_and_first_derivatives_are_the_same_bits(case: Any) -> None:
    theirs, ours, _, xs = case
    (y, grads), (z, others) = first(ours, xs), first(theirs, xs)
    assert_equal([y, *grads], [z, *others], bits=True)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_higher_derivatives(case: Any, order: int) -> None:
    _, ours, written, xs = case

    def derivative(function: Function) -> list[Tensor]:
        found = first(function, xs)[1]
        for i in range(order - 1):
            total = sum(((x * (i + 2)).cos() * (1 + x)).sum() for x in found)
            assert isinstance(total, Tensor)
            last = i == order - 2
            found = list(
                torch.autograd.grad(
                    total, xs, create_graph=not last, allow_unused=True, materialize_grads=True
                )
            )
        return found

    assert_equal(derivative(ours), derivative(written))


def test_some_inputs_are_constants(case: Any) -> None:
    _, ours, written, xs = case

    def second(function: Function, xs: list[Tensor]) -> list[Tensor]:
        total = sum((g.cos() * (1 + g)).sum() for g in first(function, xs)[1])
        assert isinstance(total, Tensor)
        needed = [x for x in xs if x.requires_grad]
        return list(torch.autograd.grad(total, needed, allow_unused=True, materialize_grads=True))

    for i in range(len(xs)):
        given = [x.detach() if k == i else x for k, x in enumerate(xs)]
        if len(given) > 1:
            assert_equal(second(ours, given), second(written, given))


def test_only_one_of_the_first_derivatives_is_used(case: Any) -> None:
    _, ours, written, xs = case

    def second(function: Function, i: int) -> list[Tensor]:
        g = first(function, xs)[1][i]
        return list(
            torch.autograd.grad(
                (g.cos() * (1 + g)).sum(), xs, allow_unused=True, materialize_grads=True
            )
        )

    for i in range(len(xs)):
        assert_equal(second(ours, i), second(written, i))


def test_finite_differences(case: Any) -> None:
    _, ours, _, xs = case
    assert torch.autograd.gradgradcheck(ours, xs, atol=1e-4)


def test_running_statistics_are_advanced() -> None:
    (x,) = params((5, 3, 2))
    found = []
    for function in (F.batch_norm, _batch_norm.batch_norm):
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        function(x, mean, var, training=True, momentum=0.3)
        found.append([mean, var])
    assert_equal(*found, bits=True)
    assert not torch.equal(found[0][0], torch.zeros(3).double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layouts(layout: torch.memory_format) -> None:
    x, w, b = params((4, 3, 2, 5), (3,), (3,))
    x = x.detach().contiguous(memory_format=layout).requires_grad_()

    def second(function: Function) -> list[Tensor]:
        grads = first(partial(batch_norm, function), [x, w, b])[1]
        return list(torch.autograd.grad([g.cos().sum() for g in grads], [x, w, b]))

    assert_equal(second(_batch_norm.batch_norm), second(F.batch_norm))


def test_pytorchs_own_where_it_knows_more() -> None:
    x, w, b = params((4, 3), (3,), (3,))
    for of, call in ((_gelu.gelu, lambda f, x: f(x)), (_layer_norm.layer_norm, layer_norm)):

        def kind(y: Tensor) -> str:
            return type(y.grad_fn).__name__

        def total(x: Tensor, of: Any = of, call: Any = call) -> Tensor:
            result: Tensor = call(of, x).square().sum()
            return result

        assert kind(call(of, x)).startswith("_")
        assert torch.func.vmap(torch.func.grad(total))(x.detach()).shape == x.shape
        torch.autograd.functional.jvp(total, x, x)
        with torch.no_grad():
            assert call(of, x).grad_fn is None
    evaluated = _batch_norm.batch_norm(x, w.detach(), b.detach().exp(), training=False)
    assert not type(evaluated.grad_fn).__name__.startswith("_")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        _batch_norm.batch_norm(x[:1], None, None, training=True)


LOW = [  # PyTorch's mixes no dtypes where there is a bias alone
    name for name in CASES if "norm" in name and "tracked" not in name and "no weight" not in name
]


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("case", LOW, indirect=True)
def test_derivatives_in_low_precision(case: Any, how: Any) -> None:
    """Values and first derivatives are PyTorch's bits; those beyond are right to rounding."""
    theirs, ours, written, xs = case
    dtype = torch.float32 if how == "autocast" else how
    low = [x.detach().to(dtype).requires_grad_() for x in xs]
    if how == "autocast":  # as what a linear layer gives
        low[0] = low[0].detach().bfloat16().requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in low]

    def first_of(function: Function, xs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            y = function(*xs)
        total = (torch.linspace(-1, 2, y.numel()).view(y.shape) * y.to(xs[-1].dtype).sin()).sum()
        return y, list(torch.autograd.grad(total, xs, create_graph=True))

    y, grads = first_of(ours, low)
    z, others = first_of(theirs, low)
    assert y.dtype == z.dtype
    assert_equal([y, *grads], [z, *others], bits=True)

    def third_of(function: Function, xs: list[Tensor]) -> list[Tensor]:
        found = first_of(function, xs)[1]
        for i in range(2):
            total = sum(
                (x.double().flatten() * (torch.arange(x.numel()) + i).cos()).sum() for x in found
            )
            assert isinstance(total, Tensor)
            found = list(torch.autograd.grad(total, xs, create_graph=True, materialize_grads=True))
        return found

    got, want = third_of(ours, low), third_of(written, wide)
    scale = max(x.abs().max().item() for x in want)
    error = max((a.double() - b).abs().max().item() for a, b in zip(got, want, strict=True))
    assert error < 0.06 * scale


@pytest.mark.parametrize("what", ["batch_norm", "instance_norm"])
def test_running_statistics_in_low_precision(what: str) -> None:
    x = params((5, 3, 2))[0].detach().bfloat16().requires_grad_()
    w = torch.ones(3, requires_grad=True)
    found = []
    for function in (getattr(F, what), getattr(_batch_norm, what)):
        mean, var = torch.zeros(3), torch.ones(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x, mean, var, w, w, True, momentum=0.3)
        found.append([y, mean, var])
    assert_equal(*found, bits=True)
    assert not torch.equal(found[0][1], torch.zeros(3))


def test_hardsigmoid_in_place() -> None:
    x = torch.linspace(-4, 4, 9)
    y = x.clone()
    assert _missing.hardsigmoid(y, inplace=True) is y
    torch.testing.assert_close(y, F.hardsigmoid(x))


def test_the_sums_of_batch_norm_are_asked_for_with_a_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without one the kernels on CUDA fail, and that on the CPU does not."""
    asked = []

    def noted(name: str, at: int) -> None:
        kernel = getattr(_batch_norm, name)

        def call(*args: Any) -> Any:
            asked.append(name)
            assert args[at] is not None
            return kernel(*args)

        monkeypatch.setattr(_batch_norm, name, call)

    noted("_backward", 3)
    noted("_sums", 2)
    (x,) = params((4, 3, 5))
    grads = torch.autograd.grad(
        _batch_norm.batch_norm(x, None, None, training=True).sin().sum(), x, create_graph=True
    )
    torch.autograd.grad(grads[0].cos().sum(), x)
    assert set(asked) == {"_backward", "_sums"}
