"""Stretches of steps as compiled loops, forwards and backwards.

The forward loop stacks the states before its steps. The way back reads them by rows, hands the
cotangent of the state from step to step, sums what flows to the tensors that all steps use, and
stacks what flows to those of single steps. How many steps there are is the length of the index, and
no part of the code.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt._compile.compiled_loop import CompiledLoop
from diffopt._compile.loop_graph import Carried
from diffopt._compile.rows import distinct, in_rows, is_dense
from diffopt._compile.specialise import Call, Specialisation
from diffopt._compile.step_inputs import nbytes
from diffopt._compile.steps import STEP, Rows, Steps
from diffopt._compile.trace import Untraceable
from diffopt._compile.way_back import Cotangents, Stacked, WayBack, check_gaps
from diffopt._torch.inductor import loop_operator
from diffopt._values.state import Cotangent, State

#: The most bytes of what flows to the parameters that are given out at once.
MOST_SHOWN = 1 << 24


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
        self._forward: dict[bool, CompiledLoop] = {}
        self._backward: dict[Hashable, WayBack] = {}

    def run(self, steps: Steps, *, keep: bool) -> Block:
        """Take the steps. With ``keep``, the block can go back through them."""
        step, state, varying = self.step, steps.call.state, self.varying
        rows = Rows(steps)
        draws = steps.call.count
        values = {**dict(enumerate(state)), **rows.values}
        values.update(enumerate(rows.drawn, draws))
        if keep not in self._forward:
            columns = {**rows.columns, **{draws + k: STEP for k in range(len(rows.drawn))}}
            self._forward[keep] = CompiledLoop(
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
            self._backward[key] = WayBack(self.step, self.varying, block, given)
        return self._backward[key](block, start, stop, given)


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
        if pulled.batches or pulled.hyper:
            own = steps.given[start - steps.start : stop - steps.start][::-1]
            for k, c in pulled.batches.items():
                pairs += _by_tensor([given.batch[k] for given in own], c)
            for k, c in pulled.hyper.items():
                pairs += _by_tensor([given.hyper[k] for given in own], c)
        return FlowedBack(pulled.before, pairs, pulled.shown)


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
    if not all(map(is_dense, call.fixed[: call.shared])):
        raise Untraceable("loss_fn uses tensors with gaps in their memory")
    check_gaps(step.traced, call)


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
