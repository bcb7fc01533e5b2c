"""The state that a training loop carries from step to step, and its cotangent.

A state is a value: no function of this package writes into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from diffopt._values.tree import Path, is_differentiable

#: What flows back (or, in forward mode, along): by path, a missing path standing for zero.
Cotangent = dict[Path, Tensor]


def add_into(total: Cotangent, more: Cotangent) -> None:
    """Add a cotangent to another, one tensor after the other, each freeing the one it replaces."""
    for path, c in more.items():
        total[path] = total[path] + c if path in total else c


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class State:
    """Inner parameters, optimizer state and buffers, each by the name the model gives them.

    A state is equal to itself alone.
    """

    params: Mapping[str, Tensor]
    opt: Mapping[str, Mapping[str, Tensor]]
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, values: Mapping[Path, Tensor]) -> State:
        """The tensors at their paths: the inverse of ``tensors``."""
        opt: dict[str, dict[str, Tensor]] = {}
        kinds: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
        for (kind, name, *key), x in values.items():
            if kind == "opt":
                opt.setdefault(name, {})[key[0]] = x
            else:
                kinds[kind][name] = x
        return cls(kinds["params"], opt, kinds["buffers"])

    def tensors(self) -> dict[Path, Tensor]:
        """Every tensor of the state by its path."""
        flat: dict[Path, Tensor] = {("params", name): x for name, x in self.params.items()}
        for name, entries in self.opt.items():
            for key, x in entries.items():
                flat["opt", name, key] = x
        for name, x in self.buffers.items():
            flat["buffers", name] = x
        return flat

    def each(self) -> Iterator[Tensor]:
        """Every tensor of the state."""
        return chain(
            self.params.values(), *(e.values() for e in self.opt.values()), self.buffers.values()
        )

    def differentiable(self) -> dict[Path, Tensor]:
        """The tensors that may carry a gradient: floating point ones, and not step counts."""
        return {
            path: x
            for path, x in self.tensors().items()
            if is_differentiable(x) and not (path[0] == "opt" and path[2] == "step")
        }

    def replace(self, values: Mapping[Path, Tensor]) -> State:
        """A state with ``values`` put in the place of the tensors at their paths."""
        get = values.get
        return State(
            {name: get(("params", name), x) for name, x in self.params.items()},
            {
                name: {key: get(("opt", name, key), x) for key, x in entries.items()}
                for name, entries in self.opt.items()
            },
            {name: get(("buffers", name), x) for name, x in self.buffers.items()},
        )

    def detach(self) -> State:
        """The same values, cut from any graph."""
        if not any(x.requires_grad for x in self.each()):
            return self
        return self.replace({p: x.detach() for p, x in self.tensors().items() if x.requires_grad})

    def apart_from(self, other: State) -> State:
        """The same values, copied where they are held in memory of ``other``."""
        taken = {_memory(x) for x in other.each()}
        mine = self.tensors()
        return self.replace({p: x.clone() for p, x in mine.items() if _memory(x) in taken})


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
