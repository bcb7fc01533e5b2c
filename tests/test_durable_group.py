"""Runs of a group that end at any moment and are taken up by all its processes, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from torch import Tensor, nn
from torch import distributed as dist

import diffopt
from diffopt import Binomial, Durable, Segmented

pytest.importorskip("safetensors")

STEPS = 10
#: What is done again at most: an interval, a segment, steps 0 and 3, and the way to that.
AGAIN = 2 + 4 + 2 + 4
ADJOINTS: dict[str, Callable[[Any], diffopt.Adjoint]] = {
    "segmented": lambda storage: Segmented(4, storage),
    "binomial": lambda storage: Binomial(3, storage),
}


def folder_of(starter: int) -> Path:
    """Of the test that started the processes."""
    return Path(tempfile.gettempdir()) / f"diffopt-group-{starter}"


@pytest.fixture(autouse=True)
def folder() -> Iterator[Path]:
    path = folder_of(os.getpid())
    path.mkdir()
    yield path
    shutil.rmtree(path)


class Stop(Exception):
    """What ends a run."""


class Run:
    """One process's part; each call makes everything anew. ``late`` is captured by process 0 alone,
    from step 3 on."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.calls = rank, world, 0

    def gradients(
        self, adjoint: diffopt.Adjoint, end: Callable[[int], None] = lambda call: None
    ) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 1))
        lr = torch.tensor(0.05, requires_grad=True)
        late = torch.tensor(0.1, requires_grad=True)
        x = torch.randn(4 * self.world, 3).tensor_split(self.world)[self.rank]
        self.calls = 0

        def loss(model: nn.Module, t: int) -> Any:
            self.calls += 1
            end(self.calls)
            value = model(x).square().mean()
            if self.rank == 0 and t >= 3:
                value = value + late * model[0].bias.sum()
            return value, value.exp()

        opt = diffopt.Adam(model.parameters(), lr=lr)
        group = dist.group.WORLD
        fast = diffopt.unroll(model, opt, STEPS, loss, adjoint=adjoint, group=group)
        total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
        (total + sum(fast.aux)).backward()
        found = [total, lr.grad, *(p.grad for p in model.parameters()), late.grad]
        return [x.detach() for x in found if x is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def own_folder(rank: int, name: str) -> Path:
    path = folder_of(os.getppid()) / name
    path.mkdir(exist_ok=True)
    return path / str(rank)


def left(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name != "lock")


def ended(run: Run, adjoint: diffopt.Adjoint, who: int, stop: int) -> None:
    """Run until evaluation ``stop`` of process ``who``, which ends all."""

    def end(call: int) -> None:
        if run.rank == who and call == stop:
            raise Stop("as by a kill")

    kind = Stop if run.rank == who else RuntimeError
    with pytest.raises(kind, match="as by a kill"):
        run.gradients(adjoint, end)


def ends_anywhere(rank: int, world: int) -> None:
    run = Run(rank, world)
    for name, make in ADJOINTS.items():
        expected = run.gradients(make(None))
        clean = run.calls
        adjoint = make(Durable(own_folder(rank, name), 2))
        for i, stop in enumerate(range(2, clean, 5)):
            ended(run, adjoint, i % world, stop)
            assert_same(run.gradients(adjoint), expected)
            assert run.calls + stop <= clean + AGAIN
            assert left(own_folder(rank, name)) == []


def one_lacks_entries(rank: int, world: int) -> None:
    """A process that was killed before its last entry was on the disk."""
    run, path = Run(rank, world), own_folder(rank, "lacking")
    adjoint = Segmented(4, Durable(path, 2))
    expected = run.gradients(Segmented(4))
    for stop in (7, STEPS + 6):
        for count in (1, 2):
            ended(run, adjoint, 0, stop)
            calls = run.calls
            manifests = [p for p in left(path) if p.name.startswith("manifest")]
            assert len(manifests) == 2
            if rank == 1:
                for manifest in manifests[-count:]:
                    manifest.unlink()
            assert_same(run.gradients(adjoint), expected)
            if count == 2:  # with none at all on one, all begin anew
                assert run.calls > calls
            assert left(path) == []


def nothing_in_common(rank: int, world: int) -> None:
    run, path = Run(rank, world), own_folder(rank, "apart")
    adjoint = Segmented(4, Durable(path, 2))
    ended(run, adjoint, 0, 5)
    if rank == 1:
        shutil.copytree(path, path.with_name("older"))
    ended(run, adjoint, 0, STEPS + 8)
    if rank == 1:
        shutil.rmtree(path)
        shutil.move(path.with_name("older"), path)
    with pytest.raises(RuntimeError, match="no whole entry in common with those of the other"):
        run.gradients(adjoint)


def other_intervals(rank: int, world: int) -> None:
    run, path = Run(rank, world), own_folder(rank, "intervals")
    with pytest.raises(RuntimeError, match="intervals of Durable differ"):
        run.gradients(Segmented(4, Durable(path, 2 + rank)))
    ended(run, Segmented(4, Durable(path, 2)), 0, 5)
    swapped = path.with_name(str(1 - rank))
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match=r"process: number \d of 2 there and"):
        run.gradients(Segmented(4, Durable(swapped, 2)))


@pytest.mark.parametrize(
    "case", [ends_anywhere, one_lacks_entries, nothing_in_common, other_intervals]
)
def test_two_processes(case: Callable[[int, int], None], processes: Processes) -> None:
    processes.run(case, 2)


def killed(rank: int, world: int) -> None:
    """Process 1 is killed on the way back."""
    run = Run(rank, world)

    def end(call: int) -> None:
        if rank == 1 and call == STEPS + 7:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="a process of the group has ended"):
        run.gradients(Segmented(4, Durable(own_folder(rank, "killed"), 2)), end)


def taken_up(rank: int, world: int) -> None:
    run = Run(rank, world)
    expected = run.gradients(Segmented(4))
    clean = run.calls
    assert left(own_folder(rank, "killed"))
    assert_same(run.gradients(Segmented(4, Durable(own_folder(rank, "killed"), 2))), expected)
    assert run.calls + STEPS + 7 <= clean + AGAIN
    assert left(own_folder(rank, "killed")) == []


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_kill(processes: Processes) -> None:
    processes.run(killed, 2, dying=(1,))
    processes.run(taken_up, 2)
