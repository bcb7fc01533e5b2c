"""What autograd knows of itself: levels of forward mode, its graph, its passes."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

from diffopt._torch.feature import optional, private

_forward_ad = optional("torch.autograd", "forward_ad")
_sequence = private("torch._C._autograd", "_get_sequence_nr", "unroll")


def in_forward_mode() -> bool:
    """Whether dual numbers may exist. Where PyTorch cannot tell, yes, which costs time alone."""
    return bool(getattr(_forward_ad, "_current_level", 0) >= 0)


def present_sequence() -> int:
    """The number that the next node of this thread's graphs gets."""
    return int(_sequence())


@cache
def load_decompositions() -> None:
    """What ``make_dual`` does at its first call, without the deprecation warnings of doing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        except ModuleNotFoundError:  # where it has moved, make_dual knows where to
            return


def graph_was_freed(root: Any, most: int = 1000) -> bool:
    """Whether a backward pass has freed what the graph from the node ``root`` on had saved.

    Args:
        most: how many nodes to look at.
    """
    stack, passed = [root], {root}
    while stack and len(passed) < most:
        node = stack.pop()
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    getattr(node, name)
                except RuntimeError as error:
                    if "second time" in str(error):
                        return True
        found = {x for x, _ in node.next_functions if x is not None} - passed
        passed |= found
        stack += found
    return False


def saved(node: Any, name: str) -> Any:
    """What a node of PyTorch's saved under ``name``, None if it has nothing of the name."""
    return getattr(node, f"_saved_{name}", None)
