"""The graph of a loop, made from the graph of a step.

In every round the step's inputs come from three places: tensors that a round hands to the next
(*carried*), tensors that are the same in all rounds (*closed over*), and *rows* of tensors that
hold the values of many steps. An index says which row each round reads: one line for each round,
one column for each kind of row. So one loop runs over any stretch of steps, forwards or backwards,
and steps that use one batch share its memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from diffopt._compile.trace import Traced
from diffopt._torch.compiling import is_overload
from diffopt._torch.inductor import loop_operator

aten = torch.ops.aten


@dataclass(frozen=True)
class Carried:
    """A tensor that rounds hand on: a step's input ``into`` and its result ``out``.

    Without ``into`` the results are summed; without ``out`` it becomes zero.
    """

    into: int | None
    out: int | None


@dataclass(frozen=True)
class LoopGraph:
    """A loop as a graph.

    It takes the index, what is carried, then the step's inputs ``closed_over``, then ``constants``.
    It gives what was carried out, then ``emitted`` and ``kept`` of all rounds, stacked.

    Attributes:
        closed_over: which of the step's inputs.
        by_rows: those of them that are read by rows.
        constants: tensors that the step itself holds.
    """

    graph: GraphModule
    closed_over: list[int]
    by_rows: frozenset[int]
    constants: list[torch.Tensor]


def loop_graph(
    step: Traced,
    carried: Sequence[Carried],
    rows: Mapping[int, int],
    emitted: Sequence[int],
    kept: Sequence[int] = (),
) -> LoopGraph:
    """A loop over ``step``.

    Args:
        rows: for each input that is read by rows the column of the index.
        emitted: the results to be stacked.
        kept: the inputs to be stacked.
    """
    body = Graph()
    given = {c.into: k for k, c in enumerate(carried) if c.into is not None}
    wanted = [*(c.out for c in carried if c.out is not None), *emitted]
    needed = {*step.used, *kept, *(i for k in wanted if (i := step.passed[k]) is not None)}
    closed_over = sorted(needed - given.keys())

    before = [body.placeholder(f"carried_{k}") for k in range(len(carried))]
    line = body.placeholder("line")
    others = {i: body.placeholder(f"input_{i}") for i in closed_over}
    held = [node for node in step.graph.graph.nodes if node.op == "get_attr"]
    constants = {node: body.placeholder(f"constant_{k}") for k, node in enumerate(held)}

    read = _Rows(body, line)
    values = {i: before[k] for i, k in given.items()}
    for i, node in others.items():
        values[i] = read(node, rows[i]) if i in rows else node
    inside: dict[Node, Any] = dict(
        zip(step.placeholders, (values[i] for i in step.used), strict=True)
    )
    computed = body.graph_copy(step.graph.graph, {**inside, **constants})
    results = iter(computed)  # type: ignore[arg-type]
    found: list[Any] = [next(results) if i is None else values.get(i) for i in step.passed]

    own = _Owned(body, [*before, line, *others.values(), *constants.values()])
    after = []
    for c, node in zip(carried, before, strict=True):
        if c.out is None:
            after.append(body.call_function(aten.zeros_like.default, (node,)))
        elif c.into is None:
            after.append(body.call_function(aten.add.Tensor, (node, found[c.out])))
        else:
            after.append(own(found[c.out]))
    stacked = [own(x) for x in (*(found[k] for k in emitted), *(values[i] for i in kept))]
    body.output((*after, *stacked))
    graph = _around(GraphModule(step.graph, body), len(carried), len(others) + len(held))
    tensors = [getattr(step.graph, str(node.target)) for node in held]
    return LoopGraph(graph, closed_over, frozenset(rows.keys() & needed), tensors)


class _Rows:
    """Reads rows in the body of a loop."""

    def __init__(self, body: Graph, line: Node) -> None:
        self._call = body.call_function
        self._line = line
        self._numbers: dict[int, Node] = {}

    def __call__(self, tensor: Node, column: int) -> Node:
        if column not in self._numbers:
            entry = self._call(aten.select.int, (self._line, 0, column))
            number = self._call(aten._local_scalar_dense.default, (entry,))
            self._assert(operator.ge, number, 0)
            self._numbers[column] = number
        number = self._numbers[column]
        self._assert(operator.lt, number, self._call(aten.sym_size.int, (tensor, 0)))
        return self._call(aten.select.int, (tensor, 0, number))

    def _assert(self, comparison: Any, a: Any, b: Any) -> None:
        # A compiler has to know that the number is one of a row.
        self._call(aten._assert_scalar.default, (self._call(comparison, (a, b)), "no such row"))


class _Owned:
    """Sees to it that no result of a loop's body shares memory with an input or another result."""

    def __init__(self, body: Graph, inputs: Iterable[Node]) -> None:
        self._body = body
        self._taken = set(inputs)

    def __call__(self, node: Node) -> Node:
        root = _root(node)
        if root in self._taken:
            return self._body.call_function(aten.clone.default, (node,))
        self._taken.add(root)
        return node


def _root(node: Node) -> Node:
    """The node that allocates the memory of ``node``."""
    while True:
        target = node.target
        if target is operator.getitem:
            source: Any = node.args[0]
            if not _is_view(source.target):
                return node
            node = source
        elif _is_view(target):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node


def _is_view(target: Any) -> bool:
    if not is_overload(target):
        return False
    return any(r.alias_info is not None for r in target._schema.returns)


def _around(body: GraphModule, carried: int, others: int) -> GraphModule:
    graph = Graph()
    index = graph.placeholder("index")
    start = [graph.placeholder(f"carried_{k}") for k in range(carried)]
    closed_over = [graph.placeholder(f"other_{k}") for k in range(others)]
    inside = graph.get_attr("body")
    operator_of_loops: Any = loop_operator()
    loop = graph.call_function(operator_of_loops, (inside, start, [index], tuple(closed_over)))
    results = len(next(n for n in body.graph.nodes if n.op == "output").args[0])
    graph.output(tuple(graph.call_function(operator.getitem, (loop, k)) for k in range(results)))
    return GraphModule({"body": body}, graph)
