"""Trees of tensors as named tensors with a note of JSON's kinds, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SINGLE = (bool, int, float, str, type(None))


def written(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree of lists, tuples and dicts by names of their own, and a note.

    The note tells the rest of the tree, in which whatever is no tensor is of JSON's kinds.
    """
    tensors: dict[str, Tensor] = {}

    def note(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = str(len(tensors))
            tensors[name] = x
            return {"tensor": name, "device": str(x.device)}
        if isinstance(x, dict):
            return {"dict": [[note(key), note(value)] for key, value in x.items()]}
        if isinstance(x, (list, tuple)):
            return {type(x).__name__: [note(item) for item in x]}
        return x

    note_of_all = note(tree)
    return tensors, note_of_all


def tree_of(tensors: Mapping[str, Tensor], note: Any) -> Any:
    """The tree that ``written`` wrote, its tensors on the devices where they were."""
    if not isinstance(note, dict):
        return note
    if "tensor" in note:
        return tensors[note["tensor"]].to(note["device"])
    if "dict" in note:
        return {tree_of(tensors, key): tree_of(tensors, value) for key, value in note["dict"]}
    ((kind, items),) = note.items()
    children = [tree_of(tensors, item) for item in items]
    return tuple(children) if kind == "tuple" else children


def foreign(tree: Any) -> str | None:
    """What there is in a tree that ``written`` does not serve, by its class; None for nothing."""
    kind = type(tree)
    if kind is Tensor and tree.layout is not torch.strided:
        return f"Tensor of layout {tree.layout}"
    if kind in _SINGLE or (kind is Tensor and not tree.is_quantized):
        return None
    if kind in (list, tuple):
        items = tree
    elif kind is dict and all(type(key) in _SINGLE for key in tree):
        items = tree.values()
    else:
        return kind.__name__
    return next(filter(None, map(foreign, items)), None)
