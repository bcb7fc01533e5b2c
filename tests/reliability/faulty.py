"""The run that the tests of this folder put in trouble, and what it gives without any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import diffopt

STEPS = 9


class Run:
    """A network with dropout and running statistics, trained by Adam; made anew by each.

    Args:
        during: called before each evaluation of the loss, with its number from 1.
    """

    def __init__(self, during: Callable[[int], object] = lambda n: None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Linear(3, 4),
                nn.BatchNorm1d(4),
                nn.Dropout(0.3),
                nn.Tanh(),
                nn.Linear(4, 1),
            ).double()
            self.x = torch.randn(8, 3, dtype=torch.float64)
        self.lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        self.before = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.calls = 0
        self._during = during

    def gradients(self, adjoint: diffopt.Adjoint) -> list[Tensor]:
        """The outer loss and its gradients."""

        def loss(model: nn.Module, t: int) -> Tensor:
            self.calls += 1
            self._during(self.calls)
            return model(self.x).square().mean()

        torch.manual_seed(1)
        opt = diffopt.Adam(self.model.parameters(), lr=self.lr)
        fast = diffopt.unroll(self.model, opt, STEPS, loss, adjoint=adjoint)
        total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
        inputs = [self.lr, *self.model.parameters()]
        found = torch.autograd.grad(total, inputs, materialize_grads=True)
        return [total.detach(), *found]

    def assert_unchanged(self) -> None:
        """Assert that the model is what it was."""
        for name, x in self.model.state_dict().items():
            assert torch.equal(x, self.before[name]), name
        assert all(p.grad is None for p in self.model.parameters())


def outcome(run: Run, adjoint: diffopt.Adjoint) -> list[Tensor] | Exception:
    """What a run gives, or the error that it ends with, which is one sentence; the model is what it
    was, in either case."""
    found: list[Tensor] | Exception
    try:
        found = run.gradients(adjoint)
    except Exception as error:
        found = error
    run.assert_unchanged()
    if isinstance(found, Exception):
        assert is_a_sentence(found), found
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two results are the same bits."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def is_a_sentence(error: BaseException) -> bool:
    """Whether an error says what is wrong and what to do."""
    text = str(error)
    return len(text) > 40 and "\n" not in text and (": " in text or ". " in text)
