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

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from diffopt._tree import tensors_in

Edge = tuple[Node, int]


def present_sequence() -> int:
    """A number that every autograd node made on this thread from now on reaches or exceeds."""
    probe = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        node = probe.view_as(probe).grad_fn
    assert node is not None
    return int(node._sequence_nr())


class Captured:
    """The captured tensors of one unroll, each once, and which of them each step uses."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._at: list[tuple[int, ...]] = []
        self._in_loss: list[frozenset[int]] = []
        self._index: dict[Tensor | Edge, int] = {}  # tensors and nodes hash by identity
        self._offered: dict[Edge, Tensor] = {}
        self._older: set[Node] = set()  # nodes known to lie outside the steps
        self._behind: set[Tensor] = set()  # leaves behind a captured non-leaf

    def offer(self, tensors: Iterable[Tensor]) -> None:
        """Name non-leaf tensors that a step may use, so that they need no search."""
        for x in tensors:
            if x.requires_grad and not x.is_leaf:
                edge = get_gradient_edge(x)
                self._offered[edge.node, edge.output_nr] = x

    def is_known(self, end: Edge) -> bool:
        """Whether the tensor at this edge has been offered."""
        return end in self._offered

    def walk(
        self, roots: Iterable[Tensor], own: Collection[Tensor], since: int
    ) -> tuple[set[Edge | Tensor], list[Edge]]:
        """Find the ends of the graph behind ``roots``.

        Args:
            roots: what a step computed.
            own: the step's own leaves, where the walk ends too.
            since: ``present_sequence()`` before the step.

        Returns:
            the ends whose tensor is known, and the edges to older nodes whose tensor is not:
            offer that and walk again.
        """
        known: set[Edge | Tensor] = set()
        unknown: list[Edge] = []
        seen: set[Node] = set()
        edges: list[Any] = []
        for root in roots:
            if root.requires_grad:
                edge = get_gradient_edge(root)
                edges.append((edge.node, edge.output_nr))
        while edges:
            node, output_nr = edges.pop()
            if node is None or node in seen:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                seen.add(node)
                if leaf not in own:
                    known.add(leaf)
            elif node in self._older or (node._sequence_nr() < since and self._is_older(node, own)):
                end = (node, output_nr)
                if end in self._offered:
                    known.add(end)
                elif end not in unknown:
                    unknown.append(end)
            else:
                seen.add(node)
                edges.extend(node.next_functions)
        return known, unknown

    def note(self, in_loss: Iterable[Edge | Tensor], in_update: Iterable[Edge | Tensor]) -> None:
        """Note the ends that the next step uses, in its loss and in its update."""
        loss = {self._position(end) for end in in_loss}
        update = {self._position(end) for end in in_update}
        self._in_loss.append(frozenset(loss))
        self._at.append(tuple(sorted(loss | update)))

    def same_in_loss(self, step: int, ends: Iterable[Edge | Tensor]) -> bool:
        """Whether a step computed again ends at the tensors it ended at the first time."""
        return {self._index.get(end, -1) for end in ends} == self._in_loss[step]

    def _position(self, end: Edge | Tensor) -> int:
        if end not in self._index:
            self._index[end] = len(self.tensors)
            self.tensors.append(end if isinstance(end, Tensor) else self._offered[end])
        return self._index[end]

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

    def edges(self, step: int) -> list[Tensor | GradientEdge]:
        """What to differentiate a step's graph with respect to, in the order of ``at``."""
        chosen = [self.tensors[i] for i in self._at[step]]
        return [x if x.is_leaf else get_gradient_edge(x) for x in chosen]

    @contextmanager
    def apart(self, step: int) -> Iterator[bool]:
        """Keep the gradients of a captured leaf and of a captured function of it apart.

        A step that uses both ``log_lr`` and ``lr = log_lr.exp()`` has, seen by autograd, a path
        from ``lr`` on to ``log_lr``; but that path is the caller's graph's to add. It is
        closed for the time of the block, which yields True where graphs have to be retained.
        """
        chosen = [self.tensors[i] for i in self._at[step]]
        nodes = {get_gradient_edge(x).node for x in chosen if not x.is_leaf}
        if not nodes or (len(nodes) == 1 and not any(x in self._behind for x in chosen)):
            yield False
            return
        hooks = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in nodes]
        try:
            yield True
        finally:
            for hook in hooks:
                hook.remove()


class TensorsSeen(TorchFunctionMode):
    """Collects the non-leaf tensors handed to PyTorch's functions while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for x in tensors_in((args, kwargs or {})):
            if x.requires_grad and not x.is_leaf:
                self.tensors[id(x)] = x
        return func(*args, **(kwargs or {}))
