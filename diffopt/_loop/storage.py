"""Snapshots kept in host memory or in files, written and read while computing goes on.

No state of a loop is ever written into, so it can be copied at leisure. Between a CUDA device and
the host the copy runs on a stream of its own, through pinned memory; files are written and read by
one background thread, in the order asked for.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._values.state import State
from diffopt._values.tree import Path

#: Where snapshots go: None for where the tensors are, "cpu", or a folder.
Storage = str | os.PathLike[str] | None

#: How many snapshots may wait to be written. Each takes host memory until it is.
BACKLOG = 2

Tensors = dict[Path, Tensor]


def check_storage(storage: Any) -> None:
    """Raise where ``storage`` is not of a kind that ``open_storage`` takes."""
    if storage is not None and not isinstance(storage, (str, os.PathLike)):
        raise TypeError(
            f'storage is a {type(storage).__name__}: pass "cpu", a folder, or None to keep '
            "snapshots on their device"
        )


def open_storage(storage: Storage) -> Snapshots:
    """An empty collection of snapshots that keeps them in ``storage``."""
    if storage is None:
        return Snapshots()
    if storage == "cpu":
        return OnHost()
    return InFolder(FilePath(storage))


class OnHost(Snapshots):
    """Snapshots in host memory. What is there already is not copied."""

    in_place = False

    def __init__(self) -> None:
        super().__init__()
        self._copier = _Copier()
        self._devices: dict[int, dict[Path, torch.device]] = {}
        self._arriving: dict[int, _Copy] = {}

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        tensors = snapshot.state.tensors()
        host = self._copier.to_host(tensors).tensors
        super().__setitem__(t, Snapshot(snapshot.state.replace(host), snapshot.generators))
        self._devices[t] = {path: x.device for path, x in tensors.items()}

    def __getitem__(self, t: int) -> Snapshot:
        held = super().__getitem__(t)
        self.prefetch(t)
        tensors = self._arriving.pop(t).received()
        return Snapshot(held.state.replace(tensors), held.generators)

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

    in_place = False

    def __init__(self, folder: FilePath) -> None:
        self._folder = folder
        self._copier = _Copier()
        self._files: dict[int, _File] = {}
        self._writing: deque[Future[None]] = deque()
        self._reading: dict[int, Future[Tensors]] = {}
        try:
            own = FilePath(tempfile.mkdtemp(prefix="diffopt-", dir=folder))
        except OSError as error:
            raise type(error)(
                error.errno,
                f"storage={str(folder)!r} cannot hold snapshots, {error.strerror}: pass a folder "
                'that exists and can be written to, or "cpu"',
            ) from error
        self._own = own
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diffopt-snapshots")
        self._discard = weakref.finalize(self, _discard, self._thread, own, os.getpid())

    def __setitem__(self, t: int, snapshot: Snapshot) -> None:
        self._raise_failed_writes()
        while len(self._writing) >= BACKLOG:
            self._writing.popleft().result()
        copy = self._copier.to_host(snapshot.state.tensors())
        file = _File(self._own / f"{t}.state", snapshot)
        self._files[t] = file
        self._writing.append(self._thread.submit(file.write, copy))

    def __getitem__(self, t: int) -> Snapshot:
        file = self._files[t]
        self.prefetch(t)
        try:
            host = self._reading.pop(t).result()
        except (OSError, RuntimeError):
            self._raise_failed_writes()  # says why there is nothing to read
            raise
        tensors = self._copier.to_devices(host, file.devices).received()
        return Snapshot(file.form.replace(tensors), file.generators)

    def __delitem__(self, t: int) -> None:
        self._reading.pop(t, None)
        self._thread.submit(self._files.pop(t).path.unlink, missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, t: object) -> bool:
        return t in self._files

    def prefetch(self, t: int) -> None:
        if t not in self._reading:  # its file is written by then: the thread works in order
            self._reading[t] = self._thread.submit(self._files[t].read)

    def another(self) -> Self:
        return type(self)(self._folder)

    def close(self) -> None:
        self._discard()
        self._files.clear()
        self._writing.clear()
        self._reading.clear()

    def _raise_failed_writes(self) -> None:
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()


def _discard(thread: ThreadPoolExecutor, folder: FilePath, process: int) -> None:
    if os.getpid() == process:  # a forked process has a copy of the object, but no thread
        thread.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


class _File:
    """One state as a file: the bytes of its tensors, one after the other.

    Attributes:
        form: the state with tensors of the same layout that take no memory.
        devices: where its tensors belong.
        generators: the snapshot's.
    """

    def __init__(self, path: FilePath, snapshot: Snapshot) -> None:
        tensors = snapshot.state.tensors()
        forms = {p: torch.empty_like(x, device="meta") for p, x in tensors.items()}
        self.path = path
        self.form: State = snapshot.state.replace(forms)
        self.devices = {p: x.device for p, x in tensors.items()}
        self.generators = snapshot.generators
        self._bytes = sum(x.numel() * x.element_size() for x in forms.values())
        self._checksum = 0

    def write(self, copy: _Copy) -> None:
        """Write the tensors, once they have arrived in host memory."""
        copy.synchronize()
        checksum = 0
        try:
            with open(self.path, "xb", buffering=0) as file:
                for x in copy.tensors.values():
                    rest = _memory(x)
                    checksum = zlib.crc32(rest, checksum)
                    while rest:
                        rest = rest[file.write(rest) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"a snapshot of {self._bytes / 2**20:,.1f} MiB could not be written to "
                f"{str(self.path)!r}, {error.strerror}: make room there, pass another folder as "
                "storage, or keep fewer snapshots",
            ) from error
        self._checksum = checksum

    def read(self) -> Tensors:
        """The tensors, in host memory."""
        pinned = {p: device.type == "cuda" for p, device in self.devices.items()}
        tensors = {
            p: torch.empty_like(x, device="cpu", pin_memory=pinned[p])
            for p, x in self.form.tensors().items()
        }
        checksum = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self._bytes:
                    raise self._altered(f"has {size} bytes instead of {self._bytes}")
                for x in tensors.values():
                    memory = rest = _memory(x)
                    while rest and (count := file.readinto(rest)):
                        rest = rest[count:]
                    checksum = zlib.crc32(memory, checksum)
        except OSError as error:
            raise type(error)(
                error.errno,
                f"the snapshot file {str(self.path)!r} cannot be read, {error.strerror}: leave "
                "the files alone until the backward pass is over",
            ) from error
        if checksum != self._checksum:
            raise self._altered("does not hold what was written to it")
        return tensors

    def _altered(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"the snapshot file {str(self.path)!r} {how}: it was altered, or the disk is faulty; "
            "unroll again, and leave the files alone until the backward pass is over"
        )


def _memory(x: Tensor) -> memoryview:
    """The bytes of a tensor in host memory that has no gaps."""
    size = x.numel() * x.element_size()
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr())).cast("B")


class _Copier:
    """Copies tensors between devices and the host; for CUDA devices on streams of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to_host(self, tensors: Mapping[Path, Tensor]) -> _Copy:
        """The tensors in host memory, without gaps; those that are there already as they are."""
        copy = _Copy({}, self._begun(x.device for x in tensors.values()))
        for path, x in tensors.items():
            if x.device.type == "cuda":
                with torch.cuda.stream(copy.streams[x.device]):
                    host = torch.empty_like(x, device="cpu", pin_memory=True)
                    copy.tensors[path] = host.copy_(x, non_blocking=True)
                x.record_stream(copy.streams[x.device])
            else:
                x = x.cpu()
                form = torch.empty_like(x, device="meta")
                plain = x.stride() == form.stride() and not x.is_conj() and not x.is_neg()
                copy.tensors[path] = x if plain else torch.empty_like(x).copy_(x)
        copy.mark()
        return copy

    def to_devices(
        self, host: Mapping[Path, Tensor], devices: Mapping[Path, torch.device]
    ) -> _Copy:
        """Tensors in host memory on the devices where they belong."""
        copy = _Copy({}, self._begun(devices.values()))
        for path, x in host.items():
            device = devices[path]
            if device.type == "cuda":
                with torch.cuda.stream(copy.streams[device]):
                    copy.tensors[path] = x.to(device, non_blocking=True)
            else:
                copy.tensors[path] = x.to(device)
        copy.mark()
        return copy

    def _begun(self, devices: Any) -> dict[torch.device, torch.cuda.Stream]:
        """The stream of each CUDA device, at the point where the device's computing is now."""
        used = {device for device in devices if device.type == "cuda"}
        new_stream: Any = torch.cuda.Stream
        for device in used:
            if device not in self._streams:
                self._streams[device] = new_stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return {device: self._streams[device] for device in used}


class _Copy:
    """Tensors on their way."""

    def __init__(self, tensors: Tensors, streams: dict[torch.device, torch.cuda.Stream]) -> None:
        self.tensors = tensors
        self.streams = streams
        self._events: dict[torch.device, torch.cuda.Event] = {}

    def mark(self) -> None:
        """All copies have been asked for."""
        self._events = {device: stream.record_event() for device, stream in self.streams.items()}

    def synchronize(self) -> None:
        """Wait until the tensors are there."""
        for event in self._events.values():
            event.synchronize()

    def received(self) -> Tensors:
        """The tensors, for the current streams to use: these wait, not the caller."""
        for device, event in self._events.items():
            torch.cuda.current_stream(device).wait_event(event)
        for x in self.tensors.values():
            if x.device in self._events:
                x.record_stream(torch.cuda.current_stream(x.device))
        return self.tensors
