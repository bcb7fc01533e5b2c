"""Finding the tensors that a step uses without being given them.

``loss_fn``, ``grad_transform`` and hyperparameter callables may use any tensor they can see: a
closure's, a module's, a global. The graph of what they compute ends at those tensors, so a walk
finds them, and nothing needs declaring. Two kinds of end exist:

* a *leaf* that requires grad: its ``AccumulateGrad`` node knows the tensor;
* a *non-leaf* made before the step, ``lr = log_lr.exp()``: the walk comes to a node that is
  older than the step and that none of the step's own variables reaches. Only its gradient edge
  is known, and the tensor is found by looking at what the step hands to PyTorch's functions.

The walk stops there; what lies behind belongs to the caller's graph.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from diffopt._derivatives.table import WRONG, WRONG_BEYOND
from diffopt._values.tree import tensors_in

Edge = tuple[Node, int]
End = Edge | Tensor

#: A step's graph in parts: the loss; its gradient; ``grad_transform``; hyperparameters; the update.
Part = Literal["loss", "gradient", "transform", "hyper", "update"]
#: Whose ends are the same in the first pass and in every recomputation.
REPEATED: tuple[Part, ...] = ("loss", "transform", "hyper")


def present_sequence() -> int:
    """A number that every autograd node made on this thread from now on reaches or exceeds."""
    return int(torch._C._autograd._get_sequence_nr())


class Captured:
    """The captured tensors of one unroll, each once, and which of them each step uses."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._at: list[tuple[int, ...]] = []
        self._parts: list[dict[Part, frozenset[int]]] = []
        self._index: dict[End, int] = {}  # tensors and nodes hash by identity
        self._offered: dict[Edge, Tensor] = {}
        self._older: set[Node] = set()  # nodes known to lie outside the steps
        self._behind: set[Tensor] = set()  # leaves behind a captured non-leaf

    def offer(self, tensors: Iterable[Tensor]) -> None:
        """Name non-leaf tensors that a step may use, so that they need no search."""
        for x in tensors:
            if x.requires_grad and not x.is_leaf:
                self._offered[_edge(x)] = x

    def apart(self) -> Captured:
        """Another, of which nothing is known but the tensors that were offered."""
        other = Captured()
        other._offered.update(self._offered)
        return other

    def include(self, tensors: Iterable[Tensor]) -> list[int]:
        """Count tensors among the captured ones, used or not. Gives their indices."""
        tensors = list(tensors)
        self.offer(tensors)
        return [self._position(end_of(x)) for x in tensors]

    def is_known(self, end: End) -> bool:
        """Whether the tensor at this end is known: a leaf always is, a non-leaf once offered."""
        return isinstance(end, Tensor) or end in self._offered

    def walk(
        self,
        roots: Iterable[Tensor],
        own: Iterable[Tensor],
        since: int,
        passed: set[Node],
        *,
        before_gradient: bool = False,
    ) -> set[End]:
        """Find the ends of the graph behind ``roots``.

        Args:
            roots: what a step computed.
            own: the step's own tensors, where the walk stops without noting anything.
            since: ``present_sequence()`` before the step.
            passed: nodes to leave out; those walked over are added.
            before_gradient: this graph is going to be differentiated twice, not once.

        Raises:
            NotImplementedError: an operation in the graph has a wrong second derivative.
        """
        wrong = WRONG_BEYOND if before_gradient else WRONG
        edges: list[Any] = [_edge(x) for x in roots if x.requires_grad]
        ends: set[End] = set()
        if not edges:
            return ends
        own = set(own)
        stops = {_edge(x) for x in own if not x.is_leaf}
        while edges:
            edge = edges.pop()
            node = edge[0]
            if node is None or node in passed or edge in stops:
                continue
            kind = type(node)
            if kind is _ACCUMULATE_GRAD:
                passed.add(node)
                if _references(node) > _REFERENCES_OF_A_GRAPH and node.variable not in own:
                    ends.add(node.variable)
            elif self._is_captured(edge, own, since):
                ends.add(edge)
            else:
                if kind.__name__ in wrong:
                    raise NotImplementedError(wrong[kind.__name__])
                passed.add(node)
                edges.extend(node.next_functions)
        return ends

    def note(self, parts: Mapping[Part, Iterable[End]]) -> None:
        """Note the ends that the next step uses."""
        indices = {part: frozenset(map(self._position, ends)) for part, ends in parts.items()}
        self._parts.append(indices)
        self._at.append(tuple(sorted(frozenset().union(*indices.values()))))

    def same(self, step: int, part: Part, ends: Iterable[End]) -> bool:
        """Whether a step computed again ends where it ended at the first time."""
        indices = {self._index.get(end, -1) for end in ends}
        if part in REPEATED:
            return indices == self._parts[step].get(part, frozenset())
        return indices <= set(self._at[step])

    def _position(self, end: Edge | Tensor) -> int:
        if end not in self._index:
            self._index[end] = len(self.tensors)
            self.tensors.append(end if isinstance(end, Tensor) else self._offered[end])
        return self._index[end]

    def _is_captured(self, edge: Edge, own: Collection[Tensor], since: int) -> bool:
        """Whether the tensor at ``edge`` was there before the step."""
        node = edge[0]
        if node in self._older:
            return True
        if edge in self._offered or node._sequence_nr() < since:
            return self._is_older(node, own)
        return False

    def _is_older(self, node: Node, own: Collection[Tensor]) -> bool:
        """Whether no variable of the step is behind ``node``.

        Sequence numbers alone do not say: they count per thread, and nodes made during a backward
        pass on an accelerator are made on another one.
        """
        region, stack = {node}, [node]
        leaves: set[Tensor] = set()
        while stack:
            for following, _ in stack.pop().next_functions:
                if following is None or following in region or following in self._older:
                    continue
                leaf = getattr(following, "variable", None)
                if leaf is None:
                    region.add(following)
                    stack.append(following)
                elif leaf in own:
                    return False
                else:
                    leaves.add(leaf)
        self._older |= region
        self._behind |= leaves
        return True

    def at(self, step: int) -> tuple[int, ...]:
        """Indices into ``tensors`` of what the step uses (position in the loop, from 0)."""
        return self._at[step]

    def used_after_loss(self, step: int) -> bool:
        """Whether the step uses any of the tensors outside its loss and the gradient of that."""
        parts = self._parts[step]
        return any(parts[part] for part in parts.keys() - {"loss", "gradient"})

    def edges(self, step: int) -> list[Tensor | GradientEdge]:
        """What to differentiate a step's graph with respect to, in the order of ``at``."""
        chosen = [self.tensors[i] for i in self._at[step]]
        return [x if x.is_leaf else get_gradient_edge(x) for x in chosen]

    @contextmanager
    def sealed(self, step: int) -> Iterator[bool]:
        """Let derivatives end at the captured tensors of a step, as at leaves without hooks.

        What follows belongs to the caller's graph, and happens once, with the sum over all steps:
        tensor hooks run, ``retain_grad`` fills ``.grad``, and of ``log_lr`` and
        ``lr = log_lr.exp()``, both captured, the one receives what flows back from the other. It
        is put off for the time of the block, which yields True where graphs have to be retained.
        """
        chosen = [self.tensors[i] for i in self._at[step]]
        nodes = {get_gradient_edge(x).node for x in chosen if not x.is_leaf}
        if len(nodes) == 1 and not any(x in self._behind for x in chosen):
            nodes.clear()
        retaining = [(x, x.grad) for x in chosen if x.retains_grad]
        hooked = [(h, dict(h)) for x in chosen if (h := x._backward_hooks)]
        closed = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in nodes]
        for hooks, _ in hooked:
            hooks.clear()
        try:
            yield bool(nodes)
        finally:
            for handle in closed:
                handle.remove()
            for hooks, before in hooked:
                hooks.update(before)
            for x, grad in retaining:
                x.grad = grad


class TensorsSeen(TorchFunctionMode):
    """Finds the non-leaf tensors at some edges among those handed to PyTorch's functions."""

    def __init__(self, edges: Iterable[Edge]) -> None:
        super().__init__()
        self.found: dict[Edge, Tensor] = {}
        self._wanted = set(edges)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for x in tensors_in((args, kwargs or {})):
            if x.requires_grad and not x.is_leaf and (edge := _edge(x)) in self._wanted:
                self.found[edge] = x
        return func(*args, **(kwargs or {}))


def end_of(x: Tensor) -> End:
    """Where a walk that comes to ``x`` ends."""
    return x if x.is_leaf else _edge(x)


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether a walk ends in the same way at both."""
    return x is y or (not x.is_leaf and not y.is_leaf and _edge(x) == _edge(y))


def first_behind(x: Tensor, tensors: Sequence[Tensor]) -> int | None:
    """The index of a tensor that ``x`` was computed from, by way of none of the others."""
    index = {end_of(y): i for i, y in enumerate(tensors)}
    if x.is_leaf or end_of(x) in index:
        return None
    seen: set[Any] = set()
    edges: list[Any] = list(get_gradient_edge(x).node.next_functions)
    while edges:
        edge = edges.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        end = getattr(edge[0], "variable", edge)
        if end in index:
            return index[end]
        edges.extend(edge[0].next_functions)
    return None


def _edge(x: Tensor) -> Edge:
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _references(node: Any) -> int:
    """How many refer to the leaf that an ``AccumulateGrad`` node belongs to."""
    return sys.getrefcount(node.variable)


def _leafs_node() -> Any:
    with torch.enable_grad():
        made: Any = torch.zeros((), requires_grad=True) * 2
    return made.grad_fn.next_functions[0][0]


#: The type of the nodes at leaves, and of no others.
_ACCUMULATE_GRAD = type(_leafs_node())

#: What that is where only graphs do. Such a leaf is one that the step made and dropped, as in
#: ``x.requires_grad_()`` for a gradient penalty: nobody can ask for its gradient.
_REFERENCES_OF_A_GRAPH = _references(_leafs_node())
