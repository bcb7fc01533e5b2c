"""The backward pass within autograd: hooks, retained graphs, changed inputs, nesting, memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adjoints import every_adjoint
from helpers import assert_all_close, batch, batches, called, mse, new_objects_only, tiny
from oracle import plain
from torch import Tensor, nn

import diffopt

T = 4


def sgd(model: nn.Module, lr: Any = 0.2, **options: Any) -> diffopt.SGD:
    return diffopt.SGD(model.parameters(), lr=lr, **options)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Hooks and retained gradients: once, with the whole gradient, as in a plain loop.


@every_adjoint
def test_tensor_hooks_act_once(adjoint: diffopt.Adjoint) -> None:
    model, data, a, log_lr = tiny(), batches(T), number(0.7), number(-2.0)
    x = data[0][0].requires_grad_()

    def run(train: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        b, lr = a.exp(), log_lr.exp()
        b.retain_grad()
        calls: list[Tensor] = []

        def doubled(g: Tensor) -> Tensor:
            calls.append(g.detach().clone())
            return 2 * g

        hooked = [a, b, lr, x, model[0].weight]
        handles = [y.register_hook(doubled) for y in hooked]
        loss_fn = lambda m, pair: mse(m, pair) * (b + a)  # noqa: E731
        train(loss_fn, lr).losses.sum().backward()
        for handle in handles:
            handle.remove()
        inputs = [a, log_lr, x, model[0].weight]
        grads = [y.grad for y in inputs]
        for y in inputs:
            y.grad = None
        return sorted(calls, key=lambda g: g.sum().item()), [b.grad], grads

    want = run(lambda loss_fn, lr: plain(model, {"lr": lr}, data, loss_fn))
    got = run(
        lambda loss_fn, lr: diffopt.unroll(model, sgd(model, lr), data, loss_fn, adjoint=adjoint)
    )
    for some, others in zip(got, want, strict=True):
        assert_all_close(some, others, rtol=1e-10, atol=1e-13)


def test_post_accumulate_hooks_act_once() -> None:
    model, data, a = tiny(), batches(T), number(0.7)
    calls: list[Any] = []
    a.register_post_accumulate_grad_hook(calls.append)
    fast = diffopt.unroll(model, sgd(model), data, lambda m, b: mse(m, b) * a, segment=2)
    fast.losses.sum().backward()
    assert len(calls) == 1
    assert calls[0] is a


@every_adjoint
def test_retain_graph(adjoint: diffopt.Adjoint) -> None:
    model, data, query, a = tiny(), batches(T), batch(), number(0.7)
    fast = diffopt.unroll(
        model, diffopt.Adam(model.parameters()), data, lambda m, b: mse(m, b) * a, adjoint=adjoint
    )
    inputs = [a, *model.parameters()]
    outcome = mse(fast, query) + fast.losses.sum()
    first = torch.autograd.grad(outcome, inputs, retain_graph=True)
    second = torch.autograd.grad(outcome, inputs, retain_graph=True)
    connected = torch.autograd.grad(outcome, inputs, create_graph=True)
    third = torch.autograd.grad(outcome, inputs)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
    assert_all_close(connected, first, rtol=1e-11, atol=1e-14)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        fast.losses.sum().backward()


def test_two_outcomes_of_one_unroll() -> None:
    model, data, query = tiny(), batches(T), batch()
    fast = diffopt.unroll(model, sgd(model), data, mse)
    reference = plain(model, {"lr": 0.2}, data, mse)
    inputs = list(model.parameters())
    for f in (lambda r: mse(r, query), lambda r: r.losses[2], lambda r: r.params["2.bias"].sum()):
        got = torch.autograd.grad(f(fast), inputs, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(f(reference), inputs, retain_graph=True, allow_unused=True)
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)


def test_gradient_with_respect_to_one_input_alone() -> None:
    model, data, a, b = tiny(), batches(T), number(0.7), number(0.2)
    fast = diffopt.unroll(model, sgd(model), data, lambda m, p: mse(m, p) * a + b * m[0].bias.sum())
    reference = plain(model, {"lr": 0.2}, data, lambda m, p: mse(m, p) * a + b * m[0].bias.sum())
    for x in (a, b, model[2].weight):
        (got,) = torch.autograd.grad(fast.losses.sum(), x, retain_graph=True)
        (want,) = torch.autograd.grad(reference.losses.sum(), x, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    fast.losses.sum().backward(inputs=[a])
    assert a.grad is not None
    assert b.grad is None
    assert model[0].weight.grad is None


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam", "AdamW", "RMSprop"])
def test_given_cotangents_and_inputs_are_not_written_into(name: str) -> None:
    model, data = tiny(), batches(T)
    opt: diffopt.Optimizer = getattr(diffopt, name)(model.parameters())
    fast = diffopt.unroll(model, opt, data, mse, segment=2)
    held = [x for entries in fast.opt_state.values() for x in entries.values() if x.requires_grad]
    outputs = [*fast.params.values(), fast.losses, *held]
    cotangents = [torch.randn_like(x) for x in outputs]
    before = [x.clone() for x in [*cotangents, *outputs, *model.parameters()]]
    torch.autograd.grad(outputs, list(model.parameters()), cotangents, create_graph=True)
    torch.autograd.grad(outputs, list(model.parameters()), cotangents)
    after = [*cotangents, *outputs, *model.parameters()]
    assert all(map(torch.equal, before, after))
    assert all(x._version == 0 for x in cotangents)


def test_anomaly_mode() -> None:
    model, data = tiny(), batches(T)
    with torch.autograd.set_detect_anomaly(True):
        fast = diffopt.unroll(model, diffopt.Adam(model.parameters()), data, mse, segment=2)
        fast.losses.sum().backward()
    assert model[0].weight.grad is not None


# Inputs that change between the call and the backward pass.


def changed(what: str) -> tuple[nn.Module, diffopt.Unrolled, Callable[[], Any]]:
    model, data, lr = tiny(), batches(T), number(0.2)
    extra = nn.Linear(2, 2).double()
    model.extra = extra
    model.forward = lambda x: extra(model[2](model[1](model[0](x))))  # type: ignore[method-assign]
    opt = diffopt.SGD([*model[0].parameters(), *model[2].parameters()], lr=lr)
    momentum = number(0.1)
    opt.param_groups[0]["momentum"] = 0.5
    buffer = torch.zeros(2).double()
    opt.state[model[2].bias] = {"momentum_buffer": buffer.requires_grad_()}
    a = number(0.7)
    b = a.exp()
    fast = diffopt.unroll(model, opt, data, lambda m, p: mse(m, p) * a * b)
    target = {
        "a trained parameter": model[0].weight,
        "another parameter": extra.weight,
        "a batch": data[1][0],
        "a hyperparameter": lr,
        "optimizer state": buffer,
        "a captured leaf": a,
        "a captured function of it": b,
    }[what]
    del momentum

    def change() -> None:
        with torch.no_grad():
            target.add_(1)

    return model, fast, change


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "what",
    [
        "a trained parameter",
        "another parameter",
        "a batch",
        "a hyperparameter",
        "optimizer state",
        "a captured leaf",
        "a captured function of it",
    ],
)
def test_an_input_changed_in_place_is_an_error(what: str, create_graph: bool) -> None:
    _, fast, change = changed(what)
    fast.losses.sum().backward(retain_graph=True)
    change()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast.losses.sum().backward(create_graph=create_graph)


def test_an_outer_step_before_the_backward_pass_is_an_error() -> None:
    model, data = tiny(), batches(T)
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = diffopt.unroll(model, sgd(model), data, mse)
    mse(model, data[0]).backward()
    outer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast.losses.sum().backward()


def test_buffers_may_change_before_the_backward_pass() -> None:
    """Using the model in between is no mistake."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    data = [torch.randn(5, 2).double() for _ in range(T)]
    loss_fn = lambda m, x: m(x).pow(3).mean()  # noqa: E731
    grads = []
    for use in (False, True):
        model[1].reset_running_stats()
        fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=2)
        if use:
            model(data[0])
            model[1].running_mean.fill_(7.0)
        grads.append(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))
    assert all(map(torch.equal, *grads))


def test_results_may_be_changed_in_place() -> None:
    """They share no memory with what the way back starts from."""
    model, data = tiny(), batches(T)

    def loss_fn(model: Any, pair: Any) -> Tensor:
        if pair is data[3]:
            return model[0](pair[0]).square().mean()  # leaves the last layer where it was
        return mse(model, pair)

    for adjoint in (diffopt.Segmented(1), diffopt.StoreAll()):
        fast = diffopt.unroll(model, sgd(model, momentum=0.5), data, loss_fn, adjoint=adjoint)
        loss = fast.losses.sum()
        want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        with torch.no_grad():
            for x in [
                *fast.params.values(),
                *(s["momentum_buffer"] for s in fast.opt_state.values()),
            ]:
                x.zero_()
        got = torch.autograd.grad(loss, list(model.parameters()))
        assert all(map(torch.equal, got, want))


# Variables that are bound to another tensor meanwhile.


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("part", ["loss", "grad_transform", "hyperparameters"])
def test_a_captured_variable_bound_anew_is_an_error(part: str, create_graph: bool) -> None:
    model, data = tiny(), batches(T)
    held = {name: number(0.7) for name in ("loss", "grad_transform", "hyperparameters")}
    fast = diffopt.unroll(
        model,
        sgd(model, lr=lambda t: held["hyperparameters"] * 0.1),
        data,
        lambda m, p: mse(m, p) * held["loss"],
        grad_transform=lambda g: {n: x * held["grad_transform"] for n, x in g.items()},
        segment=1,
    )
    for replacement in (number(0.7), 0.7):
        before, held[part] = held[part], replacement
        with pytest.raises(
            RuntimeError,
            match=rf"step . does not use .* again, in its {part}: was a variable bound",
        ):
            fast.losses.sum().backward(create_graph=create_graph, retain_graph=True)
        held[part] = before
    fast.losses.sum().backward(create_graph=create_graph)


def test_attributes_of_the_model_may_be_bound_anew() -> None:
    """They are the call's on the way back."""
    model, data, scale = tiny(), batches(T), number(0.7)
    model.scale = scale
    fast = diffopt.unroll(model, sgd(model), data, lambda m, p: mse(m, p) * m.scale)
    model.scale = number(3.0)
    fast.losses.sum().backward()
    reference = plain(model, {"lr": 0.2}, data, lambda m, p: mse(m, p) * scale)
    (want,) = torch.autograd.grad(reference.losses.sum(), scale)
    torch.testing.assert_close(scale.grad, want, rtol=1e-10, atol=1e-13)
    assert model.scale.grad is None


def test_a_tensor_that_only_the_gradient_depends_on() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * strength

    model, data, strength = tiny(), batches(T), number(0.7)
    fast = diffopt.unroll(model, sgd(model), data, lambda m, p: Scaled.apply(mse(m, p)), segment=1)
    (grad,) = torch.autograd.grad(fast.losses.sum(), strength)
    reference = plain(model, {"lr": 0.2}, data, lambda m, p: Scaled.apply(mse(m, p)))
    (want,) = torch.autograd.grad(reference.losses.sum(), strength)
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)


def test_tensors_that_a_step_keeps_for_the_next_are_an_error() -> None:
    model, data, held = tiny(), batches(T), [torch.zeros(()).double()]

    def carries(model: Any, pair: Any) -> Tensor:
        held[0] = mse(model, pair) + 0.1 * held[0]
        return held[0]

    with pytest.raises(NotImplementedError, match=r"step 1 uses a tensor .* earlier step made"):
        diffopt.unroll(model, sgd(model), data, carries)

    def keeps(model: Any, pair: Any) -> Tensor:
        held[0] = pair[0].clone().requires_grad_()
        return mse(model, (held[0], pair[1]))

    fast = diffopt.unroll(model, sgd(model), data, keeps, segment=1)
    inputs = list(model.parameters())
    got = torch.autograd.grad(fast.losses.sum(), inputs)
    want = torch.autograd.grad(plain(model, {"lr": 0.2}, data, mse).losses.sum(), inputs)
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)  # a leaf made anew each time is no state


# Threads.


@every_adjoint
def test_threads(adjoint: diffopt.Adjoint) -> None:
    """Each thread its own model; and the backward pass on another thread than the call."""

    def one(seed: int) -> None:
        model, data, a = tiny(), batches(T), number(0.7)

        def run(train: Callable[..., Any]) -> Tensor:
            b = a.exp()
            outcome: Tensor = train(lambda m, p: mse(m, p) * b * a).losses.sum()
            return outcome

        inputs = [a, *model.parameters()]
        want = torch.autograd.grad(run(lambda fn: plain(model, {"lr": 0.2}, data, fn)), inputs)
        outcome = run(lambda fn: diffopt.unroll(model, sgd(model), data, fn, adjoint=adjoint))
        with ThreadPoolExecutor(1) as other:
            got = other.submit(torch.autograd.grad, outcome, inputs).result()
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)

    one(0)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))


def test_a_tensor_computed_on_another_thread() -> None:
    model, data, a, found = tiny(), batches(T), number(0.7), []
    for _ in range(2000):
        a * 1.0  # this thread is ahead of a new one in numbering its nodes
    b = a.exp()

    def captured() -> Any:
        return diffopt.unroll(model, sgd(model), data, lambda m, p: mse(m, p) * b)

    def inside_the_batch() -> Any:
        steps = [(pair, b) for pair in data]
        return diffopt.unroll(model, sgd(model), steps, lambda m, s: mse(m, s[0]) * s[1])

    with ThreadPoolExecutor(1) as other:
        for run in (captured, inside_the_batch):
            a.grad, b = None, a.exp()
            other.submit(run).result().losses.sum().backward()
            found.append(a.grad)
    reference = plain(model, {"lr": 0.2}, data, lambda m, p: mse(m, p) * a.exp())
    (want,) = torch.autograd.grad(reference.losses.sum(), a)
    torch.testing.assert_close(found, [want, want])


# Nesting.


@every_adjoint
def test_an_unroll_within_an_unroll(adjoint: diffopt.Adjoint) -> None:
    """The inner loss of the outer loop adapts for two steps first: MAML, itself unrolled."""
    model, data, query, lr = tiny(), batches(3), batch(), number(0.2)
    log_scale = number(-0.5)
    names = [name for name, _ in model.named_parameters()]

    def outer_loss(adapt: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
        return lambda m, pair: mse(adapt(m, pair), query) + 0.1 * mse(m, pair)

    def adapt(m: Any, pair: Any) -> Any:
        # The fast weights are no leaves, so the inner model is another one that starts from them.
        start = dict(m.named_parameters())
        return diffopt.unroll(
            learner, sgd(learner, lr), [pair] * 2, scaled, initial=start, adjoint=adjoint
        )

    def adapt_plainly(m: Any, pair: Any) -> Any:
        start = dict(m.named_parameters())
        return plain(learner, {"lr": lr}, [pair] * 2, scaled, initial=start)

    def scaled(m: Any, pair: Any) -> Tensor:
        return mse(m, pair) * log_scale.exp()

    learner = tiny()
    inputs = [lr, log_scale, *model.parameters()]
    fast = diffopt.unroll(model, sgd(model, 0.1), data, outer_loss(adapt), adjoint=adjoint)
    got = torch.autograd.grad(mse(fast, query), inputs)
    reference = plain(model, {"lr": 0.1}, data, outer_loss(adapt_plainly))
    want = torch.autograd.grad(mse(reference, query), inputs)
    assert_all_close(got, want, rtol=1e-9, atol=1e-12)
    assert names == list(fast.params)


def test_maml_of_an_outer_loop_that_is_differentiated() -> None:
    """Two outer SGD steps by hand over a MAML loss: the third derivative of the model."""
    model, data, queries, meta_lr = tiny(), batches(2), batches(2), number(0.3)

    def outcome(train: Callable[..., Any]) -> Tensor:
        params = dict(model.named_parameters())
        for pair, query in zip(data, queries, strict=True):
            fast = train(model, [pair] * 2, params)
            loss = mse(fast, query)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {n: p - meta_lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
        return called(model, params, mse, queries[0])

    inputs = [meta_lr, *model.parameters()]
    got = torch.autograd.grad(
        outcome(lambda m, steps, start: diffopt.unroll(m, sgd(m), steps, mse, initial=start)),
        inputs,
    )
    want = torch.autograd.grad(
        outcome(lambda m, steps, start: plain(m, {"lr": 0.2}, steps, mse, initial=start)), inputs
    )
    assert_all_close(got, want, rtol=1e-9, atol=1e-12)


# Memory.


def live_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.mark.parametrize("create_graph", [False, True])
@every_adjoint
def test_nothing_is_left_behind(adjoint: diffopt.Adjoint, create_graph: bool) -> None:
    """Without the garbage collector: there are no reference cycles through the graph."""
    model, data, log_lr = tiny(), batches(3), number(-2.0)

    def outer_step() -> None:
        lr = log_lr.exp()
        fast = diffopt.unroll(
            model, diffopt.Adam(model.parameters(), lr=lr), data, mse, adjoint=adjoint
        )
        outcome = mse(fast, data[0])
        inputs = [log_lr, *model.parameters()]
        grads = torch.autograd.grad(outcome, inputs, create_graph=create_graph)
        if create_graph:
            torch.autograd.grad(sum(g.sum() for g in grads), inputs)
        rate = log_lr.exp()
        diffopt.unroll(model, sgd(model, rate), data, mse, adjoint=adjoint)  # and never backward

    outer_step()
    counts = []
    with new_objects_only():
        for repeats in (3, 6):
            for _ in range(repeats):
                outer_step()
            counts.append(live_tensors())
    assert counts[0] == counts[1]


def test_only_the_captured_tensor_is_kept_of_what_a_search_saw() -> None:
    model, data, a = tiny(), batches(2), number(0.7)
    seen = []
    b = a.exp()

    def loss_fn(model: Any, pair: Any) -> Tensor:
        out = model(pair[0])
        seen.append(weakref.ref(out))
        return F.mse_loss(out, pair[1]) * b

    fast = diffopt.unroll(model, sgd(model), data, loss_fn, segment=1)
    assert all(x() is None for x in seen)
    fast.losses.sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize("adjoint", [diffopt.StoreAll(), diffopt.Segmented(1)], ids=repr)
def test_the_backward_pass_frees_what_was_kept(adjoint: diffopt.Adjoint) -> None:
    model, data = tiny(), batches(8)
    held = {}
    for mode in ("before", "retained", "after"):
        with new_objects_only():
            fast = diffopt.unroll(model, sgd(model), data, mse, adjoint=adjoint)
            if mode != "before":
                fast.losses.sum().backward(retain_graph=mode == "retained")
            gc.collect()
            present = live_tensors()
            del fast
            gc.collect()
            held[mode] = present - live_tensors()
    assert held["after"] == 6  # four parameters, the losses, and the state of the random generator
    assert held["before"] > 8 * 4
    assert held["retained"] == held["before"]
