"""The random number generators a step may draw from, read and set back together.

A recomputed step has to see the random numbers of the first pass (dropout masks, noise), so the
generators' states are kept beside each snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Generators:
    """The CPU's generator, one per accelerator in use, and those that the user has made."""

    def __init__(self, devices: Iterable[torch.device], own: Iterable[torch.Generator]) -> None:
        used = {(d.type, d.index or 0) for d in devices if d.type not in ("cpu", "meta")}
        modules = [(torch.get_device_module(kind), index) for kind, index in sorted(used)]
        self._accelerators = [(m, index) for m, index in modules if hasattr(m, "get_rng_state")]
        self._own = list({id(g): g for g in own}.values())

    def get(self) -> tuple[Tensor, ...]:
        """The present states, as byte tensors on the CPU (5 kB each for the CPU's generator)."""
        return (
            torch.get_rng_state(),
            *(module.get_rng_state(index) for module, index in self._accelerators),
            *(generator.get_state() for generator in self._own),
        )

    def set(self, states: tuple[Tensor, ...]) -> None:
        """Put the generators where they were when ``states`` was read."""
        cpu, *rest = states
        torch.set_rng_state(cpu)
        count = len(self._accelerators)
        for (module, index), state in zip(self._accelerators, rest[:count], strict=True):
            module.set_rng_state(state, index)
        for generator, state in zip(self._own, rest[count:], strict=True):
            generator.set_state(state)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave the generators where they were, whatever the block draws."""
        before = self.get()
        try:
            yield
        finally:
            self.set(before)
