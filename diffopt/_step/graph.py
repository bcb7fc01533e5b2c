"""The graph of a step: where it begins, where it ends, and what lies behind a tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from diffopt._torch.autograd import gradient_edge

#: A node, and which of its results.
Edge = tuple[Node, int]
#: A tensor without a history, or the edge of one with a history.
End = Edge | Tensor

#: A step's graph in parts: the loss; the extras beside it; ``grad_transform``; hyperparameters;
#: the update.
Part = Literal["loss", "aux", "transform", "hyper", "update"]


@dataclass(slots=True)
class Graph:
    """Where a step's graph begins, and the step's own tensors, where it ends.

    Attributes:
        own: parameters, and what else of the state requires grad.
        roots: what each part computes.
        in_gradient: tensors that require grad and that hooks use while the gradient is taken.
        retained: whether it can still be differentiated.
    """

    own: Sequence[Tensor]
    roots: dict[Part, Sequence[Tensor]] = field(default_factory=dict)
    in_gradient: Collection[Tensor] = ()
    retained: bool = True


@dataclass(slots=True)
class Ends:
    """Where a graph ends.

    Attributes:
        captured: at tensors that are not the step's own.
        own: whether it ends at the step's own tensors, too.
    """

    captured: set[End] = field(default_factory=set)
    own: bool = False


def edge_of(x: Tensor) -> Edge:
    """Where the graph behind ``x`` begins."""
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def end_of(x: Tensor | GradientEdge) -> End:
    """Where a walk that comes to ``x`` ends."""
    if isinstance(x, GradientEdge):
        return x.node, x.output_nr
    return x if x.is_leaf else edge_of(x)


def leaf_or_edge(x: Tensor) -> Tensor | GradientEdge:
    """What to differentiate a graph with respect to where it ends at ``x``."""
    return x if x.is_leaf else gradient_edge(x)


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether a walk ends in the same way at both."""
    return x is y or (not x.is_leaf and not y.is_leaf and edge_of(x) == edge_of(y))


def first_behind(x: Tensor, tensors: Sequence[Tensor]) -> int | None:
    """The index of a tensor that ``x`` was computed from, by way of none of the others."""
    index = {end_of(y): i for i, y in enumerate(tensors)}
    if x.is_leaf or end_of(x) in index:
        return None
    passed: set[Any] = set()
    edges: list[Any] = list(get_gradient_edge(x).node.next_functions)
    while edges:
        edge = edges.pop()
        if edge[0] is None or edge in passed:
            continue
        passed.add(edge)
        end = getattr(edge[0], "variable", edge)
        if end in index:
            return index[end]
        edges.extend(edge[0].next_functions)
    return None


def comes_to(roots: Iterable[Tensor], own: Iterable[Tensor], since: int) -> bool:
    """Whether the graph behind ``roots``, of nodes numbered from ``since`` on, ends at ``own``."""
    leaves = {id(x) for x in own}
    stack = [x.grad_fn for x in roots if x.grad_fn is not None]
    passed: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in passed or node._sequence_nr() < since:
            continue
        passed.add(node)
        for following, _ in node.next_functions:
            if following is None:
                continue
            if id(getattr(following, "variable", None)) in leaves:
                return True
            stack.append(following)
    return False


def nodes_behind(roots: Iterable[Tensor], stops: Collection[Edge]) -> Iterator[Any]:
    """The nodes of the graph behind ``roots``, as far as the edges ``stops``."""
    stack: list[Any] = [edge_of(x) for x in roots if x.requires_grad]
    passed: set[Any] = set()
    while stack:
        edge = stack.pop()
        if edge[0] is not None and edge[0] not in passed and edge not in stops:
            passed.add(edge[0])
            yield edge[0]
            stack.extend(edge[0].next_functions)
