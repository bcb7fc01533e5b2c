"""The places where a module patched by ``higher`` holds its weights.

Nothing here imports ``higher``: what it has is passed in.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from diffopt._model.slots import ModuleSlots, Values


class FastSlots(ModuleSlots):
    """Where a patched module holds weights: its tables, and the list that ``parameters()`` reads.

    The graph behind the final weights holds these slots, and a patched module holds its final
    weights: to hold the module here would close a circle that no garbage collector sees. So the
    slots have a copy of the module, without its weights, and in a session lend that copy's tables
    to the module. Where the caller has let go of the module, the copy takes its place.

    In a session the last entry of the list is the present weights, and those from before the
    unroll stay ahead of it: ``parameters(time=0)`` is what it was.
    """

    _own_attributes = ("_fast_params",)

    def __init__(
        self,
        fmodel: Any,
        inner: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        carried: Collection[str],
        fast_names: list[str],
    ) -> None:
        # Before all else, as the constructor notes the attributes that it finds.
        self._weights: list[list[Tensor]] = list(fmodel._fast_params)
        super().__init__(_copied_modules(fmodel, self._weights), inner, constants, carried)
        self._original = weakref.ref(fmodel)
        self._newest = dict(zip(fast_names, fmodel.fast_params, strict=True))
        self._past = list(fmodel._fast_params) if fmodel.track_higher_grads else []
        # The weights a running forward call uses; a direct call of a submodule leaves them there.
        refill = type(fmodel)._refill_params_box
        self._box: list[Any] = inspect.getclosurevars(refill).nonlocals["params_box"]

    @property
    def model(self) -> nn.Module:
        original: nn.Module | None = self._original()
        return self._model if original is None else original

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.model.modules())

    def load(self, params: Values, buffers: Values) -> None:
        super().load(params, buffers)
        self._weights[:] = [*self._past, self._fast_weights(params, buffers)]
        self._box[0] = None

    def _fast_weights(self, params: Values, buffers: Values) -> list[Tensor]:
        moved = {name: x for name, x in buffers.items() if name in self._newest}
        return list({**self._newest, **moved, **params}.values())

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        box, weights = self._box[0], list(self._weights)
        original = self._original()
        of_caller = nullcontext() if original is None else ModuleSlots(original, {}, {}).unchanged()
        with super().unchanged(), of_caller:
            self._lend(lambda key: key in ("_parameters", "_buffers", "_fast_params"))
            try:
                yield
            finally:
                self._box[0] = box
                self._weights[:] = weights

    def as_at_call(self) -> None:
        super().as_at_call()
        self._lend(lambda key: key not in ("_modules", "_root_ref"))

    def _lend(self, chosen: Callable[[str], bool]) -> None:
        """Let the caller's module, while it is there, have attributes of the copy."""
        original = self._original()
        modules = [] if original is None else original.modules()
        for module, twin in zip(modules, self._modules, strict=False):
            module.__dict__.update({k: x for k, x in twin.__dict__.items() if chosen(k)})


def _copied_modules(fmodel: Any, weights: list[list[Tensor]]) -> Any:
    """A patched module once more, with tables of its own; tensors and all else are shared.

    Args:
        fmodel: the module.
        weights: the list that ``parameters()`` of the copy reads.
    """
    copies = {module: object.__new__(type(module)) for module in fmodel.modules()}
    for module, twin in copies.items():
        attributes = dict(module.__dict__)
        attributes["_parameters"] = dict(module._parameters)
        attributes["_buffers"] = dict(module._buffers)
        attributes["_modules"] = {n: copies.get(m, m) for n, m in module._modules.items()}
        if attributes.get("_root_ref") is not None:
            attributes["_root_ref"] = weakref.ref(copies[fmodel])
        twin.__dict__.update(attributes)
    copies[fmodel].__dict__["_fast_params"] = weights
    return copies[fmodel]
