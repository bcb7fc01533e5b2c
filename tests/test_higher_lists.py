"""Several optimizers over one patched module, against ``higher``'s loop or one written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoints import every_adjoint
from plugged import Net, batches, groups, loss_fn
from torch import Tensor
from torch.func import functional_call

pytest.importorskip("diffopt.higher", exc_type=ImportError)

import higher

import diffopt

BATCHES = batches(6)
STEPS, QUERY = BATCHES[:5], BATCHES[5]
Pair = tuple[Any, list[Any]]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def patched(model: Net, *opts: Any, options: tuple[Any, ...] = ({}, {})) -> Pair:
    """One patched module, and a differentiable optimizer for each."""
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    made = [
        higher.get_diff_optim(opt, model.parameters(), fmodel=fmodel, **own)
        for opt, own in zip(opts, options, strict=True)
    ]
    return fmodel, made


def of_higher(model: Net, rates: list[Tensor], **options: Any) -> Pair:
    first, second = groups(model)
    return patched(
        model,
        torch.optim.SGD([first], lr=0.0, momentum=0.9),
        torch.optim.Adam([second], lr=0.0, eps=1e-2),
        options=tuple({"override": {"lr": [rate]}, **options} for rate in rates),
    )


def of_diffopt(model: Net, rates: list[Tensor], **options: Any) -> Pair:
    first, second = groups(model)
    return patched(
        model,
        diffopt.SGD([first], lr=rates[0], momentum=0.9),
        diffopt.Adam([second], lr=lambda t: rates[1] * (1 + t) ** 0.5, eps=1e-2),
        options=(options, options),
    )


def mixed(model: Net, rates: list[Tensor], **options: Any) -> Pair:
    first, second = groups(model)
    return patched(
        model,
        torch.optim.SGD([first], lr=0.0, momentum=0.9),
        diffopt.Adam([second], lr=rates[1], eps=1e-2),
        options=({"override": {"lr": rates[:1]}, **options}, options),
    )


def by_steps(fmodel: Any, dopts: list[Any], steps: Any = STEPS) -> None:
    for batch in steps:
        loss = loss_fn(fmodel, batch)  # of the weights before both updates
        for dopt in dopts:
            dopt.step(loss)


def outcome(make: Callable[..., Pair], loop: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    model = Net()
    rates = [torch.tensor(x, requires_grad=True) for x in (0.1, 0.05)]
    fmodel, dopts = make(model, rates, **options)
    loop(fmodel, dopts)
    by_steps(fmodel, dopts, STEPS[:1])  # what is left goes on
    inputs = [*(p for p in model.parameters() if p.requires_grad), *rates]
    loss = loss_fn(fmodel, QUERY)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return list(fmodel.parameters()), grads


@pytest.mark.parametrize("make", [of_higher, of_diffopt, mixed])
@every_adjoint
def test_one_unroll_is_the_loop_that_steps_them_in_turn(make: Any, adjoint: Any) -> None:
    def unrolled(fmodel: Any, dopts: list[Any]) -> None:
        fast = diffopt.unroll(fmodel, dopts, STEPS, loss_fn, adjoint=adjoint)
        assert {"momentum_buffer"} == fast.opt_state["part.weight"].keys()
        assert {"exp_avg", "exp_avg_sq", "step"} == fast.opt_state["back.bias"].keys()

    expected = outcome(make, by_steps)
    assert all(x.abs().sum() > 0 for x in expected[1][-2:])
    torch.testing.assert_close(outcome(make, unrolled), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [of_higher, of_diffopt, mixed])
def test_steps_and_unrolls_take_turns(make: Any) -> None:
    def in_turns(fmodel: Any, dopts: list[Any]) -> None:
        by_steps(fmodel, dopts, STEPS[:1])
        diffopt.unroll(fmodel, dopts, STEPS[1:3], loss_fn, segment=2)
        by_steps(fmodel, dopts, STEPS[3:4])
        diffopt.unroll(fmodel, tuple(dopts), STEPS[4:], loss_fn)

    expected = outcome(make, by_steps)
    torch.testing.assert_close(outcome(make, in_turns), expected, rtol=1e-9, atol=1e-11)


def test_blocks_that_alternate_are_a_plain_loop() -> None:
    """Two steps of one, two of the other: each inner gradient takes the others' weights as given.

    Not so in ``higher``'s loop, whose ``step`` differentiates the loss with respect to weights that
    another optimizer's last update was computed from, and so through that update.
    """
    torch.manual_seed(3)
    model = Net()
    blocks = [["part.weight"], ["back.weight", "back.bias", "part.bias", "again.bias"]]
    rates = [torch.tensor(x, requires_grad=True) for x in (0.3, 0.2)]
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for i in (0, 1, 0, 1):
        for batch in STEPS[2 * i : 2 * i + 2]:
            inner = {name: weights[name].view_as(weights[name]) for name in blocks[i]}
            loss = loss_fn(lambda x, w={**weights, **inner}: functional_call(model, w, x), batch)
            grads = torch.autograd.grad(loss, [*inner.values()], create_graph=True)
            for name, grad in zip(inner, grads, strict=True):
                weights[name] = weights[name] - rates[i] * grad
    inputs = [model.part.weight, model.back.weight, model.again.bias, *rates]
    loss = loss_fn(lambda x: functional_call(model, weights, x), QUERY)
    expected = torch.autograd.grad(loss, inputs)
    own = dict(model.named_parameters())
    for library in (torch.optim, diffopt):
        opts = [library.SGD([own[name] for name in names], lr=0.0) for names in blocks]
        options = tuple({"override": {"lr": [rate]}} for rate in rates)
        fmodel, dopts = patched(model, *opts, options=options)
        for i in (0, 1, 0, 1):
            diffopt.unroll(fmodel, dopts[i], STEPS[2 * i : 2 * i + 2], loss_fn, segment=1)
        found = torch.autograd.grad(loss_fn(fmodel, QUERY), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_without_tracking() -> None:
    def unrolled(fmodel: Any, dopts: list[Any]) -> None:
        diffopt.unroll(fmodel, dopts, STEPS, loss_fn)

    torch.manual_seed(3)
    weights = []
    for loop, track in ((by_steps, True), (unrolled, False)):
        torch.manual_seed(3)
        fmodel, dopts = mixed(Net(), [torch.tensor(0.1)] * 2, track_higher_grads=track)
        loop(fmodel, dopts)
        weights.append(list(fmodel.parameters()))
    assert all(p.is_leaf for p in weights[1])
    torch.testing.assert_close([p.detach() for p in weights[0]], [p.detach() for p in weights[1]])


def test_each_grad_callback_sees_what_it_sees_in_the_loop() -> None:
    """By the norm of all gradients there are: the second has none of the first one's weights."""
    seen: list[list[bool]] = []

    def clipped(grads: Any) -> list[Any]:
        seen.append([g is not None for g in grads])
        norm = sum(g.square().sum() for g in grads if g is not None) ** 0.5
        return [None if g is None else g / (1 + norm) for g in grads]

    def unrolled(fmodel: Any, dopts: list[Any]) -> None:
        diffopt.unroll(fmodel, dopts, STEPS, loss_fn, adjoint=diffopt.StoreAll())

    expected = outcome(of_higher, by_steps, grad_callback=clipped)
    of_loop = seen[:2]
    seen.clear()
    found = outcome(of_higher, unrolled, grad_callback=clipped)
    assert seen[:2] == of_loop
    assert of_loop[0] != of_loop[1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def plain(model: Net, lr: Tensor, log_lr: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """SGD with momentum over the shared weight, AdamW over the rest, written out."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    learned = [n for n, p in weights.items() if p.requires_grad and n != "unused"]
    state = {name: [torch.zeros_like(weights[name])] * 2 for name in learned}
    for t, (x, y) in enumerate(STEPS, start=1):
        loss = torch.nn.functional.mse_loss(functional_call(model, weights, x), y)
        grads = torch.autograd.grad(loss, [weights[n] for n in learned], create_graph=True)
        for name, g in zip(learned, grads, strict=True):
            w, (m, v) = weights[name], state[name]
            if name == "part.weight":
                m = 0.9 * m + g
                weights[name] = w - lr * m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
                decayed = w * (1 - log_lr.exp() * 0.1)
                scaled = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-2)
                weights[name] = decayed - log_lr.exp() * scaled
            state[name] = [m, v]
    x, y = QUERY
    return weights, torch.nn.functional.mse_loss(functional_call(model, weights, x), y)


@pytest.mark.parametrize("way", ["steps", "unroll", "two steps and an unroll"])
def test_a_list_in_innerloop_ctx_is_a_plain_loop(way: str) -> None:
    torch.manual_seed(3)
    model = Net()
    lr = torch.tensor(0.1, requires_grad=True)
    log_lr = torch.tensor(-2.5, requires_grad=True)
    first, second = groups(model)
    options: Any = {"lr": lambda t: log_lr.exp(), "betas": (0.9, 0.99), "eps": 1e-2}
    opts = [
        diffopt.SGD([first], lr=lr, momentum=0.9),
        diffopt.AdamW([second], weight_decay=0.1, **options),
    ]
    inputs = [model.part.weight, model.back.weight, model.again.bias, lr, log_lr]
    weights, loss = plain(model, lr, log_lr)
    expected = torch.autograd.grad(loss, inputs)
    split = {"steps": 5, "unroll": 0}.get(way, 2)
    with higher.innerloop_ctx(model, opts, copy_initial_weights=False) as (fmodel, dopt):
        for batch in STEPS[:split]:
            dopt.step(loss_fn(fmodel, batch))
        if STEPS[split:]:
            diffopt.unroll(fmodel, dopt, STEPS[split:], loss_fn, segment=2)
        found = torch.autograd.grad(loss_fn(fmodel, QUERY), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for name, x in fmodel.named_parameters():
        torch.testing.assert_close(x, weights[name], rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_and_adamw_step_as_torch_optim_does() -> None:
    torch.manual_seed(3)
    model = Net()

    def made(model: Net) -> list[torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() < 2 and p.requires_grad]
        return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(rest, lr=0.05)]

    with higher.innerloop_ctx(model, made(model)) as (fmodel, dopt):
        by_steps(fmodel, [dopt], STEPS[:2])
        diffopt.unroll(fmodel, dopt, STEPS[2:], loss_fn)
    opts = made(model)
    for batch in STEPS:
        model.zero_grad()
        loss_fn(model, batch).backward()
        for opt in opts:
            opt.step()
    found, theirs = fmodel.parameters(), model.parameters()
    torch.testing.assert_close([*found], [*theirs], rtol=1e-5, atol=1e-7)


def test_a_list_and_one_more() -> None:
    def lists(model: Net, rates: list[Tensor], *, nested: bool) -> Pair:
        first, second = groups(model)
        first = {"params": [p for p in first["params"] if p.requires_grad]}
        biases = [p for p in second["params"] if p.dim() == 1]
        matrices = [p for p in second["params"] if p.dim() == 2]
        sgd = diffopt.SGD([first], lr=rates[0])
        opts: list[Any] = [
            diffopt.Adam(biases, lr=rates[1], eps=1e-2),
            diffopt.RMSprop(matrices, lr=0.01, eps=1e-2),
        ]
        if not nested:
            return patched(model, sgd, *opts, options=({},) * 3)
        return patched(model, sgd, opts)

    def unrolled(fmodel: Any, dopts: list[Any]) -> None:
        diffopt.unroll(fmodel, dopts, STEPS, loss_fn, segment=2)

    expected = outcome(lists, by_steps, nested=False)
    for loop in (by_steps, unrolled):
        found = outcome(lists, loop, nested=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_override_of_a_list_is_by_param_group() -> None:
    model = Net()
    rates = [torch.tensor(x, requires_grad=True) for x in (0.1, 0.05)]

    def made(*lr: Any) -> list[Any]:
        first, second = groups(model)
        return [diffopt.SGD([first], lr=lr[0]), diffopt.Adam([second], lr=lr[1])]

    losses = []
    for given, override in ((made(9.0, 9.0), {"lr": rates}), (made(*rates), None)):
        with higher.innerloop_ctx(model, given, override=override) as (fmodel, dopt):
            diffopt.unroll(fmodel, dopt, STEPS, loss_fn)
            losses.append(loss_fn(fmodel, QUERY))
    grads = [torch.autograd.grad(loss, rates) for loss in losses]
    torch.testing.assert_close(grads[0], grads[1])
    with (
        pytest.raises(ValueError, match="has 'betas', which is no option of SGD: those are lr,"),
        higher.innerloop_ctx(model, made(*rates), override={"betas": [(0.9, 0.9)]}),
    ):
        pass


class TestErrors:
    def test_the_same_weight_in_two(self) -> None:
        model = Net()
        sgd, adam = diffopt.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model.parameters())
        fmodel, dopts = patched(model, sgd, adam)
        message = r"SGD and EarlierAdam both hold the parameter 'unused'|'frozen'"
        with pytest.raises(ValueError, match=message):
            diffopt.unroll(fmodel, dopts, STEPS, loss_fn)
        opts: Any = [sgd, adam]
        with pytest.raises(ValueError, match="SGD and Adam both hold the parameter"):
            higher.get_diff_optim(opts, model.parameters(), fmodel=fmodel)

    def test_what_does_not_belong_together(self) -> None:
        model = Net()
        rates = [torch.tensor(0.1)] * 2
        fmodel, dopts = of_diffopt(model, rates)
        plain_opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TypeError, match="patched by higher, and opt is a SGD"):
            diffopt.unroll(fmodel, [dopts[0], plain_opt], STEPS, loss_fn)
        with pytest.raises(TypeError, match="opt comes from higher, and model is a plain Net"):
            diffopt.unroll(model, [plain_opt, dopts[0]], STEPS, loss_fn)
        with pytest.raises(ValueError, match="list of optimizers is empty"):
            diffopt.unroll(fmodel, [], STEPS, loss_fn)
        _, others = of_diffopt(model, rates)
        with pytest.raises(ValueError, match=r"opt updates another fmodel.*get_diff_optim"):
            diffopt.unroll(fmodel, [dopts[0], others[1]], STEPS, loss_fn)
        untracked = patched(
            model, plain_opt, plain_opt, options=({}, {"track_higher_grads": False})
        )
        with pytest.raises(ValueError, match="some optimizers of the list have track_higher_grads"):
            diffopt.unroll(untracked[0], [*untracked[1]], STEPS, loss_fn)

    def test_numbers_of_steps_that_differ(self) -> None:
        fmodel, dopts = of_diffopt(Net(), [torch.tensor(0.1)] * 2)
        by_steps(fmodel, dopts[:1], STEPS[:2])
        with pytest.raises(ValueError, match=r"have taken 0 and 2 steps.*dopt.steps = n"):
            diffopt.unroll(fmodel, dopts, STEPS, loss_fn)
        dopts[1].steps = 2
        assert diffopt.unroll(fmodel, dopts, STEPS, loss_fn).step == 7
