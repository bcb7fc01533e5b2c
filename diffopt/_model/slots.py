"""Standing other values in a module's parameters and buffers, and putting the module back.

A user's loss calls the user's own module, so the fast weights are stood in the module itself, in
every place where a parameter is held: a tied weight in all its places at once, a submodule that
is reachable by two names once. Whatever happens in between, the module is afterwards what it was.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffopt._derivatives.sharded import Numbers
from diffopt._model.held import holds_apart
from diffopt._model.shards import Shards
from diffopt._torch.dtensors import is_dtensor

Slot = tuple[dict[str, Any], str]
Values = Mapping[str, Tensor]


class Loaded(NamedTuple):
    """The values that stand in a module."""

    params: Values
    buffers: Values


class _Table:
    """The table of a submodule's buffers.

    Attributes:
        prefix: the submodule's name.
        entries: its own table.
        names: of its buffers, by key; of one that is held at several places, the first.
    """

    def __init__(self, prefix: str, entries: dict[str, Any], names: Mapping[int, str]) -> None:
        self.prefix, self.entries = prefix, entries
        self.names = {key: names[id(x)] for key, x in entries.items() if x is not None}


class ModuleSlots:
    """The places in ``model`` where its parameters and buffers are held, by their names.

    Args:
        model: the module; nothing is changed by building this.
        inner: the parameters to be replaced, by name as ``named_parameters()`` gives them.
        constants: its other parameters, by name.
        carried: names of more that is state: of buffers that calls of the module register or fill,
            and of constants that they change.
        others: values that are to stand for some of the constants.

    Attributes:
        inner: the tensors that the module holds for those names itself.
        loaded: the parameters and buffers that stand in the module at present, if any do.
        changing: names of the buffers that calls of the module change; None until that is known.
        constants: the tensors that the module holds itself for the names of ``others``.
        shards: the ``DTensor``s among the parameters, or None. Of those that are trained, parts are
            loaded.
    """

    loaded: Loaded | None = None
    #: Attributes in which a kind of module keeps its parameters of its own accord.
    _own_attributes: Collection[str] = ()
    changing: Collection[str] | None = None

    def __init__(
        self,
        model: nn.Module,
        inner: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        carried: Iterable[str] = (),
        others: Values = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._modules = list(model.modules())
        self.inner = dict(inner)
        self.shards = Shards.among(inner, constants)
        places = places_in(self._modules)
        self._params = [(name, places[id(x)]) for name, x in inner.items()]
        self._constants = {n: (x, places[id(x)]) for n, x in constants.items() if id(x) in places}
        self._moving: dict[str, Tensor] = {}  # the constants that are state, as the module has them
        self._moving_since: dict[str, int] = {}  # the first step that changes them
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self._buffers = {name: places[id(x)] for name, x in self.buffers.items()}
        self._none: set[str] = set()  # the buffers that have been None
        names = {id(x): name for name, x in self.buffers.items()}
        self._tables = [_Table(prefix, m._buffers, names) for prefix, m in _named(model)]
        self.read_buffers()
        for name in carried:
            if name in self._constants:
                self.buffers[name] = constants[name]
                self._add_moving(name)
                continue
            prefix, _, key = name.rpartition(".")
            for table in self._tables:
                if table.prefix == prefix and key not in table.names:
                    self._add_late(table, key)
        named = dict(model.named_parameters()) if others else {}
        self._others = [
            (n, x, places[id(named[n])]) for n, x in others.items() if n not in self.buffers
        ]
        self.constants: Values = {name: named[name] for name, _, _ in self._others}
        self._constants |= {name: (x, slots) for name, x, slots in self._others}
        self._apart: dict[int, bool] = {}
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
        standing = params if self.shards is None else self.shards.standing(params)
        for name, slots in self._params:
            for table, key in slots:
                table[key] = standing[name]
        for name, x, slots in self._others:
            for table, key in slots:
                table[key] = params.get(name, x)
        self.write_buffers(buffers)
        self.loaded = Loaded(params, buffers)

    def written_shards(self) -> list[str]:
        """Names of the parts that were changed in place since they were loaded.

        The whole has a count of its own for that; its part's stays where it is.
        """
        if self.shards is None:
            return []
        layouts = self.shards.layouts
        return [n for n, ((table, key), *_) in self._params if n in layouts and table[key]._version]

    def write_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Stand tensors in the places of the buffers; a buffer without one is taken out."""
        for name, slots in self._buffers.items():
            x = buffers.get(name, self._moving.get(name))
            for table, key in slots:
                if x is None and name not in self._none:
                    table.pop(key, None)
                else:
                    table[key] = x

    def training(self) -> list[bool]:
        """The training flag of each submodule."""
        return [module.training for module in self.modules]

    def set_training(self, flags: list[bool]) -> None:
        """Put the flags back. Only inside ``unchanged()``."""
        for module, flag in zip(self.modules, flags, strict=True):
            module.training = flag

    def read_buffers(self) -> dict[str, Tensor]:
        """The buffers as the last call of the module left them.

        Changed in place, replaced, registered or filled for the first time, removed.
        """
        found: dict[str, Tensor] = {}
        for table in self._tables:
            for key, x in table.entries.items():
                name = table.names.get(key) or self._add_late(table, key)
                if x is None:
                    self._none.add(name)
                else:
                    found.setdefault(name, x)
        for name, original in self._moving.items():
            entries, key = self._buffers[name][0]
            x = entries.get(key)
            if x is not None and x is not original:  # which moves from a later step on
                found[name] = x
        return {name: found[name] for name in self._buffers if name in found}

    def _add_late(self, table: _Table, key: str) -> str:
        """Take up a buffer that calls of the module register, or fill."""
        name = f"{table.prefix}.{key}" if table.prefix else key
        table.names[key] = name
        self._buffers[name] = [(table.entries, key)]
        return name

    def move(self, name: str, x: Tensor, step: int) -> None:
        """Step ``step`` changes the constant ``name``: ``x`` takes its place, as state.

        Raises:
            NotImplementedError: it is a ``DTensor``, of which no state is made.
        """
        if is_dtensor(x):
            raise NotImplementedError(
                f"step {step} changes {name!r} in place, a DTensor that is not trained: such a "
                "parameter can be no state. Make it a plain tensor, x.full_tensor(), or detach a "
                "copy and return that in aux"
            )
        self._add_moving(name)
        self._moving_since[name] = step
        for table, key in self._buffers[name]:
            table[key] = x

    def _add_moving(self, name: str) -> None:
        self._moving[name], self._buffers[name] = self._constants[name]

    def has_place(self, name: str) -> bool:
        """Whether there is a place in the module for a buffer of this name."""
        return name in self._buffers

    def completed(self, buffers: Values, step: int) -> Values:
        """``buffers`` before ``step``, with the constants that move from then on."""
        missing = {
            name: x.clone()
            for name, x in self._moving.items()
            if name not in buffers and step >= self._moving_since.get(name, step)
        }
        return {**missing, **buffers} if missing else buffers

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Give the module back as it was: attributes, parameters, buffers, training flags, hooks.

        That also undoes what layers leave behind on their own, such as the computed ``weight`` of
        an old-style ``weight_norm`` or the flat weight list of an LSTM.
        """
        with _alone(self._modules[0]), nullcontext() if self.shards is None else Numbers():
            before, loaded = _contents(self._modules), self.loaded
            try:
                yield
            finally:
                _put_back(before)
                self.loaded = loaded

    def holds_apart(self, x: Tensor) -> bool:
        """Whether the module holds ``x`` in another way than as a parameter or buffer."""
        if id(x) not in self._apart:  # of what is alive as long as this is asked for
            self._apart[id(x)] = holds_apart(self._modules, x, self._own_attributes)
        return self._apart[id(x)]

    def as_at_call(self) -> None:
        """Make the module what it was when this was built. Only inside ``unchanged()``.

        A step is computed again as it was computed first, although the caller may have called
        ``model.eval()`` or removed a hook since.
        """
        _put_back(self._at_call)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def places_in(modules: list[nn.Module]) -> dict[int, list[Slot]]:
    """Where the modules hold each parameter and buffer, by its id."""
    places: dict[int, list[Slot]] = {}
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for table in (module.__dict__["_parameters"], module.__dict__["_buffers"]):
            for key, x in table.items():
                if x is not None:
                    places.setdefault(id(x), []).append((table, key))
    return places


#: Which thread has other values standing in a module, and how often, by the module.
_HOLDERS: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Where no other thread may have values standing in ``module``.

    Raises:
        RuntimeError: one has.
    """
    this_thread = threading.get_ident()
    with _LOCK:
        thread, depth = _HOLDERS.get(module, (this_thread, 0))
        if thread != this_thread and depth:
            raise RuntimeError(
                f"another thread is just unrolling this {type(module).__name__}, and a module can "
                "hold the weights of one unroll at a time: give each thread a copy of its own "
                "(copy.deepcopy(model)), or let the threads take turns with a threading.Lock"
            )
        _HOLDERS[module] = this_thread, depth + 1
    try:
        yield
    finally:
        with _LOCK:
            _HOLDERS[module] = this_thread, depth


#: The tables that every module has: parameters, buffers, submodules and the many kinds of hooks.
_TABLES = [key for key, value in nn.Module().__dict__.items() if isinstance(value, dict)]

Contents = list[tuple[dict[str, Any], dict[str, Any]]]

_EMPTY: dict[str, Any] = {}  # what most of them are


def _contents(modules: list[nn.Module]) -> Contents:
    """Each dict that holds part of a module, with a shallow copy of it."""
    tables = []
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue  # has no parameters and buffers, or was refused
        tables.append(module.__dict__)
        tables += [table for key in _TABLES if (table := module.__dict__.get(key)) is not None]
    return [(table, dict(table) if table else _EMPTY) for table in tables]


def _put_back(contents: Contents) -> None:
    for table, before in contents:
        if (table or before) and not (
            len(table) == len(before)
            and all(map(is_, table, before))
            and all(map(is_, table.values(), before.values()))
        ):
            table.clear()
            table.update(before)
