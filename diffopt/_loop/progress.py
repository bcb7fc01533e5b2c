"""The optional progress bar of an unroll, forward and backward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Shown(threading.local):
    """What is shown of the unrolls that run on this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Progress] = []


_shown_here = _Shown()


class Progress:
    """Counts steps, on a tqdm bar where one was asked for."""

    def __init__(self, steps: int, shown: bool) -> None:
        self._steps = steps
        self._shown = shown
        self._bar: Any = None

    def forward(self, steps: int = 1) -> None:
        """So many steps of the first pass were taken."""
        self._tick("forward", steps)

    def backward(self, steps: int = 1) -> None:
        """So many vector-Jacobian products were taken."""
        self._tick("backward", steps)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it ``compiling`` is shown, where a bar was asked for."""
        if not self._shown:
            yield
            return
        _shown_here.stack.append(self)
        try:
            yield
        finally:
            _shown_here.stack.pop()

    def close(self) -> None:
        """End the present bar, also where its pass was interrupted."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tick(self, direction: str, steps: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = _tqdm()(total=self._steps, desc=f"unroll, {direction}", leave=False)
        self._bar.update(steps)


@contextmanager
def compiling() -> Iterator[None]:
    """Show that steps are traced or compiled, for as long as it lasts."""
    if not _shown_here.stack:
        yield
        return
    with _tqdm()(desc="unroll, compiling", total=0, bar_format="{desc}", leave=False):
        yield


def check_available() -> None:
    """Raise where a bar is asked for and tqdm is missing."""
    _tqdm()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm, which is not installed: pip install tqdm"
        ) from error
    return tqdm
