"""``fast`` in the model's place: what a loss may do with the model, it may do with the result."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close
from torch import Tensor, nn

import diffopt

T = 3
RATE = 0.1


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class Net(nn.Module):
    """Has one of everything: all kinds of containers, methods, properties and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Block(2)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.named = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        self.scales = nn.ParameterList([torch.ones(2), torch.ones(())])
        self.log_rate = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("shift", torch.ones(2))
        self.temperature, self.options = 2.0, {"depth": 3}
        self.listed = [self.head[0].weight, self.head]
        self.function = lambda x: self.head(x)
        self.partial = partial(self.embed, scale=2.0)

    def embed(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(self.encoder(x)) * scale

    @property
    def rate(self) -> Tensor:
        return self.log_rate.exp()

    def layers_of(self, x: Tensor) -> Any:
        for layer in self.head:
            x = layer(x)
            yield x

    def get_head(self) -> nn.Module:
        return self.head

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.embed(x)) * self.rate * self.scales[0] + self.named["a"](x)
        return x + self.named["b"](x) * self.scales[1] * self.frozen + self.shift


def squares(tensors: Any) -> Tensor:
    return torch.stack([(x.double() ** 2).sum() for x in tensors]).sum()


Loss = Callable[[Any, Tensor], Any]

#: Losses that work on the model, and have to on ``fast``.
LOSSES: dict[str, Loss] = {
    "call": lambda m, x: m(x),
    "forward": lambda m, x: m.forward(x),
    "submodule": lambda m, x: m.head(x),
    "submodule of a submodule": lambda m, x: (
        m.encoder.layer[0](x) * m.encoder.layer[2].weight.sum()
    ),
    "weight": lambda m, x: m.head[0].weight,
    "method": lambda m, x: m.embed(x),
    "method with a keyword": lambda m, x: m.embed(x, scale=3.0),
    "bound beforehand": lambda m, x: (lambda embed: embed(x) + embed(2 * x))(m.embed),
    "static method": lambda m, x: m.doubled(m.embed(x)),
    "generator": lambda m, x: sum(h.sum() for h in m.layers_of(x)),
    "method that gives a module": lambda m, x: m.get_head()(x),
    "property": lambda m, x: m.rate * m.temperature,
    "buffer": lambda m, x: m.embed(x) * m.shift,
    "running mean": lambda m, x: m.norm.running_mean * m.rate,
    "parameters": lambda m, x: squares(m.parameters()),
    "first parameter": lambda m, x: next(m.parameters()).sum(),
    "parameters of a part": lambda m, x: squares(m.encoder.parameters()),
    "named parameters": lambda m, x: squares(p for n, p in m.named_parameters() if "bias" in n),
    "parameter by name": lambda m, x: m.get_parameter("head.0.bias"),
    "module by name": lambda m, x: m.get_submodule("encoder.layer.0")(x),
    "linear layers": lambda m, x: squares(
        layer.weight for layer in m.modules() if isinstance(layer, nn.Linear)
    ),
    "linear layers by class name": lambda m, x: squares(
        layer.weight for layer in m.modules() if type(layer).__name__ == "Linear"
    ),
    "named modules": lambda m, x: squares(
        layer.weight
        for name, layer in m.named_modules()
        if name.startswith("head.")
        if hasattr(layer, "weight")
    ),
    "children": lambda m, x: squares(p for child in m.children() for p in child.parameters()),
    "sequential by index": lambda m, x: m.head[0](x),
    "sequential from the end": lambda m, x: m.head[-1].bias,
    "slice": lambda m, x: m.head[:2](x),
    "iteration": lambda m, x: [x := layer(x) for layer in m.head][-1],
    "length": lambda m, x: m.head[len(m.head) - 1].weight * len(m.head),
    "dict of modules": lambda m, x: m.named["a"](x) + sum(v(x) for v in m.named.values()),
    "in a dict of modules": lambda m, x: m.named["a"](x) * float("a" in m.named),
    "keys": lambda m, x: sum(m.named[key](x) for key in m.named),
    "list of parameters": lambda m, x: m.scales[0].sum() + squares(m.scales),
    "attribute": lambda m, x: m.embed(x) * m.temperature * m.options["depth"],
    "a parameter in a plain list": lambda m, x: m.listed[0],
    "a module in a plain list": lambda m, x: m.listed[1](x),
    "a function that holds the model": lambda m, x: m.function(x),
    "a partial that holds the model": lambda m, x: m.partial(x),
    "frozen": lambda m, x: m.embed(x) * m.frozen,
    "training": lambda m, x: m.embed(x) * float(m.training),
    "own eval": lambda m, x: (m.eval(), m.embed(x), m.train())[1],
    "eval of a part": lambda m, x: (m.norm.eval(), m.embed(x), m.norm.train())[1],
    "values that a part is given": lambda m, x: m.doubled(m.head.forward(x)),
    "private": lambda m, x: squares(m._parameters[n] for n in ("log_rate", "frozen")),
    "getattr": lambda m, x: m.head(x) * getattr(m, "absent", 1.0),
    "of two": lambda m, x: torch.func.functional_call(
        nn.Linear(2, 2).double(), {"weight": m.named["a"].weight, "bias": m.named["a"].bias}, (x,)
    ),
}


def net() -> Net:
    return Net().double()


def inner_loss(model: Any, x: Tensor) -> Tensor:
    return (model(x) ** 2).mean()


def adapted(model: Net, xs: list[Tensor]) -> diffopt.Unrolled:
    opt = diffopt.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return diffopt.unroll(model, opt, xs, inner_loss)


class Trained(nn.Module):
    """The oracle: plain gradient descent, and a copy of the model that holds its results.

    The derivative with respect to the trained values is the copy's; ``pulled`` takes it on to the
    start, through the graph of a plain loop.
    """

    def __init__(self, model: Net, xs: list[Tensor]) -> None:
        super().__init__()
        self.start = {n: p for n, p in model.named_parameters() if p.requires_grad}
        values: dict[str, Tensor] = dict(self.start)
        work = copy.deepcopy(model)
        for x in xs:
            loss = torch.func.functional_call(
                Holder(work, inner_loss), {f"model.{n}": v for n, v in values.items()}, (x,)
            )
            grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
            values = {n: v - RATE * g for (n, v), g in zip(values.items(), grads, strict=True)}
        self.values = values
        self.work = copy.deepcopy(work)
        with torch.no_grad():
            for n, p in self.work.named_parameters():
                if n in values:
                    p.copy_(values[n])
        self.work.listed = [self.work.head[0].weight, self.work.head]
        self.work.function = lambda x: self.work.head(x)
        self.work.partial = partial(self.work.embed, scale=2.0)

    def pulled(self, out: Tensor) -> list[Tensor | None]:
        params = dict(self.work.named_parameters())
        ends = [params[n] for n in self.values]
        found = torch.autograd.grad(out, ends, allow_unused=True)
        pairs = [(v, g) for v, g in zip(self.values.values(), found, strict=True) if g is not None]
        return list(
            torch.autograd.grad(
                [v for v, _ in pairs],
                list(self.start.values()),
                [g for _, g in pairs],
                allow_unused=True,
                retain_graph=True,
            )
        )


class Holder(nn.Module):
    def __init__(self, model: nn.Module, fn: Any) -> None:
        super().__init__()
        self.model, self.fn = model, fn

    def forward(self, *args: Any) -> Any:
        return self.fn(self.model, *args)


@pytest.fixture(scope="module")
def setting() -> Any:
    torch.manual_seed(0)
    model, xs, x = net(), [torch.randn(5, 2).double() for _ in range(T)], torch.randn(5, 2).double()
    trained = Trained(model, xs)
    return model, xs, x, trained


def scalar(value: Any) -> Tensor:
    found: Tensor = (torch.as_tensor(value).double() ** 2).sum()
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_model(setting: Any, name: str) -> None:
    model, xs, x, trained = setting
    loss_fn = LOSSES[name]
    oracle = copy.copy(trained)
    buffers = {n: b.clone() for n, b in trained.work.named_buffers()}
    want = scalar(loss_fn(trained.work, x))
    want_grads = oracle.pulled(want)
    for n, b in trained.work.named_buffers():
        b.copy_(buffers[n])
    fast = adapted(model, xs)
    held = {n: b.clone() for n, b in fast.buffers.items()}
    flags = [m.training for m in model.modules()]
    got = scalar(loss_fn(fast, x))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(
        got, list(trained.start.values()), allow_unused=True, materialize_grads=True
    )
    assert any(g.any() for g in grads)
    assert_all_close(grads, want_grads, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(fast.buffers[n], b) for n, b in held.items())
    assert flags == [m.training for m in model.modules()]
    assert model.head[0].weight is trained.start["head.0.weight"]


def test_the_losses_tell_trained_from_untrained_values(setting: Any) -> None:
    """So that the test above cannot pass with the initial values."""
    model, _, x, trained = setting
    model = copy.deepcopy(model)
    model.listed = [model.head[0].weight, model.head]
    model.function, model.partial = (lambda x: model.head(x)), partial(model.embed, scale=2.0)
    for name, loss_fn in LOSSES.items():
        same = torch.allclose(scalar(loss_fn(model, x)), scalar(loss_fn(trained.work, x)))
        assert not same, name


# Tasks.

OF_TASKS: dict[str, Loss] = {
    "call": lambda m, x: m(x),
    "submodule": lambda m, x: m.encoder(x),
    "method": lambda m, x: m.embed(x, scale=2.0),
    "by index": lambda m, x: m.head[0](x),
    "iteration": lambda m, x: [x := layer(x) for layer in m.head][-1],
    "weight": lambda m, x: m.head[0].weight,
    "list of parameters": lambda m, x: m.scales[0],
    "property": lambda m, x: m.rate,
    "buffer": lambda m, x: m.norm.running_mean,
    "generator": lambda m, x: list(m.layers_of(x))[1],
    "in a plain list": lambda m, x: m.listed[0],
    "module in a plain list": lambda m, x: m.listed[1](x),
    "function": lambda m, x: m.function(x),
    "parameters": lambda m, x: dict(m.named_parameters())["head.0.bias"],
}


@pytest.mark.parametrize("name", OF_TASKS)
def test_tasks_are_mapped(name: str) -> None:
    model = net()
    model.norm.track_running_stats = True
    xs = [torch.randn(4, 5, 2).double() for _ in range(T)]
    x = torch.randn(4, 5, 2).double()
    inner = [p for p in model.parameters() if p.requires_grad]
    opt = diffopt.SGD(inner, lr=RATE)
    model.norm.eval()
    fast = diffopt.unroll(model, opt, xs, inner_loss, tasks=4, segment=1)
    got = OF_TASKS[name](fast, x)
    alone = [diffopt.unroll(model, opt, [b[i] for b in xs], inner_loss) for i in range(4)]
    want = torch.stack([OF_TASKS[name](alone[i], x[i]) for i in range(4)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if got.requires_grad:
        a = torch.autograd.grad(scalar(got), inner, allow_unused=True, materialize_grads=True)
        b = torch.autograd.grad(scalar(want), inner, allow_unused=True, materialize_grads=True)
        assert_all_close(a, b, rtol=1e-9, atol=1e-11)


# Modes.


def test_the_mode_is_the_models_or_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    x = torch.randn(6, 2).double()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=RATE), [x] * T, inner_loss)
    fixed = F.linear(
        F.linear(x, fast.params["0.weight"], fast.params["0.bias"]),
        fast.params["2.weight"],
        fast.params["2.bias"],
    )
    assert fast.training
    assert not torch.allclose(fast(x), fixed)
    model.eval()
    torch.testing.assert_close(fast(x), fixed, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast[2](fast[1](fast[0](x))), fixed, rtol=1e-12, atol=0)
    assert not fast.training
    assert fast.train() is fast
    assert fast.training
    assert not model.training
    assert not torch.allclose(fast(x), fixed)
    part = fast[1]
    assert part.eval() is part
    assert (fast[0].training, fast[1].training) == (True, False)
    torch.testing.assert_close(fast(x), fixed, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.detach()(x), fixed.detach(), rtol=1e-12, atol=0)
    assert not any(m.training for m in model.modules())


# What is its own, and what is refused.


class Clash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.params = nn.Linear(2, 2), 3

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


def test_its_own_names_win() -> None:
    model = Clash().double()
    x = torch.randn(3, 2).double()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=RATE), [x] * T, inner_loss)
    assert fast.step == T
    assert set(fast.params) == {"step.weight", "step.bias"}
    torch.testing.assert_close(fast.apply(lambda m, x: m.step(x), x), fast(x))
    fast.step = 7  # its own may be set
    assert fast.step == 7
    assert "load_into" in dir(fast)
    assert "forward" in dir(fast)
    assert "to" not in dir(fast)


class Helper:
    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, x: Tensor) -> Any:
        return self.model.head(x)


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def changed(change: Callable[[Net], Any]) -> diffopt.Unrolled:
    model = net()
    change(model)
    return adapted(model, [torch.randn(5, 2).double()])


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "an object": Helper,
    "slots": Slotted,
    "a closure in an object": lambda m: Helper(lambda x: m(x)),
    "an iterator": lambda m: iter([m.head]),
    "a weak reference": weakref.ref,
    "a parameter in an object": lambda m: Helper(m.head[0].weight),
    "far down": lambda m: Helper(Slotted([{"x": (Helper(m.encoder),)}])),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_objects_that_hold_the_model_are_refused(name: str) -> None:
    fast = changed(lambda m: setattr(m, "helper", HOLDERS[name](m)))
    if name == "an iterator":
        assert [isinstance(x, nn.Sequential) for x in fast.helper] == [True]
        return
    with pytest.raises(AttributeError, match=r"holds modules or parameters.*fast.apply\(lambda"):
        _ = fast.helper


def test_objects_that_do_not_are_handed_out() -> None:
    other = Helper({"width": 3, "layers": [nn.Linear(2, 2)]})
    fast = changed(lambda m: setattr(m, "config", other))
    assert fast.config is other


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to": (lambda f: f.to("cpu"), r"to would change the Net.*fast.apply\(loss_fn, batch\)"),
    "zero_grad": (lambda f: f.zero_grad(), "zero_grad would change the Net"),
    "hook": (lambda f: f.head.register_forward_hook(print), "register_forward_hook would change"),
    "apply of a part": (lambda f: f.head.apply(print), "apply would change the Sequential"),
    "load": (lambda f: f.head.load_state_dict({}), "load_state_dict would change the Sequential"),
    "set": (lambda f: setattr(f, "temperature", 1.0), "'temperature' is an attribute of the mod"),
    "set a weight": (lambda f: setattr(f, "log_rate", 1.0), "'log_rate' is an attribute of the"),
    "set in a part": (lambda f: setattr(f.head, "weight", 1.0), "'weight' is an attribute of the"),
    "absent": (lambda f: f.tail, "'Net' object has no attribute 'tail'"),
    "dunder": (lambda f: f.__absent__, "no attribute '__absent__'"),
    "absent of a part": (lambda f: f.encoder.tail, "'Block' object has no attribute 'tail'"),
    "a view": (lambda f: f.turned, "'turned' of the Net was computed from a parameter before"),
    "weight_norm": (lambda f: f.normed.weight, "'weight' of the Linear was computed from a param"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_or_no_answer_is_refused(name: str) -> None:
    def change(model: Net) -> None:
        model.turned = model.head[0].weight.detach().t()
        with pytest.warns(FutureWarning):
            model.normed = nn.utils.weight_norm(nn.Linear(2, 2).double())

    fast = changed(change)
    act, message = REFUSED[name]
    with pytest.raises(AttributeError, match=message):
        act(fast)
    assert not hasattr(fast, "absent")


def test_no_container() -> None:
    model = Clash().double()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters()), 0, inner_loss)
    for act in (len, iter, lambda f: f[0], lambda f: 3 in f):
        with pytest.raises(TypeError, match="the model's Clash has no __"):
            act(fast)
    assert fast


def test_a_sequential_in_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x = torch.randn(3, 2).double()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=RATE), [x] * T, inner_loss)
    assert len(fast) == 3
    assert [type(part).__name__ for part in fast] == ["Linear", "Tanh", "Linear"]
    by_layer = x
    for part in fast:
        by_layer = part(by_layer)
    torch.testing.assert_close(by_layer, fast(x))
    assert fast[0].weight is fast.params["0.weight"]
    assert fast[0] == fast[0]
    assert fast[0] != fast[2]
    assert len({fast[0], fast[0], fast[2]}) == 2
    assert repr(
        fast[1]
    ) == "Tanh() of Unrolled(Sequential, step=3, 4 parameters, 0 losses)".replace(
        "0 losses", "3 losses"
    )


def test_a_result_is_no_model_to_unroll() -> None:
    fast = changed(lambda m: None)
    for wrong in (fast, fast.head):
        with pytest.raises(TypeError, match="of trained values: pass the model itself"):
            diffopt.unroll(wrong, diffopt.SGD([torch.zeros(1, requires_grad=True)]), 1)


def test_names_of_nn_module_that_the_model_uses_itself() -> None:
    fast = changed(lambda m: (setattr(m, "type", "small"), setattr(m, "half", nn.Linear(2, 2))))
    assert fast.type == "small"
    assert fast.half.weight.shape == (2, 2)


def test_copies() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    x = torch.randn(3, 2).double()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=RATE), [x], inner_loss).detach()
    for made in (copy.copy(fast), copy.deepcopy(fast)):
        torch.testing.assert_close(made(x), fast(x))
        torch.testing.assert_close(made[0](x), fast(x))


@pytest.mark.parametrize("name", ["submodule", "method", "weight", "parameters", "call"])
def test_of_a_module_patched_by_higher(name: str) -> None:
    higher = pytest.importorskip("higher")
    pytest.importorskip("diffopt.higher", exc_type=ImportError)
    model, xs, x = net(), [torch.randn(5, 2).double() for _ in range(T)], torch.randn(5, 2).double()
    model.norm.eval()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    want = LOSSES[name](diffopt.unroll(model, opt, xs, inner_loss), x)
    own = list(opt.param_groups[0]["params"])
    expected = torch.autograd.grad(scalar(want), own, allow_unused=True, materialize_grads=True)
    model.listed = model.function = model.partial = None  # higher copies the model by its tables
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, dopt):
        fast = diffopt.unroll(fmodel, dopt, xs, inner_loss)
        got = LOSSES[name](fast, x)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        found = torch.autograd.grad(scalar(got), own, allow_unused=True, materialize_grads=True)
    assert_all_close(found, expected, rtol=1e-10, atol=1e-12)
