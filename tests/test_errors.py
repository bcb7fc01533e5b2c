"""Every error says what was passed, why it cannot work and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import batches, mse, tiny
from torch import nn

import diffopt


def call(**changes: Any) -> diffopt.Unrolled:
    """A correct call but for what is changed; functions of the model are called with it."""
    model = tiny()
    arguments: dict[str, Any] = {
        "model": model,
        "opt": lambda model: diffopt.SGD(model.parameters(), lr=0.1),
        "steps": batches(3),
        "loss_fn": mse,
    }
    arguments.update(changes)
    for key in ("opt", "model", "initial"):
        made = arguments.get(key)
        if callable(made) and not isinstance(made, (nn.Module, type)):
            arguments[key] = made(model)
    return diffopt.unroll(**arguments)


class Mine(torch.optim.SGD):
    pass


class Foreign(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


def shaped(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[Any], Any]:
    return lambda model: {"0.bias": torch.zeros(shape, dtype=dtype)}


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": 3}, "model is a int: pass a torch.nn.Module"),
    "model that is a function": (
        {"model": lambda model: mse},
        "model is a function: pass a torch.nn.Module",
    ),
    "no optimizer": ({"opt": 3}, "opt is a int: pass a diffopt or torch.optim optimizer of the"),
    "a list of parameters": (
        {"opt": lambda model: list(model.parameters())},
        "opt is a list that holds a .*Parameter: pass a diffopt or torch.optim optimizer, or",
    ),
    "an optimizer class": (
        {"opt": diffopt.SGD},
        "opt is the class SGD: pass a diffopt or torch.optim",
    ),
    "an unknown optimizer": (
        {"opt": lambda model: Foreign(model.parameters())},
        r"does not know how .*Foreign steps: call diffopt.register\(Foreign, fn\)",
    ),
    "a subclass of a known optimizer": (
        {"opt": lambda model: Mine(model.parameters(), lr=0.1)},
        r"diffopt.register\(Mine, fn\).*if it steps as SGD does, fn is .*SGD.from_torch",
    ),
    "segment of a wrong kind": ({"segment": 2.5}, r"segment is 2.5, of type float, but must be an"),
    "segment that is a bool": ({"segment": True}, r"segment is True, of type bool.*segment=10"),
    "adjoint that is a string": (
        {"adjoint": "segmented"},
        r"adjoint is a str: pass an object such as diffopt.Segmented\(\)",
    ),
    "adjoint that is a class": (
        {"adjoint": diffopt.Segmented},
        r"adjoint is a \w+: pass an object such as diffopt.Segmented\(\)",
    ),
    "steps that is a bool": ({"steps": True}, "steps is a bool: pass the number of steps"),
    "steps that is a float": ({"steps": 3.0}, "steps is a float: pass the number of steps"),
    "steps that is None": ({"steps": None}, "steps is a NoneType: pass the number of steps"),
    "steps that is a string": ({"steps": "abc"}, "steps is a str: pass the number of steps"),
    "one batch": ({"steps": {"x": 1}}, r"steps is a dict.*list of batches .*\[batch\] \* T"),
    "steps that is a number in a tensor": (
        {"steps": torch.tensor(3)},
        r"steps is a 0-d tensor: pass .* int\(steps\)",
    ),
    "arguments in another order": (
        {"steps": mse, "loss_fn": batches(3)},
        "loss_fn is a list: pass a function",
    ),
    "grad_transform": ({"grad_transform": 1.0}, "grad_transform is a float: pass a function"),
    "bound": ({"max_cotangent_norm": "1"}, "max_cotangent_norm is a str: pass a number"),
    "bound that is a bool": ({"max_cotangent_norm": True}, "max_cotangent_norm is a bool"),
    "progress": ({"progress": "yes"}, "progress is a str: pass True or False"),
    "initial": ({"initial": [1.0]}, r"initial is a list: pass an Unrolled, or a dict of tensors"),
    "initial value": (
        {"initial": lambda model: {"0.bias": [0.0] * 3}},
        r"initial\['0.bias'\] is a list: pass a tensor",
    ),
    "loss that is a number": (
        {"loss_fn": lambda m, b: 1.0},
        r"loss of step 0 is a float: loss_fn has to return a scalar tensor, or the pair",
    ),
    "loss that is missing": (
        {"loss_fn": lambda m, b: None},
        "loss of step 0 is a NoneType: loss_fn has to return",
    ),
    "loss with too much beside it": (
        {"loss_fn": lambda m, b: (mse(m, b), 1, 2)},
        r"loss of step 0 is a tuple: .* or the pair \(loss, aux\)",
    ),
    "gradients that are no dict": (
        {"grad_transform": lambda g: list(g.values())},
        "grad_transform returned a list: it has to return a dict of gradients by parameter name",
    ),
    "a gradient that is no tensor": (
        {"grad_transform": lambda g: {**g, "0.bias": 0}},
        "grad_transform returned a int for '0.bias': return a tensor, or leave the name out",
    ),
}

VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "segment 0": ({"segment": 0}, "segment is 0, but must be at least 1: write segment=10"),
    "negative segment": ({"segment": -3}, "segment is -3, but must be at least 1"),
    "segment and adjoint": (
        {"segment": 2, "adjoint": diffopt.StoreAll()},
        r"both segment=2 and adjoint=StoreAll\(\) were given.*pass one of them",
    ),
    "negative steps": ({"steps": -1}, "steps=-1 is negative: pass 0 or more"),
    "bound of 0": (
        {"max_cotangent_norm": 0},
        "max_cotangent_norm=0 would stop every gradient: pass a number above 0, or None",
    ),
    "bound of nan": ({"max_cotangent_norm": float("nan")}, "pass a number above 0, or None"),
    "another model's parameters": (
        {"opt": lambda model: torch.optim.SGD(tiny().parameters(), lr=0.1)},
        r"optimizer's parameter 0 of param group 0, of shape \(3, 2\), is not one of the model's: "
        "build the optimizer over parameters of the model",
    ),
    "another model's parameters, by name": (
        {"opt": lambda model: torch.optim.SGD(tiny().named_parameters(), lr=0.1)},
        r"optimizer's parameter '0.weight', of shape \(3, 2\), is not one of the model's",
    ),
    "one parameter too many": (
        {
            "opt": lambda model: diffopt.SGD(
                [
                    {"params": list(model.parameters())},
                    {"params": [nn.Parameter(torch.ones(7))]},
                ]
            )
        },
        r"parameter 0 of param group 1, of shape \(7,\), is not one of the model's",
    ),
    "nothing to train": (
        {"opt": lambda model: diffopt.SGD(model.requires_grad_(False).parameters())},
        "none of the optimizer's parameters requires grad, so there is nothing to train",
    ),
    "initial value of an unknown name": (
        {"initial": lambda model: {"bias": torch.zeros(3)}},
        r"initial has a value for 'bias', which is not an inner variable.*such as '0.weight'",
    ),
    "initial value of a wrong shape": (
        {"initial": shaped(4)},
        r"initial\['0.bias'\] has shape \(4,\), the parameter has \(3,\): pass a value of that",
    ),
    "initial value of a wrong dtype": (
        {"initial": shaped(3, dtype=torch.float32)},
        r"initial\['0.bias'\] is torch.float32 on cpu, the parameter torch.float64 on cpu: "
        r"convert it with .to\('cpu', torch.float64\)",
    ),
    "loss that is not scalar": (
        {"loss_fn": lambda m, b: m(b[0])},
        r"loss of step 0 has shape \(5, 2\), which is not a scalar: reduce it.*\.mean\(\)",
    ),
    "loss that is empty": (
        {"loss_fn": lambda m, b: m(b[0])[:0]},
        r"loss of step 0 has shape \(0, 2\), which is not a scalar",
    ),
    "loss that is detached": (
        {"loss_fn": lambda m, b: mse(m, b).detach()},
        "loss of step 0 does not depend on any inner variable: .* do not detach it",
    ),
    "loss that is an integer": (
        {"loss_fn": lambda m, b: torch.tensor(3)},
        "loss of step 0 does not depend on any inner variable",
    ),
    "loss of something else": (
        {"loss_fn": lambda m, b: torch.ones((), requires_grad=True) * 2},
        "loss of step 0 does not depend on any inner variable: compute it with the module",
    ),
    "loss that is complex": (
        {"loss_fn": lambda m, b: m(b[0]).to(torch.complex128).sum()},
        r"loss of step 0 is complex \(torch.complex128\), .*return a real one, such as",
    ),
    "gradient of another dtype": (
        {"grad_transform": lambda g: {n: x.float() for n, x in g.items()}},
        r"a gradient of torch.float32 for '0.weight', .*convert it back with .to\(torch.float64\)",
    ),
    "gradient of an unknown name": (
        {"grad_transform": lambda g: {"bias": g["0.bias"]}},
        "grad_transform returned a gradient for 'bias', which is not an inner variable: keep the",
    ),
    "gradient of a wrong shape": (
        {"grad_transform": lambda g: {**g, "0.bias": g["0.bias"].sum()}},
        r"a gradient of shape \(\) for '0.bias', which has shape \(3,\): keep the shapes",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_wrong_kinds(name: str) -> None:
    changes, message = KINDS[name]
    with pytest.raises(TypeError, match=message):
        call(**changes)


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(name: str) -> None:
    changes, message = VALUES[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_errors_of_a_later_step_name_it() -> None:
    model = tiny()

    def loss_fn(model: Any, t: int) -> Any:
        loss = model[0].weight.square()
        return {7: loss, 8: loss.sum().detach(), 9: "text"}.get(t, loss.sum())

    half = diffopt.unroll(model, diffopt.SGD(model.parameters()), 5, loss_fn)
    with pytest.raises(ValueError, match=r"loss of step 7 has shape \(3, 2\)"):
        diffopt.unroll(model, diffopt.SGD(model.parameters()), 3, loss_fn, initial=half)
    for step, error, message in (
        (8, ValueError, "loss of step 8 does not depend on any inner variable"),
        (9, TypeError, "loss of step 9 is a str"),
    ):
        half.step = step
        with pytest.raises(error, match=message):
            diffopt.unroll(model, diffopt.SGD(model.parameters()), 1, loss_fn, initial=half)


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(2)], ids=str)
def test_a_loss_that_calls_backward(adjoint: diffopt.Adjoint) -> None:
    def loss_fn(model: Any, pair: Any) -> Any:
        loss = mse(model, pair)
        loss.backward()
        return loss

    with pytest.raises(
        RuntimeError, match=r"loss of step 0 was .* calls loss.backward\(\): leave that out"
    ):
        call(loss_fn=loss_fn, adjoint=adjoint)


def test_a_loss_of_the_wrong_module() -> None:
    """The commonest slip: the closure's model is another than the one that is trained."""
    other = tiny()
    with pytest.raises(ValueError, match="step 0 does not depend on any inner variable"):
        call(loss_fn=lambda m, pair: mse(other, pair))


def test_continuing_with_another_model() -> None:
    model = tiny()
    wide = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    whole = diffopt.unroll(wide, diffopt.SGD(wide.parameters()), batches(2), mse)
    with pytest.raises(
        ValueError,
        match=r"no value that fits parameter '0.weight': .*\(4, 2\) there, and \(3, 2\) in the mod",
    ):
        diffopt.unroll(model, diffopt.SGD(model.parameters()), batches(2), mse, initial=whole)
    longer = nn.Sequential(*tiny(), nn.Linear(2, 2)).double()
    whole = diffopt.unroll(longer, diffopt.SGD(longer.parameters()), batches(2), mse)
    with pytest.raises(ValueError, match=r"parameter '3.weight': .* the model has no such"):
        diffopt.unroll(model, diffopt.SGD(model.parameters()), batches(2), mse, initial=whole)


def test_wrapped_models() -> None:
    model = tiny()
    with pytest.raises(
        NotImplementedError, match=r"is wrapped in DataParallel.*pass the module inside, model.mod"
    ):
        call(model=nn.DataParallel(model), opt=diffopt.SGD(model.parameters()))

    wrapped = object.__new__(nn.parallel.DistributedDataParallel)  # needs a process group
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(NotImplementedError, match=r"DistributedDataParallel.*forward calls unroll"):
        call(model=wrapped, opt=diffopt.SGD(model.parameters()))


def test_sparse_and_complex() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(NotImplementedError, match=r"gradient of 'weight' is sparse.*sparse=False"):
        diffopt.unroll(
            model, diffopt.SGD(model.parameters()), 1, lambda m, t: m(torch.tensor([1])).sum()
        )
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(NotImplementedError, match=r"is complex: optimize its torch.view_as_real"):
        diffopt.unroll(model, torch.optim.SGD(model.parameters()), 1, lambda m, t: m.bias.sum())


def test_a_hyperparameter_that_does_not_broadcast() -> None:
    lr = torch.ones(3).double()
    with pytest.raises(
        ValueError, match=r"lr of shape \(3,\) does not broadcast to parameter '0.w"
    ):
        call(opt=lambda model: diffopt.SGD(model.named_parameters(), lr=lr))


def test_a_non_leaf_hyperparameter_serves_one_backward_pass() -> None:
    model, log_lr, data = tiny(), torch.tensor(-2.0).double().requires_grad_(), batches(2)
    opt = diffopt.SGD(model.parameters(), lr=log_lr.exp())
    diffopt.unroll(model, opt, data, mse).losses.sum().backward()
    message = r"SGD: lr is a tensor computed from others.*lr=lambda t: log_lr.exp\(\), or make"
    with pytest.warns(RuntimeWarning, match=message) as told:
        fast = diffopt.unroll(model, opt, data, mse)
    assert told[0].filename == __file__
    with pytest.raises(RuntimeError, match="second time"):
        fast.losses.sum().backward()
    with torch.no_grad():
        diffopt.unroll(model, opt, data, mse)
    kept = diffopt.SGD(model.parameters(), lr=2 * log_lr.exp())
    for _ in range(2):
        diffopt.unroll(model, kept, data, mse).losses.sum().backward(retain_graph=True)
    opt = diffopt.SGD(model.parameters(), lr=lambda t: log_lr.exp())
    for _ in range(2):
        diffopt.unroll(model, opt, data, mse).losses.sum().backward()
