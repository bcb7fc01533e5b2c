"""A loop over a traced step, compiled when it is run for the first time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffopt._compile.loop_graph import Carried, loop_graph
from diffopt._compile.trace import Traced, compiled, plain_arithmetic
from diffopt._torch.inductor import Run, stand_ins


class CompiledLoop:
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
