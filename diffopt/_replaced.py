"""Functions of PyTorch that are something else while a step is evaluated or differentiated."""

from __future__ import annotations

import threading
from typing import Any


class Replaced:
    """A context in which attributes have other values, for as long as any thread is inside.

    It may be entered again, in any thread. The replacements are seen by all threads, and have to
    do what the original does where nothing else is wanted.

    Args:
        replacements: (owner, attribute, new value) each.
    """

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self._new = replacements
        self._old: list[Any] = []
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._old = [getattr(owner, name) for owner, name, _ in self._new]
                for owner, name, value in self._new:
                    setattr(owner, name, value)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (owner, name, _), old in zip(self._new, self._old, strict=True):
                    setattr(owner, name, old)
