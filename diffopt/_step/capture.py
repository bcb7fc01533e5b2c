"""The tensors that the steps use without being given them, and that require grad.

``loss_fn``, ``grad_transform`` and hyperparameter callables may use any tensor they can see: a
closure's, a module's, a global. The graph of what they compute ends there, so a walk over the graph
tells which tensors a step depends on. Two kinds of end exist:

* a *leaf* that requires grad: its ``AccumulateGrad`` node knows the tensor;
* a *non-leaf* made before the step, ``lr = log_lr.exp()``: the graph only knows its gradient edge,
  and an ``Observer`` (``observe``) has seen the tensor at that edge.

The walk stops at both; what lies behind belongs to the caller's graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from diffopt._derivatives.functions import is_own, refuse_unrecorded
from diffopt._derivatives.table import is_suspect, refuse_wrong
from diffopt._step.graph import (
    Edge,
    End,
    Ends,
    Graph,
    Part,
    edge_of,
    end_of,
    leaf_or_edge,
    nodes_behind,
)
from diffopt._step.observe import Observer
from diffopt._torch.functions import function_of


class Captured:
    """The captured tensors of one unroll, each once, and which of them each step uses.

    Attributes:
        tensors: in the order in which they were found.
        functions: whether a custom ``autograd.Function`` was found in the graph of a step, other
            than this package's.
    """

    functions = False

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._at: list[tuple[int, ...]] = []
        self._parts: list[dict[Part, frozenset[int]]] = []
        self._index: dict[End, int] = {}  # tensors and nodes hash by identity
        self._edges: dict[Edge, Tensor] = {}
        self._overlap: tuple[int, bool] = (0, False)
        self._recorded: set[type] = set()  # custom Functions whose backward passes are recorded

    def offer(self, tensors: Iterable[Tensor]) -> None:
        """Name non-leaf tensors that a step may use."""
        for x in tensors:
            if x.requires_grad and not x.is_leaf:
                self._edges[edge_of(x)] = x

    def apart(self) -> Captured:
        """Another, of which nothing is known but the tensors that were offered."""
        other = Captured()
        other._edges.update(self._edges)
        return other

    def include(self, tensors: Iterable[Tensor]) -> list[int]:
        """Count tensors among the captured ones, used or not. Gives their indices."""
        tensors = list(tensors)
        self.offer(tensors)
        return [self._position(end_of(x)) for x in tensors]

    def walk(
        self,
        roots: Iterable[Tensor],
        own: Iterable[Tensor],
        *,
        twice: bool = False,
        since: int = 0,
        observer: Observer | None = None,
    ) -> Ends:
        """Find the ends of the graph behind ``roots``.

        Args:
            own: the step's own tensors, where the walk stops.
            twice: this graph is going to be differentiated twice, not once.
            since: the least sequence number of the step's nodes.
            observer: has seen the step.

        Raises:
            NotImplementedError: an operation in the graph has a wrong second derivative; or the
                step was given a tensor of the caller's where nobody could see that.
        """
        ends = Ends()
        edges: list[Any] = [edge_of(x) for x in roots if x.requires_grad]
        if not edges:
            return ends
        observed = {} if observer is None else observer.edges
        leaves = {id(x) for x in own if x.is_leaf}
        stops = {edge_of(x) for x in own if not x.is_leaf}
        passed: set[Node] = set()
        while edges:
            edge = edges.pop()
            node = edge[0]
            if node is None or node in passed:
                continue
            kind = type(node)
            if kind is not _ACCUMULATE_GRAD and edge in stops:
                ends.own = True
            elif kind is _ACCUMULATE_GRAD:
                passed.add(node)
                leaf = node.variable
                if id(leaf) in leaves:
                    ends.own = True
                elif observer is None or not observer.is_made(leaf):
                    ends.captured.add(leaf)
            elif edge in self._edges:
                ends.captured.add(edge)
            elif edge in observed:
                self._edges[edge] = observed[edge]
                ends.captured.add(edge)
            else:
                if kind not in _ORDINARY:
                    refuse_wrong(node, twice)
                    function = function_of(node)
                    if function is not None:
                        self.functions = self.functions or not is_own(function)
                    elif not is_suspect(node):
                        _ORDINARY.add(kind)
                if node._sequence_nr() < since and not _comes_to(node, leaves, stops, observer):
                    raise NotImplementedError(
                        f"a step uses a tensor made by {node.name()} before that step and given "
                        "where it cannot be seen, such as to a TorchScript function, so that no "
                        "gradient can be delivered to the tensor: pass it to loss_fn inside the "
                        "batch, or detach it"
                    )
                passed.add(node)
                edges.extend(node.next_functions)
        return ends

    def note(self, graph: Graph, observer: Observer, since: int, twice: bool) -> None:
        """Note what the next step uses, which ``observer`` has seen."""
        parts: dict[Part, frozenset[int]] = {}
        own = {id(x) for x in graph.own}  # a custom backward pass reads them from what it saved
        in_gradient = [x for x in graph.in_gradient if id(x) not in own]
        self.offer(in_gradient)
        used: set[int] = {self._position(end_of(x)) for x in in_gradient}
        for part, roots in graph.roots.items():
            ends = self.walk(
                roots, graph.own, twice=twice and part == "loss", since=since, observer=observer
            )
            unsure = {x for x in ends.captured if _may_be_made(x, observer)}
            parts[part] = frozenset(map(self._position, ends.captured - unsure))
            used |= parts[part] | set(map(self._position, unsure))
        self._parts.append(parts)
        self._at.append(tuple(sorted(used)))

    def refuse_unrecorded(self, graph: Graph, step: int) -> None:
        """Refuse a custom Function in the graph of a loss that cuts the second derivative.

        Args:
            graph: of step ``step``, which is retained.

        Raises:
            NotImplementedError: naming the Function.
        """
        if self.functions and graph.retained:
            stops = {*map(edge_of, graph.own), *self._edges}
            refuse_unrecorded(nodes_behind(graph.roots["loss"], stops), step, self._recorded)

    def missing(self, step: int, graph: Graph) -> Part | None:
        """The part of a step computed again that misses a tensor which it used at first."""
        return self.missing_among(step, self.used_by(graph, self._parts[step]))

    def missing_among(self, step: int, used: Mapping[Part, Collection[int]]) -> Part | None:
        """``missing``, from what each part of the step uses now, by index."""
        for part, expected in self._parts[step].items():
            if expected and part in used and not expected <= {*used[part]}:
                return part
        return None

    def used_by(
        self, graph: Graph, wanted: Mapping[Part, Collection[int]] | None = None
    ) -> dict[Part, set[int]]:
        """The indices of the captured tensors that each part uses, of those that use any."""
        used: dict[Part, set[int]] = {}
        for part, roots in graph.roots.items():
            if wanted is None or wanted.get(part):
                ends = self.walk(roots, graph.own)
                used[part] = {self._index.get(end, -1) for end in ends.captured}
        return used

    def _position(self, end: End) -> int:
        if end not in self._index:
            self._index[end] = len(self.tensors)
            self.tensors.append(end if isinstance(end, Tensor) else self._edges[end])
        return self._index[end]

    def repeat(self, steps: int) -> None:
        """Note that so many more steps use what the last one does."""
        self._parts += self._parts[-1:] * steps
        self._at += self._at[-1:] * steps

    def use(self, step: int) -> dict[str, Any]:
        """What a step uses, by the tensors' indices, of JSON's kinds."""
        parts = {part: sorted(used) for part, used in self._parts[step].items()}
        return {"at": list(self._at[step]), "parts": parts}

    def note_use(self, use: Mapping[str, Any], index: Sequence[int]) -> None:
        """Note a ``use`` of another process; ``index`` has the index here of each tensor there."""
        self._at.append(tuple(sorted(index[i] for i in use["at"])))
        self._parts.append(
            {part: frozenset(index[i] for i in used) for part, used in use["parts"].items()}
        )

    def met(self, indices: Iterable[int], observer: Observer) -> list[int]:
        """Indices of tensors in the order in which the steps were seen to meet them."""
        met = {end_of(x): n for n, x in enumerate(observer.met()) if x.requires_grad}
        return sorted(indices, key=lambda i: met.get(end_of(self.tensors[i]), len(met)))

    def at(self, *steps: int) -> tuple[int, ...]:
        """Indices into ``tensors`` of what steps use (positions in the loop, from 0)."""
        if len(steps) == 1:
            return self._at[steps[0]]
        return tuple(sorted({i for step in steps for i in self._at[step]}))

    def used_after_loss(self, step: int) -> bool:
        """Whether the update uses any of the tensors, other than by the gradient of the loss."""
        parts = self._parts[step].items()
        return any(used for part, used in parts if part not in ("loss", "aux"))

    def edges(self, *steps: int) -> list[Tensor | GradientEdge]:
        """What to differentiate graphs of steps with respect to, in the order of ``at``."""
        return [leaf_or_edge(self.tensors[i]) for i in self.at(*steps)]

    @contextmanager
    def sealed(self, *steps: int) -> Iterator[bool]:
        """Let derivatives end at the captured tensors of steps, as at leaves without hooks.

        What follows belongs to the caller's graph, and happens once, with the sum over all steps:
        tensor hooks run, ``retain_grad`` fills ``.grad``, and of ``log_lr`` and
        ``lr = log_lr.exp()``, both captured, the one receives what flows back from the other. It
        is put off for the time of the block, which yields True where graphs have to be retained.
        """
        chosen = [self.tensors[i] for i in self.at(*steps)]
        if not chosen:
            yield False
            return
        nodes = {get_gradient_edge(x).node for x in chosen if not x.is_leaf}
        if nodes and not self._overlaps():
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

    def _overlaps(self) -> bool:
        """Whether any captured tensor was computed from another one, or together with it."""
        count, overlap = self._overlap
        if count != len(self.tensors):
            nodes = [edge_of(x)[0] for x in self.tensors]
            passed: set[Node] = set()
            stack = [n for node in nodes for n, _ in node.next_functions]
            while stack:
                node = stack.pop()
                if node is not None and node not in passed:
                    passed.add(node)
                    stack.extend(n for n, _ in node.next_functions)
            overlap = len(set(nodes)) < len(nodes) or not passed.isdisjoint(nodes)
            self._overlap = len(self.tensors), overlap
        return overlap


def _may_be_made(end: End, observer: Observer) -> bool:
    return isinstance(end, Tensor) and observer.may_be_made(end)


def _comes_to(
    node: Any, leaves: Collection[int], stops: Collection[Edge], observer: Observer | None
) -> bool:
    """Whether a tensor of the step is behind ``node``.

    Sequence numbers alone do not tell: they count per thread, and nodes made during a backward
    pass on an accelerator are made on another one.
    """
    passed, stack = {node}, [node]
    while stack:
        for edge in stack.pop().next_functions:
            following = edge[0]
            if following is None or following in passed:
                continue
            leaf = getattr(following, "variable", None)
            if edge in stops or (
                leaf is not None
                and (id(leaf) in leaves or (observer is not None and observer.is_made(leaf)))
            ):
                return True
            passed.add(following)
            stack.append(following)
    return False


def _leafs_node() -> Any:
    with torch.enable_grad():
        made: Any = torch.zeros((), requires_grad=True) * 2
    return made.grad_fn.next_functions[0][0]


#: The type of the nodes at leaves, and of no others.
_ACCUMULATE_GRAD = type(_leafs_node())
#: The types of nodes that were met, are PyTorch's own, and have right derivatives.
_ORDINARY: set[type] = set()
