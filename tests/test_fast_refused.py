"""What is refused at the call: forgotten arguments, transforms around it, models that cannot be."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, batches, mse, tiny
from torch import Tensor, nn
from torch.autograd import forward_ad

import diffopt
from diffopt._model.memory import check_shared_memory


def unroll(**changes: Any) -> diffopt.Unrolled:
    model = tiny()
    arguments: dict[str, Any] = {"model": model, "steps": batches(3), "loss_fn": mse}
    arguments["opt"] = diffopt.SGD(changes.get("model", model).parameters(), lr=0.1)
    return diffopt.unroll(**{**arguments, **changes})


# Arguments.


def test_an_adjoints_class() -> None:
    for cls, example in (
        (diffopt.Segmented, r"diffopt.Segmented\(\)"),
        (diffopt.Binomial, r"diffopt.Binomial\(snapshots=...\)"),
        (diffopt.ForwardMode, r"diffopt.ForwardMode\(wrt=...\)"),
        (dict, r"diffopt.Segmented\(\)"),
    ):
        with pytest.raises(
            TypeError, match=f"adjoint is a class: pass an object such as {example}"
        ):
            unroll(adjoint=cls)
    with pytest.raises(TypeError, match=r"adjoint is a CG: .* diffopt.Implicit\(CG\("):
        unroll(adjoint=diffopt.CG(3, 1e-3))


def test_one_batch_as_batches() -> None:
    x, y = batch()
    with pytest.raises(
        TypeError,
        match=r"two tensors, of shapes \(5, 2\) and \(5, 2\).*one batch.*\[\(x, y\)\] \* T for T",
    ):
        unroll(steps=(x, y))
    two = unroll(steps=[x, y], loss_fn=lambda m, x: m(x).square().mean())
    assert two.step == 2


def test_a_result_or_a_module_as_steps() -> None:
    fast = unroll()
    for wrong in (fast, fast[0], tiny()):
        with pytest.raises(TypeError, match=r"steps is a \w+: .* continue from is initial="):
            unroll(steps=wrong)


def test_iterators() -> None:
    used = iter(batches(2))
    assert unroll(steps=used).step == 2
    with pytest.raises(
        ValueError, match="steps is a list_iterator that yields nothing: it was used"
    ):
        unroll(steps=used)
    with pytest.raises(ValueError, match="steps is a generator that yields nothing"):
        unroll(steps=(b for b in []))
    for empty in ([], (), {}.values()):
        assert unroll(steps=empty).step == 0
    for endless in (itertools.cycle(batches(1)), itertools.count()):
        with pytest.raises(ValueError, match=r"never ends: pass itertools.islice\(steps, T\)"):
            unroll(steps=endless)
    assert unroll(steps=itertools.islice(itertools.cycle(batches(1)), 3)).step == 3


# A model that returns its own loss.


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.layer(x)
        loss = None if labels is None else F.mse_loss(out, labels)
        return SimpleNamespace(loss=loss, logits=out)


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("tasks", [None, 3])
def test_mappings_are_given_by_keyword(kind: Callable[..., Any], tasks: int | None) -> None:
    model = Own().double()
    lead = () if tasks is None else (tasks,)
    data = [{n: torch.randn(*lead, 5, 2).double() for n in ("labels", "x")} for _ in range(3)]
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    if kind is UserDict and tasks is not None:
        with pytest.raises(TypeError, match=r"is a UserDict.*pass dict\(batch\)"):
            diffopt.unroll(model, opt, list(map(kind, data)), tasks=tasks)
        return
    got = diffopt.unroll(model, opt, list(map(kind, data)), tasks=tasks)
    want = diffopt.unroll(
        model, opt, data, lambda m, b: F.mse_loss(m(b["x"]).logits, b["labels"]), tasks=tasks
    )
    for name, x in want.params.items():
        torch.testing.assert_close(got.params[name], x, rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(fast.losses.sum(), list(model.parameters())) for fast in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_forgotten_loss() -> None:
    x, y = batch()
    own, layer = Own().double(), nn.Linear(2, 2).double()
    for model, steps, error, message in (
        (layer, [x], ValueError, r"model\(Tensor\) of the Linear .*it returns has shape \(5, 2\),"),
        (
            layer,
            [(x, y)],
            TypeError,
            r"model\(tuple\) of the Linear has to return.*it raises linear",
        ),
        (layer, 3, TypeError, r"model\(\) of the Linear has to return .* missing 1 required pos"),
        (layer, [{"x": x}], TypeError, r"model\(\*\*dict\) of the Linear .*unexpected keyword"),
        (own, [{"x": x}], TypeError, r"model\(\*\*dict\) .* has None for loss, as where the batch"),
    ):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        with pytest.raises(error, match=f"loss_fn was left out, so {message}.*pass loss_fn, such"):
            diffopt.unroll(model, opt, steps)


# Around the call.


MODEL = tiny()


def through(lr: Tensor, model: nn.Module = MODEL) -> Tensor:
    data = [(torch.ones(5, 2).double(), torch.zeros(5, 2).double())] * 2
    return diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=lr), data, mse).losses[-1]


def test_transforms_around_an_unroll() -> None:
    lr = torch.tensor(0.1).double()
    func: dict[str, Callable[[], Any]] = {
        "grad": lambda: torch.func.grad(through)(lr),
        "vmap": lambda: torch.vmap(through)(lr.expand(2)),
        "jvp": lambda: torch.func.jvp(through, (lr,), (lr,)),
        "grad ": lambda: torch.func.hessian(through)(lr),
    }
    for name, act in func.items():
        with pytest.raises(
            NotImplementedError,
            match=rf"torch.func.{name.strip()} is active around diffopt.unroll.*ForwardMode",
        ):
            act()
    assert torch.autograd.functional.jacobian(through, lr).shape == ()


def test_dual_numbers_are_refused() -> None:
    tangent = torch.ones(()).double()
    with forward_ad.dual_level():
        lr = forward_ad.make_dual(torch.tensor(0.1).double(), tangent)
        with pytest.raises(
            NotImplementedError, match=r"dual number.*adjoint=diffopt.ForwardMode\("
        ):
            through(lr)
        model = tiny()
        pair = forward_ad.make_dual(torch.ones(5, 2).double(), torch.ones(5, 2).double())
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        with pytest.raises(NotImplementedError, match=r"tensor of shape \(5, 2\) .* dual number"):
            diffopt.unroll(model, opt, [(pair, pair)], mse)
        assert through(torch.tensor(0.1).double()).ndim == 0


# Models.


def test_meta_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(
        ValueError, match=r"submodule '1' has a 'weight' on the meta device.*to_emp"
    ):
        diffopt.unroll(model, diffopt.SGD(model.parameters()), 1, lambda m, t: m[0].bias.sum())


def with_tensors(**tensors: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    for name, x in tensors.items():
        if name.startswith("p"):
            model.register_parameter(name, nn.Parameter(x))
        else:
            model.register_buffer(name, x)
    return model


def overlapping() -> dict[str, dict[str, Tensor]]:
    x, square = torch.zeros(6), torch.zeros(4, 4)
    return {
        "the same range": {"p": x, "q": x.view(2, 3)},
        "a part": {"p": x, "b": x[2:4]},
        "overlapping parts": {"p": x[:4], "p2": x[3:]},
        "the transposed": {"p": square, "b": square.t()},
        "a row and a column": {"p": square[1], "b": square[:, 2]},
        "crossing columns": {"p": square[:, :2], "b": square[:, 1:3]},
        "buffers": {"b": x, "b2": x[:1]},
        "other dtypes": {"p": x[:2], "b": x.view(torch.int32)[1:3]},
        "over one between": {"p": x, "p2": x[:1].detach(), "b": x[4:]},
        "the diagonal": {"p": square.diagonal(), "b": square[2:, 2:]},
    }


def apart() -> dict[str, dict[str, Tensor]]:
    x, square = torch.zeros(6), torch.zeros(4, 4)
    return {
        "halves": {"p": x[:3], "p2": x[3:]},
        "columns": {"p": square[:, :2], "b": square[:, 2:]},
        "odd and even": {"p": x[::2], "b": x[1::2]},
        "a row and a column": {"p": square[0, 1:], "b": square[:, 0]},
        "another dtype": {"p": x[:2], "b": x.view(torch.int32)[2:3]},
        "empty": {"p": x, "b": x[2:2]},
        "expanded": {"b": x[:1].expand(4), "p": x[1:]},
        "off the diagonal": {"p": square.diagonal(), "b": square[0, 1:]},
    }


@pytest.mark.parametrize("name", overlapping())
def test_shared_memory_is_refused(name: str) -> None:
    tensors = overlapping()[name]
    model = with_tensors(**tensors)
    opt = diffopt.SGD([model.weight], lr=0.1)
    kinds = r"(parameter|buffer)"
    with pytest.raises(
        NotImplementedError,
        match=rf"{kinds} '({'|'.join(tensors)})' and {kinds} '({'|'.join(tensors)})' share memory",
    ):
        diffopt.unroll(model, opt, 1, lambda m, t: m.weight.square().sum())


@pytest.mark.parametrize("name", apart())
def test_memory_side_by_side_is_fine(name: str) -> None:
    model = with_tensors(**apart()[name])
    opt = diffopt.SGD([model.weight], lr=0.1)
    assert diffopt.unroll(model, opt, 1, lambda m, t: m.weight.square().sum()).step == 1


def test_layers_with_flat_or_tied_weights_pass() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    lstm.flatten_parameters()
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    flat = torch.zeros(10)
    side = {"a": flat[:4].view(2, 2), "b": flat[4:]}
    for model in (lstm, tied, nn.MultiheadAttention(4, 2), nn.BatchNorm1d(3)):
        check_shared_memory(dict(model.named_parameters()), dict(model.named_buffers()))
    check_shared_memory(side, {})
