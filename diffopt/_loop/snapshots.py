"""Snapshots: states that are kept for the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from dataclasses import dataclass

from torch import Tensor

from diffopt._loop.journal import Journal
from diffopt._values.state import State


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state and where the random generators stood when it was reached."""

    state: State
    generators: tuple[Tensor, ...]


class Snapshots(MutableMapping[int, Snapshot], Journal):
    """Snapshots by their position in the loop. This class keeps them where the tensors are.

    It is told how far the run is, too, and forgets it.

    Attributes:
        by_reference: whether the state's own tensors are kept, and no copies in another place.
    """

    by_reference = True

    def __init__(self) -> None:
        self._held: dict[int, Snapshot] = {}

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        self._held[t] = snapshot

    def __getitem__(self, t: int) -> Snapshot:
        return self._held[t]

    def __delitem__(self, t: int) -> None:
        del self._held[t]

    @property
    def _positions(self) -> Collection[int]:
        """Of which positions there are snapshots."""
        return self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, t: object) -> bool:
        return t in self._positions  # a Mapping's own would fetch the snapshot

    def prefetch(self, t: int) -> None:
        """Snapshot ``t`` will be wanted next: where it is far away, begin to fetch it."""

    def another(self) -> Snapshots:
        """An empty one that keeps its snapshots in the same way."""
        return type(self)()

    def close(self) -> None:
        """Drop everything, and leave nothing behind."""
        self._held.clear()


class Layer(Snapshots):
    """Snapshots over others that are to stay: what is deleted below is only hidden."""

    def __init__(self, below: Snapshots) -> None:
        self._below = below
        self.by_reference = below.by_reference
        self._added = below.another()
        self._visible = set(below)

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        self._added[t] = snapshot
        self._visible.add(t)

    def __getitem__(self, t: int) -> Snapshot:
        if t not in self._visible:
            raise KeyError(t)
        return self._added[t] if t in self._added else self._below[t]

    def __delitem__(self, t: int) -> None:
        self._visible.remove(t)
        if t in self._added:
            del self._added[t]

    @property
    def _positions(self) -> Collection[int]:
        return self._visible

    def prefetch(self, t: int) -> None:
        (self._added if t in self._added else self._below).prefetch(t)

    def close(self) -> None:
        """Drop what was added; what lies below stays."""
        self._visible.clear()
        self._added.close()
