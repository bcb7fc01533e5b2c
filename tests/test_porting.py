"""The porting guide: what it says to write instead gives what was there before.

The oracle is ``torch_maml`` itself where it is installed; for the rule that the guide states, a
plain loop as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fenced import TOP, blocks, run
from torch import Tensor, nn

import diffopt

PAGE = TOP / "docs/pages/porting.md"


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def source_of(marker: str, language: str = "python") -> str:
    (found,) = [source for _, source in blocks(PAGE, language) if marker in source]
    return found


@pytest.fixture
def torch_maml() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoint(), and of float() on learned options
        yield pytest.importorskip("torch_maml")


def test_the_notebook_before_and_after(torch_maml: Any) -> None:
    before: dict[str, Any] = {}
    exec(source_of("torch_maml.GradientCheckpointMAML", "py"), before)
    after = {"torch": torch, "F": F, "diffopt": diffopt}
    exec(source_of("max_cotangent_norm=max_grad_grad_norm"), after)
    for name in ("final_loss", "grads_efficient"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-11)
    history = torch.cat(before["loss_history"])
    torch.testing.assert_close(after["loss_history"], history, rtol=1e-9, atol=0)
    # BatchNorm's statistics: each step counts once, in the result, and the model's own stay.
    assert after["updated_model"].buffers["1.num_batches_tracked"].item() == 10
    assert after["model"][1].num_batches_tracked.item() == 0


def test_the_benchmark_compares_two_ways_to_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffopt.higher", exc_type=ImportError)
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    from higher_port import meta_gradient

    loop, unrolled = (meta_gradient(way, "Adam", 2, "cpu") for way in ("loop", "segment=1"))
    torch.testing.assert_close(unrolled, loop, rtol=1e-8, atol=1e-10)


# Line by line.

X, Y = torch.linspace(-2, 2, 24).double().sin().reshape(8, 3), torch.arange(8) % 4
INPUTS = [(X, Y), (X.flip(0), Y), (X * 0.5, Y), (X, Y.flip(0))]
Run = Callable[..., tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))


def cross_entropy(model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
    return scale * F.cross_entropy(model(batch[0]), batch[1])


def gradients(
    model: nn.Module, trained: Any, history: Any, learned: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The final loss with a share of the losses on the way, and its gradient."""
    loss = cross_entropy(trained, INPUTS[0]) + 0.1 * sum(history)
    for x in (*model.parameters(), *learned):
        x.grad = None
    loss.backward()
    return loss, [x.grad for x in (*model.parameters(), *learned)]


def in_torch_maml(
    torch_maml: Any,
    optimizer: Any,
    learned: list[Tensor] | None = None,
    segment: int | None = None,
    get_parameters: Any = nn.Module.parameters,
    **call: Any,
) -> Any:
    kind, more = torch_maml.NaiveMAML, {}
    if segment is not None:
        kind, more = torch_maml.GradientCheckpointMAML, {"checkpoint_steps": segment}
    model = network()
    maml = kind(model, cross_entropy, optimizer=optimizer, get_parameters=get_parameters, **more)
    result = maml(INPUTS, **call)
    history = [loss.squeeze() for loss in result.loss_history]
    return gradients(model, result.model, history, learned or [])


def in_diffopt(
    make_opt: Callable[[nn.Sequential], Any],
    learned: list[Tensor] | None = None,
    loss_fn: Any = cross_entropy,
    **options: Any,
) -> Any:
    model = network()
    fast = diffopt.unroll(model, make_opt(model), INPUTS, loss_fn, **options)
    return gradients(model, fast, fast.losses, learned or [])


def assert_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_naive_and_checkpointed(torch_maml: Any) -> None:
    optimizer = torch_maml.IngraphGradientDescent(0.3)
    ours = partial(in_diffopt, lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    expected = in_torch_maml(torch_maml, optimizer)
    assert_equal(ours(adjoint=diffopt.StoreAll()), expected)
    assert_equal(ours(segment=3), in_torch_maml(torch_maml, optimizer, segment=3))
    assert_equal(ours(), expected)


def test_max_grad_grad_norm(torch_maml: Any) -> None:
    optimizer = torch_maml.IngraphGradientDescent(0.3)
    expected = in_torch_maml(torch_maml, optimizer, max_grad_grad_norm=0.05)
    sgd = partial(in_diffopt, lambda m: torch.optim.SGD(m.parameters(), lr=0.3))
    assert_equal(sgd(max_cotangent_norm=0.05), expected)
    with pytest.raises(AssertionError):
        assert_equal(sgd(), expected)


def test_loss_kwargs_and_opt_kwargs(torch_maml: Any) -> None:
    optimizer = torch_maml.IngraphRMSProp(learning_rate=9.0, beta=0.0, epsilon=1e-6)
    options = {"loss_kwargs": {"scale": 2.0}, "opt_kwargs": {"learning_rate": 0.3}}
    expected = in_torch_maml(torch_maml, optimizer, **options)
    loss_fn = partial(cross_entropy, scale=2.0)
    found = in_diffopt(lambda m: torch.optim.SGD(m.parameters(), lr=0.3), loss_fn=loss_fn)
    assert_equal(found, expected)


def test_get_parameters(torch_maml: Any) -> None:
    optimizer = torch_maml.IngraphGradientDescent(0.3)
    expected = in_torch_maml(torch_maml, optimizer, get_parameters=lambda m: m[2].parameters())
    assert_equal(in_diffopt(lambda m: torch.optim.SGD(m[2].parameters(), lr=0.3)), expected)


def test_momentum_with_rates_that_are_learned(torch_maml: Any) -> None:
    theirs = torch_maml.IngraphRMSProp(
        log_learning_rate=nn.Parameter(torch.tensor(-1.0)), momentum=0.7, beta=0.0
    )
    expected = in_torch_maml(torch_maml, theirs, learned=[theirs.log_learning_rate])
    log_lr = torch.tensor(-1.0, requires_grad=True)
    found = in_diffopt(
        lambda m: diffopt.Momentum(m.parameters(), lr=lambda t: log_lr.exp(), momentum=0.7),
        learned=[log_lr],
    )
    assert_equal(found, expected)


@pytest.fixture
def rule() -> Any:
    """``IngraphRMSProp`` as the guide states it."""
    namespace = {"torch": torch, "diffopt": diffopt}
    exec(source_of("class IngraphRMSProp").split("\n\n\n")[0], namespace)
    return namespace["IngraphRMSProp"]


@pytest.mark.parametrize("momentum", [None, 0.7])
@pytest.mark.parametrize("segment", [None, 2])
def test_rmsprop_with_everything_learned(
    torch_maml: Any, rule: Any, momentum: float | None, segment: int | None
) -> None:
    options = {"learning_rate": 0.05, "beta": 0.9, "epsilon": 0.1, "momentum": momentum}
    theirs = torch_maml.IngraphRMSProp(
        **{key: x if x is None else torch.tensor(x) for key, x in options.items()},
        force_trainable_params=True,
    )
    names = [key for key, x in options.items() if x is not None]
    learned = [getattr(theirs, key) for key in names]
    expected = in_torch_maml(torch_maml, theirs, learned=learned, segment=segment)

    ours = {key: torch.tensor(options[key], requires_grad=True) for key in names}

    def make_opt(model: nn.Module) -> Any:
        lr, beta, eps = ours["learning_rate"], ours["beta"], ours["epsilon"]
        return rule(model.parameters(), lr, ours.get("momentum", 0.0), beta, eps)

    assert_equal(in_diffopt(make_opt, learned=list(ours.values()), segment=segment), expected)


def test_rmsprop_continued_from_its_state(torch_maml: Any, rule: Any) -> None:
    theirs = torch_maml.IngraphRMSProp(learning_rate=0.05, beta=0.9, epsilon=0.1, momentum=0.5)
    model = network()
    maml = torch_maml.NaiveMAML(model, cross_entropy, optimizer=theirs)
    first = maml(INPUTS[:2])
    again = torch_maml.NaiveMAML(first.model, cross_entropy, optimizer=theirs)
    second = again(INPUTS[2:], optimizer_state=first.optimizer_state)
    expected = gradients(model, second.model, second.loss_history, [])

    model = network()
    opt = rule(model.parameters(), 0.05, momentum=0.5, beta=0.9, eps=0.1)
    fast = diffopt.unroll(model, opt, INPUTS[:2], cross_entropy)
    fast = diffopt.unroll(model, opt, INPUTS[2:], cross_entropy, initial=fast)
    assert_equal(gradients(model, fast, fast.losses, []), expected)


def test_the_rule_of_rmsprop_is_its_equations(rule: Any) -> None:
    weight = torch.tensor([0.8, -1.1], requires_grad=True)
    lr = torch.tensor(0.05, requires_grad=True)
    w, b, v = weight, None, None
    for _ in range(4):
        (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
        v = g**2 if v is None else 0.9 * v + 0.1 * g**2
        b = (g if b is None else 0.5 * b + g) / (v + 0.01) ** 0.5
        w = w - lr * b
    expected = torch.autograd.grad((w**2).sum(), [weight, lr])

    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.detach().clone())

    model = Cubic()
    opt = rule(model.parameters(), lr, momentum=0.5, beta=0.9, eps=0.01)
    fast = diffopt.unroll(model, opt, 4, lambda m, t: (m.weight**3).sum())
    found = torch.autograd.grad((fast.params["weight"] ** 2).sum(), [model.weight, lr])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


# Optimizers of your own.


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)
    return run(TOP / "docs/pages/own-optimizers.md")


def test_a_learned_optimizer_gets_the_gradient_of_a_plain_loop(own: dict[str, Any]) -> None:
    model, net = network(), nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    weights = dict(model.named_parameters())
    averages = {name: torch.zeros_like(p) for name, p in weights.items()}
    for batch in INPUTS:
        loss = cross_entropy(partial(torch.func.functional_call, model, weights), batch)
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for (name, p), g in zip(list(weights.items()), grads, strict=True):
            averages[name] = 0.9 * averages[name] + 0.1 * g
            seen = torch.stack([g, averages[name]], -1)
            weights[name] = p - 0.1 * net(seen).squeeze(-1)
    final = cross_entropy(partial(torch.func.functional_call, model, weights), INPUTS[0])
    inputs = [*net.parameters(), *model.parameters()]
    expected = torch.autograd.grad(final, inputs)
    fast = diffopt.unroll(model, own["LearnedRule"](model.parameters(), net), INPUTS, cross_entropy)
    found = torch.autograd.grad(cross_entropy(fast, INPUTS[0]), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["Lion", "LearnedOptimizer"])
def test_a_registered_optimizer_goes_on_from_its_state(own: dict[str, Any], name: str) -> None:
    model, net = network(), nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    options = {"lr": 0.01, "weight_decay": 0.1} if name == "Lion" else {"net": net}
    opt = own[name](model.parameters(), **options)

    def train(batches: Any) -> None:
        for batch in batches:
            model.zero_grad()
            cross_entropy(model, batch).backward()
            opt.step()

    train(INPUTS[:2])
    fast = diffopt.unroll(model, opt, INPUTS[2:], cross_entropy)
    train(INPUTS[2:])
    for key, p in model.named_parameters():
        torch.testing.assert_close(fast.params[key], p)
        torch.testing.assert_close(fast.opt_state[key]["exp_avg"], opt.state[p]["exp_avg"])
