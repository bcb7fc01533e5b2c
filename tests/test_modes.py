"""The settings that steps are computed under."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt._loop import Loop
from diffopt._state import State


def test_steps_computed_again_keep_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)
    connected: list[bool] = []
    again = Loop.again

    def noted(self: Loop, state: State, t: int) -> State:
        after = again(self, state, t)
        connected.append(any(v.requires_grad for v in after.tensors().values()))
        return after

    monkeypatch.setattr(Loop, "again", noted)
    opt = diffopt.SGD(model.parameters())
    fast = diffopt.unroll(model, opt, [x] * 6, lambda model, x: model(x).mean(), segment=3)
    fast(x).sum().backward()
    assert connected
    assert not any(connected)


def test_inference_mode_is_left_as_it_was() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x).square().mean()
        return out

    opt = diffopt.SGD(model.parameters(), lr=0.1)
    expected = diffopt.unroll(model, opt, [x] * 2, loss_fn).losses
    with torch.inference_mode():
        fast = diffopt.unroll(model, opt, [x] * 2, loss_fn)
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert torch.equal(fast.losses, expected)
    assert not fast.losses.requires_grad
