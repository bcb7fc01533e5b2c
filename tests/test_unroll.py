"""What ``unroll`` accepts and what it gives: steps, batches, losses, starts, random numbers."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import assert_all_close, batch, batches, mse, tiny
from oracle import plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import diffopt

T = 4


def sgd(model: nn.Module, lr: Any = 0.2, **options: Any) -> diffopt.SGD:
    return diffopt.SGD(model.parameters(), lr=lr, **options)


# Steps and batches.


class Indexable(Dataset[Any]):
    """Reads a batch from disk, so to speak, whenever it is asked for one."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, t: int) -> Any:
        x, y = self.data[t]
        return x.clone(), y.clone()


class Stream(IterableDataset[Any]):
    """Can only be iterated over, although it has a length and inherits an indexing operator."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def generated(data: list[Any]) -> Iterator[Any]:
    yield from data


KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "generator": generated,
    "iterator": iter,
    "indexable": Indexable,
    "stream": Stream,
    "loader": lambda data: DataLoader(
        TensorDataset(*(torch.cat(xs) for xs in zip(*data, strict=True))), batch_size=5
    ),
    "dict values": lambda data: dict(enumerate(data)).values(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind: str) -> None:
    model, data = tiny(), batches(T)
    want = torch.autograd.grad(
        plain(model, {"lr": 0.2}, data, mse).losses.sum(), list(model.parameters())
    )
    fast = diffopt.unroll(model, sgd(model), KINDS[kind](data), mse)
    got = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [list, deque])
def test_a_list_may_be_changed_before_the_backward_pass(kind: Callable[..., Any]) -> None:
    model, data = tiny(), batches(T)
    kept = kind(data)
    fast = diffopt.unroll(model, sgd(model), kept, mse)
    kept.reverse()
    kept.pop()
    got = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
    reference = plain(model, {"lr": 0.2}, data, mse).losses.sum()
    want = torch.autograd.grad(reference, list(model.parameters()))
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("count", [T, np.int64(T)], ids=["int", "numpy"])
def test_a_number_of_steps(count: Any) -> None:
    model, seen = tiny(), []

    def loss_fn(model: Any, t: int) -> Tensor:
        assert type(t) is int
        seen.append(t)
        return sum(p.square().sum() for p in model.parameters())

    fast = diffopt.unroll(model, sgd(model), count, loss_fn, segment=1)
    assert seen == [0, 1, 2, 3]
    assert (fast.step, fast.losses.shape) == (T, (T,))
    fast.losses.sum().backward()
    assert seen == [0, 1, 2, 3, 3, 2, 1, 0]


def test_numpy_batches() -> None:
    model, data = tiny(), np.random.default_rng(0).normal(size=(T, 5, 2))
    fast = diffopt.unroll(
        model, sgd(model), data, lambda m, x: m(torch.from_numpy(x)).square().mean()
    )
    fast.losses.sum().backward()
    assert model[0].weight.grad is not None


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).double()
        self.register_buffer("x", torch.ones(3, 2).double())

    def forward(self, pair: Any = None) -> Tensor:
        x, y = (self.x, self.x) if pair is None else pair
        return F.mse_loss(self.layer(x), y)


def test_a_model_that_returns_its_own_loss() -> None:
    model, data = OwnLoss(), batches(T)
    fast = diffopt.unroll(model, sgd(model), data)
    want = plain(model, {"lr": 0.2}, data, lambda m, pair: m(pair))
    torch.testing.assert_close(fast.losses, want.losses, rtol=1e-12, atol=0)
    fast = diffopt.unroll(model, sgd(model), T)
    want = plain(model, {"lr": 0.2}, T, lambda m, t: m())
    torch.testing.assert_close(fast.losses, want.losses, rtol=1e-12, atol=0)


class Output(dict):  # type: ignore[type-arg]
    """As the models of some libraries return it."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]  # type: ignore[no-any-return]


def test_forms_of_a_loss() -> None:
    model, pair = tiny(), batch()
    reference = diffopt.unroll(model, sgd(model), [pair] * 2, mse)
    forms: list[Callable[[Any, Any], Any]] = [
        lambda m, b: mse(m, b).reshape(1),
        lambda m, b: mse(m, b).reshape(1, 1),
        lambda m, b: (mse(m, b), "text"),
        lambda m, b: (mse(m, b), None),
        lambda m, b: Output(loss=mse(m, b)),
    ]
    for form in forms:
        fast = diffopt.unroll(model, sgd(model), [pair] * 2, form)
        assert torch.equal(fast.losses, reference.losses)
        fast.losses.sum().backward()


def test_aux_is_connected_and_the_callers_own() -> None:
    model, data = tiny(), batches(T)

    def loss_fn(model: Any, pair: Any) -> Any:
        out = model(pair[0])
        return F.mse_loss(out, pair[1]), {"out": [out], "weight": model[0].weight, "note": "x"}

    fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=1)
    assert len(fast.aux) == T
    assert fast.aux[0]["note"] == "x"
    assert all(x["out"][0].requires_grad and x["weight"].requires_grad for x in fast.aux)
    assert torch.equal(fast.aux[0]["weight"], model[0].weight)
    want = torch.autograd.grad(fast.losses.sum(), list(model.parameters()), retain_graph=True)
    for x in fast.aux:  # shares no memory with what the backward pass starts from
        x["weight"].detach().zero_()
    assert model[0].weight.any()
    got = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
    assert all(map(torch.equal, got, want))


# Zero steps, frozen parameters, missing gradients.


@every_adjoint
def test_zero_steps_are_the_start(adjoint: diffopt.Adjoint) -> None:
    model, pair = tiny(), batch()
    for steps in (0, []):
        fast = diffopt.unroll(model, diffopt.Adam(model.parameters()), steps, mse, adjoint=adjoint)
        assert (fast.step, fast.losses.shape, fast.aux) == (0, (0,), [])
        for name, p in model.named_parameters():
            assert torch.equal(fast.params[name], p)
            assert fast.params[name].data_ptr() != p.data_ptr()
        got = torch.autograd.grad(mse(fast, pair), list(model.parameters()), retain_graph=True)
        want = torch.autograd.grad(mse(model, pair), list(model.parameters()))
        assert all(map(torch.equal, got, want))
        (fast.losses.sum() + 0 * mse(fast, pair)).backward()


def test_frozen_parameters_stay_bit_for_bit() -> None:
    model, data = tiny(), batches(T)
    model[0].weight.requires_grad_(False)
    fast = diffopt.unroll(model, diffopt.AdamW(model.parameters(), weight_decay=0.5), data, mse)
    assert list(fast.params) == [name for name, _ in model.named_parameters()]
    assert fast.params["0.weight"] is model[0].weight
    assert "0.weight" not in fast.opt_state
    mse(fast, data[0]).backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    """No decay, no momentum, no count: as torch.optim does where ``.grad`` is None."""
    model, pair = tiny(), batch()
    opt = diffopt.AdamW(model.parameters(), weight_decay=0.5)
    fast = diffopt.unroll(model, opt, 3, lambda m, t: m[0](pair[0]).square().mean())
    for name in ("2.weight", "2.bias"):
        assert torch.equal(fast.params[name], dict(model.named_parameters())[name])
        assert fast.opt_state[name]["step"].item() == 0
        assert not fast.opt_state[name]["exp_avg"].any()
    assert fast.opt_state["0.weight"]["step"].item() == 3


def test_grad_transform_may_leave_parameters_alone() -> None:
    model, data = tiny(), batches(T)
    fast = diffopt.unroll(
        model,
        sgd(model),
        data,
        mse,
        grad_transform=lambda g: {"2.bias": g["2.bias"], "0.bias": None},
    )
    changed = {n for n, p in model.named_parameters() if not torch.equal(fast.params[n], p)}
    assert changed == {"2.bias"}


# Continuing.


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_three_steps_and_three_more_are_six(name: str) -> None:
    model, data, query = tiny(), batches(6), batch()
    log_lr = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def opt() -> diffopt.Optimizer:
        made: diffopt.Optimizer = getattr(diffopt, name)(
            model.parameters(), lr=lambda t: log_lr.exp() / (1 + t)
        )
        return made

    inputs = [log_lr, *model.parameters()]
    whole = diffopt.unroll(model, opt(), data, mse)
    half = diffopt.unroll(model, opt(), data[:3], mse)
    rest = diffopt.unroll(model, opt(), data[3:], mse, initial=half)
    assert (half.step, rest.step, len(rest.losses)) == (3, 6, 3)
    got = torch.autograd.grad(mse(rest, query) + half.losses.sum() + rest.losses.sum(), inputs)
    want = torch.autograd.grad(mse(whole, query) + whole.losses.sum(), inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-14)

    cut = diffopt.unroll(model, opt(), data[3:], mse, initial=half.detach())
    torch.testing.assert_close(cut.params, rest.params, rtol=0, atol=0)
    assert torch.autograd.grad(mse(cut, query), inputs, allow_unused=True)[1:] == (None,) * 4


def test_step_numbers_go_on() -> None:
    model, seen = tiny(), []

    def loss_fn(model: Any, t: int) -> Tensor:
        seen.append(t)
        return model[0].weight.square().sum()

    half = diffopt.unroll(model, sgd(model), 2, loss_fn)
    diffopt.unroll(model, sgd(model), 2, loss_fn, initial=half)
    assert seen == [0, 1, 2, 3]


def test_the_optimizer_state_of_initial_wins() -> None:
    model, data = tiny(), batches(4)
    opt = torch.optim.Adam(model.parameters())
    mse(model, data[0]).backward()
    opt.step()
    half = diffopt.unroll(model, diffopt.Adam(model.parameters()), data[:2], mse)
    rest = diffopt.unroll(model, opt, data[2:], mse, initial=half)
    want = diffopt.unroll(model, diffopt.Adam(model.parameters()), data, mse)
    assert rest.opt_state["0.weight"]["step"].item() == 4
    torch.testing.assert_close(rest.params, want.params)


# Gradient mode.


def test_under_no_grad_nothing_is_kept() -> None:
    model, data = tiny(), batches(T)
    want = diffopt.unroll(model, sgd(model), data, mse)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fast = diffopt.unroll(model, sgd(model), data, mse)
            held = [*fast.params.values(), *fast.buffers.values(), fast.losses, mse(fast, data[0])]
        assert not any(x.requires_grad for x in held)
        assert torch.equal(fast.losses, want.losses)
    fast = want
    with torch.no_grad():
        assert not mse(fast, data[0]).requires_grad


def test_a_loss_that_disables_gradients_in_part() -> None:
    model, pair = tiny(), batch()

    def loss_fn(model: Any, t: int) -> Tensor:
        with torch.no_grad():
            target = model(pair[0]) * 0.5
        return F.mse_loss(model(pair[0]), target)

    fast = diffopt.unroll(model, sgd(model), T, loss_fn)
    want = plain(model, {"lr": 0.2}, T, loss_fn)
    got = torch.autograd.grad(mse(fast, pair), list(model.parameters()))
    assert_all_close(
        got, torch.autograd.grad(mse(want, pair), list(model.parameters())), 1e-10, 1e-13
    )


# Random numbers.


class Noisy(nn.Module):
    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(2, 40).double(), nn.Linear(40, 2).double()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.layer(x), 0.5)
        return self.out(hidden + torch.randn(40, generator=self.generator).double())


@every_adjoint
def test_masks_are_drawn_again_and_the_generator_is_where_a_plain_loop_leaves_it(
    adjoint: diffopt.Adjoint,
) -> None:
    model, data = Noisy(), batches(T)
    inputs = list(model.parameters())
    torch.manual_seed(3)
    reference = plain(model, {"lr": 0.1}, data, mse)
    after = torch.get_rng_state()
    want = torch.autograd.grad(reference.losses.sum(), inputs)

    torch.manual_seed(3)
    fast = diffopt.unroll(model, sgd(model, lr=0.1), data, mse, adjoint=adjoint)
    assert torch.equal(torch.get_rng_state(), after)
    torch.rand(7)  # the caller goes on drawing
    before_backward = torch.get_rng_state()
    got = torch.autograd.grad(fast.losses.sum(), inputs, create_graph=True)
    assert torch.equal(torch.get_rng_state(), before_backward)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    got = torch.autograd.grad(fast.losses.sum(), inputs)
    assert torch.equal(torch.get_rng_state(), before_backward)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)


@every_adjoint
def test_a_generator_in_the_batch(adjoint: diffopt.Adjoint) -> None:
    model, x = tiny(), torch.randn(5, 2).double()
    generator = torch.Generator()

    def loss_fn(model: Any, item: Any) -> Tensor:
        noise = torch.randn(5, 2, generator=item["generator"]).double()
        return F.mse_loss(model(x + noise), x)

    data = [{"generator": generator}] * T
    inputs = list(model.parameters())
    generator.manual_seed(1)
    reference = plain(model, {"lr": 0.1}, data, loss_fn)
    after = generator.get_state()
    generator.manual_seed(1)
    fast = diffopt.unroll(model, sgd(model, lr=0.1), data, loss_fn, adjoint=adjoint)
    assert torch.equal(generator.get_state(), after)
    got = torch.autograd.grad(fast.losses.sum(), inputs)
    assert torch.equal(generator.get_state(), after)
    assert_all_close(got, torch.autograd.grad(reference.losses.sum(), inputs), 1e-10, 1e-13)


# The way back sees what the call saw.


@every_adjoint
def test_the_models_mode_and_attributes_are_those_of_the_call(adjoint: diffopt.Adjoint) -> None:
    model = nn.Sequential(nn.Linear(2, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    model.scale = 1.5  # type: ignore[assignment]
    data, inputs = batches(T), list(model.parameters())

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return mse(model, pair) * model.scale

    def gradient(change: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        fast = diffopt.unroll(model, sgd(model), data, loss_fn, adjoint=adjoint)
        handle = None
        if change:
            model.eval()
            model.scale, model.more = 20.0, nn.Linear(1, 1)  # type: ignore[assignment]
            handle = model[0].register_forward_hook(lambda module, args, out: out * 0)
        found = torch.autograd.grad(fast.losses.sum(), inputs)
        if handle is not None:
            handle.remove()
            assert not model.training
            assert (model.scale, len(model)) == (20.0, 4)
        return found

    want = gradient(change=False)
    assert all(map(torch.equal, gradient(change=True), want))


def test_calling_the_result_uses_the_present_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 40), nn.Dropout(0.5)).double()
    fast = diffopt.unroll(model, sgd(model), 0, mse)
    x = torch.ones(1, 2).double()
    assert not torch.equal(fast(x), fast(x))
    model.eval()
    assert torch.equal(fast(x), fast(x))


def test_autocast_of_the_call_holds_on_the_way_back() -> None:
    model, data = tiny().float(), [(x.float(), y.float()) for x, y in batches(T)]
    seen = []

    def loss_fn(model: Any, pair: Any) -> Tensor:
        out = model(pair[0])
        seen.append(out.dtype)
        return F.mse_loss(out.float(), pair[1])

    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=1)
    fast.losses.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=1)
        fast.losses.sum().backward()
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast.losses.sum().backward()
    assert set(seen) == {torch.float32}


# Arguments that change the computation.


def test_clipping_by_grad_transform_is_torchs_clipping() -> None:
    model, data = tiny(), batches(T)

    def clip(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads.values()]))
        return {name: g * (0.1 / (norm + 1e-6)).clamp(max=1) for name, g in grads.items()}

    fast = diffopt.unroll(model, sgd(model), data, mse, grad_transform=clip)
    opt = torch.optim.SGD(model.parameters(), lr=0.2)
    for pair in data:
        opt.zero_grad()
        mse(model, pair).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(fast.params[name], p, rtol=1e-9, atol=0)


def test_an_infinite_bound_is_none() -> None:
    model, data = tiny(), batches(T)
    grads = []
    for bound in (None, float("inf"), np.float32(1e30)):
        fast = diffopt.unroll(model, sgd(model), data, mse, max_cotangent_norm=bound)
        grads.append(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))
    assert_all_close(grads[1], grads[0], 0, 0)
    assert_all_close(grads[2], grads[0], 1e-12, 0)


def test_max_cotangent_norm_is_a_bound() -> None:
    """With no curvature the cotangent is what comes back: 100 per weight, bounded to 1 in all."""
    model = nn.Linear(4, 1, bias=False).double()
    fast = diffopt.unroll(model, sgd(model), T, lambda m, t: m.weight.sum(), max_cotangent_norm=1.0)
    (100 * fast.params["weight"].sum()).backward()
    torch.testing.assert_close(model.weight.grad, torch.full((1, 4), 0.5).double())


def test_progress_bars(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model, data = tiny(), batches(T)
    fast = diffopt.unroll(model, sgd(model), data, mse, progress=True)
    fast.losses.sum().backward()
    shown = capsys.readouterr().err
    assert "unroll, forward" in shown
    assert "unroll, backward" in shown
    assert f"/{T}" in shown
    diffopt.unroll(model, sgd(model), data, mse).losses.sum().backward()
    assert capsys.readouterr().err == ""

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm.*pip install tqdm"):
        diffopt.unroll(model, sgd(model), data, mse, progress=True)
    diffopt.unroll(model, sgd(model), data, mse)


def test_no_warnings_of_its_own() -> None:
    model, data = tiny(), batches(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffopt.unroll(model, sgd(model), data, mse).losses.sum().backward()
