"""Batches that are no plain pytrees: what is in them is seen, or refused by name."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_all_close, batches, mse, tiny
from torch import Tensor

import diffopt


class Encoding(UserDict[str, Any]):
    """As a tokenizer of Hugging Face gives: a mapping with attributes of its own."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class WithLoss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.net(input_ids)
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def test_an_encoding_is_split_into_encodings() -> None:
    model, data = WithLoss(), batches(3)
    encodings = [Encoding(input_ids=x, labels=y) for x, y in data]

    def loss_fn(model: Any, given: Any) -> Tensor:
        assert type(given) is Encoding
        loss: Tensor = model(given.input_ids, given.labels)["loss"]
        return loss

    params, found = list(model.parameters()), []
    for how in ({}, {"microbatches": 2}, {"microbatches": 2, "loss_fn": loss_fn}):
        inner = diffopt.Adam(params, lr=0.1)
        fast = diffopt.unroll(model, inner, encodings, **how)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(fast.losses.sum(), params))
    for other in found[1:]:
        assert_all_close(other, found[0], rtol=1e-10, atol=1e-12)
    assert set(encodings[0]) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"microbatches": 2}, r"microbatches=2 splits .* step 0, but it is a SimpleNamespace or"),
        ({"tasks": 5}, r"tasks=5 .* the batch of step 0 is a SimpleNamespace or holds one"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "beside"])
def test_tensors_that_no_pytree_shows(how: dict[str, Any], message: str, whole: bool) -> None:
    """They would be given to every part, and to every task, as they are."""
    model, (x, y) = tiny(), batches(1)[0]
    holder = SimpleNamespace(x=x, y=y)

    def loss_fn(model: Any, given: Any) -> Tensor:
        given = given if whole else given[1]
        return mse(model, (given.x, given.y))

    with pytest.raises(TypeError, match=message):
        diffopt.unroll(
            model,
            diffopt.SGD(model.parameters(), lr=0.1),
            [holder if whole else (x, holder)],
            loss_fn,
            **how,
        )
    diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=0.1), [(x, holder)], lambda m, b: m(b[0]).sum()
    )
