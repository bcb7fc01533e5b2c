"""The result: called like the model, written back into it, saved, cut and continued."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close, batch, batches, mse, tiny
from oracle import plain
from torch import Tensor, nn

import diffopt

T = 4


def adam(model: nn.Module) -> diffopt.Adam:
    return diffopt.Adam(model.parameters(), lr=0.1)


def with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()


# Calling it.


def test_is_called_like_the_model() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.head(self.encoder(x)) * scale

    model, data, x = Two(), batches(T), batch()[0]
    fast = diffopt.unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), data, mse)
    after = copy.deepcopy(model)
    opt = torch.optim.SGD(after.parameters(), lr=0.1)
    for pair in data:
        opt.zero_grad()
        mse(after, pair).backward()
        opt.step()
    torch.testing.assert_close(fast(x), after(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(fast(x, scale=3.0), after(x, scale=3.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        fast.apply(lambda m, x: m.encoder(x), x), after.encoder(x), rtol=1e-12, atol=0
    )
    assert fast.apply(lambda m: m) is model
    assert fast.apply(lambda m, a, *, b: (a, b), 1, b=2) == (1, 2)
    names = fast.apply(lambda m: [name for name, _ in m.named_parameters()])
    assert names == [name for name, _ in model.named_parameters()]
    assert fast.apply(lambda m: m.head.bias) is fast.params["head.bias"]


def test_calls_do_not_advance_the_buffers() -> None:
    model, data, x = with_norm(), batches(T), batch()[0]
    fast = diffopt.unroll(model, adam(model), data, mse)
    held = {name: x.clone() for name, x in fast.buffers.items()}
    own = {name: x.clone() for name, x in model.named_buffers()}
    assert held["1.num_batches_tracked"].item() == T
    first, second = fast(x), fast(x)
    assert torch.equal(first, second)
    fast.apply(lambda m: m(x).sum()).backward()
    assert all(torch.equal(fast.buffers[name], y) for name, y in held.items())
    assert all(torch.equal(y, own[name]) for name, y in model.named_buffers())
    model.eval()
    expected = F.batch_norm(
        F.linear(x, fast.params["0.weight"], fast.params["0.bias"]),
        fast.buffers["1.running_mean"],
        fast.buffers["1.running_var"],
        fast.params["1.weight"],
        fast.params["1.bias"],
    )
    torch.testing.assert_close(fast.apply(lambda m, x: m[1](m[0](x)), x), expected)


def test_two_results_of_one_model() -> None:
    model, data, pair = tiny(), batches(T), batch()
    one = diffopt.unroll(model, adam(model), data, mse)
    two = diffopt.unroll(model, adam(model), data[:1], mse)
    nested = one.apply(lambda m: two(pair[0]) + m(pair[0]))
    torch.testing.assert_close(nested, two(pair[0]) + one(pair[0]))
    inputs = list(model.parameters())
    got = torch.autograd.grad(F.mse_loss(nested, pair[1]), inputs, retain_graph=True)
    want = torch.autograd.grad(F.mse_loss(two(pair[0]) + one(pair[0]), pair[1]), inputs)
    assert_all_close(got, want, rtol=1e-12, atol=1e-14)


def test_repr() -> None:
    model = tiny()
    fast = diffopt.unroll(model, adam(model), batches(3), mse)
    assert repr(fast) == "Unrolled(Sequential, step=3, 4 parameters, 3 losses)"


# Writing back.


def test_load_into_writes_in_place() -> None:
    model, data = with_norm(), batches(T)
    fast = diffopt.unroll(model, adam(model), data, mse)
    held = [*model.parameters(), *model.buffers()]
    fast.load_into(model)
    assert all(x is y for x, y in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(x, {**fast.params, **fast.buffers}[name])
        assert x.requires_grad == isinstance(x, nn.Parameter)
    with torch.no_grad():
        model[0].weight.zero_()
    assert fast.params["0.weight"].any()


def test_load_into_another_dtype() -> None:
    model = tiny()
    fast = diffopt.unroll(model, adam(model), batches(T), mse)
    other = tiny().float()
    fast.load_into(other)
    assert other[0].weight.dtype == torch.float32
    torch.testing.assert_close(other[0].weight, fast.params["0.weight"].float())


def test_load_into_is_all_or_nothing() -> None:
    model = with_norm()
    fast = diffopt.unroll(model, adam(model), batches(T), mse)

    class Fewer(nn.Sequential):
        pass

    no_buffers = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Tanh(), nn.Linear(3, 2)
    )
    wider = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 7))
    shorter = Fewer(nn.Linear(2, 3))
    other = with_norm()
    momentum = torch.optim.SGD(other.parameters(), lr=0.1)
    for target, opt, message in (
        (no_buffers, None, r"the model has no buffer '1.running_mean'"),
        (wider, None, r"parameter '3.weight' has shape \(2, 3\) here and \(7, 3\) in the model"),
        (shorter, None, r"the model has no parameter '1.weight'"),
        (other, adam(with_norm()), r"opt does not hold the model's parameter '0.weight'"),
        (other, torch.optim.SGD(other[0].parameters()), r"does not hold .* '1.weight'"),
        (other, torch.optim.RMSprop(other.parameters()), r"RMSprop also needs \['square_avg'\]"),
        (
            other,
            torch.optim.Adam(other.parameters(), amsgrad=True),
            r"holds \['exp_avg', 'exp_avg_sq', 'step'\], and Adam also needs \['max_exp_avg_sq'\]",
        ),
    ):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=message):
            fast.load_into(target, opt)
        assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
        assert opt is None or not opt.state
    assert not momentum.state


def test_load_into_an_optimizer_with_schedules() -> None:
    model, data, rates = tiny(), batches(2 * T), [0.3 / (t + 1) for t in range(2 * T)]
    fast = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=lambda t: rates[t]), data[:T], mse
    )
    want = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=lambda t: rates[t]), data, mse)
    opt = diffopt.SGD(model.parameters(), lr=lambda t: rates[t])
    fast.load_into(model, opt)
    for pair in data[T:]:
        opt.zero_grad()
        mse(model, pair).backward()
        opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, want.params[name], rtol=1e-12, atol=1e-14)


def test_load_into_copies() -> None:
    """Going on with the optimizer changes nothing in the result."""
    model, data = tiny(), batches(T)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, data, mse).detach()
    before = {n: {k: x.clone() for k, x in s.items()} for n, s in fast.opt_state.items()}
    fast.load_into(model, opt)
    mse(model, data[0]).backward()
    opt.step()
    for name, entries in before.items():
        for key, x in entries.items():
            assert torch.equal(fast.opt_state[name][key], x)


# Cutting and saving.


def test_detach() -> None:
    model, data = with_norm(), batches(T)
    fast = diffopt.unroll(model, adam(model), data, mse)
    cut = fast.detach()
    assert cut is not fast
    assert type(cut) is diffopt.Unrolled
    for part in ("params", "buffers"):
        for name, x in getattr(cut, part).items():
            assert not x.requires_grad
            assert torch.equal(x, getattr(fast, part)[name])
    for name, entries in cut.opt_state.items():
        for key, x in entries.items():
            assert not x.requires_grad
            assert torch.equal(x, fast.opt_state[name][key])
    assert not cut.losses.requires_grad
    assert (cut.step, cut.aux) == (fast.step, fast.aux)
    assert fast.losses.requires_grad
    assert not cut(data[0][0]).requires_grad
    fast.losses.sum().backward()


SCRIPT = """
import sys
import torch
import diffopt

def build():
    layers = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    return torch.nn.Sequential(*layers).double()

def loss_fn(model, pair):
    return torch.nn.functional.mse_loss(model(pair[0]), pair[1])

if __name__ == "__main__":
    model, data = build(), torch.load(sys.argv[1])["data"]
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, 0, loss_fn)
    fast.load_state_dict(torch.load(sys.argv[1])["fast"])
    assert fast.step == 4 and len(fast.losses) == 4, fast
    rest = diffopt.unroll(model, opt, data, loss_fn, initial=fast)
    torch.save(rest.state_dict(), sys.argv[2])
"""


def test_saved_in_one_process_and_continued_in_another(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"__name__": "script"}
    exec(SCRIPT, scope)
    model, data = scope["build"](), batches(6)
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, opt, data[:4], scope["loss_fn"])
    torch.save({"fast": fast.state_dict(), "data": data[4:]}, tmp_path / "saved.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "saved.pt", "out.pt"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)

    got = torch.load(tmp_path / "out.pt")
    whole = diffopt.unroll(model, opt, data, scope["loss_fn"]).state_dict()
    assert got["step"] == 6
    for part in ("params", "buffers"):
        torch.testing.assert_close(got[part], whole[part], rtol=1e-12, atol=1e-14)
    for name, entries in whole["opt_state"].items():
        torch.testing.assert_close(got["opt_state"][name], entries, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got["losses"], whole["losses"][4:], rtol=1e-12, atol=0)


def test_a_state_dict_holds_tensors_without_a_graph_and_a_number() -> None:
    model = tiny()
    fast = diffopt.unroll(model, adam(model), batches(T), lambda m, b: (mse(m, b), object()))
    saved = fast.state_dict()
    assert type(saved["step"]) is int
    assert "aux" not in saved
    tensors = [x for x in torch.utils._pytree.tree_leaves(saved) if isinstance(x, Tensor)]
    assert len(tensors) == 4 + 4 * 3 + 1 + len(saved["generators"])
    assert not any(x.requires_grad for x in tensors)


def test_load_state_dict_copies_and_has_no_graph() -> None:
    model, data = tiny(), batches(T)
    saved = diffopt.unroll(model, adam(model), data, mse).state_dict()
    other = tiny().float()
    fast = diffopt.unroll(other, adam(other), 0)
    fast.load_state_dict(saved)
    assert fast.params["0.weight"].dtype == torch.float32
    assert not fast.params["0.weight"].requires_grad
    fast.params["0.bias"].zero_()
    assert saved["params"]["0.bias"].any()
    x = data[0][0].float()
    torch.testing.assert_close(
        fast.apply(lambda m: m[0].weight), saved["params"]["0.weight"].float()
    )
    assert not fast(x).requires_grad


def test_load_state_dict_is_all_or_nothing() -> None:
    model = with_norm()
    fast = diffopt.unroll(model, adam(model), batches(T), mse)
    saved = fast.state_dict()
    other = diffopt.unroll(model, torch.optim.SGD(model[0].parameters(), lr=0.1), 0)
    wide = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 7)).double()
    wrong: list[tuple[Any, str]] = [
        ({}, r"keys are \[\], expected \['buffers', 'losses', 'opt_state', 'params', 'step'\]"),
        (other.state_dict(), r"params differ by \['1.bias', '1.weight', '3.bias', '3.weight'\]"),
        (
            diffopt.unroll(wide, adam(wide), 0).state_dict(),
            r"'3.weight' has shape \(2, 3\) here and \(7, 3\) in the state dict",
        ),
        ({**saved, "opt_state": {}}, r"optimizer state is for \[\], here for \['0.bias'"),
        (
            {**saved, "opt_state": {**saved["opt_state"], "3.bias": {"exp_avg": torch.ones(7)}}},
            r"exp_avg of '3.bias' has shape \(2,\) here and \(7,\) in the state dict",
        ),
        ({**saved, "buffers": {}}, r"buffers differ by \['1.num_batches_tracked'"),
    ]
    before = copy.deepcopy(saved)
    for state_dict, message in wrong:
        with pytest.raises(ValueError, match=f"load_state_dict: {message}"):
            fast.load_state_dict(state_dict)
    torch.testing.assert_close(fast.state_dict(), before, rtol=0, atol=0)


def test_gradients_through_a_loaded_start() -> None:
    """What was loaded has no graph, and what is computed from there does."""
    model, data, lr = tiny(), batches(T), torch.tensor(0.1).double().requires_grad_()
    half = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=lr), data[:2], mse)
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=lr), 0)
    fast.load_state_dict(half.state_dict())
    rest = diffopt.unroll(
        model, diffopt.SGD(model.parameters(), lr=lr), data[2:], mse, initial=fast
    )
    (got,) = torch.autograd.grad(rest.losses.sum(), lr)
    start = {name: x.detach().requires_grad_() for name, x in half.params.items()}
    reference = plain(model, {"lr": lr}, data[2:], mse, initial=start)
    (want,) = torch.autograd.grad(reference.losses.sum(), lr)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
