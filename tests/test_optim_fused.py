"""Adam's update by one kernel: the same as by the rule's own arithmetic, and as PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.optim import fused

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.0, 0.5), "eps": 0.1, "lr": 1},
]


def _values(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    params = {"a": torch.randn(3, 40, dtype=dtype), "b": torch.randn(5, 1, dtype=dtype)}
    grads = [{n: torch.randn(x.T.shape, dtype=dtype).T for n, x in params.items()} for _ in "123"]
    return params, grads


def _taken(opt: diffopt.Adam, params: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> Any:
    state = opt.init(params)
    for each in grads:
        params, state = opt.update(params, each, state)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_kernel_agrees_with_the_rule_and_with_pytorch(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, grads = _values(dtype)
    before = {n: x.clone() for n, x in params.items()}
    opt = getattr(diffopt, name)(list(params.values()), **options)
    called = []
    kernel = fused.fused_adam(name == "AdamW")
    assert kernel is not None
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(
            fused,
            "fused_adam",
            lambda decoupled: lambda *a, **k: called.append(1) or kernel(*a, **k),
        )
        in_one = _taken(opt, params, grads)
    assert len(called) == 3
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "fused_adam", lambda decoupled: None)
        by_rule = _taken(opt, params, grads)
    assert all(torch.equal(x, before[n]) for n, x in params.items())  # written into nothing
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    )
    torch.testing.assert_close(in_one, by_rule, **tolerance)

    theirs = {n: torch.nn.Parameter(x.clone()) for n, x in params.items()}
    other = getattr(torch.optim, name)(theirs.values(), foreach=False, **options)
    for each in grads:
        for n, p in theirs.items():
            p.grad = each[n]
        other.step()
    torch.testing.assert_close(in_one[0], {n: p.detach() for n, p in theirs.items()}, **tolerance)


def test_where_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is recorded, mapped, or of another kind, the rule is its own arithmetic."""
    params, grads = _values(torch.float64)
    kernel = fused.fused_adam(False)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(fused, "fused_adam", lambda decoupled: refused)
    opt = diffopt.Adam(list(params.values()))
    learned = diffopt.Adam(list(params.values()), lr=torch.tensor(0.1, requires_grad=True))
    leaves = {n: x.clone().requires_grad_() for n, x in params.items()}
    strided = {n: x.T.contiguous().T for n, x in params.items()}
    half = {n: x.half() for n, x in params.items()}
    for rule, values in ((opt, leaves), (learned, params), (opt, strided), (opt, half)):
        each = {n: g.to(values[n].dtype) for n, g in grads[0].items()}
        new, _ = rule.update(values, each, rule.init(values))
        assert new["a"].shape == params["a"].shape
    torch.vmap(lambda x: opt.update({"a": x}, {"a": x}, opt.init({"a": x}))[0]["a"])(params["a"])
    assert kernel is not None
