"""Products of small matrices in C++, for ``small_loops``: private names of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

#: The most multiplications of two matrices that are written out; a library does more faster.
MOST_MULTIPLICATIONS = 1 << 17

#: The most bytes of a matrix that is copied first, so that its rows lie side by side.
MOST_PACKED = 1 << 18

#: Bytes of the widest registers.
_REGISTER = 64

Strides = tuple[int, int, int]


class NotSmall(Exception):
    """Says why a loop cannot be written without allocations."""


@dataclass(frozen=True)
class _Matrix:
    """A matrix in memory, or many of one form.

    Attributes:
        place: C++ for where it is.
        sizes, strides: how many there are, their rows, their columns.
    """

    place: str
    sizes: tuple[int, int, int]
    strides: Strides

    @classmethod
    def of(cls, x: Any) -> _Matrix:
        """Of a tensor of one to three dimensions."""
        sizes, strides = list(x.get_size()), list(x.get_stride())
        if not are_numbers([*sizes, *strides]) or len(sizes) > 3:
            raise NotSmall("the sizes of a product of matrices are not known")
        missing = 3 - len(sizes)
        batch, rows, columns = [1] * missing + [int(n) for n in sizes]
        b, r, c = [0] * missing + [int(n) for n in strides]
        return cls(x.codegen_reference(), (batch, rows, columns), (b, r, c))

    @property
    def transposed(self) -> _Matrix:
        (batch, rows, columns), (b, r, c) = self.sizes, self.strides
        return _Matrix(self.place, (batch, columns, rows), (b, c, r))

    def expanded(self, sizes: tuple[int, int, int]) -> _Matrix:
        """With the one row, or whatever there is one of, for all."""
        b, r, c = (
            0 if mine == 1 and wanted != 1 else stride
            for mine, wanted, stride in zip(self.sizes, sizes, self.strides, strict=True)
        )
        return _Matrix(self.place, sizes, (b, r, c))


def product_call(node: Any) -> str:
    """C++ for a node of TorchInductor's that is ``mm``, ``bmm``, ``addmm`` or ``baddbmm``.

    Raises:
        NotSmall: it is something else, or the matrices are large.
    """
    operation = str(node.python_kernel_name).rpartition(".")[2]
    if operation not in ("mm", "bmm", "addmm", "baddbmm") or node.output_view:
        raise NotSmall(f"it calls {operation}")
    if any(factor not in (1, None) for factor in node.kwargs.values()):
        raise NotSmall("a sum of products has factors")
    if node.get_dtype() not in (torch.float32, torch.float64):
        raise NotSmall(f"there are products of matrices of {node.get_dtype()}")
    *added, a, b = map(_Matrix.of, node.inputs)
    c = _Matrix.of(node)
    d = added[0].expanded(c.sizes) if added else None
    if c.sizes[1] * c.sizes[2] * a.sizes[2] > MOST_MULTIPLICATIONS:
        raise NotSmall("there is a product of large matrices")
    lanes = _REGISTER // node.get_dtype().itemsize
    if _cycles(b.transposed, a.transposed, c.transposed, lanes) < _cycles(a, b, c, lanes):
        a, b, c = b.transposed, a.transposed, c.transposed
        d = None if d is None else d.transposed
    if b.strides[2] != 1 and b.sizes[1] * b.sizes[2] * node.get_dtype().itemsize > MOST_PACKED:
        raise NotSmall("a large matrix would have to be transposed")
    numbers = [*c.sizes, a.sizes[2], *a.strides, *b.strides, *c.strides]
    numbers += (0, 0, 0) if d is None else d.strides
    kind, is_added = DTYPE_TO_CPP[node.get_dtype()], "false" if d is None else "true"
    places = [x.place for x in (c, a, b, d) if x is not None]
    text = ", ".join(f"{n}L" for n in numbers)
    return f"product<{kind}, {is_added}, {text}>({', '.join(places)});"


def _cycles(a: _Matrix, b: _Matrix, c: _Matrix, lanes: int) -> float:
    """About how long the C++ takes, which goes along the columns of ``b`` and ``c``."""
    (_, rows, columns), inner = c.sizes, a.sizes[2]
    cycles = rows * inner * math.ceil(columns / lanes) / 1.5
    if b.strides[2] != 1:
        cycles += inner * columns
    if c.strides[2] != 1:
        cycles += 2 * rows * columns
    return cycles


def are_numbers(sizes: Iterable[Any]) -> bool:
    """Whether sizes are known."""
    return all(isinstance(n, int) or getattr(n, "is_number", False) for n in sizes)


def span(sizes: Sequence[Any], strides: Sequence[Any]) -> int:
    """How many elements there are from the first to the last."""
    if 0 in sizes:
        return 0
    return 1 + sum((int(n) - 1) * int(s) for n, s in zip(sizes, strides, strict=True))
