"""Small helpers for dicts of tensors and for batches.

A batch is any pytree (nested lists, tuples, dicts, dataclasses that PyTorch knows); everything
else in the package is held in flat dicts, whose keys are *paths*: tuples of strings such as
``("params", "0.weight")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._torch import pytree
from diffopt._torch.autograd import in_forward_mode
from diffopt._torch.functorch import in_functorch

Path = tuple[str, ...]


_WITHOUT = {bool, int, float, str, type(None)}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of a pytree, in order; anything else in it is passed over."""
    kind = type(tree)
    if kind is tuple and all(type(x) is Tensor for x in tree):  # most batches
        return iter(tree)
    if kind in _WITHOUT:
        return iter(())
    if isinstance(tree, Tensor):
        return iter((tree,))
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def is_differentiable(x: Tensor) -> bool:
    """Whether a tensor of this dtype can carry a gradient."""
    return x.is_floating_point() or x.is_complex()


def vjp(
    pairs: Iterable[tuple[Any, Tensor]],
    inputs: Sequence[Any],
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """The cotangents of ``inputs``, from pairs of a result and the result's cotangent.

    Results and inputs are tensors or gradient edges. None stands for no influence.
    """
    results = list(pairs)
    if not results or not inputs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [x for x, _ in results],
        inputs,
        [c for _, c in results],
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
    )


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two cotangents, where None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def add_each(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> list[Tensor | None]:
    """``add``, pair by pair."""
    return [add(x, y) for x, y in zip(a, b, strict=True)]


class Sums(dict[Any, Tensor]):
    """Sums of tensors by key: each is made once, and written into from then on.

    A first tensor is the caller's, and is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: set[Any] = set()

    def add(self, key: Any, x: Tensor) -> None:
        """Add ``x`` to the sum of ``key``."""
        total = self.get(key)
        if total is None:
            self[key] = x
        elif (
            key in self._made
            and not (total.requires_grad or x.requires_grad)
            and total.dtype is x.dtype
            and not in_functorch()
            and not in_forward_mode()
        ):
            total.add_(x)
        else:
            self[key] = total + x
            self._made.add(key)


def differ(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[bool]:
    """Whether the tensors of two lists differ in value, pair by pair; NaN equals NaN."""
    flags = [_differs(x, y) for x, y in zip(a, b, strict=True)]
    if len({flag.device for flag in flags}) == 1:
        return torch.stack(flags).tolist()  # waits for an accelerator once
    return [bool(flag) for flag in flags]


def _differs(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        return torch.ones((), dtype=torch.bool, device=x.device)
    return ((x != y) & ((x == x) | (y == y))).any()
