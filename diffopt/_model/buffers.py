"""What stands in the module for a state's buffers: never a snapshot's or the caller's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import compress

from torch import Tensor

from diffopt._model.slots import ModuleSlots
from diffopt._values.tree import differ


class BufferStandIns:
    """Copies of the buffers for the layers to work on.

    Layers change buffers in place, so a buffer that was seen to change is copied before every step.
    A buffer that does not change (masks, position ids) has one copy for the whole unroll. Values
    tell the two apart, the first time each step is taken: version counters do not tell, since batch
    normalization updates its statistics without them, and old code writes through ``.data``.

    Limits: a write that leaves every value as it was is no change.

    Attributes:
        tracked: names of the buffers that derivatives flow through: given requiring grad, or
            computed with gradients by some step.
    """

    def __init__(self, slots: ModuleSlots) -> None:
        self._slots = slots
        self._changing: set[str] = set()
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}  # name: (original, copy)
        self._compared = 0  # the steps before this one have been compared by value
        self.tracked = {name for name, x in slots.buffers.items() if x.requires_grad}

    def stand_in(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors equal to ``buffers``, which a layer may change in place."""
        return {name: self._stand_in(name, x) for name, x in buffers.items()}

    def _stand_in(self, name: str, x: Tensor) -> Tensor:
        if name in self._changing or x.requires_grad:
            return x.clone()
        original, copy = self._copies.get(name, (None, x))
        if original is not x:
            copy = x.clone()
            self._copies[name] = x, copy
        return copy

    def after(
        self,
        buffers: Mapping[str, Tensor],
        stand_ins: Mapping[str, Tensor],
        left: Mapping[str, Tensor],
        step: int,
    ) -> dict[str, Tensor]:
        """The buffers after a step that began with ``stand_ins`` and ended with ``left``.

        Buffers that the step did not touch are the same objects as in ``buffers``.
        """
        after, unclear = dict(left), []
        for name, x in left.items():
            if x is not stand_ins.get(name) or x.requires_grad or name in self._changing:
                if name not in stand_ins:
                    self._changing.add(name)
                if x.requires_grad:
                    self.tracked.add(name)
            else:
                after[name] = buffers[name]
                unclear.append(name)
        if step >= self._compared and unclear:
            changed = differ([left[n] for n in unclear], [buffers[n] for n in unclear])
            for name in compress(unclear, changed):
                after[name] = left[name]
                self._changing.add(name)
                del self._copies[name]
        self._compared = max(self._compared, step + 1)
        self._slots.changing = self._changing
        return after

    def look_again(self, step: int) -> None:
        """Let the next evaluation of ``step`` be compared by value, too."""
        self._compared = min(self._compared, step)

    def note(self, tracked: Iterable[str], changing: Iterable[str]) -> None:
        """Take note of what is known without having been looked at here."""
        self.tracked.update(tracked)
        self._changing.update(changing)
        for name in changing:
            self._copies.pop(name, None)
        self._slots.changing = self._changing


class CopiedBuffers(BufferStandIns):
    """Copies every buffer at every step: for a traced step, which has no values to compare.

    Args:
        tracked: names of buffers that derivatives are known to flow through.
    """

    def __init__(self, tracked: Iterable[str]) -> None:
        self.tracked = set(tracked)

    def stand_in(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in buffers.items()}

    def after(
        self,
        buffers: Mapping[str, Tensor],
        stand_ins: Mapping[str, Tensor],
        left: Mapping[str, Tensor],
        step: int,
    ) -> dict[str, Tensor]:
        self.tracked |= {name for name, x in left.items() if x.requires_grad}
        return dict(left)
