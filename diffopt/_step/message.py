"""The messages of a group: one flat tensor each, which an ``all_reduce`` sums.

Every process writes into its own row where it is, and into the rest what is to be summed. Whatever
it is for, a message has one form, so any two pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

#: What a message is for; the derivative of order n of a sum is n further on.
VALUES, NORM, NUMBER, CLOSING, FAILED = 0, 100, 200, 300, 400
_FIELDS = 5  # of each process: pass, purpose, step, a number in two parts
_HALF = 1 << 24  # integers below it are exact in single precision
MOST = _HALF * _HALF - 1  #: the greatest number that a message can carry


@dataclass(frozen=True)
class Entry:
    """What one process says in a message.

    Attributes:
        pass_: which pass over the steps, counted by the process from 1 on.
        number: from 0 to ``MOST``, for whatever the message is for.
    """

    pass_: int
    purpose: int
    step: int
    number: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """What has to be the same on all processes."""
        return self.pass_, self.purpose, self.step

    def __str__(self) -> str:
        where = "the forward pass" if self.pass_ == 1 else "a backward pass"
        if self.purpose == CLOSING:
            return f"at the end of {where}"
        doing = "computing" if self.purpose in (VALUES, NUMBER) else "differentiating"
        return f"{doing} step {self.step} in {where}"


@dataclass(frozen=True)
class Total:
    """A message summed over the processes.

    Attributes:
        entries: what each process says.
        sums: the sum for each parameter; None where no process has it.
        weight: the sum of the processes' weights, 0-d.
    """

    entries: Sequence[Entry]
    sums: list[Tensor | None]
    weight: Tensor


class Form:
    """The form of the messages about tensors that are shaped like ``params``, on one device.

    Attributes:
        names: of the parameters, in order.
        dtype: of the messages, of single precision at least.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.names = tuple(params)
        self._shapes = [torch.empty_like(x, device="meta") for x in params.values()]
        dtypes = (_real(x).dtype for x in self._shapes)
        self.dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self._device = next((x.device for x in params.values()), torch.device("cpu"))

    def scalar(self, value: float = 0.0) -> Tensor:
        """A number as it is in a message, where it may be rounded."""
        return torch.tensor(value, dtype=self.dtype, device=self._device)

    def packed(
        self,
        entry: Entry,
        rank: int,
        size: int,
        parts: Sequence[Tensor | None],
        weight: Tensor | None,
    ) -> Tensor:
        """The message of process ``rank`` of ``size``. A part that is None counts as zero."""
        head = torch.zeros(size, _FIELDS, dtype=self.dtype)
        high, low = divmod(entry.number, _HALF)
        head[rank] = torch.tensor([entry.pass_, entry.purpose, entry.step, high, low])
        present = torch.tensor([float(x is not None) for x in parts], dtype=self.dtype)
        about = torch.cat([head.flatten(), present]).to(self._device)
        flat = [
            torch.zeros(_real(shape).numel(), dtype=self.dtype, device=self._device)
            if x is None
            else _real(x.detach().resolve_conj()).flatten().to(self.dtype)
            for x, shape in zip(parts, self._shapes, strict=True)
        ]
        own = self.scalar() if weight is None else weight.detach().to(self.dtype)
        return torch.cat([about, own.reshape(1), *flat])

    def read(self, total: Tensor, size: int) -> Total:
        """What the sum of the messages of ``size`` processes says."""
        lengths = [size * _FIELDS, len(self.names), 1]
        said, anywhere, weight, *sums = torch.split(
            total, [*lengths, *(_real(shape).numel() for shape in self._shapes)]
        )
        said, anywhere = torch.split(torch.cat([said, anywhere]).cpu(), lengths[:2])
        entries = [_entry(row) for row in said.view(size, _FIELDS).tolist()]
        return Total(
            entries,
            [
                _shaped(x, shape) if has > 0 else None
                for x, has, shape in zip(sums, anywhere.tolist(), self._shapes, strict=True)
            ],
            weight.reshape(()),
        )


def _entry(row: Sequence[float]) -> Entry:
    pass_, purpose, step, high, low = map(int, row)
    return Entry(pass_, purpose, step, high * _HALF + low)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _shaped(flat: Tensor, shape: Tensor) -> Tensor:
    """Numbers of a message as a tensor of the shape and dtype of a parameter."""
    if shape.is_complex():
        pairs = flat.clone().view(*shape.shape, 2)  # which begin at a multiple of two numbers
        return torch.view_as_complex(pairs).to(shape.dtype)
    return flat.view(shape.shape).to(shape.dtype)
