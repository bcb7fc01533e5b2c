"""Parameters that are ``DTensor``s: in the loop's state each is this process's part of it.

A part is a plain tensor, and so are its gradient, what flows back to it, and its optimizer's state:
a rule that acts entry by entry is given parts instead of wholes. Whoever is shown a value, the
module, ``grad_transform``, ``monitor`` and the caller, is shown the ``DTensor``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._derivatives.sharded import Layout, Processes, part_of, spread, stand, total, whole
from diffopt._derivatives.sharded import maximum as maximum_over
from diffopt._torch.dtensors import is_dtensor
from diffopt._values.state import State


class Shards:
    """The ``DTensor``s among a model's parameters.

    Attributes:
        layouts: how each that is trained lies on the processes, by its name.
        meshes: all processes that hold any, mesh by mesh.
    """

    def __init__(self, layouts: Mapping[str, Layout], meshes: Iterable[Any]) -> None:
        self.layouts = layouts
        self._numbers: set[tuple[str, str]] = set()  # state entries of numbers
        self.meshes = [Processes(mesh, tuple(range(mesh.ndim))) for mesh in dict.fromkeys(meshes)]

    @classmethod
    def among(cls, inner: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Self | None:
        """The ``DTensor``s among the trained parameters and the constants; None without any."""
        layouts = {name: Layout.of(x) for name, x in inner.items() if is_dtensor(x)}
        every: list[Any] = [x for x in (*inner.values(), *constants.values()) if is_dtensor(x)]
        return cls(layouts, [x.device_mesh for x in every]) if every else None

    def standing(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts as ``DTensor``s; whatever else is there as it is."""
        return {
            name: x if (layout := self._of(name, x)) is None else stand(x, layout)
            for name, x in values.items()
        }

    def parts(self, values: Mapping[str, Any], what: str) -> dict[str, Any]:
        """This process's parts of ``DTensor``s.

        Args:
            what: ``{name}`` in it, as the subject of an error.

        Raises:
            ValueError: a value is no ``DTensor`` where the parameter is, or the other way round, or
                of another shape or mesh.
        """
        parts = {}
        for name, x in values.items():
            layout, is_sharded = self.layouts.get(name), is_dtensor(x)
            if layout is not None and is_sharded and layout.fits(x):
                x = part_of(x, layout)
            elif is_sharded or (layout is not None and isinstance(x, Tensor)):
                is_ = f"a DTensor of shape {tuple(x.shape)}" if is_sharded else "a plain tensor"
                raise ValueError(
                    f"{what.format(name=repr(name))} is {is_}, and the model has "
                    + (
                        "a plain tensor there: pass x.full_tensor()"
                        if layout is None
                        else f"a DTensor of shape {tuple(layout.shape)} on {layout.mesh} there: "
                        "pass torch.distributed.tensor.distribute_tensor(x, mesh, placements)"
                    )
                )
            parts[name] = x
        return parts

    def state_of_parts(self, state: State) -> State:
        """The state that the loop starts from, of one that the caller has."""
        return State(
            self.parts(state.params, "the initial value of {name}"),
            {name: self._entries(name, entries) for name, entries in state.opt.items()},
            self.parts(state.buffers, "the initial value of {name}"),
        )

    def state_of_wholes(self, state: State) -> State:
        """The state that the caller is given, of one that the loop ends with."""
        opt = {
            name: {
                key: self._whole_entry(name, x, x.dim() > 0 or (name, key) in self._numbers)
                for key, x in entries.items()
            }
            for name, entries in state.opt.items()
        }
        return State(self.standing(state.params), opt, state.buffers)

    def norms(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Numbers whose joint Euclidean norm is that of the wholes of ``values``, in float64."""
        norms: list[Tensor] = []
        squares: dict[Processes, list[Tensor]] = {}
        for name, x in values.items():
            over = self.layouts[name].over if name in self.layouts else None
            norm = torch.linalg.vector_norm(x, dtype=torch.float64)
            if over is None:
                norms.append(norm)
            else:
                squares.setdefault(over, []).append(norm.square())
        sums = [total(torch.stack(of_mesh).sum(), over) for over, of_mesh in squares.items()]
        # At zero the root has no derivative, and there nothing is clipped.
        tiny = torch.finfo(torch.float64).tiny
        return [*norms, *(x.clamp(min=tiny).sqrt() for x in sums)]

    def maximum(self, number: int) -> int:
        """The greatest of the numbers of the processes that hold parts."""
        for over in self.meshes:
            number = maximum_over(number, over.groups, torch.device(over.mesh.device_type))
        return number

    def _of(self, name: str, x: Any) -> Layout | None:
        """The layout of the ``DTensor`` that ``x`` is a part of."""
        return self.layouts.get(name) if isinstance(x, Tensor) and not is_dtensor(x) else None

    def _entries(self, name: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layout, parts = self.layouts.get(name), {}
        for key, x in entries.items():
            if is_dtensor(x) and (layout is None or x.shape != layout.shape):
                x = whole(x)
            parts[key] = x
        if layout is None:
            return parts
        for key, x in parts.items():
            if not x.dim() and is_dtensor(x):
                self._numbers.add((name, key))
            if x.dim() or is_dtensor(x):
                where = f"the optimizer's {key!r} of {{name}}"
                parts[key] = self.parts({name: x}, where)[name]
            elif layout.over is not None and x.requires_grad:
                parts[key] = spread(x, layout.over)
        return parts

    def _whole_entry(self, name: str, x: Tensor, is_part: bool) -> Tensor:
        """An entry of the optimizer's state that is a part, or a number beside the part.

        Every process has that number: what flows back to it is shared among them.
        """
        if is_part:
            return self.standing({name: x})[name]
        over = self.layouts[name].over if name in self.layouts else None
        if over is None or not x.requires_grad:
            return x
        value = x.detach()
        return value + (x - value) / over.size
