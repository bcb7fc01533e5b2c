"""The way back through consecutive steps as one compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffopt._compile.compiled_loop import CompiledLoop
from diffopt._compile.loop_graph import Carried
from diffopt._compile.rows import is_dense
from diffopt._compile.specialise import Call, Flowing, Specialisation, Vjp
from diffopt._compile.steps import STEP, Rows, Steps
from diffopt._compile.trace import Traced, Untraceable
from diffopt._values.state import Cotangent


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


class Kept(Protocol):
    """Steps that were taken, with the states before them.

    Attributes:
        states: those of the tensors of the state that steps change, in rows.
    """

    steps: Steps
    rows: Rows
    states: dict[int, Tensor]


class WayBack:
    """The loop backwards, for some cotangents."""

    def __init__(
        self, step: Specialisation, varying: Sequence[int], block: Kept, given: Cotangents
    ) -> None:
        call = block.steps.call
        flowing = step.flowing(given.state)
        while True:
            cotangents = step.fitted(flowing, given.state)
            losses = [] if given.losses is None else [given.losses[0].contiguous()]
            flows = Flowing(tuple(flowing), bool(losses), (), given.norm is not None)
            vjp = Vjp(step, call, flows, [*cotangents, *losses, *_number(given.norm)])
            check_gaps(vjp.traced, call)
            more = [path for path in vjp.before if path not in flowing]
            if not more:
                break
            flowing = [*flowing, *more]  # what flows from step to step has to be taken up again
        self._step, self._flowing = step, flowing
        n, h, count = len(call.state), len(call.hyper), call.count
        outs = {path: k for k, path in enumerate(vjp.before)}
        carried = [Carried(count + k, outs.get(path)) for k, path in enumerate(flowing)]
        self._losses_at = count + len(flowing)
        self._norm_at = self._losses_at + len(losses)
        self._drawn_at = self._norm_at + (given.norm is not None)
        columns = {**block.rows.columns, self._losses_at: STEP}
        columns.update(dict.fromkeys(varying, STEP))
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
        self._loop = CompiledLoop(vjp.traced, carried, columns, emitted, [*self._shown.values()])

    def __call__(self, block: Kept, start: int, stop: int, given: Cotangents) -> Stacked:
        step, call, rows = self._step, block.steps.call, block.rows
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


def check_gaps(traced: Traced, call: Call) -> None:
    """Raise where code for batches without gaps in their memory, as rows are, may be another.

    Raises:
        Untraceable: it reads memory by its addresses.
    """
    nodes = traced.graph.graph.nodes
    if any(n.target is torch.ops.aten.as_strided.default for n in nodes) and not all(
        map(is_dense, call.fixed[call.shared :])
    ):
        raise Untraceable("a batch has tensors with gaps in their memory, and strides are used")


def _number(x: float | None) -> list[Tensor]:
    return [] if x is None else [torch.tensor(x, dtype=torch.float64, device="cpu")]
