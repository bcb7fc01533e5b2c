"""Stretches of steps as compiled loops, forwards and backwards.

The forward loop stacks the states before its steps. The way back reads them by rows, hands the
cotangent of the state from step to step, sums what flows to the tensors that all steps use, and
stacks what flows to those of single steps. How many steps there are is the length of the index, and
no part of the code.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from diffopt._compile.loop_graph import Carried, loop_graph
from diffopt._compile.rows import distinct, in_rows, is_dense
from diffopt._compile.specialise import Call, Flowing, Specialisation, Vjp
from diffopt._compile.step_inputs import ManyInputs, nbytes
from diffopt._compile.trace import Traced, Untraceable, compiled, plain_arithmetic
from diffopt._torch.inductor import Run, loop_operator, stand_ins
from diffopt._values.state import Cotangent, State

#: The columns of the index: the step within its block, its hyperparameters, and from ``BATCH`` on
#: one for each tensor of its batch.
STEP, HYPER, BATCH = 0, 1, 2


#: The most bytes of what flows to the parameters that are given out at once.
MOST_SHOWN = 1 << 24


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


class Loops:
    """The two loops of the steps of one structure, each compiled when it is first wanted.

    Raises:
        Untraceable: its steps cannot be taken in a loop.
    """

    def __init__(self, step: Specialisation, call: Call) -> None:
        _check(step, call)
        self.step = step
        n = len(call.state)
        passed = step.traced.passed[:n]
        self.varying = [i for i in range(n) if passed[i] != i]
        self._forward: dict[bool, _Loop] = {}
        self._backward: dict[Hashable, _WayBack] = {}

    def run(self, steps: Steps, *, keep: bool) -> Block:
        """Take the steps. With ``keep``, the block can go back through them."""
        step, state, varying = self.step, steps.call.state, self.varying
        rows = Rows(steps)
        draws = steps.call.count
        values = {**dict(enumerate(state)), **rows.values}
        values.update(enumerate(rows.drawn, draws))
        if keep not in self._forward:
            columns = {**rows.columns, **{draws + k: STEP for k in range(len(rows.drawn))}}
            self._forward[keep] = _Loop(
                step.traced,
                [Carried(i, i) for i in varying],
                columns,
                range(len(state), len(step.traced.passed)),
                varying if keep else (),
            )
        results = self._forward[keep](rows.index, [state[i] for i in varying], values)
        after = list(state)
        for i, x in zip(varying, results, strict=False):
            after[i] = x
        losses, *more = results[len(varying) :]
        count = len(step.traced.passed) - len(state) - 1
        states = dict(zip(varying, more[count:], strict=False))
        return Block(self, steps, rows, after, losses, more[:count], states)

    def taken(self, steps: Steps) -> Block:
        """A block of a single step, which is not run, to go back through."""
        state = steps.call.state
        states = {i: in_rows([state[i]]) for i in self.varying}
        return Block(self, steps, Rows(steps), state, state[0], [], states)

    def back(self, block: Block, start: int, stop: int, given: Cotangents) -> Stacked:
        """Pull cotangents of the state at ``stop`` and of the losses back to ``start``."""
        flowing = tuple(self.step.flowing(given.state))
        key = given.losses is None, given.norm is None, given.shown, flowing
        if key not in self._backward:
            self._backward[key] = _WayBack(self, block, given)
        return self._backward[key](block, start, stop, given)


@dataclass(frozen=True)
class Cotangents:
    """What a way back starts from: of a state, and of the losses of a whole block.

    Attributes:
        norm: before each step, the parameters' part is bounded by it.
        shown: what flows to the parameters before each step is given out.
    """

    state: Cotangent
    losses: Tensor | None
    norm: float | None = None
    shown: bool = False


@dataclass(frozen=True)
class Stacked:
    """What flows back through some steps.

    Attributes:
        before: to the state before them.
        shared: by index in ``[*hyper, *fixed]`` of the call, to what all steps use.
        batches, hyper: by index, to what single steps use: stacked, the last step first.
        shown: to the parameters after each step, by name, likewise; empty unless asked for.
    """

    before: Cotangent
    shared: dict[int, Tensor]
    batches: dict[int, Tensor]
    hyper: dict[int, Tensor]
    shown: dict[str, Tensor]


@dataclass(frozen=True)
class FlowedBack:
    """What has flown back through some steps.

    Attributes:
        before: to the state before them.
        pairs: each tensor that they use, and what flows to it.
        shown: as for ``Stacked``.
    """

    before: Cotangent
    pairs: list[tuple[Tensor, Tensor]]
    shown: dict[str, Tensor]


class Block:
    """Steps that were taken together.

    Attributes:
        after: the state after the last step.
        losses: of each step, stacked.
    """

    def __init__(
        self,
        loops: Loops,
        steps: Steps,
        rows: Rows,
        after: list[Tensor],
        losses: Tensor,
        aux: list[Tensor],
        states: dict[int, Tensor],
    ) -> None:
        self._loops = loops
        self.steps = steps
        self.rows = rows
        self.after: State = steps.call.layout.build(after)
        self.losses = losses
        self._aux = aux
        self.states = states

    def state(self, t: int) -> State:
        """The state before step ``t``."""
        call, row = self.steps.call, t - self.steps.start
        if row == 0:
            return call.layout.build(call.state)
        kept = self.states
        return call.layout.build(kept[i][row] if i in kept else x for i, x in enumerate(call.state))

    def aux(self) -> list[Any]:
        """The user's extras, one for each step, in memory of their own."""
        step, count = self._loops.step, self.steps.stop - self.steps.start
        if not self._aux and step.extras(()) is None:
            return [None] * count
        columns = [[x.clone() for x in stacked.unbind()] for stacked in self._aux]
        return [step.extras([column[t] for column in columns]) for t in range(count)]

    def can_show(self, steps: int, cotangent: Cotangent) -> bool:
        """Whether what flows to the parameters can be given out of so many steps at once.

        Nothing may be made up for a parameter that nothing flows to, and it has to be held.
        """
        step = self._loops.step
        params = [path for path in step.flowing(cotangent) if path[0] == "params"]
        if any(path not in cotangent for path in params):
            return False
        return steps * nbytes(cotangent[path] for path in params) <= MOST_SHOWN

    def vjp(self, start: int, stop: int, cotangents: Cotangents) -> FlowedBack:
        """Pull cotangents of the state at ``stop`` and of the block's losses back to ``start``.

        Raises:
            Untraceable: there can be no code for it.
        """
        steps, call = self.steps, self.steps.call
        pulled = self._loops.back(self, start, stop, cotangents)
        shared = [*call.hyper, *call.fixed]
        pairs = [(shared[i], c) for i, c in pulled.shared.items()]
        own = steps.given[start - steps.start : stop - steps.start][::-1]
        for k, c in pulled.batches.items():
            pairs += _by_tensor([given.batch[k] for given in own], c)
        for k, c in pulled.hyper.items():
            pairs += _by_tensor([given.hyper[k] for given in own], c)
        return FlowedBack(pulled.before, pairs, pulled.shown)


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


class _Loop:
    """One loop, compiled at its first run."""

    def __init__(
        self,
        step: Traced,
        carried: Sequence[Carried],
        columns: Mapping[int, int],
        emitted: Sequence[int],
        kept: Sequence[int],
    ) -> None:
        self._graph = loop_graph(step, carried, columns, emitted, kept)
        self._run: Run | None = None

    def __call__(
        self, index: Tensor, start: Sequence[Tensor], values: Mapping[int, Tensor]
    ) -> Sequence[Tensor]:
        graph = self._graph
        given = [index, *start, *(values[i] for i in graph.closed_over), *graph.constants]
        if self._run is None:
            first = 1 + len(start)
            by_rows = [
                0,
                *(k for k, i in enumerate(graph.closed_over, first) if i in graph.by_rows),
            ]
            self._run = compiled(graph.graph, stand_ins(given, by_rows), loop=True)
        with plain_arithmetic():
            return self._run(*given)


class _WayBack:
    """The loop backwards, for some cotangents."""

    def __init__(self, loops: Loops, block: Block, given: Cotangents) -> None:
        step, call = loops.step, block.steps.call
        flowing = step.flowing(given.state)
        while True:
            cotangents = step.fitted(flowing, given.state)
            losses = [] if given.losses is None else [given.losses[0].contiguous()]
            flows = Flowing(tuple(flowing), bool(losses), (), given.norm is not None)
            vjp = Vjp(step, call, flows, [*cotangents, *losses, *_number(given.norm)])
            more = [path for path in vjp.before if path not in flowing]
            if not more:
                break
            flowing = [*flowing, *more]  # what flows from step to step has to be taken up again
        self._loops, self._flowing = loops, flowing
        n, h, count = len(call.state), len(call.hyper), call.count
        outs = {path: k for k, path in enumerate(vjp.before)}
        carried = [Carried(count + k, outs.get(path)) for k, path in enumerate(flowing)]
        self._losses_at = count + len(flowing)
        self._norm_at = self._losses_at + len(losses)
        self._drawn_at = self._norm_at + (given.norm is not None)
        columns = {**block.rows.columns, self._losses_at: STEP}
        columns.update(dict.fromkeys(loops.varying, STEP))
        columns.update({self._drawn_at + k: STEP for k in range(len(step.draws))})
        found = [*((h + i) for i in vjp.fixed), *vjp.hyper]  # among [*hyper, *fixed]
        self._shared, self._emitted = [], []
        for k, i in enumerate(found, len(outs)):
            if n + i in columns:
                self._emitted.append((i, k))
            else:
                self._shared.append((i, k))
        carried += [Carried(None, k) for _, k in self._shared]
        params = enumerate(flowing) if given.shown else ()
        self._shown = {path[1]: count + k for k, path in params if path[0] == "params"}
        emitted = [k for _, k in self._emitted]
        self._loop = _Loop(vjp.traced, carried, columns, emitted, [*self._shown.values()])

    def __call__(self, block: Block, start: int, stop: int, given: Cotangents) -> Stacked:
        step, call, rows = self._loops.step, block.steps.call, block.rows
        first = block.steps.start
        index = rows.index[start - first : stop - first].flip(0)
        values = {**dict(enumerate(call.state)), **rows.values, **block.states}
        if given.losses is not None:
            values[self._losses_at] = given.losses.detach().contiguous()
        values.update(enumerate(_number(given.norm), self._norm_at))
        values.update(enumerate(rows.drawn, self._drawn_at))
        tensors = [*call.hyper, *call.fixed]
        sums = [torch.zeros_like(tensors[i], requires_grad=False) for i, _ in self._shared]
        results = self._loop(index, [*step.fitted(self._flowing, given.state), *sums], values)
        n, h, m = len(self._flowing), len(call.hyper), len(self._shared)
        stacked = {i: x for (i, _), x in zip(self._emitted, results[n + m :], strict=False)}
        shown = results[n + m + len(stacked) :]
        first_of_batch = h + call.shared
        return Stacked(
            dict(zip(self._flowing, results, strict=False)),
            {i: x for (i, _), x in zip(self._shared, results[n : n + m], strict=True)},
            {i - first_of_batch: x for i, x in stacked.items() if i >= first_of_batch},
            {i: x for i, x in stacked.items() if i < h},
            dict(zip(self._shown, shown, strict=True)),
        )


def _number(x: float | None) -> list[Tensor]:
    return [] if x is None else [torch.tensor(x, dtype=torch.float64, device="cpu")]


def _check(step: Specialisation, call: Call) -> None:
    """Raise where steps cannot follow one another in a loop."""
    if loop_operator() is None:
        raise Untraceable("this PyTorch has no operator for loops")
    if step.layout != call.layout:
        raise Untraceable("a step changes which tensors the state consists of")
    for x, form in zip(call.state, step.after.values(), strict=True):
        if not form.fits(x):
            raise Untraceable("a step changes shapes, dtypes or memory layouts of the state")
        if not x.is_contiguous():
            raise Untraceable("the state has tensors that are not contiguous")
    if not all(map(is_dense, call.fixed)):
        raise Untraceable("a batch has tensors with gaps in their memory")


def _by_tensor(tensors: Sequence[Tensor], cotangents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each tensor once, with the sum of its cotangents."""
    own, which = distinct(tensors)
    if len(own) == 1:
        return [(own[0], cotangents.sum(0))]
    if which is None:
        return list(zip(own, cotangents.unbind(), strict=True))
    sums = cotangents.new_zeros(len(own), *cotangents.shape[1:])
    sums.index_add_(0, torch.tensor(which, device=sums.device), cotangents)
    return list(zip(own, sums.unbind(), strict=True))
