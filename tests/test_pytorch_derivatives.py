"""PyTorch's own derivatives of what diffopt replaces or refuses, against finite differences.

The table says of each version what is right. A PyTorch that mends a derivative, or breaks one,
fails here: then a row of ``diffopt/_derivatives`` is to be dropped or added for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffopt._derivatives import table
from diffopt._derivatives.missing import WRONG, WRONG_BEYOND

aten = torch.ops.aten
VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

#: What a derivative may be: as the finite differences say; another number; an error; or taken for
#: zero, since what it is to be taken of requires no grad.
RIGHT, WRONG_NUMBER, MISSING, ZERO = "right", "wrong", "missing", "taken for zero"

#: A verdict on every version, or the verdicts from a version on, the oldest first.
Verdicts = str | dict[tuple[int, int], str]

MENDED_IN_2_14: Verdicts = {(2, 9): MISSING, (2, 14): RIGHT}
REFUSED_SINCE_2_14: Verdicts = {(2, 9): WRONG_NUMBER, (2, 14): MISSING}


@dataclass(frozen=True)
class Own:
    """An operation of PyTorch's.

    Attributes:
        names: the rows of ``table`` that are of it.
        call: of tensors of ``shapes``.
        second, third: what PyTorch's derivatives of these orders are. The first is right.
        since: the version that it is new in.
    """

    names: tuple[str, ...]
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    second: Verdicts
    third: Verdicts
    since: tuple[int, int] = (2, 9)

    def expected(self, order: int) -> str:
        verdicts = self.second if order == 2 else self.third
        if isinstance(verdicts, str):
            return verdicts
        return [verdict for since, verdict in verdicts.items() if since <= VERSION][-1]


def statistics() -> tuple[Tensor, Tensor]:
    return torch.linspace(-0.5, 0.5, 3), torch.linspace(1, 2, 3)


def linear_cross_entropy(x: Tensor, w: Tensor) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    return F.linear_cross_entropy(  # type: ignore[attr-defined]
        x, w, torch.tensor([0, 1, 2, 3]), options=LinearCrossEntropyOptions()
    )


def attention(*backends: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def batch_norms(*names: str) -> Callable[..., Tensor]:
    """The mean of these names' results, all of one signature."""

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        rest = [True, 0.1, 1e-5]
        return sum(getattr(aten, n)(x, w, b, *statistics(), *rest)[0] for n in names)

    return call


ROWS, ROWS_3 = ((4, 3), (3,), (3,)), ((2, 3, 4), (3,), (3,))
PAIRS = ((4, 3), (5, 3))
HEADS = ((1, 2, 4, 8),) * 3
NORMS_BY_NAME = ("native_batch_norm", "_native_batch_norm_legit")
REFUSED_BY_NAME = ("_native_batch_norm_legit_functional",)

OPERATIONS: dict[str, Own] = {
    "batch_norm": Own(
        ("batch_norm",),
        lambda x, w, b: F.batch_norm(x, *statistics(), w, b, training=True),
        ROWS,
        RIGHT,
        REFUSED_SINCE_2_14,
    ),
    "batch_norm in evaluation": Own(
        ("batch_norm",),
        lambda x, w, b: F.batch_norm(x, *statistics(), w, b).sin(),
        ROWS,
        RIGHT,
        RIGHT,
    ),
    "batch_norm by its other names": Own(
        NORMS_BY_NAME, batch_norms(*NORMS_BY_NAME), ROWS, RIGHT, REFUSED_SINCE_2_14
    ),
    "batch_norm by names that are refused": Own(
        REFUSED_BY_NAME, batch_norms(*REFUSED_BY_NAME), ROWS, RIGHT, REFUSED_SINCE_2_14
    ),
    "batch_norm's implementation": Own(
        ("_batch_norm_impl_index",),
        lambda x, w, b: aten._batch_norm_impl_index(x, w, b, *statistics(), True, 0.1, 1e-5, False)[
            0
        ],
        ROWS,
        RIGHT,
        REFUSED_SINCE_2_14,
    ),
    "batch_norm with update": Own(
        ("_batch_norm_with_update",),
        lambda x, w, b: aten._batch_norm_with_update(x, w, b, *statistics(), 0.1, 1e-5)[0],
        ROWS,
        RIGHT,
        REFUSED_SINCE_2_14,
    ),
    "instance_norm": Own(
        ("instance_norm",),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        ROWS_3,
        RIGHT,
        REFUSED_SINCE_2_14,
    ),
    "layer_norm": Own(
        ("layer_norm",),
        lambda x, w, b: F.layer_norm(x, [3], w, b),
        ROWS,
        RIGHT,
        WRONG_NUMBER,
    ),
    "native_layer_norm": Own(
        ("native_layer_norm",),
        lambda x, w, b: torch.native_layer_norm(x, [3], w, b, 1e-5)[0],
        ROWS,
        RIGHT,
        WRONG_NUMBER,
    ),
    "gelu": Own(("gelu",), F.gelu, ((5,),), RIGHT, RIGHT),
    "gelu by tanh": Own(("gelu",), lambda x: F.gelu(x, approximate="tanh"), ((5,),), RIGHT, RIGHT),
    "hardsigmoid": Own(
        ("hardsigmoid", "hardsigmoid_"),
        lambda x: F.hardsigmoid(x) + F.hardsigmoid(x + 0, inplace=True),
        ((5,),),
        MISSING,
        MISSING,
    ),
    "linear_cross_entropy": Own(
        ("linear_cross_entropy",), linear_cross_entropy, PAIRS, ZERO, ZERO, since=(2, 13)
    ),
    "weight_norm": Own(
        ("_weight_norm", "_weight_norm_interface"),
        lambda v, g: torch._weight_norm(v, g, 0) + torch._weight_norm_interface(v, g, 0)[0],
        ((3, 4), (3, 1)),
        WRONG_NUMBER,
        WRONG_NUMBER,
    ),
    "cdist": Own(("cdist",), torch.cdist, PAIRS, MENDED_IN_2_14, MENDED_IN_2_14),
    "cdist of cubes": Own(
        ("cdist",), lambda a, b: torch.cdist(a, b, 3.0), PAIRS, MENDED_IN_2_14, MENDED_IN_2_14
    ),
    "cdist by a product": Own(
        ("cdist",),
        lambda a, b: torch.cdist(a, b, 2.0, "use_mm_for_euclid_dist"),
        PAIRS,
        RIGHT,
        RIGHT,
    ),
    "attention": Own(
        ("scaled_dot_product_attention",), F.scaled_dot_product_attention, HEADS, MISSING, MISSING
    ),
    "attention by its math kernel": Own(
        ("scaled_dot_product_attention",), attention(SDPBackend.MATH), HEADS, RIGHT, RIGHT
    ),
}

#: Of other devices.
ELSEWHERE = {"cudnn_batch_norm", "miopen_batch_norm"}


@pytest.fixture(autouse=True)
def _in_float64() -> None:
    torch.set_default_dtype(torch.float64)


def weighted(values: tuple[Tensor, ...]) -> Tensor:
    """A sum with weights that are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in values)


def derivative(call: Callable[..., Any], order: int, xs: list[Tensor]) -> Tensor:
    """A weighted sum of the derivatives of an order, in which no weight is zero."""
    value = weighted((call(*xs),))
    for _ in range(order):
        if not value.requires_grad:
            break
        grads = torch.autograd.grad(
            value, xs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        value = weighted(grads)
    return value


def verdict(own: Own, order: int) -> str:
    """What PyTorch's derivative of an order is, in a random direction."""
    generator = torch.Generator().manual_seed(0)
    at = [torch.randn(s, generator=generator) for s in own.shapes]
    direction = [torch.randn(s, generator=generator) for s in own.shapes]

    def below(k: float) -> tuple[Tensor, list[Tensor]]:
        xs = [(x + k * u).requires_grad_() for x, u in zip(at, direction, strict=True)]
        return derivative(own.call, order - 1, xs), xs

    try:
        value, xs = below(0.0)
        if not value.requires_grad:
            return ZERO
        grads = torch.autograd.grad(value, xs, materialize_grads=True, allow_unused=True)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("not implemented", "does not support")):
            raise
        return MISSING
    found = sum(float((g * u).sum().detach()) for g, u in zip(grads, direction, strict=True))
    h = 1e-4
    f = {k: float(below(k * h)[0].detach()) for k in (-2, -1, 1, 2)}
    slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    error = abs(found - slope) / abs(slope)
    assert error < 1e-6 or error > 1e-2, (found, slope)
    return RIGHT if error < 1e-6 else WRONG_NUMBER


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pytorchs_own(name: str, order: int) -> None:
    own = OPERATIONS[name]
    if own.since > VERSION:
        pytest.skip("not in this version")
    expected = RIGHT if order == 1 else own.expected(order)
    found = verdict(own, order)
    assert found == expected, (
        f"PyTorch {torch.__version__}'s own derivative of order {order} of {name} is {found}, and "
        f"was {expected}: look at diffopt/_derivatives, and say so here"
    )


def test_the_table_above_has_every_operation() -> None:
    named = {name for own in OPERATIONS.values() for name in own.names}
    replaced = table._IN_PYTHON.keys() | table._IN_ATEN.keys() | table._REFUSED.keys()
    assert named == replaced - ELSEWHERE
    refused = {*WRONG.values(), *WRONG_BEYOND.values()}
    assert {text.split()[-1].removeprefix("torch.") for text in refused} <= named
