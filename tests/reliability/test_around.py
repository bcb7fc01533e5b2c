"""NaN at a step, many threads, and forks: the right gradient, as without them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty import Run, same
from torch import Tensor, nn

import diffopt

STEPS = 6

EXACT: dict[str, Callable[[Path], diffopt.Adjoint | None]] = {
    "default": lambda folder: None,
    "StoreAll": lambda folder: diffopt.StoreAll(),
    "Segmented": lambda folder: diffopt.Segmented(),
    "Segmented, host": lambda folder: diffopt.Segmented(2, "cpu"),
    "Segmented, folder": lambda folder: diffopt.Segmented(2, folder),
    "Segmented, durable": lambda folder: diffopt.Segmented(2, diffopt.Durable(folder / "d", 1)),
    "Binomial": lambda folder: diffopt.Binomial(3),
    "Binomial, folder": lambda folder: diffopt.Binomial(3, folder),
    "Binomial, durable": lambda folder: diffopt.Binomial(3, diffopt.Durable(folder / "d", 1)),
    "MemoryBudget": lambda folder: diffopt.MemoryBudget("64MiB"),
}


# --- NaN ------------------------------------------------------------------------------------------


def poisoned(model: nn.Module, x: Tensor, t: int, at: int, how: str) -> Tensor:
    """A loss that is not a number, or of which a derivative is none, at step ``at``."""
    value: Tensor = model(x).square().mean()
    if t != at:
        return value
    if how == "value":
        return value * math.nan
    if how == "infinity":
        return value / 0.0
    # The loss is a number, and its gradient is 0 * infinity.
    return value + (model.weight * 0.0).abs().sum().sqrt()


@pytest.mark.parametrize("how", ["value", "infinity", "derivative"])
@pytest.mark.parametrize("at", [0, 3, STEPS - 1])
@pytest.mark.parametrize("adjoint", EXACT)
def test_nan_at_a_step(adjoint: str, at: int, how: str, tmp_path: Path) -> None:
    """NaN where a loop with all graphs kept has NaN, and the same numbers elsewhere."""
    if "durable" in adjoint:
        pytest.importorskip("safetensors")
    torch.set_default_dtype(torch.float64)
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    lr = torch.tensor(0.1, requires_grad=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Plain(nn.Module):
        def __init__(self, values: dict[str, Tensor]) -> None:
            super().__init__()
            self.weight, self.values = values["weight"], values

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.values["weight"], self.values["bias"])

    values, losses = {n: p.clone() for n, p in model.named_parameters()}, []
    for t in range(STEPS):
        loss = poisoned(Plain(values), x, t, at, how)
        grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        values = {n: p - lr * g for (n, p), g in zip(values.items(), grads, strict=True)}
        losses.append(loss)
    total = torch.stack(losses)[: at + 1].sum() + values["bias"].sum()
    inputs = [lr, *model.parameters()]
    expected = torch.autograd.grad(total, inputs)

    fast = diffopt.unroll(
        model,
        diffopt.SGD(model.parameters(), lr=lr),
        STEPS,
        lambda m, t: poisoned(m, x, t, at, how),
        adjoint=EXACT[adjoint](tmp_path),
    )
    torch.testing.assert_close(fast.losses, torch.stack(losses), equal_nan=True)
    for name, value in values.items():
        torch.testing.assert_close(fast.params[name], value, equal_nan=True)
    total = fast.losses[: at + 1].sum() + fast.params["bias"].sum()
    found = torch.autograd.grad(total, inputs)
    assert any(g.isnan().any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, equal_nan=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- Threads --------------------------------------------------------------------------------------


class Task:
    """An inner problem without random numbers, which threads would share."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        self.adam = seed % 2 == 0

    def gradients(self, adjoint: diffopt.Adjoint | None) -> list[Tensor]:
        model = nn.Linear(3, 2, bias=False).double()
        model.weight.data.copy_(self.weight)
        lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        kind = diffopt.Adam if self.adam else diffopt.Momentum
        opt = kind(model.parameters(), lr=lr)
        fast = diffopt.unroll(
            model, opt, STEPS, lambda m, t: m(self.x).tanh().square().mean(), adjoint=adjoint
        )
        total = fast.losses.sum() + fast.params["weight"].sin().sum()
        total.backward()
        assert torch.equal(model.weight.detach(), self.weight)
        return [total.detach(), lr.grad, model.weight.grad]


def test_many_threads(tmp_path: Path) -> None:
    """Each gradient is what it is alone, whatever the other threads do meanwhile."""
    kinds = [name for name in EXACT if "durable" not in name]
    tasks = [(Task(seed), kinds[seed % len(kinds)]) for seed in range(2 * len(kinds))]
    alone = [task.gradients(EXACT[kind](tmp_path)) for task, kind in tasks]
    together: dict[int, list[Tensor] | BaseException] = {}
    begin = threading.Barrier(4)

    def work(first: int) -> None:
        begin.wait()
        for i in range(first, len(tasks), 4):
            task, kind = tasks[i]
            try:
                together[i] = task.gradients(EXACT[kind](tmp_path))
            except BaseException as error:
                together[i] = error
                raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for i, expected in enumerate(alone):
        found = together[i]
        assert not isinstance(found, BaseException), found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert list(tmp_path.iterdir()) == []


def test_threads_with_runs_that_last(tmp_path: Path) -> None:
    """Each in a folder of its own, and dropout's masks drawn one run after the other."""
    pytest.importorskip("safetensors")
    expected = Run().gradients(diffopt.Segmented(3))
    one_by_one, found = threading.Lock(), []

    def work(i: int) -> None:
        adjoint = diffopt.Segmented(3, diffopt.Durable(tmp_path / str(i), 2))
        with one_by_one:
            found.append(Run().gradients(adjoint))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(found) == 3
    assert all(same(each, expected) for each in found)


# --- Forks ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_workers(tmp_path: Path) -> None:
    """Each of some forked processes, and the one that forked them in between two unrolls of its
    own, gives what one process gives."""
    body = """
        import multiprocessing, sys, warnings
        from pathlib import Path
        import torch
        from test_around import EXACT, Task

        warnings.simplefilter("ignore")  # of Python, about forks beside threads
        torch.set_num_threads(1)
        folder = Path(sys.argv[1])
        kinds = [name for name in EXACT if "durable" not in name]

        def one(i):
            return [x.tolist() for x in Task(i).gradients(EXACT[kinds[i]](folder))]

        before = [one(i) for i in range(len(kinds))]
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            waiting = pool.map_async(one, range(len(kinds)))
            beside = [one(i) for i in range(len(kinds))]
            forked = waiting.get(timeout=100)
        print(forked == before, beside == before, list(folder.iterdir()))
    """
    path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True []\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_batches_from_forked_workers() -> None:
    """Of a ``DataLoader``, which forks them as soon as it is asked for the first batch."""
    body = """
        import warnings
        import torch, diffopt
        warnings.simplefilter("ignore")  # of Python, about forks beside threads
        torch.set_num_threads(1)
        model = torch.nn.Linear(3, 1).double()
        data = torch.randn(12, 3, dtype=torch.float64)

        def gradient(batches):
            opt = diffopt.Adam(model.parameters(), lr=0.1)
            fast = diffopt.unroll(model, opt, batches, lambda m, x: m(x).square().mean(), segment=2)
            return torch.autograd.grad(fast.losses.sum(), list(model.parameters()))

        expected = gradient(list(data.split(3)))
        for _ in range(2):
            loader = torch.utils.data.DataLoader(
                data, 3, num_workers=2, multiprocessing_context="fork"
            )
            print([torch.equal(a, b) for a, b in zip(gradient(loader), expected)])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[True, True]\n" * 2
