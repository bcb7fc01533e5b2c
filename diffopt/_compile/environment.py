"""What a function can see without being given it, in a fixed order.

That is what a step may depend on besides its inputs. Random generators among it have to be put back
where they were when the step is computed again, and tensors must not have changed by then. Compiled
code is made once and used for many calls, whose ``loss_fn`` may be a new closure over new tensors
each time: tensors are passed to it as inputs, in the order of the walk, and everything else becomes
the *structure*, equal for two functions where they may share compiled code.

The walk goes over closure cells, defaults, the globals and attributes that a function's code names,
and the modules and plain objects behind them.
"""

from __future__ import annotations

import dis
import enum
import functools
import math
import sys
import types
import weakref
from collections import OrderedDict, deque
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
_ATOMS = {int, bool, str, type(None)}  # the most frequent of them
_CONTAINERS_OF_MODULES = {dict, OrderedDict, set}
# Code of these is taken to see nothing of the user's.
_OPAQUE = {"torch", "torchvision", "numpy", "diffopt", *sys.stdlib_module_names} - {"__main__"}


class Environment:
    """What some functions see.

    Args:
        functions: the functions, in order; anything else may be among them.
        given: tensors that are no part of it, when found as a module's parameter or buffer: those
            that each step is given other values for.
        containers: what is looked into, besides functions, modules and plain objects.
        most: look into so many objects at most, the nearest first.

    Attributes:
        tensors: each tensor once, in the order of the walk.
        generators: the random number generators, likewise.
        structure: all else; hashable.
    """

    def __init__(
        self,
        *functions: Any,
        given: Collection[Tensor] = (),
        containers: tuple[type[Collection[Any]], ...] = (list, tuple, Mapping),
        most: float = math.inf,
    ) -> None:
        self.tensors: list[Tensor] = []
        self.generators: list[torch.Generator] = []
        self._containers = containers
        self._tokens: list[Hashable] = []
        self._given = {id(x) for x in given}
        self._index: dict[int, int] = {}  # by id: all are held by what is walked over
        self._visited: dict[int, int] = {}
        self._names: set[str] = set()
        self._objects: list[tuple[Any, set[str]]] = []
        self._queue: deque[tuple[Any, int]] = deque()
        self._hold: list[Any] = []
        for function in functions:
            self._visit(function, 0)
        self._enter_visited(most)
        self._visit_named_attributes(most)
        self.structure: Hashable = tuple(self._tokens)

    def _enter_visited(self, most: float) -> None:
        """Look into what was come to, and into what is come to then, the nearest first."""
        while self._queue and len(self._hold) < most:
            x, depth = self._queue.popleft()
            self._hold.append(x)
            self._tokens.append(("in", self._visited[id(x)]))
            self._enter(x, depth)

    def _visit_named_attributes(self, most: float) -> None:
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
            self._enter_visited(most)

    def _visit(self, x: Any, depth: int) -> None:
        if type(x) in _ATOMS:
            self._tokens.append((type(x), x))
        elif isinstance(x, Tensor):
            self._tokens.append(("tensor", self._slot(x)))
        elif isinstance(x, PLAIN):
            # repr tells -0.0 from 0.0, and makes NaN equal to itself.
            self._tokens.append((type(x), repr(x) if isinstance(x, (float, complex)) else x))
        else:
            if id(x) not in self._visited:
                self._visited[id(x)] = len(self._visited)
                self._queue.append((x, depth))  # which keeps it, and so its id
            self._tokens.append(("to", self._visited[id(x)]))

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
        elif isinstance(x, self._containers) and depth < DEEPEST and len(x) <= MOST_ENTRIES:
            self._tokens.append((type(x), len(x)))
            for entry in x.items() if isinstance(x, Mapping) else x:
                if isinstance(x, Mapping):
                    key, entry = entry
                    self._visit(key, depth + 1)
                self._visit(entry, depth + 1)
        else:
            self._tokens.append(Same(x))
            if isinstance(x, torch.Generator):
                self.generators.append(x)
            elif _has_attributes(x):
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
            if type(value) in _CONTAINERS_OF_MODULES and not value:
                continue
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


def methods_of(x: object) -> list[types.FunctionType]:
    """The methods that the user's own classes give an object."""
    return [
        f
        for base in type(x).__mro__
        if not _is_opaque(base.__module__)
        for f in vars(base).values()
        if isinstance(f, types.FunctionType)
    ]


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


@functools.lru_cache(maxsize=1 << 14)
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
