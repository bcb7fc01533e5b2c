"""The random number generators that steps draw from, read and set back together.

A recomputed step has to see the random numbers of the first pass (dropout masks, noise), so the
generators' states are kept beside each snapshot. A generator of the user's own is met where a step
hands it to PyTorch for the first time, before it draws: its state there is its state at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

#: The state of each generator, as byte tensors on the CPU (5 kB for the CPU's).
States = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """A generator: how to read and to set its state, and the state in which it was met."""

    get: Callable[[], Tensor]
    set: Callable[[Tensor], object]
    start: Tensor


class Generators:
    """The CPU's generator, one per accelerator in use, and those of the user's that were met.

    Args:
        devices: those in use.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._sources: list[_Source] = []
        self._met: set[object] = {"meta", torch.default_generator}
        for device in (torch.device("cpu"), *devices):
            self.meet_device(device)

    def meet(self, generator: torch.Generator) -> None:
        """Take note of a generator that a step is about to draw from."""
        if generator not in self._met:
            self._add(generator, generator.get_state, generator.set_state)

    def meet_device(self, device: torch.device) -> None:
        """Take note of a device that a step may draw on."""
        key = device.type if device.type in ("cpu", "meta") else (device.type, device.index or 0)
        if key in self._met:
            return
        if key == "cpu":
            self._add(key, torch.get_rng_state, torch.set_rng_state)
            return
        module, index = torch.get_device_module(device.type), device.index or 0
        if hasattr(module, "get_rng_state"):
            self._add(
                key,
                lambda: module.get_rng_state(index),
                lambda state: module.set_rng_state(state, index),
            )

    def _add(self, key: object, get: Callable[[], Tensor], set: Callable[[Tensor], object]) -> None:
        self._met.add(key)
        self._sources.append(_Source(get, set, get()))

    def get(self) -> States:
        """The present states."""
        return tuple([source.get() for source in self._sources])

    def set(self, states: States) -> None:
        """Put the generators where they were when ``states`` was read.

        Those that were met only afterwards had not been drawn from, and begin anew.
        """
        for i, source in enumerate(self._sources):
            source.set(states[i] if i < len(states) else source.start)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave the generators where they were, whatever the block draws."""
        before = self.get()
        try:
            yield
        finally:
            self.set(before)
