"""``compile=True`` gives what uncompiled steps give, and compiles each kind of step once.

Most tests run the traced graphs as they are: tracing is what diffopt does, and it takes a fraction
of TorchInductor's time. One compiles them.
"""

from __future__ import annotations

import gc
import logging
import shutil
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close, batch, batches, tiny, unrolled
from optimizers import CASES, Case
from oracle import plain
from test_gradients import PROBLEMS
from torch import Tensor, nn

import diffopt
from diffopt._compile import compiled as _compiled
from diffopt._compile import trace as _trace
from diffopt._torch import inductor as _inductor

T = 4


compiled = partial(unrolled, compile=True)
# Problems whose loss needs Python's step number.
COUNTED = {"captured_at_some_steps", "captured_at_each_step_another"}


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - COUNTED))
def test_gradient_is_the_plain_loops(name: str, graphs: list[bool]) -> None:
    outcome, inputs = PROBLEMS[name]()
    want_outcome = outcome(plain)
    want = torch.autograd.grad(want_outcome, inputs)
    train = compiled(diffopt.Segmented(2))
    got_outcome = outcome(train)
    torch.testing.assert_close(got_outcome, want_outcome, rtol=1e-12, atol=0)
    assert_all_close(torch.autograd.grad(got_outcome, inputs), want, rtol=1e-10, atol=1e-13)
    made = len(graphs)
    assert made
    torch.autograd.grad(outcome(train), inputs)
    assert len(graphs) == made


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_a_loss_of_the_step_number_runs_uncompiled(name: str, graphs: list[bool]) -> None:
    outcome, inputs = PROBLEMS[name]()
    want = torch.autograd.grad(outcome(plain), inputs)
    with pytest.warns(diffopt.CompileWarning, match="loss_fn uses the step number") as said:
        got = torch.autograd.grad(outcome(compiled(diffopt.Segmented(2))), inputs)
    assert len(said) == 1
    assert_all_close(got, want, rtol=1e-10, atol=1e-13)
    assert not graphs


def _loss(model: Any, pair: Any) -> Tensor:
    return F.mse_loss(model(pair[0]), pair[1])


SOME = [
    case
    for case in CASES
    if case.id
    in {
        "SGD-lr=0.1-momentum=0.9-dampening=0.3",
        "SGD-lr=0.1-momentum=0.9-weight_decay=0.2-nesterov",
        "Adam-lr=0.1-betas=(0.5,0.8)-eps=0.001-weight_decay=0.2",
        "AdamW-lr=0.1-weight_decay=0.3-amsgrad-maximize",
        "RMSprop-lr=0.1-alpha=0.7-centered-momentum=0.5-weight_decay=0.1",
        "Adagrad-lr=0.1-lr_decay=0.1-weight_decay=0.2-maximize",
        "Rprop-lr=0.1-etas=(0.4,1.5)-step_sizes=(0.05,0.3)-maximize",
        "NAdam-lr=0.1-betas=(0.7,0.8)-weight_decay=0.2-momentum_decay=0.3",
        "RAdam-lr=0.1-betas=(0.9,0.6)",
        "ASGD-lr=0.1-lambd=0.1-alpha=0.5-t0=2.5-weight_decay=0.2",
    }
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_every_rule(case: Case, graphs: list[bool]) -> None:
    model, data, query = tiny(), batches(T), batch()
    log_lr = torch.tensor(-2.5, dtype=torch.float64, requires_grad=True)
    inputs = [*model.parameters(), log_lr]

    def grads(compile: bool) -> tuple[Tensor, ...]:
        opt = case.ours(model.parameters(), lr=lambda t: log_lr.exp() / (1 + t))
        fast = diffopt.unroll(model, opt, data, _loss, segment=1, compile=compile)
        return torch.autograd.grad(_loss(fast, query) + fast.losses.sum(), inputs)

    want = grads(False)
    assert_all_close(grads(True), want, rtol=1e-10, atol=1e-13)
    made = len(graphs)
    assert_all_close(grads(True), want, rtol=1e-10, atol=1e-13)
    assert len(graphs) == made


def test_trajectory_is_that_of_torch_optim(graphs: list[bool]) -> None:
    model, data = tiny(), batches(6)
    opt = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for _ in range(2):  # the start has a history
        opt.step(lambda: _backward(model, data[0], opt))  # type: ignore[arg-type]
        scheduler.step()
    with torch.no_grad():
        fast = diffopt.unroll(model, opt, data, _loss, compile=True)
    assert len(graphs) == 1
    for pair in data:
        opt.step(lambda: _backward(model, pair, opt))  # noqa: B023  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        torch.testing.assert_close(fast.params[name], p.detach(), rtol=1e-12, atol=1e-14)


def _backward(model: nn.Module, pair: Any, opt: torch.optim.Optimizer) -> Tensor:
    opt.zero_grad()
    loss = _loss(model, pair)
    loss.backward()
    return loss


# What is compiled, and when.


def test_new_values_batches_lengths_and_closures_compile_nothing_again(graphs: list[bool]) -> None:
    model = tiny()
    meta = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)

    def outer(steps: int, lr: float, weight: float) -> None:
        scale, shift = meta.exp().unbind()  # new tensors, and a new function, each time

        def loss_fn(model: Any, pair: Any) -> Tensor:
            return _loss(model, pair) * scale + (shift * torch.ones(2)).sum()

        query = batch()

        def outcome(compile: bool) -> Tensor:
            opt = diffopt.Adam(model.parameters(), lr=lr, weight_decay=weight)
            data = [(x * lr, y) for x, y in fixed[:steps]]
            fast = diffopt.unroll(model, opt, data, loss_fn, compile=compile)
            return loss_fn(fast, query)

        want = torch.autograd.grad(outcome(False), [meta, *model.parameters()], retain_graph=True)
        got = torch.autograd.grad(outcome(True), [meta, *model.parameters()])
        assert_all_close(got, want, rtol=1e-10, atol=1e-13)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)

    fixed = batches(5)
    outer(3, 0.1, 0.2)
    assert len(graphs) == 2  # a step and its derivative
    outer(5, 0.03, 0.1)
    outer(1, 0.5, 0.3)
    assert len(graphs) == 2
    outer(3, 0.1, 0.0)  # without weight decay the rule is another
    assert len(graphs) == 4


def test_what_code_takes_for_granted_is_looked_at(graphs: list[bool]) -> None:
    model, query = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 2)), batch()
    model.double()
    factor = 2.0

    def check(rows: int, **more: Any) -> int:
        data = [batch(rows) for _ in range(2)]
        before = len(graphs)

        def loss_fn(model: Any, pair: Any) -> Tensor:
            return _loss(model, pair) * factor

        got = []
        for compile in (False, True):
            torch.manual_seed(1)
            opt = diffopt.SGD(model.parameters(), lr=0.1, **more)
            fast = diffopt.unroll(model, opt, data, loss_fn, compile=compile)
            got.append(torch.autograd.grad(_loss(fast, query), list(model.parameters())))
        assert_all_close(got[1], got[0], rtol=1e-10, atol=1e-13)
        return len(graphs) - before

    assert check(5) == 2
    assert check(5) == 0
    assert check(6) == 2  # another shape
    factor = 3.0
    assert check(5) == 2  # another number in the closure
    model.eval()
    assert check(5) == 2
    assert check(5) == 0


def test_many_kinds_of_steps_are_not_all_compiled(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffopt._compile.compiled.MOST_SPECIALISATIONS", 2)
    model = tiny()
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    data = [batch(rows) for rows in range(1, 6)]
    with pytest.warns(diffopt.CompileWarning, match="2 kinds of step were compiled") as said:
        fast = diffopt.unroll(model, opt, data, _loss, compile=True)
    assert len(said) == 1
    assert len(graphs) == 2
    torch.testing.assert_close(fast.losses, diffopt.unroll(model, opt, data, _loss).losses)


def test_compiled_code_does_not_keep_the_model(graphs: list[bool]) -> None:
    model = tiny()
    fast = diffopt.unroll(model, diffopt.SGD(model.parameters()), batches(2), _loss, compile=True)
    fast.params["0.weight"].sum().backward()
    alive = weakref.ref(model)
    del model, fast
    gc.collect()
    assert alive() is None


# Random numbers and buffers.


def test_dropout_draws_what_uncompiled_steps_draw(graphs: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    data = batches(T)

    def loss_fn(model: Any, pair: Any) -> Any:
        hidden = model[1](model[0](pair[0] + 0.1 * torch.randn_like(pair[0])))
        noise = torch.rand(2).double() + torch.empty(2).normal_()
        return F.mse_loss(model[2](hidden) + noise, pair[1]), (hidden == 0, noise)

    found = []
    for compile in (False, True):
        for adjoint in (diffopt.Segmented(1), diffopt.Segmented(3), diffopt.StoreAll()):
            torch.manual_seed(7)
            opt = diffopt.Adam(model.parameters(), lr=0.05)
            fast = diffopt.unroll(model, opt, data, loss_fn, adjoint=adjoint, compile=compile)
            grads = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
            after = torch.rand(1)
            found.append((fast.aux, after, grads))
    assert len(graphs) == 2
    for aux, after, grads in found[1:]:
        for (mask, noise), (expected_mask, expected_noise) in zip(aux, found[0][0], strict=True):
            assert torch.equal(mask, expected_mask)
            assert torch.equal(noise, expected_noise)
        assert torch.equal(after, found[0][1])
        assert_all_close(grads, found[0][2], rtol=1e-10, atol=1e-13)


def test_buffers(graphs: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model.register_buffer("mask", torch.tensor([1.0, 0.5]).double())
    before = {name: x.clone() for name, x in model.named_buffers()}
    data = batches(T)

    def loss_fn(model: Any, pair: Any) -> Tensor:
        return _loss(model, pair) + (model(pair[0]) * model.mask).mean()

    results = []
    for compile in (False, True):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, loss_fn, compile=compile)
        grads = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
        results.append((fast, grads))
    (want, want_grads), (got, got_grads) = results
    assert_all_close(got_grads, want_grads, rtol=1e-10, atol=1e-12)
    for name, x in want.buffers.items():
        torch.testing.assert_close(got.buffers[name], x, rtol=1e-12, atol=1e-14)
        assert torch.equal(dict(model.named_buffers())[name], before[name])
    assert int(got.buffers["1.num_batches_tracked"]) == 2 * T
    held = got.buffers["1.running_mean"].clone()
    got(data[0][0])
    assert torch.equal(got.buffers["1.running_mean"], held)


# In company.


@pytest.mark.parametrize(
    "adjoint",
    [
        diffopt.StoreAll(),
        diffopt.Binomial(2),
        diffopt.Truncated(2),
        diffopt.FirstOrder(),
        diffopt.Implicit(diffopt.CG(5, 0.5, damping=1.0), gradient_tol=100.0),
    ],
    ids=repr,
)
def test_every_adjoint(adjoint: diffopt.Adjoint, graphs: list[bool]) -> None:
    model, data, query = tiny(), batches(T), batch()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def grads(compile: bool) -> Sequence[Tensor | None]:
        opt = diffopt.Adam(model.parameters(), lr=0.05)
        fast = diffopt.unroll(
            model,
            opt,
            data,
            lambda m, pair: _loss(m, pair) + scale * m[0].weight.square().sum(),
            adjoint=adjoint,
            compile=compile,
        )
        inputs = [scale, *model.parameters()]
        return torch.autograd.grad(_loss(fast, query), inputs, allow_unused=True)

    for got, want in zip(grads(True), grads(False), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    # Of a step of first order the values of the gradients are wanted, which compiled code keeps.
    assert bool(graphs) == (not isinstance(adjoint, diffopt.FirstOrder))


def test_a_batch_that_is_filled_anew(graphs: list[bool]) -> None:
    class Data:
        def __init__(self) -> None:
            self.held: dict[str, Tensor] = {}
            self.tensors = batches(T)

        def __len__(self) -> int:
            return T

        def __getitem__(self, t: int) -> dict[str, Tensor]:
            self.held.update(zip("xy", self.tensors[range(T)[t]], strict=True))
            return self.held

    model, data = tiny(), Data()
    losses = [
        diffopt.unroll(
            model,
            diffopt.SGD(model.parameters(), lr=0.1),
            data,
            lambda m, held: _loss(m, (held["x"], held["y"])),
            compile=compile,
        ).losses
        for compile in (False, True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert graphs


def test_contexts_do_not_pile_up(graphs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled, "MOST_SPECIALISATIONS", 3)
    model, data = tiny(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.CompileWarning)
        for epoch in range(6):
            inner = diffopt.SGD(model.parameters(), lr=0.1)
            diffopt.unroll(
                model,
                inner,
                [data],
                lambda m, b, n=epoch: _loss(m, b) * (1 + n),
                segment=1,
                compile=True,
            )
    assert len(_compiled._COMPILATIONS[model].by_context) == 3


def test_verify_a_bound_on_cotangents_and_second_derivatives(graphs: list[bool]) -> None:
    model, data, query = tiny(), batches(T), batch()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def of_gradient(**more: Any) -> Sequence[Tensor]:
        fast = diffopt.unroll(
            model, diffopt.SGD(model.parameters(), lr=lr), data, _loss, verify=True, **more
        )
        (first,) = torch.autograd.grad(_loss(fast, query), lr, create_graph=True)
        return torch.autograd.grad(first, [lr, *model.parameters()])

    for bound in (None, 0.05):
        got = of_gradient(compile=True, max_cotangent_norm=bound)
        assert_all_close(got, of_gradient(max_cotangent_norm=bound), rtol=1e-9, atol=1e-12)


def test_tasks(graphs: list[bool]) -> None:
    model = tiny()
    data = [(torch.randn(3, 5, 2).double(), torch.randn(3, 5, 2).double()) for _ in range(T)]
    for p in (0.0, 0.4):
        layers = nn.Sequential(*model, nn.Dropout(p))
        found = []
        for compile in (False, True):
            torch.manual_seed(2)
            opt = diffopt.Adam(layers.parameters(), lr=0.1)
            fast = diffopt.unroll(layers, opt, data, _loss, tasks=3, compile=compile)
            found.append(torch.autograd.grad(fast.losses.square().sum(), [*layers.parameters()]))
        assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert len(graphs) == 4


def test_autocast(graphs: list[bool]) -> None:
    model, data = tiny().float(), [(x.float(), y.float()) for x, y in batches(T)]
    found = []
    for compile in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            opt = diffopt.SGD(model.parameters(), lr=0.1)
            fast = diffopt.unroll(model, opt, data, _loss, compile=compile)
        found.append((fast.losses, *torch.autograd.grad(fast.losses.sum(), [*model.parameters()])))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    assert graphs


def test_parameters_of_low_precision(graphs: list[bool]) -> None:
    model = nn.Linear(2, 2)
    data = [(x.float(), y.float()) for x, y in batches(T)]
    for dtype in (torch.bfloat16, torch.float32):  # the loop's state is float32 in both
        model.to(dtype)
        of_dtype = [(x.to(dtype), y.to(dtype)) for x, y in data]
        found = []
        for compile in (False, True):
            opt = diffopt.SGD(model.parameters(), lr=0.1)
            fast = diffopt.unroll(model, opt, of_dtype, _loss, compile=compile)
            grads = torch.autograd.grad(fast.losses.sum(), list(model.parameters()))
            found.append((*fast.params.values(), *grads))
        for got, want in zip(*found, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got, want)


# What cannot be compiled.


def _data_dependent(model: Any, pair: Any) -> Tensor:
    loss = _loss(model, pair)
    return loss * 2 if loss > 0.1 else loss


def _masked(model: Any, pair: Any) -> Tensor:
    out = model(pair[0])
    return out[out > 0].mean() + out.square().mean()


def _through_numpy(model: Any, pair: Any) -> Tensor:
    return _loss(model, pair) * float(pair[0].numpy().sum())


def _random_rate(model: Any, pair: Any) -> Tensor:
    return (model(pair[0]) * torch.bernoulli(pair[1].sigmoid())).square().mean()


class _Odd:
    pass


_hidden = {"held": [torch.tensor([3.0]).double()] * 100}


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (_data_dependent, "it reads a value of a tensor, as control flow that depends on data"),
        (_masked, "it has shapes that depend on data, by aten.(nonzero|index)"),
        (_through_numpy, "it reads values of a tensor, by torch.Tensor.numpy"),
        (_random_rate, "it draws random numbers whose distribution depends on a tensor"),
        (lambda m, pair: (_loss(m, pair), _Odd()), "the extras that loss_fn returns hold a _Odd"),
        (
            lambda m, pair: _loss(m, pair) * _hidden["held"][0].sum(),
            r"it uses a tensor of shape \(1,\) whose origin could not be found",
        ),
    ],
)
def test_what_cannot_be_traced_runs_uncompiled_and_says_so(
    loss_fn: Callable[[Any, Any], Any], reason: str, graphs: list[bool]
) -> None:
    model, data, query = tiny(), batches(T), batch()

    def grads(compile: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, loss_fn, compile=compile)
        return torch.autograd.grad(_loss(fast, query), list(model.parameters()))

    with pytest.warns(
        diffopt.CompileWarning, match=f"of Sequential runs uncompiled: {reason}"
    ) as w:
        got = grads(True)
    assert len(w) == 1
    assert_all_close(got, grads(False), rtol=1e-12, atol=1e-14)
    grads(True)  # said once
    assert not graphs


def test_a_failing_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Any, examples: Any, *, loop: bool = False) -> Any:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(_trace, "compile_graph", fail)
    model, data = tiny(), batches(2)
    opt = diffopt.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        diffopt.CompileWarning, match=r"it cannot be compiled \(RuntimeError: no C\+\+ compiler\)"
    ):
        fast = diffopt.unroll(model, opt, data, _loss, compile=True)
    assert torch.equal(fast.losses, diffopt.unroll(model, opt, data, _loss).losses)


def test_errors_are_those_of_uncompiled_steps(graphs: list[bool]) -> None:
    model = tiny()
    opt = diffopt.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"the loss of step 0 has shape \(5, 2\)"):
        diffopt.unroll(model, opt, batches(1), lambda m, pair: m(pair[0]), compile=True)
    with pytest.raises(TypeError, match="compile is a str: pass True or False"):
        diffopt.unroll(model, opt, 1, _loss, compile="yes")  # type: ignore[arg-type]


# TorchInductor.


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_by_inductor(
    inductor: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(_inductor, "_FEW", 0)  # by TorchInductor's own loops
    # One parameter: every kernel is a run of the C++ compiler.
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1, bias=False)).double()
    data = [(torch.randn(5, 3).double(), torch.randn(5, 1).double()) for _ in range(T)]
    log_lr = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = [log_lr, scale, *model.parameters()]

    def grads(compile: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        computed = scale.exp()
        opt = diffopt.Adam(model.parameters(), lr=lambda t: log_lr.exp(), eps=1e-3)
        fast = diffopt.unroll(
            model, opt, data, lambda m, pair: _loss(m, pair) * computed, compile=compile
        )
        return torch.autograd.grad(fast.losses.sum(), inputs)

    want = grads(False)
    before = diffopt.compile_seconds()
    with config.patch({"cpp.simdlen": 0}), caplog.at_level(logging.INFO, logger="diffopt"):
        assert_all_close(grads(True), want, rtol=1e-10, atol=1e-12)
    said = [r.getMessage() for r in caplog.records if r.name == "diffopt"]
    assert sum("compiled a graph of" in line for line in said) == 2
    spent = diffopt.compile_seconds()
    assert spent > before
    log_lr.data += 0.5
    assert_all_close(grads(True), grads(False), rtol=1e-10, atol=1e-12)
    assert diffopt.compile_seconds() == spent


class _Products(nn.Module):
    """Products of matrices of many forms, with one row, one column, and odd remainders."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.wide = nn.Parameter(torch.randn(9, 17) * 0.3)
        self.narrow = nn.Parameter(torch.randn(17, 1) * 0.3)
        self.many = nn.Parameter(torch.randn(3, 9, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        z = (y @ self.wide) @ self.narrow
        return z.square().mean() + torch.bmm(y[:9].reshape(3, 3, 9), self.many).square().mean()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="where other private names are needed")
def test_small_loops(inductor: None, caplog: pytest.LogCaptureFixture) -> None:
    model = _Products().double()
    data = [torch.randn(11, 7, dtype=torch.float64) for _ in range(T)]

    def grads(compile: bool, **more: Any) -> tuple[Tensor, ...]:
        opt = diffopt.Momentum(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, compile=compile, **more)
        ends = [x.square().sum() for x in fast.params.values()]
        return torch.autograd.grad(fast.losses.sum() + sum(ends), [*model.parameters()])

    want = grads(False)
    with caplog.at_level(logging.INFO, logger="diffopt"):
        for adjoint in (diffopt.Segmented(1), diffopt.Segmented(3), diffopt.Binomial(2)):
            got = grads(True, adjoint=adjoint)
            assert_all_close(got, want, rtol=1e-10, atol=1e-13)
            assert_all_close(grads(True, adjoint=adjoint), got, rtol=0, atol=0)
    said = [r.getMessage() for r in caplog.records if r.name == "diffopt"]
    if torch.__version__ < "2.14":  # which lowers one of these loops in another way, and says so
        assert not [line for line in said if "as TorchInductor writes it" in line]
    assert sum("compiled a graph of" in line for line in said) == 2
    gc.collect()
    gc.freeze()
