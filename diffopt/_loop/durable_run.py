"""Snapshots in files, and the journal of where the run is: what a ``Durable`` folder holds.

Between two entries of the journal nothing that the older one needs is removed. A process that is
killed therefore leaves a state from which the same call goes on, in either pass, and what it then
computes is to the last bit what it would have computed.

Of the steps that are not taken again, the entries hold the losses, the extras and which captured
tensors each used. These tensors themselves are the new process's: they are met again by taking the
steps that used one first, most often step 0 alone, and are compared with those of the run by their
checksums.

The processes of a group have a folder each. None makes an entry before all have the one before, so
the newest that all have is one of the last two of each.

Limits: what ``loss_fn`` does besides returning a loss and ``aux`` is not kept.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from diffopt._loop.background import Background
from diffopt._loop.durable import Durable
from diffopt._loop.files import is_address
from diffopt._loop.journal import Journal, Way, WayBack
from diffopt._loop.loop import Loop
from diffopt._loop.passed import Passed, meet_again
from diffopt._loop.run_terms import differences, digest, terms_of
from diffopt._loop.shelf import Damaged, File, Shelf
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._loop.transfer import Copier
from diffopt._loop.written import Read, Written, of_snapshot, of_way_back, snapshot_of, way_back_of
from diffopt._step.message import MOST
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.schedule import Plan


@dataclass(frozen=True)
class _Entry:
    """An entry of the journal, of which everything that is needed at once has been read.

    Attributes:
        number: how many entries there were before, and one.
        note: the entry as it was written.
        reached: the state that the forward pass had come to.
        back: what the backward pass had come back with; None before that had begun.
        again: the state it had come to in computing steps again, if it was.
        first: the earliest state that is kept, if one is.
    """

    number: int
    note: Mapping[str, Any]
    passed: Passed
    reached: Read
    back: Read | None
    again: Read | None
    first: Read | None


class DurableSnapshots(Snapshots, Journal):
    """Snapshots on a shelf, and the journal beside them."""

    keeps = True

    def __init__(self, durable: Durable) -> None:
        folder = os.fspath(durable.folder)
        folder = folder if is_address(folder) else os.path.abspath(folder)
        if (older := _open.get(folder)) is not None:
            older._give_up("a later call of unroll in this process took its folder over")
        self._every = durable.every
        self._shelf = Shelf(folder)
        self._copier = Copier()
        self._background = Background("diffopt-durable")
        self._files: dict[int, File] = {}
        self._reading: dict[int, Future[Read]] = {}
        self._entries = 0
        self._passed = Passed()
        self._records: list[File] = []
        self._final: File | None = None
        self._given = ""
        self._since = 0  # how many steps are recorded
        self._work = 0  # on the way back, how many steps were taken since the last entry
        self._back: tuple[Cotangent, File] | None = None  # what was come back with at that
        self._came_back: WayBack | None = None
        self._again: Snapshot | None = None
        self._loop: Loop | None = None
        self._plan = Plan(0, ())
        self._terms: dict[str, Any] = {}
        self._lost = ""
        self._finished = False
        _open[folder] = self
        self._release = weakref.finalize(self, _close, self._background, self._shelf)

    # Snapshots.

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        file = self._shelf.file("state")
        self._files[t] = file
        self._write(file, of_snapshot(snapshot))

    def __getitem__(self, t: int) -> Snapshot:
        self.prefetch(t)
        try:
            read = self._reading.pop(t).result()
        except Damaged as error:
            self._background.raise_failed()
            raise RuntimeError(
                f"{error}: the state at step {t} is lost. Empty the folder "
                f"{self._shelf.name!r} to begin anew"
            ) from error
        return self._snapshot(read)

    def __delitem__(self, t: int) -> None:
        del self._files[t]  # its file goes when no entry names it
        self._reading.pop(t, None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, t: object) -> bool:
        return t in self._files

    def prefetch(self, t: int) -> None:
        self._check_mine()
        if t not in self._reading:
            file = self._files[t]
            self._reading[t] = self._background.read(lambda: self._shelf.read(file))

    @property
    def journal(self) -> Journal:
        return self

    def another(self) -> Snapshots:
        return Snapshots()  # of a way back that keeps its graph, and is not journaled

    def close(self) -> None:
        """Stop, and leave the files for the next call, unless all is done."""
        if not self._background.mine:
            return
        self._background.close()
        if self._finished and not self._lost:
            self._shelf.clear()
        self._release()
        self._loop = None

    # The journal: taking a run up.

    def begin(self, loop: Loop, plan: Plan) -> Way:
        self._loop, self._plan = loop, plan
        self._terms = json.loads(json.dumps(terms_of(loop, plan)))
        entry = self._newest(loop)
        if entry is None:
            self._shelf.clear()
            return Way(0, 0, loop.start)
        return self._taken_up(loop, entry)

    def _newest(self, loop: Loop) -> _Entry | None:
        """The newest entry that is whole, also on the other processes of a group."""
        damage: list[str] = []
        entries = self._whole(damage)
        entry = next(entries, None)
        if entry is None and self._shelf.has_manifests():
            raise RuntimeError(
                f"the folder {self._shelf.name!r} holds a run of which no entry is whole: "
                f"{'; '.join(damage) or 'its manifests are damaged'}. Empty it to begin anew"
            )
        if (group := loop.step.group) is None:
            return entry
        newest = MOST - group.maximum(MOST - (0 if entry is None else entry.number))
        if not newest:
            return None
        while entry is not None and entry.number > newest:
            entry = next(entries, None)
        if entry is None or entry.number < newest:
            raise RuntimeError(
                f"the folder {self._shelf.name!r} has no whole entry in common with those of the "
                "other processes: empty the folders of all of them to begin anew"
            )
        return entry

    def _whole(self, damage: list[str]) -> Iterator[_Entry]:
        """The entries that are whole, the newest first; what is the matter with others."""
        for note in self._shelf.manifests():
            different = list(differences(note["run"], self._terms))
            if different:
                more = f", and {len(different) - 1} more" if len(different) > 1 else ""
                raise ValueError(
                    f"the folder {self._shelf.name!r} holds another run, which differs in "
                    f"{different[0]}{more}: give every run a folder of its own, or empty this one"
                )
            try:
                entry = self._read(note)
            except Damaged as error:
                damage.append(str(error))
            else:
                yield entry

    def _read(self, note: Mapping[str, Any]) -> _Entry:
        """Read an entry.

        Raises:
            Damaged: a file that is needed for it is not whole.
        """
        states = {int(t): File(*file) for t, file in note["states"].items()}
        records = [File(*file) for file in note["records"]]
        for file in (*states.values(), *records):
            if not self._shelf.is_there(file):
                raise Damaged(f"the file {self._shelf.path(file)!r} is gone")
        final, back, here = (_file(note[key]) for key in ("final", "back", "here"))
        reached = final or here
        assert reached is not None
        read = self._shelf.read
        return _Entry(
            note["number"],
            note,
            Passed.read([read(file) for file in records]),
            read(reached),
            None if back is None else read(back),
            None if back is None or here is None else read(here),
            read(states[min(states)]) if states else None,
        )

    def _taken_up(self, loop: Loop, entry: _Entry) -> Way:
        note, passed = entry.note, entry.passed
        self._entries = entry.number
        self._files = {int(t): File(*file) for t, file in note["states"].items()}
        self._records = [File(*file) for file in note["records"]]
        self._final = _file(note["final"])
        start = None if entry.first is None else self._snapshot(entry.first)
        captured = meet_again(loop, passed, start, self)
        self._passed, self._since = passed, len(passed.steps)
        passed.deliver(loop, captured)
        if entry.back is not None:
            self._given = note["given"]
            places = note["back action"], note["back position"]
            self._came_back = way_back_of(entry.back, captured, *places)
            self._again = None if entry.again is None else self._snapshot(entry.again)
        reached = loop.restored(self._snapshot(entry.reached))
        return Way(note["action"], self._since, reached)

    # The journal: making entries.

    def forward(self, way: Way) -> None:
        t, last = way.position, self._since
        if not self._records or (t - last >= self._every and t < self._plan.steps):
            self._record(t)
            self._publish(way.action, self._here(t, way.state))

    def arrived(self, state: State) -> None:
        if self._final is None:
            self._record(self._plan.steps)
            self._final = self._shelf.file("final")
            self._write(self._final, of_snapshot(self._run.snapshot(state)))
            self._publish(len(self._plan.forward_actions), None)
        # What the caller is given is the caller's to change, and may be a tensor to be written.
        self._background.finish()

    def turn(self, way: WayBack, outputs: OutputCotangents) -> WayBack:
        given = _given(way.cotangent, outputs)
        if self._given not in ("", given):
            raise RuntimeError(
                "what flows back from the result is not what flowed back in the pass that was "
                f"interrupted, of which {self._shelf.name!r} keeps a part: compute the same "
                "outer loss from the same data, or empty the folder to begin anew"
            )
        self._given = given
        way, self._came_back = self._came_back or way, None
        if self._again is not None:
            way, self._again = replace(way, state=self._run.restored(self._again)), None
        return way

    def backward(self, way: WayBack) -> None:
        self._work += 1
        if self._work < self._every:
            return
        self._work = 0
        if self._back is None or self._back[0] is not way.cotangent:
            self._back = way.cotangent, self._shelf.file("back")
            self._write(self._back[1], of_way_back(way))
        here = None if way.state is None else self._here(way.position, way.state)
        self._publish(len(self._plan.forward_actions), here, way)

    def finished(self) -> None:
        self._wait_for_others()
        self._finished = True

    @property
    def _run(self) -> Loop:
        assert self._loop is not None
        return self._loop

    def _record(self, stop: int) -> None:
        """Write what is to be known of the steps since the last record."""
        file = self._shelf.file("record")
        self._write(file, self._passed.record(self._run, stop))
        self._records = [*self._records, file]
        self._since = stop

    def _here(self, position: int, state: State) -> File:
        """Where the state at ``position`` is written, the present one."""
        if position in self._files:
            return self._files[position]
        file = self._shelf.file("state")
        self._write(file, of_snapshot(self._run.snapshot(state)))
        return file

    def _write(self, file: File, written: Written) -> None:
        self._check_mine()
        copy = self._copier.to_host(written[0])

        def write() -> None:
            copy.synchronize()
            self._shelf.write(file, copy.tensors, written[1])

        self._background.write(write)

    def _publish(self, action: int, here: File | None, way: WayBack | None = None) -> None:
        """Make an entry, once all that it names is written."""
        self._wait_for_others()
        self._entries += 1
        states, records, final = dict(self._files), list(self._records), self._final
        back = None if way is None or self._back is None else self._back[1]
        named = {f.name for f in (*states.values(), *records, final, here, back) if f is not None}
        number, given = self._entries, self._given

        def publish() -> None:
            entry = {
                "run": self._terms,
                "number": number,
                "action": action,
                "states": {t: _named(f) for t, f in states.items()},
                "records": [_named(f) for f in records],
                "here": _named(here),
                "final": _named(final),
                "back": _named(back),
                "back action": 0 if way is None else way.action,
                "back position": 0 if way is None else way.position,
                "given": given,
            }
            self._shelf.publish(entry, named)

        self._check_mine()
        self._background.write(publish)

    def _wait_for_others(self) -> None:
        """Until all processes of a group have the last entry."""
        if (group := self._run.step.group) is not None:
            self._background.finish()
            group.maximum(0)

    def _check_mine(self) -> None:
        if self._lost:
            raise RuntimeError(f"this unroll cannot go back: {self._lost}")
        self._background.check_mine()

    def _give_up(self, why: str) -> None:
        self._lost = why
        self._release()

    def _snapshot(self, read: Read) -> Snapshot:
        return snapshot_of(read, list(self._run.start.opt))


#: Those that are open in this process, by folder.
_open: weakref.WeakValueDictionary[str, DurableSnapshots] = weakref.WeakValueDictionary()


def _close(background: Background, shelf: Shelf) -> None:
    if background.mine:  # a forked process has no thread, and its lock is its parent's
        background.close()
        shelf.close()


def _named(file: File | None) -> list[Any] | None:
    return None if file is None else [file.name, file.checksum]


def _file(named: Sequence[Any] | None) -> File | None:
    return None if named is None else File(*named)


def _given(cotangent: Cotangent, outputs: OutputCotangents) -> str:
    """What flows to the results, as a text that differs where it does."""
    parts = {" ".join(path): digest(x) for path, x in cotangent.items()}
    parts |= {f"aux {t} {i}": digest(x) for t, aux in outputs.aux.items() for i, x in aux.items()}
    if outputs.losses is not None:
        parts["losses"] = digest(outputs.losses)
    return f"{zlib.crc32(json.dumps(sorted(parts.items())).encode()):08x}"
