"""Tensors in objects that PyTorch's pytrees take for leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffopt._torch import pytree

_PLAIN = (Tensor, nn.Module, str, bytes, bool, int, float, complex, type(None))


def hidden_tensors(tree: Any) -> Iterator[tuple[Any, Tensor]]:
    """The leaves of a pytree that hold tensors, each with a tensor in it.

    Modules and functions are passed over, and so is what slots of C code or a thousand other
    objects stand before.
    """
    for leaf in pytree.tree_leaves(tree):
        if not isinstance(leaf, _PLAIN):
            yield from ((leaf, x) for x in _inside(leaf) if isinstance(x, Tensor))


def _inside(holder: Any) -> Iterator[Any]:
    """What an object holds, itself or by way of the containers that it has."""
    stack: list[Any] = [holder]
    passed: set[int] = set()
    while stack and len(passed) < 1000:
        x = stack.pop()
        if id(x) in passed:
            continue
        passed.add(id(x))
        yield x
        if isinstance(x, (*_PLAIN, type)) or callable(x):
            continue
        if isinstance(x, Mapping):
            stack.extend(x.values())
        elif isinstance(x, (list, tuple, set, frozenset, deque)):
            stack.extend(x)
        else:
            stack.extend(getattr(x, "__dict__", {}).values())
            names: Collection[str] = getattr(type(x), "__slots__", ())
            names = (names,) if isinstance(names, str) else names
            stack.extend(getattr(x, name, None) for name in names)
