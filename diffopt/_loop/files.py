"""Folders of files: on a disk of this machine, or, by fsspec, wherever its addresses lead."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any


class OnDisk:
    """A folder of files on a disk of this machine.

    Attributes:
        name: as messages have it.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.where = path

    def make(self) -> None:
        """Make the folder, where it is missing."""
        self.where.mkdir(exist_ok=True)

    def make_new(self) -> OnDisk:
        """A new folder in it, of a name that no other has."""
        return OnDisk(Path(tempfile.mkdtemp(prefix="diffopt-", dir=self.where)))

    def path(self, name: str) -> str:
        """The full name of a file."""
        return str(self.where / name)

    def open(self, name: str, mode: str) -> Any:
        """A binary file, for ``mode`` "rb", or a new one for "xb"."""
        return open(self.where / name, mode, buffering=0)

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of this name, or over it: ``write`` is given a path to write to.

        The file is whole or absent: written under another name, flushed to the disk, then renamed.
        """
        path = self.where / name
        partial = path.with_suffix(".partial")
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":
            folder = os.open(self.where, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def taken(self, name: str) -> AbstractContextManager[Path]:
        """A file as one of this machine, for as long as the context lasts."""
        return nullcontext(self.where / name)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.where / name).exists()

    def names(self) -> list[str]:
        """The names of the files, in no order."""
        return [path.name for path in self.where.iterdir()]

    def remove(self, name: str) -> None:
        """Remove a file, if there is one of this name."""
        (self.where / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.where, ignore_errors=True)


class Elsewhere:
    """A folder like ``OnDisk``, that fsspec reaches by an address such as ``s3://bucket/states``.

    Raises:
        ImportError: fsspec, or what it needs for the address, is not installed.
        ValueError: fsspec knows no such kind of address.
    """

    def __init__(self, address: str) -> None:
        try:
            fsspec: Any = importlib.import_module("fsspec")
        except ImportError as error:
            raise ImportError(
                f"the folder {address!r} is an address, which fsspec is needed for, and that is "
                "not installed: pip install 'torch-diffopt[remote]', or pass a path"
            ) from error
        try:
            self._system, self._where = fsspec.core.url_to_fs(address)
        except ImportError as error:
            raise ImportError(
                f"the folder {address!r} is of a kind that fsspec needs a package for: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"the folder {address!r} is of a kind that fsspec does not know: {error}"
            ) from error
        self.name = address.rstrip("/")

    def make(self) -> None:
        self._system.makedirs(self._where, exist_ok=True)

    def make_new(self) -> Elsewhere:
        new = type(self)(f"{self.name}/diffopt-{uuid.uuid4().hex}")
        new._system.makedirs(new._where, exist_ok=True)
        return new

    def path(self, name: str) -> str:
        return f"{self.name}/{name}"

    def open(self, name: str, mode: str) -> Any:
        # Not every kind has "xb"; no name is used twice.
        return self._system.open(self._full(name), mode.replace("x", "w"))

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """By way of a temporary file of this machine."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            write(path)
            self._system.put_file(str(path), self._full(name))

    @contextmanager
    def taken(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            self._system.get_file(self._full(name), str(path))
            yield path

    def has(self, name: str) -> bool:
        return bool(self._system.exists(self._full(name)))

    def names(self) -> list[str]:
        self._system.invalidate_cache()  # of listings, which would not show new files
        paths = self._system.ls(self._where, detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(self._full(name))

    def discard(self) -> None:
        try:
            self._system.rm(self._where, recursive=True)
        except FileNotFoundError:
            return  # object storage has no folders but those of its files
        except OSError as error:
            warnings.warn(
                f"the snapshots in {self.name!r} could not be removed, {cause_of(error)}: remove "
                "the folder by hand",
                stacklevel=2,
            )

    def _full(self, name: str) -> str:
        return f"{self._where}/{name}"


Folder = OnDisk | Elsewhere


def is_address(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` is an address for fsspec, and no path."""
    return "://" in os.fspath(folder)


def folder_of(folder: str | os.PathLike[str]) -> Folder:
    """The folder of a path or an address."""
    if is_address(folder):
        return Elsewhere(os.fspath(folder))
    return OnDisk(Path(folder))


def cause_of(error: OSError) -> str:
    """The cause of a failure of files; failures of fsspec have no number."""
    return error.strerror or str(error) or type(error).__name__


def restated(error: OSError, message: str) -> OSError:
    """The same failure with another message."""
    if error.errno is not None:
        return OSError(error.errno, message)  # of the class that belongs to the number
    kind = type(error) if type(error).__module__ == "builtins" else OSError
    return kind(message)
