"""Replaced operations, called by every name they have.

The oracle of the derivatives is the operation written out in others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm as bound_layer_norm
from torch.overrides import TorchFunctionMode

import diffopt
from diffopt._derivatives.routing import Routed
from diffopt._derivatives.table import REPLACEMENTS, with_second_derivatives

aten = torch.ops.aten
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
MATH = SDPBackend.MATH
Function = Callable[..., Any]


def params(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


def normalised(x: Tensor, dims: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def written_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normalised(x, (2,)) * w + b


def written_batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normalised(x, (0, 2)) * w[:, None] + b[:, None]


def written_instance_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normalised(x, (2,)) * w[:, None] + b[:, None]


def written_hardsigmoid(x: Tensor) -> Tensor:
    return (3 * x / 6 + 0.5).clamp(0, 1)


def written_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def written_weight_norm(v: Tensor, g: Tensor) -> Tensor:
    return g * v / v.square().sum(1, keepdim=True).sqrt()


def written_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).abs().pow(3).sum(-1).pow(1 / 3)


def named(name: str, holder: Any = torch) -> list[Any]:
    """The names in ``torch`` and in ATen."""
    return [getattr(holder, name), getattr(aten, name), getattr(aten, name).default]


def calls(names: list[Any], call: Callable[..., Any]) -> list[Function]:
    return [lambda *xs, f=f: call(f, *xs) for f in names]


LAYERS = [(4, 3, 5), (5,), (5,)]
CHANNELS = [(4, 3, 5), (3,), (3,)]
NN = torch._C._nn

#: What: (written out, shapes, the calls).
CALLS: dict[str, tuple[Function, list[tuple[int, ...]], list[Function]]] = {
    "layer_norm": (
        written_layer_norm,
        LAYERS,
        [
            *calls([F.layer_norm, bound_layer_norm], lambda f, x, w, b: f(x, [5], w, b)),
            *calls(named("layer_norm"), lambda f, x, w, b: f(x, [5], w, b, 1e-5)),
            *calls(named("native_layer_norm"), lambda f, x, w, b: f(x, [5], w, b, 1e-5)[0]),
            lambda x, w, b: torch.layer_norm(
                input=x, normalized_shape=(5,), weight=w, bias=b, cudnn_enable=False
            ),
        ],
    ),
    "batch_norm": (
        written_batch_norm,
        CHANNELS,
        [
            lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
            *calls(
                named("batch_norm"),
                lambda f, x, w, b: f(x, w, b, None, None, True, 0.1, 1e-5, False),
            ),
            *calls(
                named("native_batch_norm"),
                lambda f, x, w, b: f(x, w, b, None, None, True, 0.1, 1e-5)[0],
            ),
            lambda x, w, b: torch._native_batch_norm_legit(x, w, b, True, 0.1, 1e-5)[0],
            lambda x, w, b: torch._native_batch_norm_legit(
                x, w, b, x.new_zeros(3), x.new_ones(3), True, 0.1, 1e-5
            )[0],
            lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)[0],
        ],
    ),
    "instance_norm": (
        written_instance_norm,
        CHANNELS,
        [
            lambda x, w, b: F.instance_norm(x, None, None, w, b),
            *calls(
                named("instance_norm"),
                lambda f, x, w, b: f(x, w, b, None, None, True, 0.1, 1e-5, False),
            ),
        ],
    ),
    "gelu": (
        written_gelu,
        [(4, 5)],
        [*calls([F.gelu, *named("gelu", NN)], lambda f, x: f(x)), lambda x: aten.gelu(self=x)],
    ),
    "hardsigmoid": (
        written_hardsigmoid,
        [(4, 5)],
        [
            *calls([F.hardsigmoid, *named("hardsigmoid", NN)], lambda f, x: f(3 * x)),
            lambda x: F.hardsigmoid(3 * x, inplace=True),
            *calls(named("hardsigmoid_", NN), lambda f, x: f(3 * x)),
        ],
    ),
    "weight_norm": (
        written_weight_norm,
        [(4, 5), (4, 1)],
        [
            *calls(named("_weight_norm"), lambda f, v, g: f(v, g, 0)),
            *calls(named("_weight_norm_interface"), lambda f, v, g: f(v, g, 0)[0]),
        ],
    ),
    "cdist": (
        written_distances,
        [(4, 5), (3, 5)],
        [
            lambda x, y: torch.cdist(x, y, 3.0),
            lambda x, y: torch.cdist(x1=x, x2=y, p=3.0),
            *calls(
                [torch._VF.cdist, aten.cdist, aten.cdist.default],
                lambda f, x, y: f(x, y, 3.0, None),
            ),
            lambda x, y: aten.cdist(x, y, 3.0, 2),
        ],
    ),
}
CALLS["attention"] = (
    lambda q, k, v: ((q @ k.mT) / 5**0.5).softmax(-1) @ v,
    [(2, 4, 5), (2, 3, 5), (2, 3, 5)],
    calls(
        [F.scaled_dot_product_attention, *named("scaled_dot_product_attention", NN)],
        lambda f, *xs: f(*xs),
    ),
)
EVERY = [(what, i) for what, (_, _, called) in CALLS.items() for i in range(len(called))]


def third(function: Function, xs: list[Tensor]) -> list[Tensor]:
    """The operation's value, and derivatives of orders one to three, of things not linear in it."""
    y = function(*xs)
    found, total = [y], (torch.linspace(-1, 2, y.numel()).double().view(y.shape) * y.sin()).sum()
    for order in range(3):
        grads = torch.autograd.grad(total, xs, create_graph=True, materialize_grads=True)
        found += grads
        total = sum(((order + 2) * g).cos().mul(1 + g).sum() for g in grads)
    return found


@pytest.mark.parametrize(("what", "i"), EVERY)
def test_every_name_of_an_operation_has_the_right_third_derivative(what: str, i: int) -> None:
    written, shapes, called = CALLS[what]
    xs = params(*shapes)
    with with_second_derivatives:
        got = third(called[i], xs)
    for a, b in zip(got, third(written, xs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


REFUSED = ["_batch_norm_impl_index", "_batch_norm_with_update", "_functional", "cudnn", "miopen"]


def test_the_calls_above_use_every_row_but_those_refused() -> None:
    used = set()

    class Noted(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            used.add(func)
            return func(*args, **(kwargs or {}))

    for _, shapes, called in CALLS.values():
        for call in called:
            with Noted():
                call(*params(*shapes))
    rest = {str(f) for f in REPLACEMENTS.keys() - used}
    assert {f for f in rest if not any(name in f for name in REFUSED)} <= {
        str(getattr(F, "linear_cross_entropy", None)),
        "aten._native_batch_norm_legit",
        "aten._native_batch_norm_legit.default",
    }


@pytest.mark.parametrize("batch_norm", named("_batch_norm_impl_index"))
def test_names_whose_results_nobody_can_tell_are_refused(batch_norm: Any) -> None:
    x, w, b = params(*CHANNELS)
    arguments = (None, None, True, 0.1, 1e-5, False)
    with with_second_derivatives:
        with pytest.raises(NotImplementedError, match="whose third derivative"):
            batch_norm(x, w, b, *arguments)
        with torch.no_grad():
            y = batch_norm(x, w, b, *arguments)[0]
    torch.testing.assert_close(y, written_batch_norm(x, w, b).detach())


def test_statistics_of_native_normalisations_have_derivatives() -> None:
    """PyTorch takes them for constants."""
    x, w, b = params(*LAYERS)
    with with_second_derivatives:
        _, mean, rate = torch.native_layer_norm(x, [5], w, b, 1e-5)
        _, channel_mean, channel_rate = torch.native_batch_norm(
            x, None, None, None, None, True, 0.1, 1e-5
        )
    parts = [mean.sin().sum() * 2, rate.sum(), channel_mean.cos().sum(), channel_rate.sum()]
    (got,) = torch.autograd.grad(sum(parts), x)

    def inverse(dims: tuple[int, ...]) -> Tensor:
        return (x.var(dims, unbiased=False) + 1e-5).rsqrt().sum()

    total = x.mean(2).sin().sum() * 2 + inverse((2,)) + x.mean((0, 2)).cos().sum() + inverse((0, 2))
    torch.testing.assert_close(got, torch.autograd.grad(total, x)[0])


def test_evaluation_and_results_written_elsewhere_are_pytorchs() -> None:
    x, w, b = params(*CHANNELS)
    statistics = torch.ones(3).double(), torch.full((3,), 2.0).double()
    arguments = (x, w, b, *statistics, False, 0.1, 1e-5)
    with with_second_derivatives:
        got = torch.native_batch_norm(*arguments)[0]
        out = torch.empty_like(x)
        with torch.no_grad():
            assert F.gelu(x, out=out) is out
    assert torch.equal(got, torch.native_batch_norm(*arguments)[0])
    assert torch.equal(out, F.gelu(x))


class Trap(Exception):
    pass


def test_what_a_python_function_of_pytorchs_calls_is_seen() -> None:
    def trapped(*args: Any, **kwargs: Any) -> Any:
        raise Trap

    x = torch.randn(4, 2, 6)
    attention = nn.MultiheadAttention(6, 2)
    with Routed({torch._C._nn.linear: trapped}), pytest.raises(Trap):
        attention(x, x, x)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return F.gelu(x - y).sum(-1)

    with Routed({F.gelu: trapped}), pytest.raises(Trap):
        F.triplet_margin_with_distance_loss(x, x, x, distance_function=distance)
    (leaf,) = params((3,))
    y = leaf.sin()
    y.register_hook(lambda g: F.gelu(g))
    with Routed({F.gelu: trapped}), pytest.raises(Trap):
        torch.autograd.grad(y.sum(), leaf)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2])),
        lambda x: F.multi_margin_loss(x, torch.tensor([0, 1, 2])),
        lambda x: F.max_pool1d(x[None], 2, return_indices=True)[0],
        lambda x: torch.einsum("ij,kj->ik", x, x),
        lambda x: x.unflatten(1, (2, 2)),
        lambda x: 2 - x,
        lambda x: 2 / x,
        lambda x: x.split(2)[0].norm(dim=0, keepdim=True),
        lambda x: torch.stft(x.flatten(), 4, window=torch.ones(4).double(), return_complex=True),
        lambda x: torch.nn.init.normal_(torch.zeros_like(x), generator=torch.Generator()) + x,
        lambda x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0],
        lambda x: F.embedding(torch.tensor([0, 2]), x, max_norm=None),
    ],
)
def test_python_functions_do_what_they_do_without_a_mode(function: Function) -> None:
    (x,) = params((3, 4))
    want = function(x)
    with with_second_derivatives:
        got = function(x)
        again = function(nn.Parameter(x.detach()))
    assert torch.equal(got, want)
    assert torch.equal(again, want)


def test_subclasses_of_tensors_are_asked_first() -> None:
    class Mine(Tensor):
        pass

    x = torch.randn(3, 4).as_subclass(Mine)
    with with_second_derivatives:
        y = F.cross_entropy(x, torch.tensor([0, 1, 2]))
        z = F.layer_norm(x, [4])
    assert type(y) is Mine
    assert type(z) is Mine


def test_other_modes_see_what_is_called() -> None:
    seen = []

    class Noted(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, w, b = params(*LAYERS)
    with with_second_derivatives, Noted():
        got = third(lambda *xs: torch.layer_norm(xs[0], [5], *xs[1:]), [x, w, b])
    assert torch.layer_norm in seen
    with Noted(), with_second_derivatives:
        again = third(lambda *xs: torch.layer_norm(xs[0], [5], *xs[1:]), [x, w, b])
    want = third(written_layer_norm, [x, w, b])
    for a, c, d in zip(got, again, want, strict=True):
        torch.testing.assert_close(a, d, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(c, d, rtol=1e-8, atol=1e-8)


def test_nothing_of_pytorchs_is_changed() -> None:
    """Another thread computes with PyTorch's own operations."""
    names = [(F, n) for n in ("gelu", "layer_norm", "batch_norm", "instance_norm", "hardsigmoid")]
    names += [(torch, n) for n in ("cdist", "_weight_norm", "layer_norm", "conv2d")]
    before = [getattr(*name) for name in names]
    elsewhere = []
    x = params((3, 4))[0]
    with with_second_derivatives:
        assert [getattr(*name) for name in names] == before
        ours = F.layer_norm(x, [4]).grad_fn
        thread = threading.Thread(target=lambda: elsewhere.append(F.layer_norm(x, [4]).grad_fn))
        thread.start()
        thread.join()
    assert type(elsewhere[0]).__name__ == "NativeLayerNormBackward0"
    assert type(ours).__name__ != "NativeLayerNormBackward0"


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(2)])
@pytest.mark.parametrize("norm", CALLS["layer_norm"][2][:5])
def test_a_gradient_penalty_through_any_name(norm: Function, adjoint: diffopt.Adjoint) -> None:
    """The meta-gradient of it is a third derivative."""
    (x,) = params((4, 3, 5))
    start = params((5,), (5,))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = (nn.Parameter(p.detach().clone()) for p in start)

        def forward(self, x: Tensor, norm: Function = norm) -> Tensor:
            y: Tensor = norm(x.tanh() * self.w, self.w, self.b).sin()
            return y

    def penalised(model: Any, x: Tensor, norm: Function) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = model(x, norm).square().sum()
            (g,) = torch.autograd.grad(y, x, create_graph=True)
        return y + g.square().sum()

    model = Model()
    inner = diffopt.SGD(model.parameters(), lr=0.003)
    fast = diffopt.unroll(
        model, inner, [x] * 2, lambda m, x: penalised(m, x, norm), adjoint=adjoint
    )
    got = torch.autograd.grad(fast(x).sum(), list(model.parameters()))

    plain = Model()
    values = list(plain.parameters())
    current = [v.clone() for v in values]
    for _ in range(2):

        def called(x: Tensor, norm: Function, current: list[Tensor] = current) -> Tensor:
            named = dict(zip("wb", current, strict=True))
            return torch.func.functional_call(plain, named, (x, norm))

        loss = penalised(called, x, written_layer_norm)
        grads = torch.autograd.grad(loss, current, create_graph=True)
        current = [v - 0.003 * g for v, g in zip(current, grads, strict=True)]
    outer = written_layer_norm(x.tanh() * current[0], *current).sin().sum()
    for a, b in zip(got, torch.autograd.grad(outer, values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@every_adjoint
@pytest.mark.parametrize("backends", [[FLASH, MATH], [MATH, EFFICIENT], MATH])
def test_attention_that_a_model_chooses_itself(backends: Any, adjoint: diffopt.Adjoint) -> None:
    """The ways but ``MATH`` have no second derivative."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 4).double()
    layer = nn.Linear(4, 12).double()
    params = list(layer.parameters())

    def loss_fn(m: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(*m(x).chunk(3, -1)).square().sum()

    fast = diffopt.unroll(layer, diffopt.SGD(params, lr=0.1), [x] * 2, loss_fn, adjoint=adjoint)
    got = torch.autograd.grad(loss_fn(fast, x), params)

    def written(w: Tensor, b: Tensor) -> Tensor:
        q, k, v = (x @ w.T + b).chunk(3, -1)
        return ((q @ k.mT / 2).softmax(-1) @ v).square().sum()

    values = list(params)
    for _ in range(2):
        grads = torch.autograd.grad(written(*values), values, create_graph=True)
        values = [p - 0.1 * g for p, g in zip(values, grads, strict=True)]
    for a, b in zip(got, torch.autograd.grad(written(*values), params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
