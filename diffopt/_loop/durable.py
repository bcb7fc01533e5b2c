"""Runs that survive their process: snapshots in files, and a journal of where the run is.

Between two entries of the journal nothing that the older one needs is removed. A process that is
killed therefore leaves a state from which the same call goes on, in either pass, and what it then
computes is to the last bit what it would have computed.

Of the steps that are not taken again, the entries hold the losses and which captured tensors each
used. The tensors themselves are the new process's: they are met again by taking the steps that used
one first, most often step 0 alone, and are compared with those of the run by their checksums.

Limits: ``aux`` is not kept, nor what ``loss_fn`` does besides returning a loss.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffopt._loop.files import is_address
from diffopt._loop.journal import Journal, Way, WayBack
from diffopt._loop.loop import Loop
from diffopt._loop.passed import Passed, meet_again
from diffopt._loop.run_terms import differences, digest, terms_of
from diffopt._loop.shelf import Damaged, File, Shelf
from diffopt._loop.snapshots import Snapshot, Snapshots, check_process
from diffopt._loop.transfer import Copier
from diffopt._values.state import Cotangent, State
from diffopt._values.tree import Path
from diffopt.schedule import Plan, check_int

_BACKLOG = 2  # writes that may wait, each of which holds a state in host memory


@dataclass(frozen=True)
class Durable:
    """A folder in which a run survives its process, for ``Segmented`` and ``Binomial``.

    Killed at any moment, in the forward or in the backward pass, the same call with the same folder
    goes on from what is there and gives the same gradient, bit for bit. When the backward pass is
    over the folder is empty again, but for a lock.

    Args:
        folder: of this run alone: a path, or an address for fsspec such as
            ``"s3://bucket/run-0"``. It is made where it is missing.
        every: how many steps are taken, at least, between two entries of the journal. What is
            done again after a kill is at most about that, and the way from one kept state to the
            next.

    Raises:
        TypeError: ``folder`` is no path, or ``every`` no int.
        ValueError: ``folder`` is empty, or ``every`` is below 1. When unrolling: what is in the
            folder is of another run; the message names what differs.
        ImportError: when unrolling, safetensors is not installed, or, for an address, fsspec.
        NotImplementedError: when unrolling, ``loss_fn`` returns ``aux``, or with ``verify``.
        RuntimeError: when unrolling, another process of this machine uses the folder, or nothing in
            it is whole; or the outer loss gives other cotangents than before the kill.
        OSError: when unrolling, the folder cannot be made or written to.

    Cost: on the disk, the plan's states and two entries' more. Writing goes on in the background.
    A backward pass with ``retain_graph=True``, or one that is itself recorded, begins anew after a
    kill, and leaves the folder as it is.
    """

    folder: str | os.PathLike[str]
    every: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise TypeError(f"folder is a {type(self.folder).__name__}: pass a path")
        if not os.fspath(self.folder):
            raise ValueError("folder='': pass a folder of this run alone, such as 'runs/outer-3'")
        check_int("every", self.every, 1, "a number of steps between two entries")


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffopt-durable")
        self._process = os.getpid()
        self._writing: deque[Future[None]] = deque()
        self._files: dict[int, File] = {}
        self._reading: dict[int, Future[tuple[dict[str, Tensor], Any]]] = {}
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
        self._release = weakref.finalize(self, _close, self._thread, self._shelf, self._process)

    # Snapshots.

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        file = self._shelf.file("state")
        self._files[t] = file
        self._write(file, *_written(snapshot))

    def __getitem__(self, t: int) -> Snapshot:
        self.prefetch(t)
        try:
            tensors, order = self._reading.pop(t).result()
        except Damaged as error:
            self._raise_failed_writes()
            raise RuntimeError(
                f"{error}: the state at step {t} is lost. Empty the folder "
                f"{self._shelf.name!r} to begin anew"
            ) from error
        return self._snapshot(tensors, order)

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
            self._reading[t] = self._thread.submit(self._shelf.read, self._files[t])

    @property
    def journal(self) -> Journal:
        return self

    def another(self) -> Snapshots:
        return Snapshots()  # of a way back that keeps its graph, and is not journaled

    def close(self) -> None:
        """Stop, and leave the files for the next call, unless all is done."""
        if os.getpid() != self._process:
            return
        self._thread.shutdown(wait=True)
        if self._finished and not self._lost:
            self._shelf.clear()
        self._release()
        self._loop = None

    # The journal.

    def begin(self, loop: Loop, plan: Plan) -> Way:
        if loop.ledger is not None:
            raise NotImplementedError(
                "verify=True compares with digests of the first pass, which Durable does not keep: "
                "leave one of them out"
            )
        self._loop, self._plan = loop, plan
        self._terms = json.loads(json.dumps(terms_of(loop, plan)))
        damage: list[str] = []
        for entry in self._shelf.manifests():
            self._refuse_another_run(entry["run"])
            try:
                return self._taken_up(loop, entry)
            except Damaged as error:
                damage.append(str(error))
        if damage or self._shelf.has_manifests():
            raise RuntimeError(
                f"the folder {self._shelf.name!r} holds a run of which no entry is whole: "
                f"{'; '.join(damage) or 'its manifests are damaged'}. Empty it to begin anew"
            )
        self._shelf.clear()
        return Way(0, 0, loop.start)

    def _refuse_another_run(self, found: Mapping[str, Any]) -> None:
        different = list(differences(found, self._terms))
        if different:
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            raise ValueError(
                f"the folder {self._shelf.name!r} holds another run, which differs in "
                f"{different[0]}{more}: give every run a folder of its own, or empty this one"
            )

    def _taken_up(self, loop: Loop, entry: Mapping[str, Any]) -> Way:
        """Go on from an entry.

        Raises:
            Damaged: a file that is needed for it is not whole.
        """
        self._files = {int(t): File(*file) for t, file in entry["states"].items()}
        self._records = [File(*file) for file in entry["records"]]
        for file in (*self._files.values(), *self._records):
            if not self._shelf.is_there(file):
                raise Damaged(f"the file {self._shelf.path(file)!r} is gone")
        final, back = _file(entry["final"]), _file(entry["back"])
        here = _file(entry["here"])
        self._final = final
        reached = final or here
        assert reached is not None
        forward = self._shelf.read(reached)
        passed = Passed.read([self._shelf.read(file) for file in self._records])
        came_back = None if back is None else self._shelf.read(back)
        again = None if back is None or here is None else self._shelf.read(here)
        first = self._shelf.read(self._files[min(self._files)]) if self._files else None
        # From here on nothing has to be read, so the loop is not left half taken up.
        start = None if first is None else self._snapshot(*first)
        captured = meet_again(loop, passed, start, self)
        self._passed, self._since = passed, len(passed.steps)
        passed.deliver(loop, captured)
        if came_back is not None:
            self._given = entry["given"]
            self._came_back = _read_back(entry, *came_back, captured)
            self._again = None if again is None else self._snapshot(*again)
        snapshot = self._snapshot(*forward)
        return Way(entry["action"], self._since, loop.restored(snapshot))

    def forward(self, way: Way) -> None:
        assert self._loop is not None
        t, last = way.position, self._since
        if not self._records or (t - last >= self._every and t < self._plan.steps):
            self._record(t)
            self._publish(way.action, self._here(t, way.state))

    def arrived(self, state: State) -> None:
        assert self._loop is not None
        if self._final is None:
            self._record(self._plan.steps)
            self._final = self._shelf.file("final")
            self._write(self._final, *_written(self._loop.snapshot(state)))
            self._publish(len(self._plan.forward_actions), None)

    def turn(self, way: WayBack, loss_cotangents: Tensor | None) -> WayBack:
        assert self._loop is not None
        given = _given(way.cotangent, loss_cotangents)
        if self._given not in ("", given):
            raise RuntimeError(
                "what flows back from the result is not what flowed back in the pass that was "
                f"interrupted, of which {self._shelf.name!r} keeps a part: compute the same "
                "outer loss from the same data, or empty the folder to begin anew"
            )
        self._given = given
        way, self._came_back = self._came_back or way, None
        if self._again is not None:
            way, self._again = replace(way, state=self._loop.restored(self._again)), None
        return way

    def backward(self, way: WayBack) -> None:
        self._work += 1
        if self._work < self._every:
            return
        self._work = 0
        if self._back is None or self._back[0] is not way.cotangent:
            self._back = way.cotangent, self._shelf.file("back")
            self._write(self._back[1], *_written_back(way))
        here = None if way.state is None else self._here(way.position, way.state)
        self._publish(len(self._plan.forward_actions), here, way)

    def finished(self) -> None:
        self._finished = True

    # Writing.

    def _record(self, stop: int) -> None:
        """Write what is to be known of the steps since the last record."""
        assert self._loop is not None
        file = self._shelf.file("record")
        self._write(file, *self._passed.record(self._loop, stop))
        self._records = [*self._records, file]
        self._since = stop

    def _write(self, file: File, tensors: Mapping[str, Tensor], note: Any) -> None:
        copy = self._copier.to_host(tensors)

        def write() -> None:
            copy.synchronize()
            self._shelf.write(file, copy.tensors, note)

        self._later(write)

    def _here(self, position: int, state: State) -> File:
        """Where the state at ``position`` is written, the present one."""
        if position in self._files:
            return self._files[position]
        assert self._loop is not None
        file = self._shelf.file("state")
        self._write(file, *_written(self._loop.snapshot(state)))
        return file

    def _publish(self, action: int, here: File | None, way: WayBack | None = None) -> None:
        """Make an entry, once all that it names is written."""
        states, records, final = dict(self._files), list(self._records), self._final
        back = None if way is None or self._back is None else self._back[1]
        named = {f.name for f in (*states.values(), *records, final, here, back) if f is not None}
        given = self._given

        def publish() -> None:
            entry = {
                "run": self._terms,
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

        self._later(publish)

    def _later(self, work: Callable[[], None]) -> None:
        self._check_mine()
        self._raise_failed_writes()
        while len(self._writing) >= _BACKLOG:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(work))

    def _raise_failed_writes(self) -> None:
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()

    def _check_mine(self) -> None:
        if self._lost:
            raise RuntimeError(f"this unroll cannot go back: {self._lost}")
        check_process(self._process)

    def _give_up(self, why: str) -> None:
        self._lost = why
        self._release()

    def _snapshot(self, tensors: Mapping[str, Tensor], order: Sequence[Any]) -> Snapshot:
        """What ``_written`` wrote, on the devices where it was."""
        assert self._loop is not None
        params: dict[str, Tensor] = {}
        opt: dict[str, dict[str, Tensor]] = {name: {} for name in self._loop.start.opt}
        buffers: dict[str, Tensor] = {}
        generators: list[Tensor] = []
        for (kind, *rest), device in order:
            x = tensors[json.dumps([kind, *rest])].to(device)
            if kind == "opt":
                opt[rest[0]][rest[1]] = x
            elif kind == "generators":
                generators.append(x)
            else:
                (params if kind == "params" else buffers)[rest[0]] = x
        return Snapshot(State(params, opt, buffers), tuple(generators))


#: Those that are open in this process, by folder.
_open: weakref.WeakValueDictionary[str, DurableSnapshots] = weakref.WeakValueDictionary()


def _close(thread: ThreadPoolExecutor, shelf: Shelf, process: int) -> None:
    if os.getpid() == process:  # a forked process has no thread, and its lock is its parent's
        thread.shutdown(wait=True)
        shelf.close()


def _written(snapshot: Snapshot) -> tuple[dict[str, Tensor], list[Any]]:
    """A snapshot's tensors by name, and their order, with their devices."""
    tensors: dict[Path, Tensor] = snapshot.state.tensors()
    for i, x in enumerate(snapshot.generators):
        tensors["generators", str(i)] = x
    order = [(path, str(x.device)) for path, x in tensors.items()]
    return {json.dumps(path): x for path, x in tensors.items()}, order


def _written_back(way: WayBack) -> tuple[dict[str, Tensor], list[Any]]:
    keys: dict[Path, Tensor] = {("state", *path): x for path, x in way.cotangent.items()}
    for i, x in enumerate(way.captured):
        if x is not None:
            keys["captured", str(i)] = x
    order = [(key, str(x.device)) for key, x in keys.items()]
    return {json.dumps(key): x for key, x in keys.items()}, order


def _named(file: File | None) -> list[Any] | None:
    return None if file is None else [file.name, file.checksum]


def _file(named: Sequence[Any] | None) -> File | None:
    return None if named is None else File(*named)


def _read_back(
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    order: Sequence[Any],
    captured: Sequence[int],
) -> WayBack:
    """What ``_written_back`` wrote; ``captured`` has the present index of each captured tensor."""
    cotangent: Cotangent = {}
    total: list[Tensor | None] = [None] * (max(captured, default=-1) + 1)
    for (kind, *rest), device in order:
        x = tensors[json.dumps([kind, *rest])].to(device)
        if kind == "state":
            cotangent[tuple(rest)] = x
        else:
            total[captured[int(rest[0])]] = x
    return WayBack(entry["back action"], cotangent, total, entry["back position"])


def _given(cotangent: Cotangent, loss_cotangents: Tensor | None) -> str:
    """What flows to the results, as a text that differs where it does."""
    parts = sorted(f"{' '.join(path)} {digest(x)}" for path, x in cotangent.items())
    losses = "" if loss_cotangents is None else digest(loss_cotangents)
    return f"{zlib.crc32('; '.join([*parts, losses]).encode()):08x}"
