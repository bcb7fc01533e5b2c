"""What has trained values in the model's place: an unroll's result, and its submodules.

``loss_fn(fast, batch)`` is to work for every loss that works on the model. So a name that the
model has is a name here, too. What it gives is computed in the user's own module, while the values
stand in it; a submodule is given as a ``Part``, which does the same for its own names.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, ItemsView, Iterator, KeysView, MutableMapping, ValuesView
from functools import partial, wraps
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from torch import Tensor, nn

from diffopt._model.held import APART, reaches
from diffopt._torch.dtensors import stored
from diffopt._torch.pytree import tree_flatten, tree_unflatten
from diffopt._values.tree import tensors_in

if TYPE_CHECKING:
    from diffopt._unroll.unrolled import Unrolled

#: What modules have of ``nn.Module`` that reads, and nothing more: it lists what is there.
_READS = {
    "buffers",
    "children",
    "get_buffer",
    "get_extra_state",
    "get_parameter",
    "get_submodule",
    "modules",
    "named_buffers",
    "named_children",
    "named_modules",
    "named_parameters",
    "parameters",
    "state_dict",
}
_DEFINED_HERE = {"forward", "train", "eval"}
#: Everything else that ``nn.Module`` has would change the module.
_CHANGES = {
    name
    for name in dir(nn.Module)
    if not name.startswith("_")
    and callable(getattr(nn.Module, name))
    and name not in _READS | _DEFINED_HERE
}
_CALLABLES = (types.FunctionType, types.MethodType, partial)


class StandIn:
    """A module of the model with the trained values in it, from outside.

    A subclass says which module, and how a function of it is evaluated. Its own names win over
    the module's.
    """

    __slots__ = ()

    def _diffopt_parts(self) -> tuple[Unrolled, nn.Module]:
        """The result of the unroll, and the module of its model that this stands for."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the trained values.

        The buffers that the call would advance (running statistics) are advanced in a copy. With
        tasks, the call is mapped over the leading dimension of the arguments. It is in training or
        in eval mode as the model is: ``model.eval()`` before it, or ``fast.eval()``.
        """
        fast, module = self._diffopt_parts()
        return _evaluate(fast, module, args, kwargs)

    def train(self, mode: bool = True) -> Self:
        """Put this in training mode, and leave the model's own flags as they are.

        From then on the flags of the whole result are its own, not the model's.
        """
        fast, module = self._diffopt_parts()
        fast._set_flags(lambda: module.train(mode))
        return self

    def eval(self) -> Self:
        """Put this in eval mode, and leave the model's own flags as they are."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # those are looked up on classes; copy and pickle ask instances
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        fast, module = self._diffopt_parts()
        return _attribute(fast, module, name)

    if TYPE_CHECKING:  # by __getattr__, as everything else that the module has

        def parameters(self, recurse: bool = True) -> Iterator[Tensor]: ...

        def named_parameters(
            self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
        ) -> Iterator[tuple[str, Tensor]]: ...

    def __dir__(self) -> list[str]:
        _, module = self._diffopt_parts()
        return sorted({*super().__dir__(), *dir(module)} - _CHANGES)


def refuse_setting(module: nn.Module, name: str) -> None:
    """Raise, as an attribute set from outside would not stand in the module."""
    raise AttributeError(
        f"{name!r} is an attribute of the model's {type(module).__name__}, which calls here would "
        "not see changed: set it on the model itself before, or inside "
        "fast.apply(lambda model, ...: ...)"
    )


class Part(StandIn):
    """A submodule of the model with the trained values: ``fast.encoder``.

    ``isinstance(fast.encoder, nn.Linear)`` is what it is for ``model.encoder``; ``type`` gives a
    class of the same name.
    """

    __slots__ = ("__weakref__", "_diffopt_fast", "_diffopt_module")

    def __init__(self, fast: Unrolled, module: nn.Module) -> None:
        object.__setattr__(self, "_diffopt_fast", fast)
        object.__setattr__(self, "_diffopt_module", module)

    def _diffopt_parts(self) -> tuple[Unrolled, nn.Module]:
        return self._diffopt_fast, self._diffopt_module

    # So that a loss that asks for the kinds of layers gets the answer of the model.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._diffopt_module)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_setting(self._diffopt_module, name)

    def __repr__(self) -> str:
        return f"{self._diffopt_module!r} of {self._diffopt_fast!r}"

    def __eq__(self, other: object) -> bool:
        return _is_part(other) and other._diffopt_parts() == self._diffopt_parts()

    def __hash__(self) -> int:
        return hash((id(self._diffopt_fast), id(self._diffopt_module)))


#: What Python looks up on classes alone: a part has of it what its module's class has.
_CONTAINER = ("__contains__", "__getitem__", "__iter__", "__len__", "__reversed__")


def contained(name: str) -> Callable[..., Any]:
    """A method ``name`` that does what the module's does."""

    def method(self: StandIn, *args: Any) -> Any:
        fast, module = self._diffopt_parts()
        of_class = getattr(type(module), name, None)
        if of_class is None:
            raise TypeError(f"the model's {type(module).__name__} has no {name}")
        return _evaluate(fast, partial(of_class, module), args, {})

    method.__name__ = name
    return method


_classes: MutableMapping[type, type[Part]] = weakref.WeakKeyDictionary()


def _part(fast: Unrolled, module: nn.Module) -> Part:
    kind = type(module)
    if kind not in _classes:
        methods = {name: contained(name) for name in _CONTAINER if hasattr(kind, name)}
        _classes[kind] = type(kind.__name__, (Part,), {"__slots__": (), **methods})
    return _classes[kind](fast, module)


def _attribute(fast: Unrolled, module: nn.Module, name: str) -> Any:
    """``module.name``, as it is with the values of ``fast``."""
    submodule = module._modules.get(name)
    if submodule is not None:
        return _part(fast, submodule)
    static = getattr_static(type(module), name, None)
    if name == "get_parameter":  # PyTorch's own looks for an nn.Parameter
        return partial(_parameter, fast, module)
    if name in _CHANGES and name not in vars(module):
        raise AttributeError(
            f"{name} would change the {type(module).__name__}, and what stands in it here is taken "
            f"out again: call it on the model itself, or write fast.apply(loss_fn, batch) for a "
            "loss_fn that needs it, which hands it the model itself with the trained values in it"
        )
    if isinstance(static, types.FunctionType) and name not in vars(module):
        return _deferred(fast, getattr(module, name), mapped=name not in _READS)
    if module._parameters.get(name) is not None:
        for full, x in _originals(fast).items():
            if module._parameters[name] is x:
                return fast.params[full]
    _refuse_stale(fast, module, name)
    is_tensor = name in module._parameters or name in module._buffers
    return _evaluate(fast, lambda: getattr(module, name), (), {}, mapped=not is_tensor)


def _parameter(fast: Unrolled, module: nn.Module, target: str) -> Any:
    module.get_parameter(target)  # which says what is wrong with the name
    path, _, name = target.rpartition(".")
    return _attribute(fast, module.get_submodule(path), name)


def _refuse_stale(fast: Unrolled, module: nn.Module, name: str) -> None:
    """Refuse a tensor attribute that was computed from parameters before they were trained."""
    value = vars(module).get(name)
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    originals = _originals(fast).values()
    memory = {_address(x) for x in originals if x.device.type != "meta"}
    hooks = [getattr(hook, "name", None) for hook in module._forward_pre_hooks.values()]
    for x in tensors_in(value):
        shared = not any(x is y for y in originals) and _address(x) in memory
        if shared or (name in hooks and isinstance(value, Tensor)):
            raise AttributeError(
                f"{name!r} of the {type(module).__name__} was computed from a parameter before the "
                "unroll, and does not follow it: compute it from the parameter where it is used, "
                "for example in a property, or with torch.nn.utils.parametrize"
            )


def _address(x: Tensor) -> int:
    return stored(x).untyped_storage().data_ptr()


def _evaluate(
    fast: Unrolled, function: Callable[..., Any], args: Any, kwargs: Any, *, mapped: bool = True
) -> Any:
    """``function(*args, **kwargs)`` with the values standing, its result as seen from outside."""

    def inside(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        value = function(*args, **kwargs)
        lazy = isinstance(value, Iterator)  # it would go on when the values are gone
        assert fast._slots.loaded is not None
        params = fast._slots.loaded.params
        standing = {id(x): params[name] for name, x in _originals(fast).items()}
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            value = list(value)
        return lazy, _replaced(value, lambda x: standing.get(id(x), x))

    if kwargs or not all(type(x) is Tensor for x in args):
        args, kwargs = _replaced((args, kwargs), _module_of)
    lazy, value = fast._evaluate(inside, args, kwargs, mapped=mapped)
    shown = _replaced(value, partial(_shown, fast))
    return iter(shown) if lazy else shown


def _originals(fast: Unrolled) -> dict[str, Tensor]:
    """The tensors that the module holds itself for the names that have other values here."""
    return {**fast._slots.inner, **fast._slots.constants}


def _deferred(
    fast: Unrolled, function: Callable[..., Any], *, mapped: bool = True
) -> Callable[..., Any]:
    """``function``, to be called from outside."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _evaluate(fast, function, args, kwargs, mapped=mapped)

    return call


def _is_part(x: object) -> TypeGuard[Part]:
    return issubclass(type(x), Part)  # isinstance would ask the module


def _module_of(x: Any) -> Any:
    return x._diffopt_parts()[1] if _is_part(x) else x


def _replaced(tree: Any, function: Callable[[Any], Any]) -> Any:
    """``tree`` with ``function`` of each leaf; a copy where there are tensors in it.

    The tables of a module, which are trees, too, hold other tensors when the values are gone.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    leaves, spec = tree_flatten(tree)
    new = [function(x) for x in leaves]
    if all(a is b and not isinstance(a, Tensor) for a, b in zip(new, leaves, strict=True)):
        return tree
    return tree_unflatten(new, spec)


def _shown(fast: Unrolled, value: Any) -> Any:
    """A value of the model as it is handed out: nothing in it may use the untrained values."""
    if isinstance(value, (Tensor, bool, int, float, str, type(None), type)):
        return value
    if isinstance(value, nn.Module):
        return _part(fast, value)
    if not _holds_model(fast, value):
        return value
    if isinstance(value, _CALLABLES):
        return _deferred(fast, value)
    raise AttributeError(
        f"a {type(value).__name__} of the model holds modules or parameters of it, and would use "
        "them as they were before the unroll: write fast.apply(lambda model, x: ..., x), where "
        "model is the model itself with the trained values in it"
    )


def _holds_model(fast: Unrolled, value: Any) -> bool:
    """Whether a module or a trained parameter of the model is behind ``value``."""
    wanted = {id(x) for x in (*fast._slots.modules, *_originals(fast).values())}
    return reaches([value], wanted, APART)
