"""Standing other values in a module's parameters and buffers, and putting the module back.

A user's loss calls the user's own module, so the fast weights are stood in the module itself, in
every place where a parameter is held: a tied weight in all its places at once, a submodule that
is reachable by two names once. Whatever happens in between, the module is afterwards what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from diffopt._model.held import holds_apart

Slot = tuple[dict[str, Any], str]
Values = Mapping[str, Tensor]


class ModuleSlots:
    """The places in ``model`` where its parameters and buffers are held, by their names.

    Args:
        model: the module; nothing is changed by building this.
        inner: the parameters to be replaced, by name as ``named_parameters()`` gives them.
        moving: parameters that are not trained and that calls of the module change: as buffers.

    Attributes:
        inner: the tensors that the module holds for those names itself.
        loaded: the parameters and buffers that stand in the module at present, if any do.
        changing: names of the buffers that calls of the module change; None until that is known.
        constants: the tensors that the module holds itself for further names that are loaded.
    """

    loaded: tuple[Values, Values] | None = None
    #: Attributes in which a kind of module keeps its parameters of its own accord.
    _own_attributes: Collection[str] = ()
    changing: Collection[str] | None = None
    constants: Values = MappingProxyType({})

    def __init__(
        self, model: nn.Module, inner: Mapping[str, Tensor], moving: Mapping[str, Tensor]
    ) -> None:
        self._model = model
        self._modules = list(model.modules())
        self.inner = dict(inner)
        places = places_in(self._modules)
        self._params = [(name, places[id(x)]) for name, x in inner.items()]
        self.buffers: dict[str, Tensor] = {**dict(model.named_buffers()), **moving}
        self._buffers = [(name, places[id(x)]) for name, x in self.buffers.items()]
        self._at_call = _contents(self._modules)

    @property
    def model(self) -> nn.Module:
        """The module that the caller's functions are given."""
        return self._model

    @property
    def modules(self) -> list[nn.Module]:
        """It and its submodules, each once, however many names it has."""
        return self._modules

    def load(self, params: Values, buffers: Values) -> None:
        """Stand the values in their places. Only inside ``unchanged()``."""
        for name, slots in self._params:
            for table, key in slots:
                table[key] = params[name]
        self.write_buffers(buffers)
        self.loaded = params, buffers

    def write_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Put other tensors in the places of the buffers."""
        for name, slots in self._buffers:
            for table, key in slots:
                table[key] = buffers[name]

    def training(self) -> list[bool]:
        """The training flag of each submodule."""
        return [module.training for module in self.modules]

    def set_training(self, flags: list[bool]) -> None:
        """Put the flags back. Only inside ``unchanged()``."""
        for module, flag in zip(self.modules, flags, strict=True):
            module.training = flag

    def read_buffers(self) -> dict[str, Tensor]:
        """The buffers as the last call of the module left them (changed in place or replaced)."""
        return {name: slots[0][0][slots[0][1]] for name, slots in self._buffers}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Give the module back as it was: attributes, parameters, buffers, training flags, hooks.

        That also undoes what layers leave behind on their own, such as the computed ``weight`` of
        an old-style ``weight_norm`` or the flat weight list of an LSTM.
        """
        before, loaded = _contents(self._modules), self.loaded
        try:
            yield
        finally:
            _put_back(before)
            self.loaded = loaded

    @cached_property
    def holds_apart(self) -> bool:
        """Whether the module holds an inner parameter in another way than by registering it."""
        own = [*self.inner.values(), *self.constants.values()]
        return holds_apart(self._modules, own, self._own_attributes)

    def as_at_call(self) -> None:
        """Make the module what it was when this was built. Only inside ``unchanged()``.

        A step is computed again as it was computed first, although the caller may have called
        ``model.eval()`` or removed a hook since.
        """
        _put_back(self._at_call)


def places_in(modules: list[nn.Module]) -> dict[int, list[Slot]]:
    """Where the modules hold each parameter and buffer, by its id."""
    places: dict[int, list[Slot]] = {}
    for module in modules:
        for table in (module.__dict__["_parameters"], module.__dict__["_buffers"]):
            for key, held in table.items():
                if held is not None:
                    places.setdefault(id(held), []).append((table, key))
    return places


#: The tables that every module has: parameters, buffers, submodules and the many kinds of hooks.
_TABLES = [key for key, value in nn.Module().__dict__.items() if isinstance(value, dict)]

Contents = list[tuple[dict[str, Any], dict[str, Any]]]


def _contents(modules: list[nn.Module]) -> Contents:
    """Each dict that holds part of a module, with a shallow copy of it."""
    held = []
    for module in modules:
        held.append(module.__dict__)
        held += [table for key in _TABLES if (table := module.__dict__.get(key)) is not None]
    return [(table, dict(table)) for table in held]


def _put_back(contents: Contents) -> None:
    for table, before in contents:
        if len(table) != len(before) or any(
            table.get(k, table) is not v for k, v in before.items()
        ):
            table.clear()
            table.update(before)
