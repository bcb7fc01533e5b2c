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
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffopt._loop.background import Background
from diffopt._loop.durable import Durable
from diffopt._loop.entries import Entry, file_of, name_of, newest
from diffopt._loop.files import is_address
from diffopt._loop.journal import BackwardPoint, ForwardPoint
from diffopt._loop.loop import Loop
from diffopt._loop.passed import Passed, meet_again
from diffopt._loop.run_terms import fingerprint, terms_of
from diffopt._loop.shelf import Damaged, File, Shelf
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._loop.transfer import Copier
from diffopt._loop.written import tree_of, written
from diffopt._values.outputs import OutputCotangents
from diffopt._values.state import Cotangent, State
from diffopt.schedule import Plan


class DurableSnapshots(Snapshots):
    """Snapshots on a shelf, and the journal beside them."""

    journaled = True
    by_reference = False

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
        self._reading: dict[int, Future[tuple[dict[str, Tensor], Any]]] = {}
        self._entries = 0
        self._passed = Passed()
        self._records: list[File] = []
        self._final: File | None = None
        self._cotangents = ""
        self._since = 0  # how many steps are recorded
        self._work = 0  # on the way back, how many steps were taken since the last entry
        self._back: tuple[Cotangent, File] | None = None  # what was come back with at that
        self._came_back: BackwardPoint | None = None
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
        self._files[t] = self._write("state", _tree_of(snapshot))

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
        return _snapshot_of(tree_of(*read))

    def __delitem__(self, t: int) -> None:
        del self._files[t]  # its file goes when no entry names it
        self._reading.pop(t, None)

    @property
    def _positions(self) -> Collection[int]:
        return self._files

    def prefetch(self, t: int) -> None:
        self._refuse_lost()
        self._background.check_mine()
        if t not in self._reading:
            file = self._files[t]
            self._reading[t] = self._background.read(lambda: self._shelf.read(file))

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

    def begin(self, loop: Loop, plan: Plan) -> ForwardPoint:
        self._loop, self._plan = loop, plan
        self._terms = json.loads(json.dumps(terms_of(loop, plan)))
        entry = newest(self._shelf, self._terms, loop.step.group)
        if entry is None:
            self._shelf.clear()
            return ForwardPoint(0, 0, loop.start)
        return self._taken_up(loop, entry)

    def _taken_up(self, loop: Loop, entry: Entry) -> ForwardPoint:
        note, passed = entry.note, entry.passed
        self._entries = entry.number
        self._files = {int(t): File(*file) for t, file in note["states"].items()}
        self._records = [File(*file) for file in note["records"]]
        self._final = file_of(note["final"])
        start = None if entry.first is None else _snapshot_of(entry.first)
        captured = meet_again(loop, passed, start, self)
        self._passed, self._since = passed, len(passed.steps)
        passed.deliver(loop, captured)
        if entry.back is not None:
            self._cotangents = note["cotangents"]
            self._came_back = BackwardPoint(
                note["back action"],
                entry.back["cotangent"],
                _by_index(entry.back["captured"], captured),
                note["back position"],
            )
            self._again = None if entry.again is None else _snapshot_of(entry.again)
        reached = loop.restored(_snapshot_of(entry.reached))
        return ForwardPoint(note["action"], self._since, reached)

    # The journal: making entries.

    def forward(self, point: ForwardPoint) -> None:
        t, last = point.position, self._since
        if not self._records or (t - last >= self._every and t < self._plan.steps):
            self._record(t)
            self._publish(point.action, self._here(t, point.state))

    def arrived(self, state: State) -> None:
        if self._final is None:
            self._record(self._plan.steps)
            self._final = self._write("final", _tree_of(self._run.snapshot(state)))
            self._publish(len(self._plan.forward_actions), None)
        # What the caller is given is the caller's to change, and may be a tensor to be written.
        self._background.finish()

    def turn(self, point: BackwardPoint, outputs: OutputCotangents) -> BackwardPoint:
        now = _digest_of(point.cotangent, outputs)
        if self._cotangents not in ("", now):
            raise RuntimeError(
                "what flows back from the result is not what flowed back in the pass that was "
                f"interrupted, of which {self._shelf.name!r} keeps a part: compute the same "
                "outer loss from the same data, or empty the folder to begin anew"
            )
        self._cotangents = now
        point, self._came_back = self._came_back or point, None
        if self._again is not None:
            point, self._again = replace(point, state=self._run.restored(self._again)), None
        return point

    def backward(self, point: BackwardPoint) -> None:
        self._work += 1
        if self._work < self._every:
            return
        self._work = 0
        if self._back is None or self._back[0] is not point.cotangent:
            tree = {"cotangent": point.cotangent, "captured": point.captured}
            self._back = point.cotangent, self._write("back", tree)
        here = None if point.state is None else self._here(point.position, point.state)
        self._publish(len(self._plan.forward_actions), here, point)

    def finished(self) -> None:
        self._wait_for_others()
        self._finished = True

    @property
    def _run(self) -> Loop:
        assert self._loop is not None
        return self._loop

    def _record(self, stop: int) -> None:
        """Write what is to be known of the steps since the last record."""
        self._records.append(self._write("record", self._passed.record(self._run, stop)))
        self._since = stop

    def _here(self, position: int, state: State) -> File:
        """Where the state at ``position`` is written, the present one."""
        if position in self._files:
            return self._files[position]
        return self._write("state", _tree_of(self._run.snapshot(state)))

    def _write(self, kind: str, tree: Any) -> File:
        """Write a tree to a new file, later."""
        self._refuse_lost()
        self._background.make_room()
        file = self._shelf.file(kind)
        tensors, note = written(tree)
        copy = self._copier.to_host(tensors)

        def write() -> None:
            copy.synchronize()
            self._shelf.write(file, copy.tensors, note)

        self._background.write(write)
        return file

    def _publish(self, action: int, here: File | None, point: BackwardPoint | None = None) -> None:
        """Make an entry, once all that it names is written."""
        self._wait_for_others()
        self._entries += 1
        states, records, final = dict(self._files), list(self._records), self._final
        back = None if point is None or self._back is None else self._back[1]
        named = {f.name for f in (*states.values(), *records, final, here, back) if f is not None}
        number, cotangents = self._entries, self._cotangents

        def publish() -> None:
            entry = {
                "run": self._terms,
                "number": number,
                "action": action,
                "states": {t: name_of(f) for t, f in states.items()},
                "records": [name_of(f) for f in records],
                "here": name_of(here),
                "final": name_of(final),
                "back": name_of(back),
                "back action": 0 if point is None else point.action,
                "back position": 0 if point is None else point.position,
                "cotangents": cotangents,
            }
            self._shelf.publish(entry, named)

        self._refuse_lost()
        self._background.write(publish)

    def _wait_for_others(self) -> None:
        """Until all processes of a group have the last entry."""
        if (group := self._run.step.group) is not None:
            self._background.finish()
            group.maximum(0)

    def _refuse_lost(self) -> None:
        if self._lost:
            raise RuntimeError(f"this unroll cannot go back: {self._lost}")

    def _give_up(self, why: str) -> None:
        self._lost = why
        self._release()


#: Those that are open in this process, by folder.
_open: weakref.WeakValueDictionary[str, DurableSnapshots] = weakref.WeakValueDictionary()


def _close(background: Background, shelf: Shelf) -> None:
    if background.mine:  # a forked process has no thread, and its lock is its parent's
        background.close()
        shelf.close()


def _tree_of(snapshot: Snapshot) -> Any:
    state = snapshot.state
    opt = {name: dict(entries) for name, entries in state.opt.items()}
    return dict(state.params), opt, dict(state.buffers), snapshot.generators


def _snapshot_of(tree: Any) -> Snapshot:
    """The snapshot that a tree was made of."""
    *tables, generators = tree
    return Snapshot(State(*tables), generators)


def _by_index(cotangents: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor | None]:
    """What flows to the captured tensors, at the index that each has in this process."""
    total: list[Tensor | None] = [None] * (max(indices, default=-1) + 1)
    for i, x in enumerate(cotangents):
        if x is not None:
            total[indices[i]] = x
    return total


def _digest_of(cotangent: Cotangent, outputs: OutputCotangents) -> str:
    """A digest of what flows to the results."""
    named = {" ".join(path): x for path, x in cotangent.items()}
    named |= {f"aux {t} {i}": x for t, aux in outputs.aux.items() for i, x in aux.items()}
    if outputs.losses is not None:
        named["losses"] = outputs.losses
    text = json.dumps(sorted((name, fingerprint(x)) for name, x in named.items()))
    return f"{zlib.crc32(text.encode()):08x}"
