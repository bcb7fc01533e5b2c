"""How many bytes one step takes: found by taking it, under a meter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.loop import Loop
from diffopt._torch.dispatch import TorchDispatchMode
from diffopt._values.tree import tensors_in

_UNIT = 512  # bytes: allocators give whole multiples of this, or of less


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        state: what a state does not share with the one before, and the generators' beside it.
        graph: what is held of a step that was recorded, the state after it included.
        workspace: what evaluating and differentiating one step takes at its peak.
        fixed: what is held for the whole backward pass: the cotangent of the result, and the sums
            of what flows to captured tensors.
    """

    state: int
    graph: int
    workspace: int
    fixed: int


def measure(loop: Loop) -> Sizes:
    """Take the first step of ``loop`` and its vector-Jacobian product, on trial."""
    trial = loop.trial()
    with trial.session(), trial.generators.undisturbed(), _Meter() as meter:
        linearization, state = trial.first_recorded(trial.start, 0)
        graph = meter.held
        own = meter.bytes_of(state.tensors().values())
        cotangent = {
            path: torch.ones_like(x) for path, x in trial.step.differentiable(state).items()
        }
        flowing = meter.held - graph
        with torch.no_grad():  # as in a backward pass
            losses = trial.losses.all()
            assert losses is not None
            losses = torch.ones_like(losses[0])
            before, captured = trial.vjp(linearization, 0, cotangent, losses)
        sums = sum(x.numel() * x.element_size() for x in captured if x is not None)
        del linearization, state, cotangent, before, captured
    random = sum(x.numel() for x in trial.generators.get())
    return Sizes(own + random, max(graph, 1), meter.peak, flowing + 2 * sums)


class _Meter(TorchDispatchMode):
    """Counts the bytes of the storages that come into being while it is active, until they go.

    Attributes:
        held: bytes alive now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        self.peak = 0
        self._alive: dict[int, tuple[int, Any]] = {}  # 0 bytes for those from before

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._alive.clear()

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """The bytes among those held that belong to ``tensors``."""
        keys = {x.untyped_storage()._cdata for x in tensors}
        return sum(self._alive[key][0] for key in keys if key in self._alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for x in tensors_in((args, kwargs)):
            self._note(x, counted=False)
        result = func(*args, **(kwargs or {}))
        for x in tensors_in(result):
            self._note(x, counted=True)
        return result

    def _note(self, x: Tensor, counted: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // _UNIT) * _UNIT if counted else 0

        def gone(_: Any) -> None:
            del self._alive[key]
            self.held -= size

        self._alive[key] = size, weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)
