"""What is measured: networks, data, optimizers, and the table of their sizes and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Batch], Tensor]

#: name: (class in torch.optim, and in diffopt; options beside the learning rate).
OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adam": ("Adam", {}),
    "rmsprop": ("RMSprop", {}),
}


@dataclass(frozen=True)
class Case:
    """One line of the table: what every library is asked to differentiate.

    Attributes:
        steps: T, the number of inner steps.
        tasks: how many tasks one meta-gradient is the mean over, each with batches of its own.
    """

    workload: str
    optimizer: str
    steps: int = 20
    tasks: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        tasks = f"-tasks{self.tasks}" if self.tasks > 1 else ""
        return f"{self.workload}-{self.optimizer}-T{self.steps}{tasks}"

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """A network with random data of the right shape.

    Attributes:
        inputs: shape of one batch's inputs.
        family: the network's name in ``libraries/jax.py``.
        classes: how many there are, and for a language model the vocabulary; 0: regression.
        batches: how many different batches the inner loop goes through in turn; 1: the same one
            in every step, as in MAML.
        rates: learning rates of sgd, momentum, adam and rmsprop, at which nothing diverges.
    """

    title: str
    family: str
    model: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int
    batches: int
    rates: tuple[float, float, float, float]
    tokens: bool = False

    def rate(self, optimizer: str) -> float:
        return dict(zip(OPTIMIZERS, self.rates, strict=True))[optimizer]

    def batch(self, generator: torch.Generator, dtype: torch.dtype) -> Batch:
        if self.tokens:
            n, length = self.inputs
            text = torch.randint(self.classes, (n, length + 1), generator=generator)
            return text[:, :-1].contiguous(), text[:, 1:].contiguous()
        x = torch.randn(self.inputs, generator=generator)
        if not self.classes:
            return (x := x.to(dtype)), torch.sin(3 * x)
        return x.to(dtype), torch.randint(self.classes, self.inputs[:1], generator=generator)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        if not self.classes:
            return F.mse_loss(model(x), y)
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


WORKLOADS = {
    "mlp": Workload(
        "MLP 256-512-512-512-10, batch 128",
        "mlp",
        lambda: models.mlp(256, 512, 512, 512, 10),
        (128, 256),
        10,
        8,
        (0.05, 0.01, 1e-3, 1e-4),
    ),
    "conv4": Workload(
        "Conv4 with 64 filters, 5-way 5-shot, 28x28",
        "conv4",
        lambda: models.Conv4(64, 5, 28),
        (25, 1, 28, 28),
        5,
        1,
        (0.05, 0.01, 1e-3, 1e-4),
    ),
    "resnet18": Workload(
        "ResNet-18 at a quarter of its width, batch 16, 32x32",
        "resnet18",
        lambda: models.ResNet18(16, 10),
        (16, 3, 32, 32),
        10,
        8,
        (0.01, 0.002, 1e-4, 1e-5),
    ),
    "resnet18-wide": Workload(
        "ResNet-18, batch 16, 32x32",
        "resnet18",
        lambda: models.ResNet18(64, 10),
        (16, 3, 32, 32),
        10,
        8,
        (0.01, 0.002, 1e-4, 1e-5),
    ),
    "gpt": Workload(
        "GPT with 4 layers of 128, batch 12 of 64 tokens",
        "gpt",
        lambda: models.GPT(4, 128, 4, 256, 64),
        (12, 64),
        256,
        8,
        (0.1, 0.02, 1e-3, 1e-4),
        tokens=True,
    ),
    "gpt-mini": Workload(
        "GPT with 2 layers of 64, batch 4 of 32 tokens",
        "gpt",
        lambda: models.GPT(2, 64, 4, 64, 32),
        (4, 32),
        64,
        8,
        (0.1, 0.02, 1e-3, 1e-4),
        tokens=True,
    ),
    "sinusoid": Workload(
        "MLP 1-40-40-1 on sinusoids, batch 10",
        "mlp",
        lambda: models.mlp(1, 40, 40, 1),
        (10, 1),
        0,
        1,
        (0.01, 0.002, 1e-3, 1e-4),
    ),
    "small": Workload(
        "MLP 20-32-10 of 1,002 parameters, batch 16",
        "mlp",
        lambda: models.mlp(20, 32, 10),
        (16, 20),
        10,
        8,
        (0.05, 0.01, 1e-3, 1e-4),
    ),
    # For the tests: as above, and small enough to run in a moment.
    "tiny-mlp": Workload(
        "MLP 4-8-3, batch 5",
        "mlp",
        lambda: models.mlp(4, 8, 3),
        (5, 4),
        3,
        2,
        (0.05, 0.02, 1e-2, 1e-3),
    ),
    "tiny-conv4": Workload(
        "Conv4 with 3 filters, 16x16",
        "conv4",
        lambda: models.Conv4(3, 2, 16),
        (4, 1, 16, 16),
        2,
        1,
        (0.05, 0.02, 1e-3, 1e-4),
    ),
    "tiny-resnet18": Workload(
        "ResNet-18 of width 2, batch 6, 16x16",
        "resnet18",
        lambda: models.ResNet18(2, 3),
        (6, 3, 16, 16),
        3,
        2,
        (0.01, 0.005, 1e-4, 1e-5),
    ),
    "tiny-gpt": Workload(
        "GPT with 1 layer of 8",
        "gpt",
        lambda: models.GPT(1, 8, 2, 11, 5),
        (2, 5),
        11,
        2,
        (0.1, 0.05, 1e-2, 1e-3),
        tokens=True,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A case made concrete: everything a library needs, the same for all of them.

    Attributes:
        batches: one list of T batches per task.
        queries: one batch per task, on which the meta-objective is evaluated.
    """

    case: Case
    model: nn.Module
    batches: list[list[Batch]]
    queries: list[Batch]
    loss_fn: LossFn
    optimizer: str
    options: dict[str, float]

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.model.parameters(), **self.options)


def build(case: Case) -> Problem:
    """The same numbers in every process: drawn on the CPU in float32 from fixed seeds."""
    workload = WORKLOADS[case.workload]
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    model = workload.model().to(case.device, dtype)
    generator = torch.Generator().manual_seed(1)
    batches, queries = [], []
    for _ in range(case.tasks):
        drawn = [workload.batch(generator, dtype) for _ in range(workload.batches + 1)]
        drawn = [(x.to(case.device), y.to(case.device)) for x, y in drawn]
        batches.append([drawn[t % workload.batches] for t in range(case.steps)])
        queries.append(drawn[-1])
    name, options = OPTIMIZERS[case.optimizer]
    options = {"lr": workload.rate(case.optimizer), **options}
    return Problem(case, model, batches, queries, workload.loss_fn, name, options)
