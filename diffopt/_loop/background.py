"""Work on files that a thread does, one thing after another, while computing goes on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from diffopt._loop.snapshots import check_process

T = TypeVar("T")

_BACKLOG = 2  # writes that may wait, each of which holds a state in host memory


class Background:
    """A thread that writes and reads for one process.

    What fails on it is raised by the next call here.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._process = os.getpid()
        self._writing: deque[Future[None]] = deque()

    @property
    def mine(self) -> bool:
        """Whether this process made it, and was not forked from the one that did."""
        return os.getpid() == self._process

    def check_mine(self) -> None:
        """Raise in a forked process, which has no such thread."""
        check_process(self._process)

    def write(self, work: Callable[[], None]) -> None:
        """Do ``work`` later. Waits where too much waits already."""
        self.raise_failed()
        while len(self._writing) >= _BACKLOG:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(work))

    def read(self, work: Callable[[], T]) -> Future[T]:
        """Do ``work`` after what was asked for before."""
        return self._thread.submit(work)

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writing:
            self._writing.popleft().result()

    def raise_failed(self) -> None:
        """Raise what failed so far."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()

    def close(self) -> None:
        """Do what was asked for, and end the thread."""
        self._thread.shutdown(wait=True)
