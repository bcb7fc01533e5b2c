"""The settings that steps are computed under."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from adjoints import every_adjoint
from helpers import live_bytes, new_objects_only
from oracle import plain
from torch import Tensor, nn

import diffopt
from diffopt._loop.loop import Loop
from diffopt._values.state import State


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


def settings() -> list[object]:
    """Everything of the process that an unroll sets for a while."""
    hooks = torch.nn.modules.module.BackwardHook
    checkpoint = torch.utils.checkpoint
    return [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.allow_tf32,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        *(hooks, checkpoint._CheckpointFrame, checkpoint.CheckpointFunction),
        torch.Tensor.register_hook,
    ]


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 3, dtype=torch.double)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0]
            return out

    return Last()


def test_settings_are_put_back() -> None:
    before = settings()
    model, x = recurrent(), torch.ones(3, 2, dtype=torch.double)
    inside: list[list[object]] = []

    def loss_fn(model: Any, t: int) -> Tensor:
        inside.append(settings())
        if t == 3:
            raise KeyError("a loss that fails")
        out: Tensor = model(x).square().mean()
        return out

    inner = diffopt.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, inner, 3, loss_fn)
    assert settings() == before
    fast(x).sum().backward()
    assert settings() == before
    with pytest.raises(KeyError):
        diffopt.unroll(model, inner, 4, loss_fn)
    assert settings() == before
    assert len(inside) > 4
    assert all(now[:3] == [False, False, True] and now[4] is False for now in inside)


def test_settings_of_the_call_hold_on_the_way_back() -> None:
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    seen: list[tuple[torch.dtype, torch.device]] = []

    def loss_fn(model: Any, t: int) -> Tensor:
        seen.append((torch.zeros(1).dtype, torch.zeros(1).device))
        out: Tensor = model(x).square().mean()
        return out

    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=0.1), 4, loss_fn, segment=4)
    loss = fast(x).sum()
    torch.set_default_dtype(torch.double)
    try:
        with torch.device("meta"):
            loss.backward()
    finally:
        torch.set_default_dtype(torch.float)
    assert len(seen) > 4
    assert set(seen) == {(torch.float, torch.device("cpu"))}


@pytest.mark.parametrize("where", ["outside", "inside"])
@every_adjoint
def test_autocast(where: str, adjoint: diffopt.Adjoint) -> None:
    """The same numbers as a plain loop under autocast, of whose rounding both have their share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    casting = torch.autocast("cpu", dtype=torch.bfloat16)

    def loss_fn(model: Any, t: int) -> Tensor:
        with casting if where == "inside" else nullcontext():
            return F.mse_loss(model(x).float(), y)

    def outcome(train: Any) -> tuple[Tensor, ...]:
        with casting if where == "outside" else nullcontext():
            outer = loss_fn(train(), 0)
        return torch.autograd.grad(outer, list(model.parameters()))

    inner = diffopt.SGD(model.parameters(), lr=0.1)
    got = outcome(lambda: diffopt.unroll(model, inner, 5, loss_fn, adjoint=adjoint))
    want = outcome(lambda: plain(model, {"lr": 0.1}, 5, loss_fn))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.01 * w.abs().max().item())


def test_backward_in_another_thread_and_two_unrolls_at_once() -> None:
    before = settings()
    x = torch.linspace(-1, 1, 12, dtype=torch.double).reshape(6, 2)

    def gradient(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model = recurrent()
        inner = diffopt.SGD(model.parameters(), lr=0.1 * (seed + 1))
        fast = diffopt.unroll(model, inner, 6, lambda m, t: m(x).square().mean(), segment=2)
        return list(torch.autograd.grad(fast(x).sum(), list(model.parameters())))

    want = [gradient(seed) for seed in range(4)]
    models = []
    for seed in range(4):
        torch.manual_seed(seed)
        models.append(recurrent())
    inners = [diffopt.SGD(m.parameters(), lr=0.1 * (i + 1)) for i, m in enumerate(models)]

    def unrolled(i: int) -> Tensor:
        fast = diffopt.unroll(models[i], inners[i], 6, lambda m, t: m(x).square().mean(), segment=2)
        return fast(x).sum()

    with ThreadPoolExecutor(4) as pool:
        outers = list(pool.map(unrolled, range(4)))
        got = list(
            pool.map(
                lambda pair: torch.autograd.grad(pair[0], list(pair[1].parameters())),
                zip(reversed(outers), reversed(models), strict=True),
            )
        )
    assert settings() == before
    for found, wanted in zip(reversed(got), want, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_is_flat_without_gradients(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 20), nn.BatchNorm1d(20), nn.Dropout(0.1), nn.Linear(20, 1))
    x, held = torch.randn(8, 3), []

    def loss_fn(model: Any, t: int) -> Tensor:
        if t % 30 == 15:
            held.append(live_bytes())
        out: Tensor = model(x).square().mean()
        return out

    with new_objects_only(), mode():
        fast = diffopt.unroll(model, diffopt.Adam(model.parameters()), 300, loss_fn)
    assert len(held) == 10
    assert held[-1] - held[0] <= 270 * 8  # a loss is kept of each step
    assert fast.losses.shape == (300,)


def test_no_leaks_in_50_outer_iterations() -> None:
    """With layers that recompute themselves, hooks and buffers, and without a garbage collector."""
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    body[0].register_full_backward_hook(lambda module, inner, outer: None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = body, nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
            if hidden.requires_grad:
                hidden.register_hook(lambda g: 0.5 * g)
            out: Tensor = self.last(hidden)
            return out

    model, x = Model(), torch.randn(6, 3).requires_grad_()
    log_lr = torch.tensor(-2.0, requires_grad=True)
    outer_opt = torch.optim.SGD([*model.parameters(), log_lr], lr=1e-3)
    held = []
    with new_objects_only():
        for i in range(50):
            inner = diffopt.Momentum(model.parameters(), lr=lambda t: log_lr.exp())
            fast = diffopt.unroll(model, inner, [x] * 2, lambda m, x: m(x).square().mean())
            outer_opt.zero_grad()
            fast(x).square().mean().backward()
            outer_opt.step()
            if i in (4, 49):
                held.append(live_bytes())
                del inner, fast
    assert held[0] == held[1]


def test_compiling_is_back_after_two_threads_were_inside() -> None:
    """The stance of ``torch.compile`` is one for the process: the last to leave puts it back."""
    stance = torch._dynamo.eval_frame._stance.stance
    first_is_inside, first_may_leave = threading.Event(), threading.Event()
    second_is_inside, second_may_leave = threading.Event(), threading.Event()

    def unroll(inside: threading.Event, leave: threading.Event) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].compile(backend="eager")

        def loss_fn(m: Any, t: int) -> Tensor:
            inside.set()
            assert leave.wait(60)
            return m(torch.ones(1, 2)).sum()

        diffopt.unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, loss_fn)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(unroll, first_is_inside, first_may_leave)
        assert first_is_inside.wait(60)
        second = pool.submit(unroll, second_is_inside, second_may_leave)
        assert second_is_inside.wait(60)
        first_may_leave.set()
        first.result()
        second_may_leave.set()
        second.result()
    assert torch._dynamo.eval_frame._stance.stance == stance
