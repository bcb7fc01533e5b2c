"""Several steps at once: blocks of steps, as a loop takes them and goes back through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from diffopt._loop.loop import Loop
from diffopt._loop.setting import Monitor
from diffopt._loop.snapshots import Snapshot
from diffopt._step.graph import Graph
from diffopt._step.observe import Observer
from diffopt._step.result import Checked
from diffopt._torch.autograd import present_sequence
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State


@dataclass(frozen=True)
class Between:
    """What is done to the cotangent of the state before it flows back through a step.

    Attributes:
        bounded: all of it: it is shown, and its parameters' part is bounded.
        monitor: the user's function that it is shown to, with the step's number, or None.
        norm: the bound, or None.
        first_step: the number of the step at position 0.
    """

    bounded: Callable[[int, Cotangent], Cotangent]
    monitor: Monitor | None
    norm: float | None
    first_step: int


class Block(Protocol):
    """Steps ``start``, ..., ``stop`` − 1, which were taken at once.

    Attributes:
        after: the state after them.
        losses: of each, stacked.
        alike: whether all depend on the same tensors.
        scheduled: whether callables give hyperparameters.
        attached: which of the tensors of a step's extras derivatives flow to.
    """

    start: int
    stop: int
    after: State
    losses: Tensor
    alike: bool
    scheduled: bool
    attached: Sequence[int]

    def aux(self) -> list[Any]:
        """The user's extras, one for each step."""

    def state(self, t: int) -> State:
        """The state before step ``t``."""

    def generators(self, t: int) -> tuple[Tensor, ...]:
        """Where the random generators were then."""

    def graph(self, t: int) -> Graph:
        """What step ``t`` depends on."""

    def checked(self, t: int) -> Checked:
        """What step ``t`` has to give again."""

    def vjp(
        self,
        start: int,
        stop: int,
        state_cotangent: Cotangent,
        outputs: OutputCotangents,
        captured: Sequence[Any],
        *,
        between: Between | None = None,
        retain_graph: bool = False,
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Carry a cotangent back from ``stop`` to ``start``.

        Args:
            outputs: of the block's losses and extras, counted from its first step.
            between: what is done to it before each step.
        """


class TakesBlocks(Protocol):
    """A step that can be taken many times at once."""

    def together(
        self, state: State, start: int, stop: int, *, keep: bool, observer: Observer | None = None
    ) -> Block | None:
        """Take some of the steps from ``start`` on, ``stop`` at most.

        Args:
            keep: the block is to be gone back through.
            observer: sees what the steps use.

        Returns:
            None where step ``start`` has to be taken alone.
        """


class InBlock(Snapshot):
    """A snapshot whose state is made from a block when it is wanted."""

    __slots__ = ("block", "t")
    block: Block
    t: int

    def __init__(self, block: Block, t: int) -> None:
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "t", t)

    @property
    def state(self) -> State:
        """The state before step ``t``."""
        return self.block.state(self.t)

    @property
    def generators(self) -> tuple[Tensor, ...]:
        """Where the random generators were then."""
        return self.block.generators(self.t)


def first_block(loop: Loop, state: State, start: int, stop: int, *, keep: bool) -> Block | None:
    """Take steps for the first time, and note what they use and give.

    Returns:
        None where step ``start`` has to be taken alone.
    """
    since = present_sequence()
    block = _taken(loop, state, start, stop, keep, loop.observer)
    if block is None:
        return None
    if loop.check is not None:
        _note(loop, block, since)
    if loop.observer.originals_used:
        loop.refuse_originals(state, start, block.after)
    loop.losses.extend(block.losses)
    for t, aux in enumerate(block.aux(), block.start):
        loop.extras.append(loop.step.first_step + t, aux, block.attached)
    loop.progress.forward(block.stop - start)
    if block.stop == loop.steps:
        # What the caller is given is the caller's to change, and no snapshot's memory.
        block.after = block.after.apart_from(state)
    return block


def _note(loop: Loop, block: Block, since: int) -> None:
    """Note what the steps use, and what they give."""
    twice, number = not loop.step.first_order, loop.step.first_step
    alone = range(block.start, block.start + 1 if block.alike else block.stop)
    for t in alone:
        loop.captured.note(block.graph(t), loop.observer, since, twice)
    loop.captured.repeat(block.stop - alone.stop)
    assert loop.check is not None
    if block.scheduled:
        for t in range(block.start, block.stop):
            loop.check.first(number + t, block.checked(t))
    else:
        loop.check.first_losses(number + block.start, block.losses)


def block_again(loop: Loop, state: State, start: int, stop: int, *, keep: bool) -> Block | None:
    """Take steps again. The generators have to be where they were the first time."""
    block = _taken(loop, state, start, stop, keep)
    if block is not None and loop.check is not None:
        number = loop.step.first_step
        if block.scheduled:
            for t in range(start, block.stop):
                loop.check.again(number + t, block.checked(t))
        else:
            loop.check.again_losses(number + start, block.losses)
    return block


def _taken(
    loop: Loop, state: State, start: int, stop: int, keep: bool, observer: Observer | None = None
) -> Block | None:
    step = loop.step
    if loop.ledger is not None or not hasattr(step, "together"):
        return None
    with torch.no_grad():
        return cast(TakesBlocks, step).together(state, start, stop, keep=keep, observer=observer)


def block_vjp(
    loop: Loop,
    block: Block,
    start: int,
    stop: int,
    cotangent: Cotangent,
    outputs: OutputCotangents,
    *,
    retain_graph: bool,
) -> tuple[Cotangent, Sequence[int], list[Tensor | None]]:
    """Go back through steps of a block.

    Args:
        outputs: of the losses and extras of the whole loop.

    Returns:
        the cotangent of the state at ``start``, and indices and cotangents of captured tensors.
    """
    captured = loop.captured
    steps = (start,) if block.alike else range(start, stop)
    norm, monitor, first = loop.max_cotangent_norm, loop.monitor, loop.step.first_step
    between = None
    if norm is not None or monitor is not None:
        between = Between(loop.bounded, monitor, norm, first)
    with captured.sealed(*steps) as shared:
        before, to_captured = block.vjp(
            start,
            stop,
            cotangent,
            outputs.later(block.start).until(block.stop - block.start),
            captured.edges(*steps),
            between=between,
            retain_graph=retain_graph or shared,
        )
    loop.progress.backward(stop - start)
    return before, captured.at(*steps), to_captured
