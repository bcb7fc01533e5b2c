"""``diffopt.unroll`` in the place of ``higher``'s loop of ``dopt.step``, which is the oracle."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from plugged import Net, batches, groups, loss_fn
from torch import Tensor, nn

pytest.importorskip("diffopt.higher", exc_type=ImportError)

import higher

import diffopt

BATCHES = batches(7)
STEPS, QUERY = BATCHES[:6], BATCHES[6]

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("Adadelta", {"lr": 0.5}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1}),
    ("Adamax", {"lr": 0.05}),
    ("ASGD", {"lr": 0.05, "lambd": 0.1, "t0": 2}),
    ("RMSprop", {"lr": 0.05, "momentum": 0.5}),
    ("RMSprop", {"lr": 0.05, "centered": True, "alpha": 0.9, "eps": 1e-3}),
    ("Rprop", {"lr": 0.05}),
]
every_optimizer = pytest.mark.parametrize(
    ("name", "options"), OPTIMIZERS, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


@contextlib.contextmanager
def inner_loop(model: nn.Module, opt: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    """``innerloop_ctx``, without what ``higher`` says about its RMSprop and Rprop."""
    options = {"copy_initial_weights": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Differentiable R", UserWarning)
        context = higher.innerloop_ctx(model, opt, **options)
        pair = context.__enter__()
    yield pair


def by_steps(fmodel: Any, dopt: Any, steps: Any = STEPS) -> None:
    for batch in steps:
        dopt.step(loss_fn(fmodel, batch))


def by_unrolling(fmodel: Any, dopt: Any, steps: Any = STEPS) -> diffopt.Unrolled:
    return diffopt.unroll(fmodel, dopt, steps, loss_fn, segment=2)


def outcome(model: nn.Module, opt: Any, loop: Any, learned: list[Tensor], **options: Any) -> Any:
    """Weights after the loop and one step more, and the gradient of a loss with them."""
    with inner_loop(model, opt, **options) as (fmodel, dopt):
        loop(fmodel, dopt)
        after = [p.detach().clone() for p in fmodel.parameters()]
        dopt.step(loss_fn(fmodel, STEPS[0]))
        loss = loss_fn(fmodel, QUERY)
        initial = [p for p in fmodel.parameters(time=0) if p.requires_grad]
        inputs = [*initial, *learned]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return after, list(fmodel.parameters()), grads


@every_optimizer
@pytest.mark.parametrize("own", [False, True], ids=["of_higher", "of_diffopt"])
def test_weights_and_gradients_are_those_of_the_loop(
    name: str, options: dict[str, Any], own: bool
) -> None:
    model = Net()
    opt = getattr(diffopt.optim if own else torch.optim, name)(groups(model), **options)
    learned = [torch.tensor(options["lr"] * x, requires_grad=True) for x in (1, 2)]
    if name == "ASGD" and not own:
        learned = []  # higher cuts a part of the gradient of its learning rate: math.pow
    override = {"lr": learned} if learned else None
    expected = outcome(model, opt, by_steps, learned, override=override)
    found = outcome(model, opt, by_unrolling, learned, override=override)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_it_is_a_change_of_one_line_in_a_maml_loop() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    tasks = [(BATCHES[0:3], BATCHES[3]), (BATCHES[4:6], BATCHES[6])]
    seen = []
    for loop in (by_steps, by_unrolling):
        model.zero_grad()
        buffers = []
        for support, query in tasks:
            with inner_loop(model, opt) as (fmodel, dopt):
                loop(fmodel, dopt, support)
                loss_fn(fmodel, query).backward()
                buffers += [*fmodel.parameters(), *fmodel.buffers()]
        seen.append(([p.grad for p in model.parameters()], buffers))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own", [False, True], ids=["of_higher", "of_diffopt"])
def test_steps_and_unrolls_take_turns(own: bool) -> None:
    model = Net()
    opt: Any = torch.optim.Adam(groups(model), lr=0.1)
    if own:
        opt = diffopt.Adam(groups(model), lr=lambda step: 0.1 / (1 + step))

    def in_turns(fmodel: Any, dopt: Any) -> None:
        by_steps(fmodel, dopt, STEPS[:1])
        by_unrolling(fmodel, dopt, STEPS[1:3])
        by_steps(fmodel, dopt, STEPS[3:4])
        by_unrolling(fmodel, dopt, STEPS[4:])

    expected = outcome(model, opt, by_steps, [])
    torch.testing.assert_close(outcome(model, opt, in_turns, []), expected, rtol=1e-9, atol=1e-11)


def test_the_initial_weights_and_those_between() -> None:
    model = Net()
    with inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, dopt):
        initial = list(fmodel.parameters())
        dopt.step(loss_fn(fmodel, STEPS[0]))
        between = list(fmodel.parameters())
        fast = by_unrolling(fmodel, dopt)
        for time, weights in ((0, initial), (1, between), (2, list(fmodel.parameters()))):
            kept = fmodel.parameters(time=time)
            assert all(a is b for a, b in zip(kept, weights, strict=True))
        assert fmodel.part.weight is fmodel.again.weight is fast.params["part.weight"]
        assert len(list(fmodel.parameters(time=-1))) == len(initial)
        torch.testing.assert_close(fast(QUERY[0]), fmodel(QUERY[0]))


class TestInsideTheLoss:
    """What ``loss_fn`` may do with the module, as in a loop of ``dopt.step``."""

    def compare(self, model: nn.Module, loss: Any, loss_in_loop: Any = None) -> None:
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        trained = [p for name, p in model.named_parameters() if name not in ("frozen", "unused")]
        results = []
        for unrolled in (False, True):
            with inner_loop(model, opt) as (fmodel, dopt):
                if unrolled:
                    losses = diffopt.unroll(fmodel, dopt, STEPS[:4], loss, segment=3).losses
                else:
                    found = []
                    for batch in STEPS[:4]:
                        found.append((loss_in_loop or loss)(fmodel, batch))
                        dopt.step(found[-1])
                    losses = torch.stack(found)
                grads = torch.autograd.grad(loss_fn(fmodel, QUERY) + losses.sum(), trained)
                results.append((losses, list(fmodel.parameters()), grads))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)

    def test_present_and_initial_weights(self) -> None:
        def loss(fmodel: Any, batch: Any) -> Tensor:
            now, then = fmodel.parameters(), fmodel.parameters(time=0)
            proximal = sum((a - b).square().sum() for a, b in zip(now, then, strict=True))
            return loss_fn(fmodel, batch) + 0.3 * proximal + 0.1 * fmodel.back.bias.sum() ** 2

        self.compare(Net(), loss)

    def test_a_submodule_and_then_the_whole(self) -> None:
        def loss(fmodel: Any, batch: Any) -> Tensor:
            # higher goes on with the weights of a direct call until the module itself is called.
            return loss_fn(fmodel, batch) + fmodel.part(batch[0]).square().mean()

        self.compare(Net(), loss)

    def test_a_submodule_alone_has_the_present_weights(self) -> None:
        model = Net()

        def loss(fmodel: Any, batch: Any) -> Tensor:
            return fmodel.part(batch[0]).square().mean()

        expected = diffopt.unroll(model, diffopt.SGD(model.parameters(), lr=0.1), STEPS, loss)
        with inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, dopt):
            fast = diffopt.unroll(fmodel, dopt, STEPS, loss)
            torch.testing.assert_close(fast.losses, expected.losses)
            after = fmodel.part(STEPS[0][0])
        torch.testing.assert_close(after, expected.apply(lambda m: m.part(STEPS[0][0])))

    def test_weights_for_one_call(self) -> None:
        model = Net()
        names = list(dict(model.named_parameters()))

        def shifted(fmodel: Any) -> list[Tensor]:
            return [p + 0.1 for p in fmodel.parameters()]

        def loss(fmodel: Any, batch: Any) -> Tensor:
            return F.mse_loss(fmodel(batch[0], params=shifted(fmodel)), batch[1])

        def loss_in_loop(fmodel: Any, batch: Any) -> Tensor:
            # There, params= would replace the weights for good.
            weights = dict(zip(names, shifted(fmodel), strict=True))
            return F.mse_loss(torch.func.functional_call(model, weights, batch[0]), batch[1])

        self.compare(model, loss, loss_in_loop)

    def test_recurrent_layers(self) -> None:
        class Reader(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.read, self.out = nn.LSTM(3, 5), nn.Linear(5, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.read(x[:, None])[0][:, 0])

        self.compare(Reader(), loss_fn)

    def test_a_layer_that_recomputes_itself(self) -> None:
        class Checkpointed(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)
                return self.again(self.back(x.tanh()) * self.frozen)

        torch.manual_seed(2)
        plain = Net()
        torch.manual_seed(2)
        model = Checkpointed()
        found = outcome(model, torch.optim.SGD(model.parameters(), lr=0.1), by_unrolling, [])
        expected = outcome(plain, torch.optim.SGD(plain.parameters(), lr=0.1), by_steps, [])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_dropout(self) -> None:
        model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 4))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        results = []
        for loop in (by_steps, by_unrolling):
            torch.manual_seed(5)
            with inner_loop(model, opt) as (fmodel, dopt):
                loop(fmodel, dopt)
                fmodel.eval()
                results.append(torch.autograd.grad(loss_fn(fmodel, QUERY), model.parameters()))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)

    def test_the_module_itself_is_seen_and_put_back(self) -> None:
        model = Net()
        with inner_loop(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, dopt):
            seen = []

            def loss(given: Any, batch: Any) -> Tensor:
                seen.append(given is fmodel)
                if len(seen) == 3:
                    raise KeyError("third")
                return loss_fn(fmodel, batch)

            before = list(fmodel.parameters())
            with pytest.raises(KeyError, match="third"):
                diffopt.unroll(fmodel, dopt, STEPS, loss)
            assert seen == [True] * 3
            assert all(a is b for a, b in zip(fmodel.parameters(), before, strict=True))
            assert fmodel.part.weight is before[2]
            assert len(fmodel._fast_params) == 1
            assert not any(dopt.state)
            by_unrolling(fmodel, dopt, STEPS[:2])
            dopt.step(fmodel.part(STEPS[0][0]).sum())


def test_part_of_the_weights_in_the_optimizer() -> None:
    model = Net()
    opt = torch.optim.Adam(model.back.parameters(), lr=0.1)
    expected = outcome(model, opt, by_steps, [])
    torch.testing.assert_close(outcome(model, opt, by_unrolling, []), expected)


def test_without_tracking_or_grad_mode_nothing_is_kept() -> None:
    model = Net()
    opt = torch.optim.Adam(model.back.parameters(), lr=0.1)
    expected, _, _ = outcome(model, opt, by_steps, [])
    for track, grad in ((False, True), (True, False)):
        with inner_loop(model, opt, track_higher_grads=track) as (fmodel, dopt):
            with torch.set_grad_enabled(grad):
                fast = by_unrolling(fmodel, dopt)
            torch.testing.assert_close(list(fmodel.parameters()), expected)
            assert not fast.losses.requires_grad
            assert fmodel.back.weight.is_leaf
            assert fmodel.back.weight.requires_grad
            by_steps(fmodel, dopt, STEPS[:1])


def test_a_second_derivative() -> None:
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for loop in (by_steps, by_unrolling):
        with inner_loop(model, opt) as (fmodel, dopt):
            loop(fmodel, dopt, STEPS[:3])
            weights = [model.part.weight, model.back.bias]
            grads = torch.autograd.grad(loss_fn(fmodel, QUERY), weights, create_graph=True)
            norm = sum(g.square().sum() for g in grads)
            found.append(torch.autograd.grad(norm, weights))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_betas_get_the_whole_gradient_that_higher_cuts() -> None:
    """Its square root of a bias correction is ``math.sqrt``, which ends the graph."""
    model = Net()

    def loss_at(beta: Tensor) -> Tensor:
        opt = torch.optim.Adam(model.parameters(), lr=0.05)
        override = {"betas": [(0.9, beta)]}
        with inner_loop(model, opt, override=override) as (fmodel, dopt):
            by_unrolling(fmodel, dopt)
            return loss_fn(fmodel, QUERY)

    beta = torch.tensor(0.9, requires_grad=True)
    (found,) = torch.autograd.grad(loss_at(beta), beta)
    numeric = (loss_at(beta.detach() + 1e-5) - loss_at(beta.detach() - 1e-5)) / 2e-5
    assert found.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_parameters_with_different_step_counts() -> None:
    """The first weight has no gradient at even steps; higher's Adam corrects each by its own."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, -2.0]))
            self.b = nn.Parameter(torch.tensor([0.5, 3.0]))

    def loss(fmodel: Any, t: int) -> Tensor:
        total = (fmodel.b - 1).square().sum()
        return total + (fmodel.a * fmodel.b).square().sum() if t % 2 else total

    model = Two()
    opt = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-2)
    with inner_loop(model, opt) as (fmodel, dopt):
        for t in range(5):
            dopt.step(loss(fmodel, t))
        expected = torch.autograd.grad(loss(fmodel, 1), list(model.parameters()))
    with inner_loop(model, opt) as (fmodel, dopt):
        diffopt.unroll(fmodel, dopt, 5, loss)
        found = torch.autograd.grad(loss(fmodel, 1), list(model.parameters()))
        assert [held["step"] for held in dopt.state[0].values()] == [2, 5]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_grad_callback_is_applied() -> None:
    model = Net()

    def callback(grads: Any) -> list[Any]:
        return [None if g is None else g.tanh() for g in grads]

    results = []
    for loop in (by_steps, by_unrolling):
        fmodel = higher.monkeypatch(model, copy_initial_weights=False)
        dopt = higher.get_diff_optim(
            torch.optim.SGD(model.parameters(), lr=0.3),
            model.parameters(),
            fmodel=fmodel,
            grad_callback=callback,
        )
        loop(fmodel, dopt)
        results.append(torch.autograd.grad(loss_fn(fmodel, QUERY), model.part.weight))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_a_differentiable_optimizer_that_is_not_known() -> None:
    class Signed(torch.optim.SGD):
        pass

    class DifferentiableSigned(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for g, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for i, grad in enumerate(grads):
                    if grad is None:
                        continue
                    state = self.state[g][i]
                    state["step"] = state.get("step", 0) + 1
                    state["mean"] = 0.5 * state.get("mean", torch.zeros_like(grad)) + grad
                    rate = group["lr"] / (1 if state["step"] % 2 else 2)
                    moved = group["params"][i] - rate * state["mean"].tanh()
                    group["params"][i] = moved

    higher.register_optim(Signed, DifferentiableSigned)
    model = Net()
    opt = Signed(groups(model), lr=0.1)
    rates = [torch.tensor(x, requires_grad=True) for x in (0.1, 0.2)]
    expected = outcome(model, opt, by_steps, rates, override={"lr": rates})
    found = outcome(model, opt, by_unrolling, rates, override={"lr": rates})
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class TestLifetime:
    def test_the_module_may_be_let_go_before_the_backward_pass(self) -> None:
        model = Net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def adapted(loop: Any) -> tuple[Tensor, Any]:
            with inner_loop(model, opt) as (fmodel, dopt):
                loop(fmodel, dopt)
                return loss_fn(fmodel, QUERY), weakref.ref(fmodel)

        loss, ref = adapted(by_unrolling)
        gc.collect()
        assert ref() is None
        (found,) = torch.autograd.grad(loss, model.part.weight)
        (expected,) = torch.autograd.grad(adapted(by_steps)[0], model.part.weight)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("own", [False, True], ids=["of_higher", "of_diffopt"])
    def test_nothing_is_left_of_an_unroll_that_is_not_used(self, own: bool) -> None:
        model = Net()
        opt: Any = (diffopt if own else torch.optim).Adam(model.parameters(), lr=0.1)
        with inner_loop(model, opt) as (fmodel, dopt):
            fast = by_unrolling(fmodel, dopt)
            left = [weakref.ref(x) for x in (*fast.params.values(), fmodel, dopt)]
            kept = {id(p) for p in model.parameters()}
        del fmodel, dopt, fast
        gc.collect()
        assert all(ref() is None or id(ref()) in kept for ref in left)

    def test_the_result_goes_into_the_plain_model(self) -> None:
        model = Net()
        opt = torch.optim.Adam(model.parameters(), lr=0.1)
        with inner_loop(model, diffopt.Adam(model.parameters(), lr=0.1)) as (fmodel, dopt):
            fast = by_unrolling(fmodel, dopt)
            fast.load_into(model, opt)
            by_steps(fmodel, dopt, STEPS[:1])
        loss_fn(model, STEPS[0]).backward()
        opt.step()
        for ours, theirs in zip(fmodel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


class TestErrors:
    def test_one_of_the_two_is_not_from_higher(self) -> None:
        model = Net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with inner_loop(model, opt) as (fmodel, dopt):
            with pytest.raises(TypeError, match="model is a plain Net: pass the fmodel"):
                diffopt.unroll(model, dopt, STEPS, loss_fn)
            with pytest.raises(TypeError, match="opt is a SGD: pass the fmodel and the optimizer"):
                diffopt.unroll(fmodel, opt, STEPS, loss_fn)
            with pytest.raises(ValueError, match="FunctionalLinear, holds no fast weights"):
                diffopt.unroll(fmodel.part, dopt, STEPS, loss_fn)
            with inner_loop(model, opt) as (other, _):
                pass
            with pytest.raises(ValueError, match="opt updates another fmodel"):
                diffopt.unroll(other, dopt, STEPS, loss_fn)

    def test_what_higher_would_ignore(self) -> None:
        model = Net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
        with (
            inner_loop(model, opt) as (fmodel, dopt),
            pytest.raises(NotImplementedError, match="maximize=True has no effect in higher's"),
        ):
            by_unrolling(fmodel, dopt)

    def test_tasks(self) -> None:
        model = Net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        refused = pytest.raises(NotImplementedError, match="tasks=2 would give every weight")
        with inner_loop(model, opt) as (fmodel, dopt), refused:
            diffopt.unroll(fmodel, dopt, STEPS, loss_fn, tasks=2)
