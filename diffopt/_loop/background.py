"""Work on files that a thread does, one thing after another, while computing goes on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

#: How many writes may wait. Each holds a state in host memory until it is done.
BACKLOG = 2


class Background:
    """A thread of one process. A write that failed is raised when the next one is asked for."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._process = os.getpid()
        self._writing: deque[Future[Any]] = deque()

    @property
    def mine(self) -> bool:
        """Whether this process started the thread; a process forked from it has none."""
        return os.getpid() == self._process

    def check_mine(self) -> None:
        """Raise in a process that was forked from the one that started the thread."""
        if not self.mine:
            raise RuntimeError(
                "this process was forked after the call of unroll, whose snapshots are read by a "
                "thread of the process that made it: call unroll in the process that calls "
                "backward()"
            )

    def make_room(self) -> None:
        """Wait until one more write may wait."""
        self.check_mine()
        self.raise_failed()
        while len(self._writing) >= BACKLOG:
            self._writing.popleft().result()

    def write(self, work: Callable[[], object]) -> None:
        """Do ``work`` later, once there is room."""
        self.make_room()
        self._writing.append(self._thread.submit(work))

    def read(self, work: Callable[[], T]) -> Future[T]:
        """Do ``work`` after all earlier work."""
        self.check_mine()
        return self._thread.submit(work)

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writing:
            self._writing.popleft().result()

    def raise_failed(self) -> None:
        """Raise what failed so far."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()

    def close(self, *, drop: bool = False) -> None:
        """End the thread when all work is done; with ``drop``, after the present piece of work."""
        self._thread.shutdown(wait=True, cancel_futures=drop)
