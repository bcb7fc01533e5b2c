"""Processes that take the same steps together, each on its share of every batch.

The inner gradients are averaged over the processes, so that all hold the same weights. Whatever is
exchanged goes in a message of one form, with where the process is and whether it has failed: a
message pairs with any other, so processes that have come apart find that out instead of waiting for
each other or adding up what does not belong together.

Limits: a process that waits outside of an unroll, for an exchange of the caller's own or for a
``backward()`` that another does not call, is found by the group's timeout alone. So is one whose
second backward pass comes by no step of the first, where another's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from diffopt._step.apart import (
    GroupError,
    is_known,
    know,
    refuse_apart,
    refuse_different,
    refuse_failed,
    text_of,
)
from diffopt._step.collectives import ProcessGroup, check_group, rank_in, size_of
from diffopt._step.message import CLOSING, FAILED, NORM, NUMBER, VALUES, Entry, Form, Total
from diffopt._torch.collectives import sum_now
from diffopt._torch.engine import at_its_end, graph_task

_READS, _LEARNED = 1, 2  # what a message of gradients notes, as bits of its number


@dataclass(frozen=True)
class Averaged:
    """Gradients averaged over the processes.

    Attributes:
        grads: by name; None where no process has one.
        token: of a differentiable average, a zero that the derivative is to start from as well, so
            that every process takes part in the exchange on the way back, also one to whose
            gradients nothing flows.
        noted: whether some process made the note.
    """

    grads: dict[str, Tensor | None]
    token: Tensor | None
    noted: bool


class Group:
    """The processes of one unroll.

    Args:
        group: a ``torch.distributed`` process group.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process does not belong to it.
        RuntimeError: no process group was started.

    Cost: of each exchange, one ``all_reduce`` of as many numbers as there are inner parameters, in
    single precision at least.
    """

    def __init__(self, group: ProcessGroup) -> None:
        check_group(group)
        self._group = group
        self._form: Form | None = None
        self._passes = 0
        self._within = 0  # how many blocks of passes are open
        self._task: int | None = None  # autograd's, that is the present pass
        self._step = 0
        self._broken = False

    @property
    def processes(self) -> ProcessGroup:
        """What it was made of."""
        return self._group

    @property
    def size(self) -> int:
        """How many processes there are."""
        return size_of(self._group)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return rank_in(self._group)

    # Beginning and ending together.

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Before ``agree``: an error in the block is one on all processes."""
        try:
            yield
        except BaseException as error:
            if self._form is None and not is_known(error):
                self._meet(None, text_of(error))
                know(error)
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
        self._form = Form(params)

    def _meet(self, said: Mapping[str, Any] | None, failure: str) -> None:
        everyone: list[Any] = [None] * self.size
        with self._completing("before the first step"):
            dist.all_gather_object(everyone, (said, failure), group=self._group)
        if failure:
            return
        refuse_failed([text for _, text in everyone], ["before the first step"] * self.size)
        refuse_different([terms for terms, _ in everyone])

    @contextmanager
    def during(self) -> Iterator[None]:
        """A pass over the steps, which all processes begin and end together.

        Raises:
            GroupError: on this process, where another failed; it says where and how.
        """
        self._passes += 1
        with self._telling():
            yield
        self._exchange(CLOSING)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Part of a pass; outside of any, that of autograd which is running.

        All processes end that together, too, if they come to such a part in it.
        """
        task = graph_task()
        if not self._within and self._task != task:
            self._passes += 1
            self._task = task
            at_its_end(self._end)
        with self._telling():
            yield

    def _end(self) -> None:
        self._task = None
        self._exchange(CLOSING)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Where an error that the other processes do not know of is told to them."""
        self._within += 1
        try:
            yield
        except BaseException as error:
            if not self._broken and not is_known(error):
                know(error)
                self._tell(error)
            raise
        finally:
            self._within -= 1

    def at(self, step: int) -> None:
        """This process comes to ``step``: so an error will say, were it to fail there."""
        self._step = step

    def _tell(self, error: BaseException) -> None:
        try:
            self._exchange(FAILED, failure=text_of(error))
        except GroupError as told:
            error.add_note(str(told))

    # Exchanges.

    def averaged(
        self,
        grads: Mapping[str, Tensor | None],
        step: int,
        own: Tensor | None = None,
        *,
        weight: float | Tensor | None = 1.0,
        note: bool = False,
    ) -> Averaged:
        """The gradients averaged over the processes, which are all at ``step``.

            ḡ = Σ w g / Σ w

        A gradient that is None counts as zero, and stays None where it is so on all processes.

        Args:
            own: for a differentiable result, a tensor that it is going to be differentiated with
                respect to, whether or not the gradients depend on it.
            weight: this process's w, a 0-d tensor where derivatives flow to it; None: the gradients
                are added up.
            note: what all processes are to know of if it is true on one.
        """
        self._step = step
        names, w = self._formed.names, self._checked(weight, step)
        parts = [grads.get(name) for name in names]
        if w is not None and (w.requires_grad or weight != 1.0):
            parts = [g if g is None else g * w for g in parts]
        notes = _READS * note + _LEARNED * (w is not None and w.requires_grad)
        token = None
        if own is None or not torch.is_grad_enabled():
            total = self._exchange(VALUES, parts=parts, weight=w, number=notes)
            entries, sums, weights = total.entries, total.sums, total.weight
        else:
            op = _Exchange(self, step, VALUES, notes)
            token, weights, *sums = _Summed.apply(op, own, w, *parts)  # type: ignore[no-untyped-call]
            entries = op.entries
        if w is not None:
            sums = [s if s is None else (s / weights).to(s.dtype) for s in sums]
        noted = any(entry.number & _READS for entry in entries)
        return Averaged(dict(zip(names, sums, strict=True)), token, noted)

    def pulled_back(
        self, cotangents: Mapping[str, Tensor], step: int, weight: float | Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The derivative of ``averaged``, of which nothing has been kept.

        Args:
            cotangents: of the average ḡ.
            weight: this process's w, as ``averaged`` was given it.

        Returns:
            c = Σ cotangents / Σ w, which is what flows to w g; and w c, which flows to g. What
            flows to w is ⟨c, g − ḡ⟩.
        """
        self._step = step
        names, w = self._formed.names, self._checked(weight, step)
        total = self._exchange(VALUES + 1, parts=[cotangents.get(name) for name in names], weight=w)
        shared = {n: x for n, x in zip(names, total.sums, strict=True) if x is not None}
        if w is None:
            return shared, shared
        w = w.detach()
        shared = {n: (x / total.weight).to(x.dtype) for n, x in shared.items()}
        return shared, {n: (x * w).to(x.dtype) for n, x in shared.items()}

    def mean(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of what flows to the parameters, a missing one being zero."""
        names = self._formed.names
        parts = [cotangents.get(name) for name in names]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts):
            op = _Exchange(self, self._step, NORM)
            _, _, *sums = _Summed.apply(op, None, None, *parts)  # type: ignore[no-untyped-call]
        else:
            sums = self._exchange(NORM, parts=parts).sums
        return {n: x / self.size for n, x in zip(names, sums, strict=True) if x is not None}

    def maximum(self, number: int) -> int:
        """The greatest of the processes' numbers, each from 0 to 2⁴⁸ − 1."""
        return max(entry.number for entry in self._exchange(NUMBER, number=number).entries)

    @property
    def _formed(self) -> Form:
        assert self._form is not None, "the processes have not agreed on what they exchange"
        return self._form

    def _checked(self, weight: float | Tensor | None, step: int) -> Tensor | None:
        """A weight as it will be in a message."""
        if weight is None:
            return None
        number = float(weight.detach() if isinstance(weight, Tensor) else weight)
        if not 0 < number < math.inf:
            raise ValueError(
                f"the weight of this process's share at step {step} is {number}: it has to be a "
                "finite number above 0, so give every process a part of each batch"
            )
        if isinstance(weight, Tensor):
            return weight.to(self._formed.dtype)
        return self._formed.scalar(weight)

    def _exchange(
        self,
        purpose: int,
        *,
        parts: Sequence[Tensor | None] = (),
        weight: Tensor | None = None,
        number: int = 0,
        failure: str = "",
    ) -> Total:
        """Send one message and read the sum of all."""
        form = self._formed
        parts = parts or [None] * len(form.names)
        entry = Entry(self._passes, purpose, self._step, number)
        message = form.packed(entry, rank_in(self._group), self.size, parts, weight)
        with self._completing(f"at step {self._step}"):
            summed = sum_now(message, self._group)
        total = form.read(summed, self.size)
        self._compare(total.entries, failure)
        return total

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

    def _compare(self, entries: Sequence[Entry], failure: str) -> None:
        """Raise where a process has failed, or where the processes are not at one place."""
        if any(entry.purpose == FAILED for entry in entries):
            texts: list[Any] = [None] * self.size
            with self._completing(f"at step {self._step}"):
                dist.all_gather_object(texts, failure, group=self._group)
            refuse_failed(texts, [f"at step {entry.step}" for entry in entries])
        refuse_apart(entries)


@dataclass
class _Exchange:
    """What a ``_Summed`` exchanges.

    Attributes:
        entries: what the processes said, once they have.
    """

    group: Group
    step: int
    purpose: int
    number: int = 0
    entries: Sequence[Entry] = ()

    def of(self, xs: Sequence[Tensor | None], weight: Tensor | None) -> Total:
        """The sums."""
        self.group.at(self.step)
        total = self.group._exchange(self.purpose, parts=xs, weight=weight, number=self.number)
        self.entries = total.entries
        return total


class _Summed(torch.autograd.Function):
    """x ↦ Σ x over the processes, for a weight and the gradients; its adjoint is a sum again.

    Before the results comes a token, a zero that keeps the node in every graph.
    """

    @staticmethod
    def forward(
        ctx: Any, op: _Exchange, own: Tensor | None, weight: Tensor | None, *xs: Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        total = op.of(xs, weight)
        ctx.adjoint = _Exchange(op.group, op.step, op.purpose + 1)
        ctx.there = [x is not None for x in (weight, *xs)]
        if not any(entry.number & _LEARNED for entry in op.entries):
            ctx.mark_non_differentiable(total.weight)
        return torch.zeros_like(total.weight), total.weight, *total.sums

    @staticmethod
    def backward(
        ctx: Any, token: Tensor | None, weight: Tensor | None, *cotangents: Tensor | None
    ) -> Any:
        if torch.is_grad_enabled():
            ctx.adjoint.number = _LEARNED
            _, *cots = _Summed.apply(ctx.adjoint, None, weight, *cotangents)  # type: ignore[no-untyped-call]
        else:
            total = ctx.adjoint.of(cotangents, weight)
            cots = [total.weight, *total.sums]
        return (
            None,
            None,
            *(c if there else None for c, there in zip(cots, ctx.there, strict=True)),
        )
