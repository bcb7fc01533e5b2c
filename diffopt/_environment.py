"""What a function can see without being given it, in a fixed order.

Compiled code is made once and used for many calls, whose ``loss_fn`` may be a new closure over new
tensors each time. What a function sees is therefore walked over: closure cells, defaults, the
globals and attributes that its code names, the modules and plain objects behind them. Tensors are
listed in the order of the walk, to be passed to compiled code as inputs; everything else becomes
the *structure*, equal for two functions where they may share compiled code.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Containers with more entries, or nested deeper, are compared by identity and not looked into.
MOST_ENTRIES = 64
DEEPEST = 8

#: Types compared by value.
PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    type(...),
    enum.Enum,
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
# Code of these is taken to see nothing of the user's.
_OPAQUE = {"torch", "torchvision", "numpy", "diffopt", *sys.stdlib_module_names} - {"__main__"}


class Environment:
    """What some functions see.

    Args:
        functions: the functions, in order; anything else may be among them.
        given: tensors that are no part of it, when found as a module's parameter or buffer: those
            that each step is given other values for.

    Attributes:
        tensors: each tensor once, in the order of the walk.
        structure: all else; hashable.
    """

    def __init__(self, *functions: Any, given: Collection[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._tokens: list[Hashable] = []
        self._given = {id(x) for x in given}
        self._index: dict[int, int] = {}  # by id: all are held by what is walked over
        self._visited: dict[int, int] = {}
        self._names: set[str] = set()
        self._objects: list[tuple[Any, set[str]]] = []
        self._hold: list[Any] = []
        for function in functions:
            self._visit(function, 0)
        self._visit_named_attributes()
        self.structure: Hashable = tuple(self._tokens)

    def _visit_named_attributes(self) -> None:
        """The attributes, of objects met so far, that any code met so far names."""
        grown = True
        while grown:
            grown = False
            for thing, done in list(self._objects):
                for name, value in _attributes(thing, self._names - done):
                    done.add(name)
                    grown = True
                    self._tokens.append(name)
                    self._visit(value, 1)

    def _visit(self, x: Any, depth: int) -> None:
        if isinstance(x, Tensor):
            self._tokens.append(("tensor", self._slot(x)))
        elif isinstance(x, PLAIN):
            # repr tells -0.0 from 0.0, and makes NaN equal to itself.
            self._tokens.append((type(x), repr(x) if isinstance(x, (float, complex)) else x))
        elif id(x) in self._visited:
            self._tokens.append(("again", self._visited[id(x)]))
        else:
            self._visited[id(x)] = len(self._visited)
            self._hold.append(x)
            self._enter(x, depth)

    def _slot(self, x: Tensor) -> int:
        if id(x) not in self._index:
            self._index[id(x)] = len(self.tensors)
            self.tensors.append(x)
        return self._index[id(x)]

    def _enter(self, x: Any, depth: int) -> None:
        if isinstance(x, types.FunctionType) and not _is_opaque(x.__module__):
            self._function(x, depth)
        elif isinstance(x, types.MethodType):
            self._visit(x.__func__, depth)
            self._visit(x.__self__, depth)
        elif isinstance(x, functools.partial):
            for part in (x.func, x.args, x.keywords):
                self._visit(part, depth)
        elif isinstance(x, nn.Module):
            self._module(x, depth)
        elif isinstance(x, (list, tuple, Mapping)) and depth < DEEPEST and len(x) <= MOST_ENTRIES:
            self._tokens.append((type(x), len(x)))
            for entry in x.items() if isinstance(x, Mapping) else x:
                if isinstance(x, Mapping):
                    key, entry = entry
                    self._visit(key, depth + 1)
                self._visit(entry, depth + 1)
        else:
            self._tokens.append(Same(x))
            if _has_attributes(x):
                self._objects.append((x, set()))
                self._names.add("__call__")

    def _function(self, x: types.FunctionType, depth: int) -> None:
        self._tokens.append(x.__code__)
        for code in _nested(x.__code__):
            self._names.update(code.co_names)
            for name in _global_names(code):
                if name in x.__globals__:
                    self._tokens.append(name)
                    self._visit(x.__globals__[name], depth)
        for cell in x.__closure__ or ():
            self._visit(_contents(cell), depth)
        self._visit(x.__defaults__, depth)
        self._visit(x.__kwdefaults__, depth)

    def _module(self, x: nn.Module, depth: int) -> None:
        self._tokens.append(Same(type(x)))
        own = not _is_opaque(type(x).__module__)
        if own:
            self._objects.append((x, set(x.__dict__)))  # for the methods that code names
            self._visit(type(x).forward, depth)
        for key, value in x.__dict__.items():
            if key in ("_parameters", "_buffers"):
                for name, tensor in value.items():
                    if tensor is not None and id(tensor) in self._given:
                        self._tokens.append((name, "given", tensor.dtype))
                    else:
                        self._tokens.append(name)
                        self._visit(tensor, depth)
            elif key == "_modules":
                for name, module in value.items():
                    self._tokens.append(name)
                    self._visit(module, depth)
            elif isinstance(value, Mapping) and not value:
                continue
            else:
                self._tokens.append(key)
                self._visit(value, depth + 1)


class Same:
    """Equal only for the same object, which it does not keep alive where it need not."""

    def __init__(self, x: Any) -> None:
        self._id = id(x)
        self._get: Callable[[], Any]
        try:
            self._get = weakref.ref(x)
        except TypeError:
            self._get = lambda: x

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self._id != other._id:
            return False
        x = self._get()
        return x is not None and x is other._get()

    def __hash__(self) -> int:
        return self._id


def _is_opaque(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _OPAQUE


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    read = ("LOAD_GLOBAL", "LOAD_NAME")
    found = (i.argval for i in dis.get_instructions(code) if i.opname in read)
    return tuple(dict.fromkeys(found))


def _has_attributes(x: Any) -> bool:
    if isinstance(x, types.ModuleType):
        return not _is_opaque(x.__name__)
    return not isinstance(x, type) and hasattr(x, "__dict__") and not _is_opaque(type(x).__module__)


def _attributes(x: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Those attributes of ``x`` that are among ``names``; of its class, the functions."""
    own = vars(x)
    for name in sorted(names):
        if name in own:
            yield name, own[name]
            continue
        for base in type(x).__mro__:
            value = vars(base).get(name)
            if value is not None:
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(value, types.FunctionType) and not _is_opaque(value.__module__):
                    yield name, value
                break
