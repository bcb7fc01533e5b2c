"""States, cotangents and extras as named tensors with a note of JSON's kinds, and back again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.journal import WayBack
from diffopt._loop.snapshots import Snapshot
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path

#: Tensors in host memory or on a device, and what is to be known of them.
Written = tuple[dict[str, Tensor], Any]
#: What has been read again, all of it in host memory.
Read = tuple[Mapping[str, Tensor], Any]


def of_snapshot(snapshot: Snapshot) -> Written:
    """A snapshot."""
    tensors = snapshot.state.tensors()
    for i, x in enumerate(snapshot.generators):
        tensors["generators", str(i)] = x
    return _named(tensors)


def snapshot_of(read: Read, opt: Sequence[str]) -> Snapshot:
    """The snapshot that ``of_snapshot`` wrote, on the devices where it was.

    Args:
        opt: the parameters that have optimizer state, were it an empty one.
    """
    params: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in opt}
    buffers: dict[str, Tensor] = {}
    generators: list[Tensor] = []
    for (kind, *rest), x in _on_devices(read):
        if kind == "opt":
            states[rest[0]][rest[1]] = x
        elif kind == "generators":
            generators.append(x)
        else:
            (params if kind == "params" else buffers)[rest[0]] = x
    return Snapshot(State(params, states, buffers), tuple(generators))


def of_way_back(way: WayBack) -> Written:
    """What a backward pass has come back with."""
    tensors: dict[Path, Tensor] = {("state", *path): x for path, x in way.cotangent.items()}
    for i, x in enumerate(way.captured):
        if x is not None:
            tensors["captured", str(i)] = x
    return _named(tensors)


def way_back_of(read: Read, captured: Sequence[int], action: int, position: int) -> WayBack:
    """What ``of_way_back`` wrote; ``captured`` has the present index of each captured tensor."""
    cotangent: Cotangent = {}
    total: list[Tensor | None] = [None] * (max(captured, default=-1) + 1)
    for (kind, *rest), x in _on_devices(read):
        if kind == "state":
            cotangent[tuple(rest)] = x
        else:
            total[captured[int(rest[0])]] = x
    return WayBack(action, cotangent, total, position)


def _named(tensors: Mapping[Path, Tensor]) -> Written:
    order = [(path, str(x.device)) for path, x in tensors.items()]
    return {json.dumps(path): x for path, x in tensors.items()}, order


def _on_devices(read: Read) -> Iterator[tuple[Path, Tensor]]:
    tensors, order = read
    for path, device in order:
        yield tuple(path), tensors[json.dumps(path)].to(device)


_SINGLE = (bool, int, float, str, type(None))


def of_tree(tree: Any, put: Callable[[Tensor], str], refuse: Callable[[str], Exception]) -> Any:
    """A tree of lists, tuples and dicts, with the name that ``put`` gives each tensor.

    Raises:
        what ``refuse`` makes of the name of a class that is of another kind.
    """
    kind = type(tree)
    if kind in _SINGLE:
        return tree
    if kind is Tensor and tree.layout is not torch.strided:
        raise refuse(f"Tensor of layout {tree.layout}")
    if kind is Tensor and not tree.is_quantized:
        return {"tensor": put(tree), "device": str(tree.device)}
    if kind in (list, tuple):
        return {kind.__name__: [of_tree(x, put, refuse) for x in tree]}
    if kind is dict and all(type(key) in _SINGLE for key in tree):
        return {"dict": [[key, of_tree(x, put, refuse)] for key, x in tree.items()]}
    raise refuse(kind.__name__)


def tree_of(written: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that ``of_tree`` wrote."""
    if not isinstance(written, dict):
        return written
    if "tensor" in written:
        return tensors[written["tensor"]].to(written["device"])
    if "dict" in written:
        return {key: tree_of(x, tensors) for key, x in written["dict"]}
    ((kind, items),) = written.items()
    found = [tree_of(x, tensors) for x in items]
    return tuple(found) if kind == "tuple" else found
