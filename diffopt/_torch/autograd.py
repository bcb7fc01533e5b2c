"""What autograd knows of itself: levels of forward mode, its graph, its passes."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from diffopt._torch.feature import optional, private

_forward_ad = optional("torch.autograd", "forward_ad")
#: What the nodes of custom Functions are instances of. Where that is not known, every node is.
_NODE_IN_PYTHON: Any = optional("torch._C", "_FunctionBase") or Node
_sequence = private("torch._C._autograd", "_get_sequence_nr", "unroll")


def in_forward_mode() -> bool:
    """Whether dual numbers may exist. True where PyTorch cannot tell, which costs time alone."""
    return bool(getattr(_forward_ad, "_current_level", 0) >= 0)


def present_sequence() -> int:
    """The number that the next node of this thread's graphs gets."""
    return int(_sequence())


def gradient_edge(x: Tensor) -> GradientEdge:
    """``get_gradient_edge``, in half of the time where a node of PyTorch's own made ``x``."""
    node = x.grad_fn
    if node is None or isinstance(node, _NODE_IN_PYTHON):
        return get_gradient_edge(x)
    return GradientEdge(node, x.output_nr)


@cache
def load_decompositions() -> None:
    """Do what ``make_dual`` does at its first call, without the deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        except ModuleNotFoundError:  # where it has moved, make_dual knows where to
            return


def graph_was_freed(root: Any) -> bool:
    """Whether a backward pass has freed what the graph from the node ``root`` on had saved.

    Limits: a thousand nodes are looked at.
    """
    stack, passed = [root], {root}
    while stack and len(passed) < 1000:
        node = stack.pop()
        kind: Any = type(node)
        for name in _saved_names(kind):
            try:
                getattr(node, name)
            except RuntimeError as error:
                if "second time" in str(error):
                    return True
        found = {x for x, _ in node.next_functions if x is not None} - passed
        passed |= found
        stack += found
    return False


@cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def saved(node: Any, name: str) -> Any:
    """What a node of PyTorch's saved under ``name``; None if the node saved nothing so."""
    return getattr(node, f"_saved_{name}", None)
