"""What steps are given besides the state, read for compiled code.

A step of compiled code has to be of the structure that the code was made for. Of many steps at once
that is seen by columns: whether a tensor of the batch is, in all steps, of one shape, dtype, device
and so on. Where it is not, each step is looked at by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from diffopt._compile.environment import PLAIN, Same
from diffopt._compile.hyper_inputs import constants, entries, is_input
from diffopt._compile.rows import distinct
from diffopt._compile.step_number import STEP_NUMBER
from diffopt._step.observe import Observer
from diffopt._step.step import InnerStep
from diffopt._torch.autograd import present_sequence
from diffopt._torch.pytree import tree_flatten


@dataclass(frozen=True)
class StepInputs:
    """What a step is given besides the state.

    Attributes:
        item: the batch.
        options: the optimizer's, evaluated.
        key: what code depends on of both.
        batch: the tensors of the batch alone.
        hyper: the tensors that the options consist of.
        constant: which of them are the same in all steps, as no schedule computes them.
    """

    item: Any
    options: Sequence[Mapping[str, Any]]
    key: tuple[Hashable, Hashable]
    batch: Sequence[Tensor]
    hyper: list[Tensor]
    constant: tuple[bool, ...]


#: The tensors of a column, each once, and which of them each step has; None: its own.
Column = tuple[Sequence[Tensor], Sequence[int] | None]


class ManyInputs(Sequence[StepInputs]):
    """What each of several steps is given, all of one structure."""

    def __init__(self, each: Sequence[StepInputs]) -> None:
        self._each = each

    def __len__(self) -> int:
        return len(self._each)

    @overload
    def __getitem__(self, i: int) -> StepInputs: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[StepInputs]: ...
    def __getitem__(self, i: Any) -> Any:
        return self._each[i]

    def columns(self) -> list[Column]:
        """The tensors of their batches, by place."""
        return [distinct(column) for column in zip(*(x.batch for x in self._each), strict=True)]

    @property
    def one_batch(self) -> bool:
        """Whether all have one batch."""
        return all(x.batch is self._each[0].batch for x in self._each)

    @property
    def one_hyper(self) -> bool:
        """Whether all have the same hyperparameters."""
        return all(x.hyper is self._each[0].hyper for x in self._each)


class _OwnBatches(ManyInputs):
    """Steps that differ in their batches alone, which are tuples of tensors, each its own."""

    def __init__(self, first: StepInputs, items: Sequence[Any], columns: list[Column]) -> None:
        self._first, self._items, self._columns = first, items, columns

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        first, item = self._first, self._items[i]
        if item is first.item:
            return first
        return StepInputs(item, first.options, first.key, item, first.hyper, first.constant)

    def columns(self) -> list[Column]:
        return self._columns

    @property
    def one_batch(self) -> bool:
        return len(self) == 1

    @property
    def one_hyper(self) -> bool:
        return True


class Reader:
    """Reads what the steps of an unroll are given.

    Args:
        step: the eager step.
        places: the index, by id, of each tensor that the functions see.
        counted: ``loss_fn`` is given the step number, not a batch.
        indexed: batches are made when they are asked for.

    Attributes:
        scheduled: whether callables give hyperparameters.
    """

    def __init__(
        self, step: InnerStep, places: Mapping[int, int], *, counted: bool, indexed: bool
    ) -> None:
        self._loss, self._opt, self._first_step = step.loss, step.opt, step.first_step
        self._places = places
        self._counted = counted
        self._indexed = indexed
        self.scheduled = any(
            callable(x) for group in step.opt.param_groups for _, x in entries([group])
        )
        self._options: tuple[Any, ...] | None = None
        self._last: StepInputs | None = None
        self._leaves: tuple[Any, ...] = ()

    def of(self, step: InnerStep) -> Reader:
        """A reader of the same unroll, whose positions are those of ``step``."""
        reader = copy(self)
        reader._loss, reader._first_step = step.loss, step.first_step
        return reader

    def at(self, t: int, observer: Observer | None) -> StepInputs:
        """What step ``t`` is given. Of steps that are alike, the key is one object."""
        if self.scheduled or self._indexed or self._options is None:
            item = self._evaluated_item(t, observer)
        else:
            item = STEP_NUMBER if self._counted else self._loss.item_at(t)
        assert self._options is not None
        leaves, spec = _flattened(item)
        last = self._last
        if last is None or self._leaves[0] != spec:
            batch, batch_key = self._tensors(leaves, spec)
        elif all(map(operator.is_, leaves, self._leaves[1])):
            if not self.scheduled:
                return last
            batch, batch_key = last.batch, last.key[0]
        elif type(spec) is int and self._as_before(leaves, last):
            batch, batch_key = leaves, last.key[0]
        else:
            batch, batch_key = self._tensors(leaves, spec)
        options, hyper, constant, hyper_key = self._options
        key = (batch_key, hyper_key)
        if last is not None and key == last.key:
            key = last.key
        self._last = StepInputs(item, options, key, batch, hyper, constant)
        self._leaves = spec, leaves
        return self._last

    def many(self, first: StepInputs, start: int, stop: int, most_bytes: int) -> ManyInputs | None:
        """What the steps ``start``, ..., ``stop`` − 1 are given, where that is seen by columns.

        Args:
            first: what step ``start`` is given.
            most_bytes: of their batches; there are as many steps as that allows.

        Returns:
            None where each has to be looked at by itself.
        """
        if self.scheduled or self._indexed or self._counted:
            return None
        stop = min(stop, start + max(most_bytes // max(nbytes(first.batch), 1), 1))
        items = list(map(self._loss.item_at, range(start, stop)))
        if all(item is first.item for item in items):
            return ManyInputs([first] * len(items))
        count = len(first.batch)
        if {*map(type, items)} != {tuple} or {*map(len, items)} != {count}:
            return None
        if not all(map(_is_plain, first.item)):
            return None
        columns = list(zip(*items, strict=True))
        ids = {id(x) for column in columns for x in column}
        if len(ids) != count * len(items) or not self._places.keys().isdisjoint(ids):
            return None
        if not all(map(_is_uniform, columns)):
            return None
        return _OwnBatches(first, items, [(column, None) for column in columns])

    def _evaluated_item(self, t: int, observer: Observer | None) -> Any:
        """The batch of step ``t``, and the optimizer's options."""
        seen: AbstractContextManager[Any] = nullcontext()
        if observer is not None and (self._indexed or self.scheduled):
            observer.begin(self._first_step + t, (), present_sequence())
            seen = observer
        with torch.enable_grad(), seen:  # always, as the code depends on what requires grad
            item = STEP_NUMBER if self._counted else self._loss.item_at(t)
            self._options = self._evaluated(t)
        return item

    def _as_before(self, leaves: Sequence[Tensor], last: StepInputs) -> bool:
        """Whether these are other tensors, of the same structure as those of the last batch."""
        count = len(leaves)
        return (
            len(last.batch) == count
            and len({*map(id, leaves)}) == count
            and self._places.keys().isdisjoint(map(id, leaves))
            and all(map(_alike, leaves, self._leaves[1]))
        )

    def _tensors(self, leaves: Sequence[Any], spec: Any) -> tuple[Sequence[Tensor], Hashable]:
        """The tensors of a batch alone, and what code depends on of the batch."""
        batch: list[Tensor] = []
        places = self._places
        own: dict[int, int] = {}
        key: list[Hashable] = [spec]
        for x in leaves:
            if isinstance(x, Tensor):
                place = places.get(id(x), own.get(id(x)))
                if place is None:
                    place = own[id(x)] = len(places) + len(batch)
                    batch.append(x)
                key.append((place, form_of(x)))
            else:
                key.append((type(x), x) if isinstance(x, PLAIN) else Same(x))
        return batch, tuple(key)

    def _evaluated(self, t: int) -> tuple[Any, list[Tensor], tuple[bool, ...], Hashable]:
        """The optimizer's options, the tensors among them, which are constant, and all else."""
        values = self._opt.hyperparameters(self._first_step + t)
        options = [  # a switch stays one, also where a rule's own counts as a number
            {k: group[k] if isinstance(group.get(k), bool) else v for k, v in own.items()}
            for group, own in zip(self._opt.param_groups, values, strict=True)
        ]
        constant = constants(self._opt, options)
        key: list[Hashable] = [constant]
        tensors = []
        for name, value in entries(options):
            if is_input(name, value):
                x = value if isinstance(value, Tensor) else _number(value)
                tensors.append(x)
                key.append(form_of(x))
            else:
                key.append(value)
        return options, tensors, constant, tuple(key)


def _number(value: float) -> Tensor:
    """A number as a tensor, the one of the last time if nothing has written into that."""
    if torch.is_inference_mode_enabled():  # whose tensors no later unroll could use
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    kept = _kept_number(value, math.copysign(1.0, value))
    return kept if kept.item() == value else torch.tensor(value, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=1024)
def _kept_number(value: float, sign: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def form_of(x: Tensor) -> Hashable:
    """What compiled code takes for granted of an input."""
    return x.dtype, x.device, x.shape, x.stride(), x.requires_grad


def nbytes(tensors: Iterable[Tensor]) -> int:
    """How many bytes tensors take."""
    return sum(x.numel() * x.element_size() for x in tensors)


_PARTS: tuple[Callable[[Any], Hashable], ...] = (
    type,
    *map(operator.attrgetter, ("dtype", "requires_grad", "shape")),
)
_ON_CPU, _ON_DEVICE = map(operator.attrgetter, ("is_cpu", "device"))


def _is_uniform(column: Sequence[Tensor]) -> bool:
    """Whether tensors are of one form."""
    first = column[0]
    parts = (
        *_PARTS,
        _ON_CPU if first.is_cpu else _ON_DEVICE,
        Tensor.is_contiguous if first.is_contiguous() else Tensor.stride,
    )
    return all(len({*map(part, column)}) == 1 for part in parts)


def _alike(x: Tensor, y: Tensor) -> bool:
    return (
        x.shape == y.shape
        and x.dtype is y.dtype
        and x.requires_grad is y.requires_grad
        and x.stride() == y.stride()
        and x.device == y.device
    )


def _flattened(item: Any) -> tuple[Sequence[Any], Any]:
    """The leaves of a batch, and what else it is."""
    if type(item) is tuple and all(type(x) is Tensor for x in item):
        return item, len(item)
    leaves, spec = tree_flatten(item)
    return leaves, spec


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor
