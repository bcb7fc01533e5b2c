"""The entries of a durable run's journal, and which of them a run is taken up from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffopt._loop.passed import Passed
from diffopt._loop.run_terms import differences
from diffopt._loop.shelf import Damaged, File, Shelf
from diffopt._loop.written import tree_of
from diffopt._step.group import Group
from diffopt._step.message import MOST


@dataclass(frozen=True)
class Entry:
    """An entry of the journal, with the trees that it names.

    Attributes:
        note: the entry as it was written.
        reached: the state that the forward pass had come to.
        back: what the backward pass had come back with; None before that had begun.
        again: the state it had come to in computing steps again, if it was.
        first: the earliest state that is kept, if one is.
    """

    note: Mapping[str, Any]
    passed: Passed
    reached: Any
    back: Any
    again: Any
    first: Any

    @property
    def number(self) -> int:
        """How many entries there were before, and one."""
        return int(self.note["number"])


def newest(shelf: Shelf, terms: Mapping[str, Any], group: Group | None) -> Entry | None:
    """Find the newest entry that all processes of a group have whole; None to begin anew.

    Raises:
        ValueError: the entries are of another run than ``terms`` say.
        RuntimeError: there are entries, and none that is whole, or that all processes have.
    """
    damage: list[str] = []
    entries = _whole(shelf, terms, damage)
    entry = next(entries, None)
    if entry is None and shelf.has_manifests():
        raise RuntimeError(
            f"the folder {shelf.name!r} holds a run of which no entry is whole: "
            f"{'; '.join(damage) or 'its manifests are damaged'}. Empty it to begin anew"
        )
    if group is None:
        return entry
    common = MOST - group.maximum(MOST - (0 if entry is None else entry.number))
    if not common:
        return None
    while entry is not None and entry.number > common:
        entry = next(entries, None)
    if entry is None or entry.number < common:
        raise RuntimeError(
            f"the folder {shelf.name!r} has no whole entry in common with those of the other "
            "processes: empty the folders of all of them to begin anew"
        )
    return entry


def _whole(shelf: Shelf, terms: Mapping[str, Any], damage: list[str]) -> Iterator[Entry]:
    """The whole entries, the newest first; what is wrong with the others goes to ``damage``."""
    for note in shelf.manifests():
        different = list(differences(note["run"], terms))
        if different:
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            raise ValueError(
                f"the folder {shelf.name!r} holds another run, which differs in "
                f"{different[0]}{more}: give every run a folder of its own, or empty this one"
            )
        try:
            entry = _read(shelf, note)
        except Damaged as error:
            damage.append(str(error))
        else:
            yield entry


def _read(shelf: Shelf, note: Mapping[str, Any]) -> Entry:
    """Read an entry.

    Raises:
        Damaged: a file that is needed for it is not whole.
    """
    states = {int(t): File(*file) for t, file in note["states"].items()}
    records = [File(*file) for file in note["records"]]
    for file in (*states.values(), *records):
        if not shelf.is_there(file):
            raise Damaged(f"the file {shelf.path(file)!r} is gone")
    final, back, here = (file_of(note[key]) for key in ("final", "back", "here"))

    def read(file: File | None) -> Any:
        return None if file is None else tree_of(*shelf.read(file))

    return Entry(
        note,
        Passed.read(map(read, records)),
        read(final or here),
        read(back),
        None if back is None else read(here),
        read(states[min(states)]) if states else None,
    )


def name_of(file: File | None) -> list[Any] | None:
    """How an entry names a file."""
    return None if file is None else [file.name, file.checksum]


def file_of(named: Sequence[Any] | None) -> File | None:
    """The file of such a name."""
    return None if named is None else File(*named)
