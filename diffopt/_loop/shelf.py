"""A folder of tensors that survives its process: files that are whole or absent, and a manifest.

A file is written under another name, flushed to the disk and renamed; the manifest, which says what
the files are for and what their checksums have to be, is written last. The last two manifests are
kept with all files that they name, so that one of them can be read whatever happens.

Of an address, fsspec writes and reads files as a whole. What is torn on the way is told by the
checksums, as what was damaged later is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from diffopt._loop.checksum import bytes_of, checksum, memory_of
from diffopt._loop.files import Folder, OnDisk, cause_of, folder_of, restated

_KEPT = 2  # manifests


class Damaged(RuntimeError):
    """A file does not hold what was written to it, or is gone."""


@dataclass
class File:
    """A file of tensors.

    Attributes:
        name: in the folder.
        checksum: of what it holds; 0 until it has been written.
    """

    name: str
    checksum: int = 0


class Shelf:
    """The files of one run.

    Args:
        folder: a path or an address. Is made if it is missing, in a folder that exists.

    Raises:
        ImportError: safetensors is not installed, or for an address, fsspec.
        OSError: the folder cannot be made, or written to, or is full.
        RuntimeError: another process of this machine uses it, as far as it is on a disk.

    Attributes:
        name: the folder's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._safetensors = _safetensors()
        self._folder: Folder = folder_of(folder)
        self.name = self._folder.name
        self._lock: IO[str] | None = None
        try:
            self._folder.make()
            if isinstance(self._folder, OnDisk):
                self._lock = _locked(self._folder.path("lock"), self.name)
            names = self._folder.names()
        except OSError as error:
            raise restated(
                error,
                f"Durable({self.name!r}) cannot hold a run, {cause_of(error)}: pass a folder that "
                "can be written to, or made in one that exists",
            ) from error
        self._number = max((_number(name) for name in names), default=0)

    def path(self, file: File) -> str:
        """The full name of a file."""
        return self._folder.path(file.name)

    def file(self, kind: str) -> File:
        """A name that no file had before."""
        self._number += 1
        return File(f"{kind}-{self._number:08d}.safetensors")

    def write(self, file: File, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write tensors in host memory without gaps, and a note of JSON's kinds beside them."""
        flat, form = {}, {}
        for key, x in tensors.items():
            form[key] = [str(x.dtype).removeprefix("torch."), list(x.shape), list(x.stride())]
            flat[key] = bytes_of(x)
        about = json.dumps({"form": form, "note": note})
        file.checksum = _checksum(flat, about)
        try:
            self._folder.put(file.name, lambda path: _save(path, flat, about))
        except OSError as error:
            raise self._full(error) from error

    def read(self, file: File) -> tuple[dict[str, Tensor], Any]:
        """The tensors, in host memory and in the order in which they were given, and the note.

        Raises:
            Damaged: they are not what was written.
        """
        library, folder = self._safetensors, self._folder
        unreadable = OSError, KeyError, ValueError, TypeError, library.SafetensorError
        try:
            with folder.taken(file.name) as path, library.safe_open(path, "pt", "cpu") as content:
                about = content.metadata()["diffopt"]
                flat = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
            about_all = json.loads(about)
            flat = {key: flat[key] for key in about_all["form"]}
        except unreadable as error:
            raise Damaged(f"the file {self.path(file)!r} cannot be read ({error})") from error
        if _checksum(flat, about) != file.checksum:
            raise Damaged(f"the file {self.path(file)!r} does not hold what was written to it")
        tensors = {key: _formed(flat[key], *form) for key, form in about_all["form"].items()}
        return tensors, about_all["note"]

    def is_there(self, file: File) -> bool:
        """Whether the file exists, whatever it holds."""
        return self._folder.has(file.name)

    def publish(self, manifest: Mapping[str, Any], named: set[str]) -> None:
        """Write the manifest, which names the files ``named``, and remove what none names."""
        self._number += 1
        body = json.dumps({"named": sorted(named), **manifest})
        text = f"{zlib.crc32(body.encode()):08x}\n{body}"
        name = f"manifest-{self._number:08d}.json"
        try:
            self._folder.put(name, lambda path: path.write_text(text))
        except OSError as error:
            raise self._full(error) from error
        present = self._folder.names()
        manifests = _manifests(present)[:_KEPT]
        names = {*manifests, *named}
        for older in manifests[1:]:
            names |= set((self._body(older) or {}).get("named", ()))
        self._remove(set(present) - names)

    def manifests(self) -> Iterator[dict[str, Any]]:
        """The whole manifests, the newest first."""
        for name in _manifests(self._folder.names()):
            if (body := self._body(name)) is not None:
                yield body

    def has_manifests(self) -> bool:
        """Whether there is a manifest, whole or not."""
        return bool(_manifests(self._folder.names()))

    def clear(self) -> None:
        """Remove every file of the run, manifests first."""
        present = self._folder.names()
        manifests = _manifests(present)
        for name in manifests:
            self._folder.remove(name)
        self._remove(set(present).difference(manifests))

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _body(self, name: str) -> dict[str, Any] | None:
        try:
            with self._folder.taken(name) as path:
                head, body = path.read_text().split("\n", 1)
            if int(head, 16) == zlib.crc32(body.encode()):
                manifest: dict[str, Any] = json.loads(body)
                return manifest
        except (OSError, ValueError):
            pass  # a manifest that is not whole is passed over for the one before it
        return None

    def _remove(self, names: Iterable[str]) -> None:
        """Remove files, except those that this module did not name."""
        for name in names:
            if _number(name):
                self._folder.remove(name)

    def _full(self, error: OSError) -> OSError:
        return restated(
            error,
            f"Durable({self.name!r}) could not be written to, {cause_of(error)}: make room "
            "there and call again, which goes on from what is there",
        )


def _locked(path: str, folder: str) -> IO[str]:
    """A file that keeps a folder to one process, until it is closed or the process ends."""
    file = open(path, "a")  # noqa: SIM115 - held as long as the run lasts
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not on this system
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"the folder {folder!r} is in use by another process: give every run a "
            "folder of its own, Durable(folder)"
        ) from None
    return file


def _manifests(names: Iterable[str]) -> list[str]:
    """The names of manifests among ``names``, the newest first."""
    manifests = (n for n in names if n.startswith("manifest-") and n.endswith(".json"))
    return sorted(manifests, reverse=True)


def _number(name: str) -> int:
    """The number in a name that this module gave; 0 for any other."""
    kind, _, rest = name.partition("-")
    digits, _, suffix = rest.partition(".")
    if suffix not in ("safetensors", "json", "partial") or not digits.isdigit():
        return 0
    return int(digits) if kind in ("manifest", "state", "record", "final", "back") else 0


def _formed(flat: Tensor, dtype: str, shape: list[int], stride: list[int]) -> Tensor:
    x = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype))
    bytes_of(x).copy_(flat)
    return x


def _save(path: Path, flat: Mapping[str, Tensor], about: str) -> None:
    """Write bytes as a safetensors file.

    The library's own way copies all of them, twice, and where the process is killed leaves a file
    of a name that nobody knows.
    """
    head: dict[str, Any] = {"__metadata__": {"diffopt": about}}
    stop = 0
    for key, x in flat.items():
        start, stop = stop, stop + len(x)
        head[key] = {"dtype": "U8", "shape": [len(x)], "data_offsets": [start, stop]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in flat.values():
            file.write(memory_of(x))


def _checksum(flat: Mapping[str, Tensor], about: str) -> int:
    crc = zlib.crc32(about.encode())
    for key, x in flat.items():
        crc = checksum(x, zlib.crc32(key.encode(), crc))
    return crc


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "diffopt.Durable needs safetensors, which is not installed: pip install "
            "'torch-diffopt[durable]'"
        ) from error
    return safetensors
