"""The oracle for whole models: a ``torch.optim`` loop and finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import plain
from torch import Tensor, nn

import diffopt

ADJOINTS: Sequence[diffopt.Adjoint] = (
    diffopt.StoreAll(),
    diffopt.Segmented(1),
    diffopt.Segmented(2),
    diffopt.Segmented(),
)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03, eps=1e-3)


@dataclass(frozen=True)
class Training:
    """An inner training run and what is computed from its end.

    Attributes:
        make: builds the model, in float64.
        loss: ``loss(model, t)``.
        outer: the number that is differentiated, from the trained model.
        optimizer: builds the inner optimizer.
        steps: how many there are.
        reference: builds the model that the oracle trains, where that is another one.
        cut: whether the model itself takes something that it computes for a constant. Finite
            differences see it vary, so the oracle is then a loop with ``create_graph=True``.
        rounds: whether PyTorch computes gradients that are to be differentiated by other kernels.
        along: keeps of a random direction for a parameter what the model can be moved along.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Any, int], Any]
    outer: Callable[[Any], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam
    steps: int = 4
    reference: Callable[[], nn.Module] | None = None
    cut: bool = False
    rounds: bool = False
    along: Callable[[Tensor], Tensor] = lambda v: v

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def _reference(self) -> nn.Module:
        torch.manual_seed(0)
        return (self.reference or self.make)()

    def slope(self, v: dict[str, Tensor]) -> float:
        """The derivative of the outer value along ``v``."""
        if self.cut:
            return self._slope_in_graph(v)
        h = 3e-5
        f = {k: self.in_place(v, k * h)[0].item() for k in (-2, -1, 1, 2)}
        return (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)

    def _slope_in_graph(self, v: dict[str, Tensor]) -> float:
        """With the graph of all steps kept, and Adam's rule as its authors state it."""
        model = self._reference()
        start = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first = {name: torch.zeros_like(p) for name, p in start.items()}
        second = dict(first)

        def rule(params: dict[str, Tensor], grads: dict[str, Tensor], t: int) -> dict[str, Tensor]:
            new = {}
            for name, g in grads.items():
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                mean = first[name] / (1 - 0.9 ** (t + 1))
                square = second[name] / (1 - 0.999 ** (t + 1))
                new[name] = params[name] - 0.03 * mean / (square.sqrt() + 1e-3)
            return new

        torch.manual_seed(1)
        outer = plain(model, {}, self.steps, self.loss, rule=rule).apply(self.outer)
        found = torch.autograd.grad(outer, list(start.values()))
        return sum((g * v[name]).sum().item() for name, g in zip(start, found, strict=True))

    def in_place(self, shift: dict[str, Tensor], h: float) -> tuple[Tensor, nn.Module, Tensor]:
        """Train with ``torch.optim`` from initial parameters moved by ``h * shift``.

        Returns:
            the outer value, the trained model, and the state of the random generator at its end.
        """
        model = self._reference()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in shift:
                    p.add_(shift[name], alpha=h)
        opt = self.optimizer(model)
        torch.manual_seed(1)
        for t in range(self.steps):
            opt.zero_grad()
            loss = self.loss(model, t)
            (loss if isinstance(loss, Tensor) else loss.loss).backward()
            opt.step()
        generator = torch.get_rng_state()
        buffers = {name: x.clone() for name, x in model.named_buffers()}
        outer = self.outer(model).detach()
        with torch.no_grad():
            for name, x in model.named_buffers():  # which the outer evaluation may advance
                x.copy_(buffers[name])
        return outer, model, generator


def check(training: Training, adjoints: Sequence[diffopt.Adjoint] = ADJOINTS) -> None:
    """The trajectory is ``torch.optim``'s, and the gradient that of finite differences.

    Under every adjoint, to the last bit; the caller's model, its random generator and the kept
    buffers are left alone.
    """
    model = training.model()
    torch.manual_seed(2)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    v = {name: training.along(torch.randn_like(p)) for name, p in trainable.items()}
    slope = training.slope(v)
    value, trained, generator = training.in_place({}, 0.0)

    gradients = []
    for adjoint in adjoints:
        model = training.model()
        before = copy.deepcopy(model.state_dict())
        attributes = [dict(module.__dict__) for module in model.modules()]
        inner = training.optimizer(model)
        torch.manual_seed(1)
        fast = diffopt.unroll(model, inner, training.steps, training.loss, adjoint=adjoint)
        assert torch.equal(torch.get_rng_state(), generator)
        outer = fast.apply(training.outer)
        torch.testing.assert_close(outer.detach(), value, rtol=1e-9, atol=1e-12)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        torch.rand(3)
        drawn = torch.get_rng_state()
        found = torch.autograd.grad(outer, list(params.values()), materialize_grads=True)
        assert torch.equal(torch.get_rng_state(), drawn)
        gradients.append(dict(zip(params, found, strict=True)))
        for name, p in trained.named_parameters():
            torch.testing.assert_close(
                fast.params.get(name, p.detach()).detach(), p.detach(), rtol=1e-9, atol=1e-12
            )
        for name, x in trained.named_buffers():
            torch.testing.assert_close(fast.buffers[name], x, rtol=1e-9, atol=1e-12)
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name])
        for module, held in zip(model.modules(), attributes, strict=True):
            assert module.__dict__.keys() == held.keys()
            assert all(module.__dict__[key] is held[key] for key in held)
        assert all(p.grad is None for p in model.parameters())

    along = sum((g * v[name]).sum().item() for name, g in gradients[0].items())
    assert abs(along - slope) <= 1e-6 * abs(slope) + 1e-9, (along, slope)
    for other in gradients[1:]:
        for name, g in gradients[0].items():
            if training.rounds:
                torch.testing.assert_close(g, other[name], rtol=1e-10, atol=1e-13)
            else:
                assert torch.equal(g, other[name]), name
