"""What the tests of ``diffopt.higher`` share: a network with every kind of weight, and data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Shared, frozen and unused weights, in float64; ``part`` may be called on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 4)
        self.back = nn.Linear(4, 3)
        self.again = nn.Linear(3, 4)
        self.again.weight = self.part.weight
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.part(x).tanh()) * self.frozen
        return self.again(x)


def groups(model: Net) -> list[dict[str, Any]]:
    """Two param groups: the shared weight, and all others."""
    rest = [p for p in model.parameters() if p is not model.part.weight]
    return [{"params": [model.part.weight]}, {"params": rest}]


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(5, 3 + 4, generator=generator, dtype=torch.double) for _ in range(number)]
    return [(x[:, :3], x[:, 3:]) for x in made]


def loss_fn(model: Any, batch: Batch) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)
