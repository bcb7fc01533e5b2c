"""Rules that are not elementwise, and options that differ by task, under ``tasks=N``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjoints import EXACT, every_adjoint
from helpers import assert_all_close, differences, mse
from optimizers import CASES, OPTIMIZERS, Case, Lars
from torch import Tensor, nn

import diffopt
from diffopt.optim.mapped import init_over_tasks, is_elementwise, update_over_tasks

N, STEPS = 3, 4


class Centralised(diffopt.Adam):
    """Adam of gradients without their mean over each row (Yong et al., 2020).

    It inherits from an elementwise rule, and is none.
    """

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        grads = [g - g.mean(-1, keepdim=True) if g.dim() > 1 else g for g in grads]
        return super()._update(hyper, params, grads, states)


class Factored(diffopt.Optimizer):
    """The second moment as rows times columns, as in Adafactor (Shazeer and Stern, 2018)."""

    def __init__(self, params: Any, lr: Any = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def _init(self, hyper: Any, param: Tensor) -> Any:
        state = {"step": torch.zeros(())}
        for i, size in enumerate(param.shape):
            state[f"factor{i}"] = torch.zeros(size, dtype=param.dtype)
        return {**state, "norm": torch.zeros((), dtype=param.dtype)}

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        new_params, new_states = [], []
        for p, g, s in zip(params, grads, states, strict=True):
            new = {"step": s["step"] + 1, "norm": 0.9 * s["norm"] + (g * g).sum()}
            second = torch.ones_like(p)
            for i in range(p.dim()):
                others = [j for j in range(p.dim()) if j != i]
                squares = g * g + 1e-2
                new[f"factor{i}"] = s[f"factor{i}"] + (squares.sum(others) if others else squares)
                shape = [-1 if j == i else 1 for j in range(p.dim())]
                second = second * new[f"factor{i}"].reshape(shape)
            scale = second.sqrt() * (1 + new["norm"])
            new_params.append(p - hyper["lr"] / (1 + 0.1 * new["step"]) * g / scale)
            new_states.append(new)
        return new_params, new_states


OWN = [Lars, Centralised, Factored]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def some_batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(N, 5, 2).double(), torch.randn(N, 5, 1).double()) for _ in range(STEPS)]


def of_task(data: list[tuple[Tensor, Tensor]], i: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for x, y in data]


def total(fast: diffopt.Unrolled, i: int | None = None) -> Tensor:
    """A number that every task, or one of them, contributes to with weights of its own."""
    generator = torch.Generator().manual_seed(2)
    result = torch.zeros((), dtype=torch.float64)
    for _, x in sorted(fast.params.items()):
        each = x if i is None else torch.zeros(N, *x.shape, dtype=x.dtype)
        weights = torch.randn(each.shape, generator=generator, dtype=torch.float64)
        result = result + ((weights if i is None else weights[i]) * x).sum()
    weights = torch.randn(N, STEPS, generator=generator, dtype=torch.float64)
    return result + ((weights if i is None else weights[i]) * fast.losses).sum()


@pytest.mark.parametrize("rule", OWN)
def test_equals_a_loop_over_the_tasks(rule: type[diffopt.Optimizer]) -> None:
    model, data = small(), some_batches()
    log_lr = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), log_lr]
    assert not is_elementwise(rule(model.parameters()))

    def opt() -> diffopt.Optimizer:
        return rule(model.parameters(), lr=lambda t: log_lr.exp())

    singles = [diffopt.unroll(model, opt(), of_task(data, i), mse) for i in range(N)]
    want = torch.autograd.grad(sum(total(x, i) for i, x in enumerate(singles)), inputs)
    for _, adjoint in EXACT:
        fast = diffopt.unroll(model, opt(), data, mse, tasks=N, adjoint=adjoint)
        for i, single in enumerate(singles):
            for name, x in single.params.items():
                torch.testing.assert_close(fast.params[name][i], x, rtol=1e-12, atol=1e-14)
            for name, entries in single.opt_state.items():
                for key, x in entries.items():
                    got = fast.opt_state[name][key]
                    torch.testing.assert_close(
                        got if key == "step" else got[i], x, rtol=1e-12, atol=1e-14
                    )
        assert all("step" not in s or s["step"].dim() == 0 for s in fast.opt_state.values())
        found = torch.autograd.grad(total(fast), inputs)
        assert_all_close(found, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", OWN)
def test_against_finite_differences(rule: type[diffopt.Optimizer]) -> None:
    model, data = small(), some_batches()
    inputs = [model[0].weight, model[2].bias]

    def loss() -> Tensor:
        with torch.no_grad():
            singles = [
                diffopt.unroll(model, rule(model.parameters()), of_task(data, i), mse)
                for i in range(N)
            ]
            result: Tensor = sum(total(x, i) for i, x in enumerate(singles))
            return result

    fast = diffopt.unroll(model, rule(model.parameters()), data, mse, tasks=N)
    found = torch.autograd.grad(total(fast), inputs)
    assert_all_close(found, differences(loss, inputs), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rule", OWN)
def test_continued_and_differentiated_twice(rule: type[diffopt.Optimizer]) -> None:
    model, data = small(), some_batches()
    inputs = list(model.parameters())

    def gradient(split: bool) -> Any:
        def unroll(steps: Any, **more: Any) -> diffopt.Unrolled:
            return diffopt.unroll(model, rule(model.parameters()), steps, mse, tasks=N, **more)

        fast = unroll(data[:2] if split else data)
        if split:
            fast = unroll(data[2:], initial=fast)
        loss = sum((x**2).sum() for x in fast.params.values())
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), inputs)]

    assert_all_close(gradient(True), gradient(False), rtol=1e-9, atol=1e-12)


def test_a_class_may_declare_itself_elementwise() -> None:
    mapped = []

    class Plain(diffopt.Optimizer):
        elementwise = True

        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def _init(self, hyper: Any, param: Tensor) -> Any:
            return {}

        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            mapped.append([p.dim() for p in params])
            return [p - 0.1 * g for p, g in zip(params, grads, strict=True)], states

    class Changed(Plain):
        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            return super()._update(hyper, params, grads, states)

    model, data = small(), some_batches()
    for rule, dims in ((Plain, [3, 2, 3, 2]), (Changed, [2, 1, 2, 1])):
        assert is_elementwise(rule(model.parameters())) == (rule is Plain)
        diffopt.unroll(model, rule(model.parameters()), data, mse, tasks=N)
        assert mapped.pop() == dims


def test_every_rule_of_this_library_says_what_it_is() -> None:
    """Muon, too: it reads the last two dimensions alone."""
    for case in [*OPTIMIZERS.values(), Case("Muon")]:
        assert is_elementwise(case.ours([torch.zeros(2, 2)]))


def test_a_rule_that_reads_values_is_refused_by_name() -> None:
    class Clipped(Lars):
        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            grads = [g / g.norm() if g.norm() > 1 else g for g in grads]
            return super()._update(hyper, params, grads, states)

    model = small()
    with pytest.raises(
        RuntimeError, match=r"rule of Clipped cannot be mapped .*tasks=3.*elementwise = True"
    ):
        diffopt.unroll(model, Clipped(model.parameters()), some_batches(), mse, tasks=N)


def test_each_task_draws_its_own_random_numbers() -> None:
    class Noisy(Lars):
        def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
            return [p + torch.randn_like(p) for p in params], states

    params = {"w": torch.zeros(N, 1000)}
    rule = Noisy([torch.zeros(1000)])
    new, _ = update_over_tasks(
        rule, N, params, params, {"w": {}}, hyper=rule.hyperparameters(0), groups=[["w"]]
    )
    assert new["w"].unique().numel() > 2 * 1000


# Options for each task.


@pytest.mark.parametrize("case", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("shape", [(N,), (N, 1, 1)], ids=str)
def test_a_rate_for_each_task(case: Case, shape: tuple[int, ...]) -> None:
    torch.set_default_dtype(torch.float64)
    model, data = small(), some_batches()
    rates = torch.tensor([0.02, 0.05, 0.1], requires_grad=True)
    inputs = [*model.parameters(), rates]
    singles = [
        diffopt.unroll(
            model, case.ours(model.parameters(), lr=lambda t, i=i: rates[i]), of_task(data, i), mse
        )
        for i in range(N)
    ]
    want = torch.autograd.grad(
        sum(total(x, i) for i, x in enumerate(singles)), inputs, materialize_grads=True
    )
    for _, adjoint in EXACT[:3]:
        opt = case.ours(model.parameters(), lr=lambda t: rates.reshape(shape))
        fast = diffopt.unroll(model, opt, data, mse, tasks=N, adjoint=adjoint)
        found = torch.autograd.grad(total(fast), inputs, materialize_grads=True)
        assert_all_close(found, want, rtol=1e-10, atol=1e-13)


TUPLES = {
    "betas": ("Adam", lambda x: (x, 0.9)),
    "second beta": ("NAdam", lambda x: (0.8, x)),
    "first beta": ("NAdam", lambda x: (x, 0.9)),
}


@pytest.mark.parametrize("kind", TUPLES)
def test_an_entry_of_a_tuple_for_each_task(kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    model, data = small(), some_batches()
    name, betas = TUPLES[kind]
    values = torch.tensor([0.3, 0.6, 0.8], requires_grad=True)
    inputs = [*model.parameters(), values]

    def opt(beta: Any) -> diffopt.Optimizer:
        return getattr(diffopt, name)(model.parameters(), lr=0.05, betas=betas(beta))

    singles = [
        diffopt.unroll(model, opt(lambda t, i=i: values[i]), of_task(data, i), mse)
        for i in range(N)
    ]
    want = torch.autograd.grad(sum(total(x, i) for i, x in enumerate(singles)), inputs)
    fast = diffopt.unroll(model, opt(lambda t: values), data[:2], mse, tasks=N)
    losses = [fast.losses]
    fast = diffopt.unroll(model, opt(lambda t: values), data[2:], mse, tasks=N, initial=fast)
    fast.losses = torch.cat([*losses, fast.losses], 1)
    found = torch.autograd.grad(total(fast), inputs)
    assert_all_close(found, want, rtol=1e-10, atol=1e-13)


@every_adjoint
def test_a_rate_for_each_entry_and_for_each_entry_of_each_task(adjoint: diffopt.Adjoint) -> None:
    """Meta-SGD's rates, the same for all tasks, and then with a task dimension."""
    model, data = small(), some_batches()
    shapes = [(n, p.shape) for n, p in model.named_parameters()]
    shared = {n: (torch.rand(s).double() * 0.1).requires_grad_() for n, s in shapes}
    each = {n: (torch.rand(N, *s).double() * 0.1).requires_grad_() for n, s in shapes}

    def opt(rates: Any) -> diffopt.Optimizer:
        named = model.named_parameters()
        return diffopt.SGD([{"params": [p], "lr": lambda t, n=n: rates[n]} for n, p in named])

    for rates, of in (
        (shared, lambda i: shared),
        (each, lambda i: {n: x[i] for n, x in each.items()}),
    ):
        inputs = list(rates.values())
        singles = [diffopt.unroll(model, opt(of(i)), of_task(data, i), mse) for i in range(N)]
        want = torch.autograd.grad(sum(total(x, i) for i, x in enumerate(singles)), inputs)
        fast = diffopt.unroll(model, opt(rates), data, mse, tasks=N, adjoint=adjoint)
        found = torch.autograd.grad(total(fast), inputs)
        assert_all_close(found, want, rtol=1e-10, atol=1e-13)


def test_a_shape_that_may_mean_either_is_an_error_that_says_how() -> None:
    model = nn.Sequential(nn.Linear(2, N), nn.Linear(N, 1)).double()
    rates = torch.full((N,), 0.1)

    def opt(rates: Tensor) -> diffopt.Optimizer:
        return diffopt.SGD([{"params": [model[0].bias], "lr": lambda t: rates}])

    data = some_batches()
    with pytest.raises(ValueError, match=r"tasks=3, lr of shape \(3,\) may hold one .*'0.bias'"):
        diffopt.unroll(model, opt(rates), data, mse, tasks=N)
    for spelled in (rates.reshape(N, 1), rates.expand(N, N)):
        diffopt.unroll(model, opt(spelled), data, mse, tasks=N)
    with pytest.raises(ValueError, match=r"lr of shape \(4,\) does not broadcast to .*'0.bias'"):
        diffopt.unroll(model, opt(torch.full((4,), 0.1)), data, mse, tasks=N)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_task(case: Case) -> None:
    """The task dimension of one task is no row of a parameter."""
    torch.set_default_dtype(torch.float64)
    model, data = small(), of_task(some_batches(), 0)
    alone = diffopt.unroll(model, case.ours(model.parameters()), data, mse)
    batched = [(x[None], y[None]) for x, y in data]
    fast = diffopt.unroll(model, case.ours(model.parameters()), batched, mse, tasks=1)
    for name, x in alone.params.items():
        torch.testing.assert_close(fast.params[name][0], x, rtol=1e-10, atol=1e-12)


def test_compiled_steps_map_the_rule(graphs: list[bool]) -> None:
    model, data = small(), some_batches()
    inputs = list(model.parameters())
    results = []
    for compile in (False, True):
        fast = diffopt.unroll(
            model, Lars(model.parameters()), data, mse, tasks=N, compile=compile, segment=1
        )
        results.append(torch.autograd.grad(total(fast), inputs))
    assert graphs
    assert_all_close(results[1], results[0], rtol=1e-10, atol=1e-13)


def test_init_of_several_param_groups_keeps_the_order() -> None:
    a, b = torch.zeros(N, 2), torch.zeros(N, 3, 2)
    rule = Factored([{"params": [torch.zeros(3, 2)]}, {"params": [torch.zeros(2)]}])
    state = init_over_tasks(rule, N, {"a": a, "b": b}, groups=[["b"], ["a"]])
    assert list(state) == ["a", "b"]
    assert {k: tuple(x.shape) for k, x in state["b"].items()} == {
        "step": (),
        "factor0": (N, 3),
        "factor1": (N, 2),
        "norm": (),
    }


# What a rule uses besides its arguments.


class Learned(Lars):
    """θ ← θ − s ‖θ‖ g, with a step size s that the rule holds, and noise where it is asked for."""

    def __init__(self, params: Any, size: Tensor, noise: float = 0.0) -> None:
        super().__init__(params)
        self.size, self.noise = size, noise

    def _update(self, hyper: Any, params: Any, grads: Any, states: Any) -> Any:
        moved = []
        for p, g in zip(params, grads, strict=True):
            step = self.size * (p * p).sum().sqrt() * g
            moved.append(p - step * (1 + self.noise * torch.randn_like(p)))
        return moved, states


@every_adjoint
def test_a_tensor_that_the_rule_holds_gets_its_gradient(adjoint: diffopt.Adjoint) -> None:
    model, data = small(), some_batches()
    size = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), size]
    singles = [
        diffopt.unroll(model, Learned(model.parameters(), size), of_task(data, i), mse)
        for i in range(N)
    ]
    want = torch.autograd.grad(sum(total(x, i) for i, x in enumerate(singles)), inputs)
    opt = Learned(model.parameters(), size)
    fast = diffopt.unroll(model, opt, data, mse, tasks=N, adjoint=adjoint)
    assert_all_close(torch.autograd.grad(total(fast), inputs), want, rtol=1e-10, atol=1e-13)


def test_random_numbers_of_a_mapped_rule_are_drawn_again() -> None:
    model, data = small(), some_batches()
    size = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), size]
    results = []
    for _, adjoint in EXACT:
        torch.manual_seed(5)
        opt = Learned(model.parameters(), size, noise=0.5)
        fast = diffopt.unroll(model, opt, data, mse, tasks=N, adjoint=adjoint, verify=True)
        results.append([total(fast), *torch.autograd.grad(total(fast), inputs)])
    for result in results[1:]:
        assert_all_close(result, results[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", [Lars, Centralised, Factored, diffopt.Adam])
def test_forward_mode_carries_tangents_through_a_mapped_rule(rule: Any) -> None:
    model, data = small(), some_batches()
    log_rates = torch.full((N,), -3.0, dtype=torch.float64, requires_grad=True)
    results = []
    for adjoint in (diffopt.StoreAll(), diffopt.ForwardMode([log_rates])):
        opt = rule(model.parameters(), lr=lambda t: log_rates.exp())
        fast = diffopt.unroll(model, opt, data, mse, tasks=N, adjoint=adjoint)
        results.append(torch.autograd.grad(total(fast), log_rates))
    assert_all_close(results[1], results[0], rtol=1e-10, atol=1e-13)
