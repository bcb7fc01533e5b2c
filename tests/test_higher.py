"""``higher`` with diffopt's optimizers in place of its own: what its documentation says holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizers import CASES, Case
from plugged import Net, batches, groups, loss_fn
from torch import Tensor, nn

pytest.importorskip("diffopt.higher", exc_type=ImportError)

import higher

import diffopt
from diffopt.higher import DifferentiableOptimizer

BATCHES = batches(4)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
_FIRST = {case.name: case for case in reversed(CASES)}
one_case_each = pytest.mark.parametrize("case", _FIRST.values(), ids=lambda case: case.name)


def run(fmodel: Any, dopt: Any, steps: list[Any]) -> None:
    for batch in steps:
        dopt.step(loss_fn(fmodel, batch))


def meta_loss(model: nn.Module, opt: torch.optim.Optimizer, **options: Any) -> Tensor:
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **options) as (fmodel, dopt):
        run(fmodel, dopt, BATCHES[:3])
        return loss_fn(fmodel, BATCHES[3])


@every_case
def test_the_trajectory_is_that_of_torch_optim(case: Case) -> None:
    model = Net()
    trained = copy.deepcopy(model)
    opt = case.theirs(groups(trained))
    for batch in BATCHES:
        opt.zero_grad()
        loss_fn(trained, batch).backward()
        opt.step()
    with higher.innerloop_ctx(model, case.ours(groups(model))) as (fmodel, dopt):
        assert type(dopt) is DifferentiableOptimizer
        run(fmodel, dopt, BATCHES)
        for ours, theirs in zip(fmodel.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@one_case_each
def test_the_state_of_a_used_optimizer_is_the_start(case: Case) -> None:
    model = Net()
    ours, theirs = case.ours(groups(model)), case.theirs(groups(model))
    for batch in BATCHES[:2]:
        model.zero_grad()
        loss_fn(model, batch).backward()
        before = [p.detach().clone() for p in model.parameters()]
        ours.step()
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)
        theirs.step()
    with higher.innerloop_ctx(model, ours) as (fmodel, dopt):
        run(fmodel, dopt, BATCHES[2:])
    held = {p: dict(entries) for p, entries in ours.state.items()}
    for batch in BATCHES[2:]:
        model.zero_grad()
        loss_fn(model, batch).backward()
        theirs.step()
    for mine, p in zip(fmodel.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-9, atol=1e-12)
    for p, entries in ours.state.items():  # the optimizer itself has taken two steps, not four
        assert all(entries[key] is x for key, x in held[p].items())


@one_case_each
def test_the_meta_gradient_is_that_of_finite_differences(case: Case) -> None:
    torch.set_default_dtype(torch.float64)  # also of the numbers in the state
    model = Net()
    lr = torch.tensor(0.01, requires_grad=True)
    opt = case.ours(groups(model), lr=lr)
    inputs = [model.part.weight, model.back.bias, lr]
    found = torch.autograd.grad(meta_loss(model, opt), inputs)
    for x, gradient in zip(inputs, found, strict=True):
        at = x.numel() // 2
        around = []
        for move in (1e-5, -2e-5):
            with torch.no_grad():
                x.view(-1)[at] += move
            around.append(meta_loss(model, opt).item())
        with torch.no_grad():
            x.view(-1)[at] += 1e-5
        numeric = (around[0] - around[1]) / 2e-5
        assert gradient.view(-1)[at].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_sgd_with_everything_learned_equals_a_plain_loop() -> None:
    model = Net()
    hyper = torch.tensor([0.1, 0.8, 0.01], dtype=torch.double, requires_grad=True)
    lr, momentum, decay = hyper.unbind()
    owned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights: dict[str, Tensor] = dict(owned)
    buffers = {name: torch.zeros_like(p) for name, p in owned.items()}

    def loss_of(batch: Any) -> Tensor:
        return loss_fn(lambda x: torch.func.functional_call(model, weights, x), batch)

    for batch in BATCHES[:3]:
        names = [name for name in weights if name != "unused"]
        grads = torch.autograd.grad(loss_of(batch), [weights[n] for n in names], create_graph=True)
        for name, g in zip(names, grads, strict=True):
            buffers[name] = momentum * buffers[name] + g + decay * weights[name]
            weights[name] = weights[name] - lr * buffers[name]
    inputs = [owned[name] for name in names] + [hyper]
    expected = torch.autograd.grad(loss_of(BATCHES[3]), inputs, retain_graph=True)
    opt = diffopt.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    found = torch.autograd.grad(meta_loss(model, opt), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


class TestOptions:
    def test_a_computed_tensor_and_one_in_a_tuple_stay_connected(self) -> None:
        model = Net()
        log_lr = torch.tensor(-2.0, requires_grad=True, dtype=torch.double)
        beta = torch.tensor(0.8, requires_grad=True, dtype=torch.double)
        opt = diffopt.Adam(model.parameters(), lr=log_lr.exp(), betas=(beta, 0.9))
        grads = torch.autograd.grad(meta_loss(model, opt), [log_lr, beta])
        assert all(g.abs().item() > 1e-6 for g in grads)

    def test_a_schedule_is_called_with_the_number_of_the_step(self) -> None:
        model, seen = Net(), []
        opt = diffopt.SGD(model.parameters(), lr=lambda step: seen.append(step) or 0.1)
        meta_loss(model, opt)
        assert seen == [0, 1, 2]

    def test_override_at_the_start_and_at_a_step(self) -> None:
        model = Net()
        rates = [torch.tensor(x, requires_grad=True, dtype=torch.double) for x in (0.1, 0.2, 0.3)]
        opt = diffopt.SGD(groups(model), lr=9.0)
        with higher.innerloop_ctx(model, opt, override={"lr": rates[:2]}) as (fmodel, dopt):
            dopt.step(loss_fn(fmodel, BATCHES[0]))
            dopt.step(loss_fn(fmodel, BATCHES[1]), override={"lr": [rates[2]]})
            first = dict(
                zip(dict(model.named_parameters()), fmodel.parameters(time=1), strict=True)
            )
            last = next(iter(dict(fmodel.named_parameters())["part.weight"]))
        for name, moved_by in (("part.weight", rates[0]), ("back.weight", rates[1])):
            grads = torch.autograd.grad(
                first[name].sum(), rates, allow_unused=True, retain_graph=True
            )
            assert [g is not None for g in grads] == [rate is moved_by for rate in rates]
        assert torch.autograd.grad(last.sum(), rates[2])[0].abs().item() > 1e-6
        assert opt.param_groups[0]["lr"] == 9.0
        for group in dopt.param_groups:
            assert group["lr"] is rates[2]

    def test_trainable_copies_of_all_options(self) -> None:
        model = Net()
        opt = diffopt.Adam(model.parameters(), lr=0.1)
        override = higher.optim.get_trainable_opt_params(opt)
        plain = meta_loss(model, opt)
        learned = meta_loss(model, opt, override=override)
        torch.testing.assert_close(learned, plain, rtol=1e-6, atol=0)
        (g_lr,) = torch.autograd.grad(learned, override["lr"])
        assert g_lr.abs().item() > 1e-6
        with torch.no_grad():
            override["lr"][0].fill_(0.25)
        higher.optim.apply_trainable_opt_params(opt, {"lr": override["lr"]})
        assert opt.param_groups[0]["lr"] == 0.25

    def test_what_cannot_be_overridden_is_named(self) -> None:
        model = Net()
        opt = diffopt.SGD(groups(model), lr=0.1)
        with pytest.raises(ValueError, match=r"'learning_rate', which is no option of SGD.* lr,"):
            meta_loss(model, opt, override={"learning_rate": [0.1]})
        with pytest.raises(TypeError, match="lr must be a number"):
            meta_loss(model, opt, override={"lr": ["fast"]})
        with pytest.raises(ValueError, match="Mismatch between the number of override"):
            meta_loss(model, opt, override={"lr": [0.1, 0.2, 0.3]})


class TestWeights:
    def test_the_initial_weights_are_the_models_or_a_copy(self) -> None:
        model = Net()
        opt = diffopt.Adam(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=True) as (fmodel, dopt):
            run(fmodel, dopt, BATCHES[:2])
            loss = loss_fn(fmodel, BATCHES[3])
            initial = list(fmodel.parameters(time=0))
        at_copy = torch.autograd.grad(loss, initial[2], retain_graph=True)[0]
        assert torch.equal(initial[2], model.part.weight)
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(loss, model.part.weight, retain_graph=True)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, dopt):
            run(fmodel, dopt, BATCHES[:2])
            at_model = torch.autograd.grad(loss_fn(fmodel, BATCHES[3]), model.part.weight)[0]
        torch.testing.assert_close(at_copy, at_model)

    def test_shared_frozen_and_unused_weights(self) -> None:
        model = Net()
        with higher.innerloop_ctx(model, diffopt.Adam(groups(model), lr=0.1)) as (fmodel, dopt):
            run(fmodel, dopt, BATCHES[:2])
            final = dict(zip(dict(model.named_parameters()), fmodel.parameters(), strict=True))
            assert fmodel.again.weight is fmodel.part.weight is final["part.weight"]
        assert not torch.equal(final["part.weight"], model.part.weight)
        assert torch.equal(final["frozen"], model.frozen)
        assert torch.equal(final["unused"], model.unused)
        assert not final["frozen"].requires_grad

    def test_every_time_is_kept(self) -> None:
        model = Net()
        with higher.innerloop_ctx(model, diffopt.SGD(model.parameters(), lr=0.1)) as (fmodel, dopt):
            returned = [list(dopt.step(loss_fn(fmodel, batch))) for batch in BATCHES]
            for time, weights in enumerate(returned, start=1):
                kept = fmodel.parameters(time=time)
                assert all(a is b for a, b in zip(kept, weights, strict=True))

    def test_without_tracking_no_graph_is_kept(self) -> None:
        model = Net()
        lr = torch.tensor(0.1, requires_grad=True, dtype=torch.double)
        tracked = meta_loss(model, diffopt.Adam(model.parameters(), lr=lr))
        opt = diffopt.Adam(model.parameters(), lr=lr)
        with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, dopt):
            run(fmodel, dopt, BATCHES[:3])
            torch.testing.assert_close(loss_fn(fmodel, BATCHES[3]), tracked)
            for p in fmodel.parameters():
                assert p.is_leaf
            assert not next(iter(fmodel.parameters())).requires_grad  # the frozen one
            for held in dopt.state:
                assert not any(x.requires_grad for s in held.values() for x in s.values())

    @pytest.mark.cuda
    def test_the_device_of_weights_and_state(self) -> None:
        model = Net()
        opt = diffopt.Adam(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
        loss_fn(model, BATCHES[0]).backward()
        opt.step()
        device = torch.device("cuda")
        with higher.innerloop_ctx(model, opt, device=device) as (fmodel, dopt):
            run(fmodel, dopt, [[x.to(device) for x in batch] for batch in BATCHES])
        assert all(p.device.type == "cuda" for p in fmodel.parameters())
        entries = dopt.state[0][0]
        assert entries["exp_avg"].device.type == "cuda"
        assert entries["step"].device.type == "cpu"


class TestOtherWaysIn:
    def test_grad_callback_of_the_optimizer_and_of_a_step(self) -> None:
        model = Net()
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fmodel = higher.monkeypatch(model)
        before = [p.detach().clone() for p in fmodel.parameters()]
        dopt = higher.get_diff_optim(
            opt,
            model.parameters(),
            fmodel=fmodel,
            grad_callback=lambda grads: [None if g is None else torch.ones_like(g) for g in grads],
        )
        dopt.step(loss_fn(fmodel, BATCHES[0]))
        after = list(fmodel.parameters())
        torch.testing.assert_close(after[2], before[2] - 0.1)
        dopt.step(loss_fn(fmodel, BATCHES[0]), grad_callback=lambda grads: [None] * len(grads))
        assert all(a is b for a, b in zip(fmodel.parameters(), after, strict=True))

    def test_create_diff_optim_with_and_without_a_module(self) -> None:
        model = Net()
        lr = torch.tensor(0.1, requires_grad=True, dtype=torch.double)
        fmodel = higher.monkeypatch(model)
        dopt = higher.create_diff_optim(diffopt.SGD, {"lr": lr}, fmodel=fmodel)
        dopt.step(loss_fn(fmodel, BATCHES[0]))
        weight = torch.tensor(2.0, requires_grad=True)
        alone = higher.create_diff_optim(diffopt.SGD, {"lr": lr}, params=[weight])
        (new,) = alone.step(weight**2, params=[weight])
        assert new.item() == pytest.approx(2.0 - 0.1 * 4.0)
        assert torch.autograd.grad(new, lr)[0].item() == pytest.approx(-4.0)
        moved = list(fmodel.parameters(time=1))[2]
        assert torch.autograd.grad(moved.sum(), lr)[0].abs().item() > 1e-6

    @pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam"])
    def test_those_of_torch_that_higher_does_not_know(self, name: str) -> None:
        model = Net()
        trained = copy.deepcopy(model)
        opt = getattr(torch.optim, name)(trained.parameters())
        loss_fn(trained, BATCHES[0]).backward()
        opt.step()
        opt = getattr(torch.optim, name)(model.parameters())
        with higher.innerloop_ctx(model, opt) as (fmodel, dopt):
            run(fmodel, dopt, BATCHES[:1])
        for ours, theirs in zip(fmodel.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_class_of_ones_own(self) -> None:
        class Halving(diffopt.SGD):
            def _update(self, hyper, params, grads, states):
                return super()._update(hyper, params, [g / 2 for g in grads], states)

        higher.register_optim(Halving, DifferentiableOptimizer)
        model = Net()
        half = meta_loss(model, Halving(model.parameters(), lr=0.2))
        torch.testing.assert_close(half, meta_loss(model, diffopt.SGD(model.parameters(), lr=0.1)))

    def test_a_state_that_requires_grad_gets_its_gradient(self) -> None:
        model = nn.Linear(1, 1, bias=False).double()
        opt = diffopt.SGD(model.parameters(), lr=0.5, momentum=0.9)
        buffer = torch.ones(1, 1, dtype=torch.double, requires_grad=True)
        opt.state[model.weight] = {"momentum_buffer": buffer}
        with higher.innerloop_ctx(model, opt) as (fmodel, dopt):
            dopt.step(fmodel(torch.ones(1, 1, dtype=torch.double)).sum())
            (weight,) = fmodel.parameters()
        assert torch.autograd.grad(weight.sum(), buffer)[0].item() == pytest.approx(-0.45)
