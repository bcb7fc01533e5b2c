"""Wrong arguments in every combination: each is one sentence, and the model is what it was.

Small by default; ``DIFFOPT_COMBINATIONS=1000`` for many.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import diffopt

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

COMBINATIONS = int(os.environ.get("DIFFOPT_COMBINATIONS", "40"))

#: Right and wrong values of each argument.
VALUES: dict[str, list[Any]] = {
    "steps": [2, 0, -1, True, 2.0, "2", {}, [], None, iter(())],
    "segment": [None, 1, 0, -3, 2.5, "k"],
    "adjoint": [None, diffopt.StoreAll(), diffopt.Segmented, "cpu", 3],
    "initial": [None, {}, {"weight": 3}, {"nothing": torch.ones(1)}, 3],
    "grad_transform": [None, lambda grads: grads, lambda grads: None, lambda grads: 3, 7],
    "max_cotangent_norm": [None, 1.0, 0, -1.0, float("nan"), "1", True],
    "verify": [False, True, None, 1],
    "tasks": [None, 0, -1, 2.5, True, "2"],
    "progress": [False, "yes"],
    "group": [None, 3, "world"],
}


@hypothesis.settings(
    max_examples=COMBINATIONS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(chosen=st.fixed_dictionaries({k: st.sampled_from(v) for k, v in VALUES.items()}))
def test_wrong_combinations(chosen: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    held = dict(model.named_parameters())
    options = {k: v for k, v in chosen.items() if k != "steps"}

    def loss(model: nn.Module, t: Any) -> torch.Tensor:
        return model(torch.ones(3, 2)).square().mean()

    opt = diffopt.SGD(model.parameters(), lr=0.1)
    refused = None
    try:
        fast = diffopt.unroll(model, opt, chosen["steps"], loss, **options)
        fast.params["weight"].sum().backward()
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        refused = str(error)
    if refused is None:
        assert chosen["steps"] in (2, 0, []) or isinstance(chosen["steps"], type(iter(())))
        assert model.weight.grad is not None
    else:
        assert len(refused) > 20
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(x is held[n] for n, x in model.named_parameters())
