"""Whether a module holds a parameter in another way than by registering it.

``self.tied = [self.encoder.weight]`` holds the original, and goes on holding it while another value
stands in the place of ``encoder.weight``. Asked only when a step was seen to use an original.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

#: More objects than that behind a module's attributes are not looked through.
MOST = 200_000

_TABLES = {"_parameters", "_buffers", "_modules"}
_FLAT = {"_flat_weights", "_flat_weight_refs"}  # of recurrent layers, made anew by each call
APART = (types.ModuleType, types.FrameType, types.CodeType, str, int, float)


_HOLDING = (Tensor, list, tuple, dict, set)


def holds_apart(modules: Iterable[nn.Module], tensor: Tensor, but: Collection[str] = ()) -> bool:
    """Whether ``tensor`` is behind an attribute of ``modules``, in whatever container.

    Args:
        but: attributes that are left out.

    The answer is as by ``reaches``.
    """
    stack: list[Any] = []
    for module in modules:
        skipped = {*but, *_TABLES, *(_FLAT if isinstance(module, nn.RNNBase) else ())}
        stack += [value for key, value in vars(module).items() if key not in skipped]
        for cls in type(module).__mro__:
            if not (cls.__module__ or "").startswith("torch."):
                stack += vars(cls).values()
    return reaches(stack, {id(tensor)})


def reaches(
    start: Iterable[Any], wanted: Collection[int], apart: tuple[type, ...] = (*APART, nn.Module)
) -> bool:
    """Whether an object with one of the ids ``wanted`` is behind the objects of ``start``.

    Followed is what Python's garbage collector knows, and weak references; of a function what it
    captured, and not its globals; of a class the tensors and containers among its attributes; and
    nothing behind tensors and objects of the types ``apart``.
    The answer is yes, too, where there is too much to look through.
    """
    passed: set[int] = set()
    stack = list(start)
    while stack:
        x = stack.pop()
        if id(x) in wanted:
            return True
        if id(x) in passed or issubclass(type(x), (*apart, Tensor)):
            continue
        passed.add(id(x))
        if len(passed) > MOST:
            return True
        stack += _behind(x)
    return False


def _behind(x: Any) -> list[Any]:
    if type(x) is types.FunctionType:
        return [*(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, x.__dict__]
    if issubclass(type(x), weakref.ref):
        return [x()]
    if issubclass(type(x), type):  # the rest of it leads to half of the interpreter
        return [value for value in vars(x).values() if isinstance(value, _HOLDING)]
    return gc.get_referents(x)
