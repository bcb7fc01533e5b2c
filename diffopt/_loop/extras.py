"""What ``loss_fn`` returned beside the losses of a loop."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._values.hidden import hidden_tensors
from diffopt._values.tree import map_tensors, tensors_in

#: By position in the loop, and by index among the tensors of the step's extras.
AuxKey = tuple[int, int]


class Extras:
    """The user's extras, one for each step, as values cut from the graph.

    ``connected`` puts tensors of the caller's graph in the place of those that derivatives flow
    to, once the loop has been run.
    """

    def __init__(self) -> None:
        self._trees: list[Any] = []
        self._keys: list[AuxKey] = []

    def append(self, step: int, aux: Any, attached: Sequence[int]) -> None:
        """Note the extras of the next step.

        Args:
            step: its number, for messages.
            attached: which of their tensors derivatives flow to.

        Raises:
            TypeError: they hold tensors that require grad where pytrees see none.
        """
        if aux is not None:
            _refuse_hidden(aux, step)
            self._keys += [(len(self._trees), i) for i in attached]
            # What the caller is given is the caller's to change, and no snapshot's memory.
            aux = map_tensors(lambda x: x.detach().clone(), aux)
        self._trees.append(aux)

    def at(self, t: int) -> tuple[Any, list[int]]:
        """What step ``t`` gave, and to which of its tensors derivatives flow."""
        start, stop = bisect_left(self._keys, (t, 0)), bisect_left(self._keys, (t + 1, 0))
        return self._trees[t], [i for _, i in self._keys[start:stop]]

    def ones(self) -> dict[int, Tensor]:
        """A cotangent of ones for each tensor of the last step that derivatives flow to."""
        last = len(self._trees) - 1
        flat = list(tensors_in(self._trees[last]))
        return {i: torch.ones_like(flat[i]) for t, i in self._keys if t == last}

    def take(self) -> tuple[list[Any], dict[AuxKey, Tensor]]:
        """Hand out the extras of all steps, and the tensors among them that derivatives flow to.

        Nothing is left here: the extras become part of a graph whose node holds the loop.
        """
        trees, keys = self._trees, self._keys
        self._trees, self._keys = [], []
        flat = {t: list(tensors_in(trees[t])) for t in {t for t, _ in keys}}
        return trees, {(t, i): flat[t][i] for t, i in keys}


def connected(trees: Sequence[Any], values: Mapping[AuxKey, Tensor]) -> list[Any]:
    """``trees`` with ``values`` at their keys."""
    touched = {t for t, _ in values}
    return [_replaced(tree, t, values) if t in touched else tree for t, tree in enumerate(trees)]


def _replaced(tree: Any, t: int, values: Mapping[AuxKey, Tensor]) -> Any:
    count = iter(range(len(values) + sum(1 for _ in tensors_in(tree))))
    return map_tensors(lambda x: values.get((t, next(count)), x), tree)


def _refuse_hidden(aux: Any, step: int) -> None:
    for leaf, x in hidden_tensors(aux):
        if x.requires_grad:
            raise TypeError(
                f"aux of step {step} holds a {type(leaf).__name__} with a tensor of shape "
                f"{tuple(x.shape)} in it that requires grad, which cannot be connected there: "
                "return tensors in tuples, lists and dicts, register the class with PyTorch's "
                "pytrees, or detach the tensor"
            )
