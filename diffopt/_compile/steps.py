"""Consecutive steps of one structure, and what they are given as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import torch
from torch import Tensor

from diffopt._compile.rows import in_rows
from diffopt._compile.specialise import Call
from diffopt._compile.step_inputs import ManyInputs

#: The columns of the index: the step within its block, its hyperparameters, and from ``BATCH`` on
#: one for each tensor of its batch.
STEP, HYPER, BATCH = 0, 1, 2


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one structure, with what they are given besides the state.

    Attributes:
        call: the first of them.
        given: for each step its batch and hyperparameters.
        drawn: for each step its random numbers.
    """

    call: Call
    given: ManyInputs
    drawn: Sequence[Sequence[Tensor]]

    @property
    def start(self) -> int:
        """The position of the first."""
        return self.call.t

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.call.t + len(self.given)


class Rows:
    """What the steps of a block are given besides the state, as a loop takes it.

    Attributes:
        index: which rows each step reads.
        values: by index among a step's inputs, hyperparameters and the tensors of functions and
            batches: a tensor, or the rows of many.
        columns: for those in rows the column of the index.
        drawn: the random numbers, in rows.
    """

    def __init__(self, steps: Steps) -> None:
        call, count = steps.call, len(steps.given)
        n, h = len(call.state), len(call.hyper)
        columns = steps.given.columns()
        values = dict(enumerate([*call.hyper, *call.fixed], n))
        self.columns: dict[int, int] = {}
        one = steps.given.one_hyper
        hyper = [call.hyper] if one else [x.hyper for x in steps.given]
        for j, constant in enumerate(call.constant):
            if not constant:
                values[n + j] = in_rows([x[j] for x in hyper])
                self.columns[n + j] = HYPER
        index = _index(count, (True, not one, *(which is None for _, which in columns)))
        for k, (tensors, which) in enumerate(columns):
            i = n + h + call.shared + k
            values[i] = in_rows(tensors)
            self.columns[i] = BATCH + k
            if which is not None and len(tensors) > 1:
                index = index.clone()
                index[:, BATCH + k] = torch.tensor(which)
        self.index = index
        self.values = values
        self.drawn = [in_rows(column) for column in zip(*steps.drawn, strict=True)]


@lru_cache(maxsize=64)
def _index(steps: int, own: tuple[bool, ...]) -> Tensor:
    """Which rows steps read: in each column the one of their own number, or the first."""
    index = torch.zeros(steps, len(own), dtype=torch.int64, device="cpu")
    for column in compress(range(len(own)), own):
        index[:, column] = torch.arange(steps, device="cpu")
    return index
