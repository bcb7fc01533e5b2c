"""Snapshots kept in host memory or in files, written and read while computing goes on.

No state of a loop is ever written into, so it can be copied at leisure. Between a CUDA device and
the host the copy runs on a stream of its own, through pinned memory; files are written and read by
one background thread, in the order asked for.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._loop.background import Background
from diffopt._loop.checksum import bytes_of, checksum, memory_of
from diffopt._loop.durable import Durable
from diffopt._loop.durable_run import DurableSnapshots
from diffopt._loop.files import Folder, cause_of, folder_of, restated
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._loop.transfer import Copier, Copy
from diffopt._values.state import State
from diffopt._values.tree import Path
from diffopt.schedule import check_kind

#: Where snapshots go: None for where the tensors are, "cpu", a folder (a path, or an address for
#: fsspec), or one that lasts.
Storage = str | os.PathLike[str] | Durable | None

Tensors = dict[Path, Tensor]


def check_storage(storage: Any) -> None:
    """Raise where ``storage`` is not of a kind that ``open_storage`` takes."""
    if storage is not None:
        advice = 'pass "cpu", a folder, or None to keep snapshots on their device'
        check_kind("storage", storage, (str, os.PathLike, Durable), advice)
    if storage == "":
        raise ValueError(
            'storage="" names no folder: pass "." for the present one, "cpu", or None to keep '
            "snapshots on their device"
        )


def open_storage(storage: Storage) -> Snapshots:
    """An empty collection of snapshots that keeps them in ``storage``."""
    if storage is None:
        return Snapshots()
    if storage == "cpu":
        return OnHost()
    if isinstance(storage, Durable):
        return DurableSnapshots(storage)
    return InFolder(folder_of(storage))


class OnHost(Snapshots):
    """Snapshots in host memory. What is there already is not copied."""

    by_reference = False

    def __init__(self) -> None:
        super().__init__()
        self._copier = Copier()
        self._devices: dict[int, dict[Path, torch.device]] = {}
        self._arriving: dict[int, Copy] = {}

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        tensors = snapshot.state.tensors()
        host = self._copier.to_host(tensors).tensors
        super().__setitem__(t, Snapshot(snapshot.state.replace(host), snapshot.generators))
        self._devices[t] = {path: x.device for path, x in tensors.items()}

    def __getitem__(self, t: int) -> Snapshot:
        on_host = super().__getitem__(t)
        self.prefetch(t)
        tensors = self._arriving.pop(t).received()
        return Snapshot(on_host.state.replace(tensors), on_host.generators)

    def __delitem__(self, t: int) -> None:
        super().__delitem__(t)
        del self._devices[t]
        self._arriving.pop(t, None)

    def prefetch(self, t: int) -> None:
        if t not in self._arriving:
            host = super().__getitem__(t).state.tensors()
            self._arriving[t] = self._copier.to_devices(host, self._devices[t])

    def close(self) -> None:
        super().close()
        self._devices.clear()
        self._arriving.clear()


class InFolder(Snapshots):
    """Snapshots in files, one each, in a new folder inside ``folder``.

    The new folder is removed by ``close``, or when the last reference to this object goes, or when
    the interpreter ends, whichever comes first.

    Raises:
        OSError: the folder is missing or cannot be written to; the disk is full; a file is gone.
        RuntimeError: a file does not hold what was written to it.
    """

    by_reference = False

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._copier = Copier()
        self._files: dict[int, _File] = {}
        self._reading: dict[int, Future[Tensors]] = {}
        try:
            subfolder = folder.make_new()
        except OSError as error:
            raise restated(
                error,
                f"storage={folder.name!r} cannot hold snapshots, {cause_of(error)}: pass a folder "
                'that exists and can be written to, or "cpu"',
            ) from error
        self._subfolder = subfolder
        self._background = Background("diffopt-snapshots")
        self._discard = weakref.finalize(self, _discard, self._background, subfolder)

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        self._background.make_room()
        copy = self._copier.to_host(snapshot.state.tensors())
        file = _File(self._subfolder, f"{t}.state", snapshot)
        self._files[t] = file
        self._background.write(lambda: file.write(copy))

    def __getitem__(self, t: int) -> Snapshot:
        file = self._files[t]
        self.prefetch(t)
        try:
            host = self._reading.pop(t).result()
        except (OSError, RuntimeError):
            self._background.raise_failed()  # says why there is nothing to read
            raise
        tensors = self._copier.to_devices(host, file.devices).received()
        return Snapshot(file.form.replace(tensors), file.generators)

    def __delitem__(self, t: int) -> None:
        self._reading.pop(t, None)
        name = self._files.pop(t).name
        self._background.read(lambda: self._subfolder.remove(name))

    @property
    def _positions(self) -> Collection[int]:
        return self._files

    def prefetch(self, t: int) -> None:
        self._background.check_mine()
        if t not in self._reading:  # its file is written by then: the thread works in order
            self._reading[t] = self._background.read(self._files[t].read)

    def another(self) -> Self:
        return type(self)(self._folder)

    def close(self) -> None:
        if self._background.mine:
            self._discard()
        self._files.clear()
        self._reading.clear()


def _discard(background: Background, folder: Folder) -> None:
    if background.mine:
        background.close(drop=True)
        folder.discard()


class _File:
    """One state as a file: the bytes of its tensors, one after the other.

    Attributes:
        name: in its folder.
        form: the state with tensors of the same layout that take no memory.
        devices: where its tensors belong.
        generators: the snapshot's.
    """

    def __init__(self, folder: Folder, name: str, snapshot: Snapshot) -> None:
        tensors = snapshot.state.tensors()
        forms = {p: torch.empty_like(x, device="meta") for p, x in tensors.items()}
        self.name = name
        self._folder = folder
        self.form: State = snapshot.state.replace(forms)
        self.devices = {p: x.device for p, x in tensors.items()}
        self.generators = snapshot.generators
        self._bytes = sum(x.numel() * x.element_size() for x in forms.values())
        self._checksum = 0

    def write(self, copy: Copy) -> None:
        """Write the tensors, once they have arrived in host memory."""
        copy.synchronize()
        crc = 0
        try:
            with self._folder.open(self.name, "xb") as file:
                for x in copy.tensors.values():
                    rest = memory_of(x)
                    crc = checksum(bytes_of(x), crc)
                    while rest:
                        count = file.write(rest)
                        rest = rest[len(rest) if count is None else count :]
        except OSError as error:
            raise restated(
                error,
                f"a snapshot of {self._bytes / 2**20:,.1f} MiB could not be written to "
                f"{self._path!r}, {cause_of(error)}: make room there, pass another folder as "
                "storage, or keep fewer snapshots",
            ) from error
        self._checksum = crc

    def read(self) -> Tensors:
        """The tensors, in host memory."""
        pinned = {p: device.type == "cuda" for p, device in self.devices.items()}
        tensors = {
            p: torch.empty_like(x, device="cpu", pin_memory=pinned[p])
            for p, x in self.form.tensors().items()
        }
        crc = 0
        try:
            with self._folder.open(self.name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                if size != self._bytes:
                    raise self._altered(f"has {size} bytes instead of {self._bytes}")
                for x in tensors.values():
                    rest = memory_of(x)
                    while rest and (count := file.readinto(rest)):
                        rest = rest[count:]
                    crc = checksum(bytes_of(x), crc)
        except OSError as error:
            raise restated(
                error,
                f"the snapshot file {self._path!r} cannot be read, {cause_of(error)}: leave "
                "the files alone until the backward pass is over",
            ) from error
        if crc != self._checksum:
            raise self._altered("does not hold what was written to it")
        return tensors

    @property
    def _path(self) -> str:
        return self._folder.path(self.name)

    def _altered(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"the snapshot file {self._path!r} {how}: it was altered, or the disk is faulty; "
            "unroll again, and leave the files alone until the backward pass is over"
        )
