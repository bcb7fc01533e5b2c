"""Processes that take the same steps together, each on its share of every batch.

The inner gradients are averaged over the processes, so that all hold the same weights. Whatever is
exchanged goes in a message of one form, with where the process is and whether it has failed: a
message pairs with any other, so processes that have come apart find that out instead of waiting for
each other or adding up what does not belong together.

Limits: a process that waits outside of an unroll, for an exchange of the caller's own or for a
``backward()`` that another does not call, is found by the group's timeout alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from diffopt._step.collectives import ProcessGroup, check_group, rank_in, size_of, sum_now

#: What a message is for; the derivative of order n of a sum is n further on.
_VALUES, _NORM, _NUMBER, _CLOSING, _FAILED = 0, 100, 200, 300, 400
_FIELDS = 6  # in a message, of each process: pass, purpose, step, weight, a number in two parts
_HALF = 1 << 24  # integers below it are exact in single precision


class GroupError(RuntimeError):
    """A process of the group failed, or the processes came apart; every process knows of it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one process says in a message."""

    pass_: int
    purpose: int
    step: int
    weight: float
    number: int

    @property
    def place(self) -> tuple[int, int, int]:
        """What has to be the same on all processes."""
        return self.pass_, self.purpose, self.step

    def __str__(self) -> str:
        where = "the forward pass" if self.pass_ == 1 else "a backward pass"
        if self.purpose == _CLOSING:
            return f"at the end of {where}"
        doing = "computing" if self.purpose in (_VALUES, _NUMBER) else "differentiating"
        return f"{doing} step {self.step} in {where}"


class Group:
    """The processes of one unroll.

    Args:
        group: a ``torch.distributed`` process group.
        weight: this process's part in the average at a step, such as how many examples it has;
            None: all processes count the same.
        summed: the gradients are added up instead of averaged.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process does not belong to it.
        RuntimeError: no process group was started.

    Cost: of each exchange, one ``all_reduce`` of as many numbers as there are inner parameters, in
    single precision at least.
    """

    def __init__(
        self,
        group: ProcessGroup,
        weight: Callable[[int], float] | None = None,
        *,
        summed: bool = False,
    ) -> None:
        check_group(group)
        self._group, self._weight, self._summed = group, weight, summed
        self._forms: dict[str, Tensor] = {}
        self._empty = torch.empty(0)
        self._passes = 0
        self._step = 0
        self._broken = False

    @property
    def size(self) -> int:
        """How many processes there are."""
        return size_of(self._group)

    # Beginning and ending together.

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Before ``agree``: an error in the block is one on all processes."""
        try:
            yield
        except BaseException as error:
            if not self._forms and not _is_known(error):
                self._meet(None, _text(error))
                _know(error)
            raise

    def agree(self, params: Mapping[str, Tensor], terms: Mapping[str, Any]) -> None:
        """Compare what all processes are about to do.

        Args:
            params: the inner parameters, by name: what messages are shaped by.
            terms: what else has to be the same, by what it is called in the error.

        Raises:
            GroupError: something differs, or a process has failed already.
            NotImplementedError: the parameters are on several devices.
        """
        devices = {x.device for x in params.values()}
        if len(devices) > 1:
            raise NotImplementedError(
                f"the inner parameters are on {', '.join(sorted(map(str, devices)))}, and a group "
                "averages those of one device: move the model to one"
            )
        parameters = {name: f"{tuple(x.shape)}, {x.dtype}" for name, x in params.items()}
        said = {"inner parameters": parameters, **{key: str(x) for key, x in terms.items()}}
        self._meet(said, "")
        self._forms = {name: torch.empty_like(x, device="meta") for name, x in params.items()}
        dtypes = (_real(x).dtype for x in self._forms.values())
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self._empty = torch.empty(0, dtype=dtype, device=devices.pop())

    def _meet(self, said: Mapping[str, Any] | None, failure: str) -> None:
        everyone: list[Any] = [None] * self.size
        with self._completing("before the first step"):
            dist.all_gather_object(everyone, (said, failure), group=self._group)
        if failure:
            return
        self._refuse_failed([text for _, text in everyone], "before the first step")
        for key, first in everyone[0][0].items():
            for rank, (other, _) in enumerate(everyone):
                if _ordered(other.get(key)) != _ordered(first):
                    raise GroupError(
                        f"{key} differ between the processes of the group: "
                        f"{_difference(first, other.get(key), rank)}. Call unroll on all of them "
                        "with the same model, optimizer and options; only the batches may differ"
                    )

    @contextmanager
    def during(self) -> Iterator[None]:
        """A pass over the steps, which all processes begin and end together.

        Raises:
            GroupError: on this process, where another failed; it says where and how.
        """
        self._passes += 1
        try:
            yield
        except BaseException as error:
            if not self._broken and not _is_known(error):
                _know(error)
                self._tell(error)
            raise
        self._exchange(_CLOSING, self._step, {})

    def at(self, step: int) -> None:
        """This process comes to ``step``: so an error will say, were it to fail there."""
        self._step = step

    def _tell(self, error: BaseException) -> None:
        try:
            self._exchange(_FAILED, self._step, {}, _text(error))
        except GroupError as told:
            error.add_note(str(told))

    # Exchanges.

    def averaged(
        self,
        grads: Mapping[str, Tensor | None],
        step: int,
        own: Tensor | None = None,
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The gradients averaged over the processes, which are all at ``step``.

        A gradient that is None counts as zero, and stays None where it is so on all processes.

        Args:
            own: for a differentiable result, a tensor that it is going to be differentiated with
                respect to, whether or not the gradients depend on it.

        Returns:
            the gradients, and for a differentiable result a token: a zero that the derivative is
            to start from as well, so that every process takes part in the exchange on the way
            back, also one to whose gradients nothing flows.
        """
        self._step = step
        if self._summed:
            op = _Sum(self, step, _VALUES, 1.0, 1.0)
        else:
            weight = 1.0 if self._weight is None else self._checked(self._weight(step), step)
            op = _Sum(self, step, _VALUES, weight, None)
        values = [grads.get(name) for name in self._forms]
        if own is None or not torch.is_grad_enabled():
            total, _ = op.of(values)
            return dict(zip(self._forms, total, strict=True)), None
        token, *connected = _Differentiable.apply(op, own, *values)  # type: ignore[no-untyped-call]
        return dict(zip(self._forms, connected, strict=True)), token

    def mean(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of what flows to the parameters, a missing one being zero."""
        op = _Sum(self, self._step, _NORM, 1.0, None)
        values = [cotangents.get(name) for name in self._forms]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in values):
            _, *mean = _Differentiable.apply(op, None, *values)  # type: ignore[no-untyped-call]
        else:
            mean, _ = op.of(values)
        return {n: x for n, x in zip(self._forms, mean, strict=True) if x is not None}

    def maximum(self, number: int) -> int:
        """The greatest of the processes' numbers, each from 0 to 2⁴⁸ − 1."""
        entries, _, _ = self._exchange(_NUMBER, self._step, {}, number=number)
        return max(entry.number for entry in entries)

    def _checked(self, weight: float, step: int) -> float:
        if not 0 < weight < math.inf:
            raise ValueError(
                f"the weight of this process's share at step {step} is {weight}: it has to be a "
                "finite number above 0, so give every process a part of each batch"
            )
        # As it will be read off the message, where it may be rounded.
        return float(torch.tensor(weight, dtype=self._empty.dtype))

    def _exchange(
        self,
        purpose: int,
        step: int,
        parts: Mapping[str, Tensor],
        failure: str = "",
        *,
        weight: float = 1.0,
        number: int = 0,
    ) -> tuple[list[_Entry], dict[str, Tensor], dict[str, bool]]:
        """Send one message and read the sum of all.

        Returns:
            what each process says, the sums of ``parts`` by name, and which any process has.
        """
        names, new = list(self._forms), self._empty.new_tensor
        head = new([0.0] * (self.size * _FIELDS))
        mine = [self._passes, purpose, step, weight, number // _HALF, number % _HALF]
        at = rank_in(self._group) * _FIELDS
        head[at : at + _FIELDS] = new(mine)
        present = new([float(name in parts) for name in names])
        flat = [
            _real(parts[name].detach()).flatten().to(head.dtype)
            if name in parts
            else self._empty.new_zeros(_real(form).numel())
            for name, form in self._forms.items()
        ]
        lengths = [len(head), len(present), *map(len, flat)]
        with self._completing(f"at step {step}"):
            total = sum_now(torch.cat([head, present, *flat]), self._group)
        said, anywhere, *sums = torch.split(total, lengths)
        entries = [_entry(row) for row in said.view(self.size, _FIELDS).tolist()]
        self._compare(entries, failure)
        found = dict(zip(names, sums, strict=True))
        has = dict(zip(names, (x > 0 for x in anywhere.tolist()), strict=True))
        return entries, found, has

    @contextmanager
    def _completing(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._broken = True
            raise GroupError(
                f"the exchange {where} could not be completed: a process of the group has ended, "
                f"or took longer than the group's timeout ({error})"
            ) from error

    def _compare(self, entries: Sequence[_Entry], failure: str) -> None:
        """Raise where a process has failed, or where the processes are not at one place."""
        if any(entry.purpose == _FAILED for entry in entries):
            texts: list[Any] = [None] * self.size
            with self._completing(f"at step {self._step}"):
                dist.all_gather_object(texts, failure, group=self._group)
            self._refuse_failed(texts, *(f"at step {entry.step}" for entry in entries))
        if len({entry.place for entry in entries}) > 1:
            where = "; ".join(f"process {rank} is {entry}" for rank, entry in enumerate(entries))
            raise GroupError(
                f"the processes of the group have come apart: {where}. Call unroll and backward "
                "as often on all of them, in the same order, with the same options"
            )

    def _refuse_failed(self, texts: Sequence[str], *where: str) -> None:
        failed = [
            f"process {rank} stopped {where[rank % len(where)]} with {text}"
            for rank, text in enumerate(texts)
            if text
        ]
        if failed:
            raise GroupError(
                f"{'; '.join(failed)}. So this unroll has ended on all processes of the group"
            )


@dataclass(frozen=True, slots=True)
class _Sum:
    """x ↦ after · Σ before · x over the processes, which is linear; its adjoint has both swapped.

    Attributes:
        before: this process's factor, its weight.
        after: the factor of the sum; None: one over the sum of the weights, which come with it.
    """

    group: Group
    step: int
    purpose: int
    before: float
    after: float | None

    def of(self, xs: Sequence[Tensor | None]) -> tuple[list[Tensor | None], float]:
        """The sum for each of the group's parameters, and the factor ``after``."""
        forms = self.group._forms
        parts = {n: x * self.before for n, x in zip(forms, xs, strict=True) if x is not None}
        weight = self.before if self.after is None else 1.0
        entries, sums, has = self.group._exchange(self.purpose, self.step, parts, weight=weight)
        after = 1 / sum(e.weight for e in entries) if self.after is None else self.after
        found = [_formed(sums[n] * after, form) if has[n] else None for n, form in forms.items()]
        return found, after


class _Differentiable(torch.autograd.Function):
    """A ``_Sum``; before the results comes a token, a zero that keeps the node in every graph."""

    @staticmethod
    def forward(ctx: Any, op: _Sum, own: Tensor | None, *xs: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        found, after = op.of(xs)
        ctx.adjoint = replace(op, purpose=op.purpose + 1, before=after, after=op.before)
        ctx.given = [x is not None for x in xs]
        return op.group._empty.new_zeros(()), *found

    @staticmethod
    def backward(ctx: Any, token: Tensor | None, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            _, *found = _Differentiable.apply(ctx.adjoint, None, *cotangents)  # type: ignore[no-untyped-call]
        else:
            found, _ = ctx.adjoint.of(cotangents)
        return (
            None,
            None,
            *(c if given else None for c, given in zip(found, ctx.given, strict=True)),
        )


def _entry(row: Sequence[float]) -> _Entry:
    pass_, purpose, step, weight, high, low = row
    return _Entry(int(pass_), int(purpose), int(step), weight, int(high) * _HALF + int(low))


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _formed(flat: Tensor, form: Tensor) -> Tensor:
    """Numbers of a message as a tensor of the form of a parameter."""
    if form.is_complex():
        return torch.view_as_complex(flat.view(*form.shape, 2)).to(form.dtype)
    return flat.view(form.shape).to(form.dtype)


def _difference(first: Any, other: Any, rank: int) -> str:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                first, other = (f"{name!r}: {x.get(name, 'missing')}" for x in (first, other))
                break
        else:
            return f"their order on process {rank} is another"
    return f"process 0 has {first}, process {rank} has {other}"


def _ordered(said: Any) -> Any:
    return list(said.items()) if isinstance(said, Mapping) else said


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _know(error: BaseException) -> None:
    error.__dict__["_known_to_group"] = True


def _is_known(error: BaseException) -> bool:
    """Whether the other processes fail as well, or have been told."""
    return isinstance(error, GroupError) or "_known_to_group" in error.__dict__
