"""Where a run survives its process: the argument ``storage``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from diffopt.schedule import check_int, check_kind


@dataclass(frozen=True)
class Durable:
    """A folder in which a run survives its process, for ``Segmented`` and ``Binomial``.

    Killed at any moment, in the forward or in the backward pass, the same call with the same folder
    goes on from what is there and gives the same gradient, bit for bit. When the backward pass is
    over the folder is empty again, but for a lock.

    Args:
        folder: of this run alone, and of this process of a group: a path, or an address for fsspec
            such as ``"s3://bucket/run-0"``, where no lock keeps others out. It is made where it is
            missing.
        every: how many steps are taken, at least, between two entries of the journal. What is
            done again after a kill is at most about that, and the way from one kept state to the
            next.

    Raises:
        TypeError: ``folder`` is no path, or ``every`` no int.
        ValueError: ``folder`` is empty, or ``every`` is below 1. When unrolling: what is in the
            folder is of another run; the message names what differs.
        ImportError: when unrolling, safetensors is not installed, or, for an address, fsspec.
        NotImplementedError: when unrolling, ``aux`` holds something else than tensors, numbers and
            texts in lists, tuples and dicts.
        RuntimeError: when unrolling, another process of this machine uses the folder, or nothing in
            it is whole; or the outer loss gives other cotangents than before the kill.
        OSError: when unrolling, the folder cannot be made or written to.

    Cost: on the disk, the plan's states and two entries' more, and the extras. Writing goes on in
    the background; in a group, the processes wait for one another at every entry. A backward pass
    with ``retain_graph=True``, or one that is itself recorded, begins anew after a kill, and leaves
    the folder as it is.
    """

    folder: str | os.PathLike[str]
    every: int = 10

    def __post_init__(self) -> None:
        check_kind("folder", self.folder, (str, os.PathLike), "pass a path")
        if not os.fspath(self.folder):
            raise ValueError("folder='': pass a folder of this run alone, such as 'runs/outer-3'")
        check_int("every", self.every, 1, "a number of steps between two entries")
