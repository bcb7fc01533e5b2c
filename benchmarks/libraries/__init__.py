"""The libraries that are compared: one file each, with ``prepare(problem, **options) -> run``.

``run()`` does the whole of the work, forward and back, and returns the meta-gradient with respect
to the initial parameters by name. Whatever can be done once, and every compilation, belongs into
``prepare`` or happens in the first ``run()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Library:
    """One column of the table.

    Attributes:
        module: the file in this folder, and what has to be installed.
        options: for its ``prepare``.
        peer: whether it is a published library that keeps every step's graph, one of which is
            what the ratios are taken against.
    """

    module: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: bool = False

    def load(self) -> ModuleType:
        return import_module(f"libraries.{self.module}")


LIBRARIES = {
    "diffopt": Library("diffopt", "`Segmented(1)`", {"segment": 1}),
    "diffopt-segment5": Library("diffopt", "`Segmented(5)`", {"segment": 5}),
    "diffopt-sqrt": Library("diffopt", "`Segmented()`"),
    "diffopt-default": Library("diffopt", "the default, `MemoryBudget()`", {"default": True}),
    "diffopt-512": Library("diffopt", '`MemoryBudget("512MiB")`', {"budget": "512MiB"}),
    "diffopt-store": Library("diffopt", "`StoreAll()`", {"store_all": True}),
    "diffopt-compile": Library(
        "diffopt", "`Segmented(1)`, `compile`", {"segment": 1, "compile": True}
    ),
    "diffopt-tasks": Library("diffopt", "`Segmented(1)`, `tasks`", {"segment": 1, "tasks": True}),
    "diffopt-tasks-compile": Library(
        "diffopt",
        "`Segmented(1)`, `tasks`, `compile`",
        {"segment": 1, "tasks": True, "compile": True},
    ),
    "higher": Library("higher", "higher", peer=True),
    "torchopt": Library("torchopt", "TorchOpt", peer=True),
    "torch_maml": Library("torch_maml", "torch_maml", peer=True),
    "torch_maml-checkpoint5": Library(
        "torch_maml", "torch_maml, checkpoints of 5", {"checkpoint": 5}
    ),
    "plain": Library("plain", "a loop by hand"),
    "reference": Library("plain", "a loop by hand, checkpointed", {"checkpointed": True}),
    "jax": Library("jax", "JAX, `jit` and `checkpoint`"),
}
