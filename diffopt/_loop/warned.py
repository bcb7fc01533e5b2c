"""What a step calls may warn: when it is taken first, and not again on the way back.

Python shows a warning once for each line, by default; but with ``always``, and whenever something
has changed the filters meanwhile (``warnings.catch_warnings`` does), it shows it again. A loop
written by hand would warn once for each step, so the first pass is left alone, and what was shown
in it is not shown when a step is computed again.

What is not known: a warning that Python itself held back in the first pass, because an earlier
call had shown it. It is shown if it comes on the way back and the filters have changed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

#: Category, words, file and line.
_Key = tuple[type[Warning], str, str, int]


class Warned:
    """What one unroll has shown of warnings. Errors made of warnings are not touched."""

    def __init__(self) -> None:
        self._shown: set[_Key] = set()

    def first(self) -> AbstractContextManager[None]:
        """Note what is shown."""
        return _asking(self._note)

    def again(self) -> AbstractContextManager[None]:
        """Show what has not been shown."""
        return _asking(lambda key: key not in self._shown)

    def _note(self, key: _Key) -> bool:
        self._shown.add(key)
        return True


@contextmanager
def _asking(wanted: Callable[[_Key], bool]) -> Iterator[None]:
    """Show a warning of this thread only if ``wanted`` says so."""
    thread, show = threading.get_ident(), warnings.showwarning

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        *more: Any,
        **options: Any,
    ) -> None:
        here = threading.get_ident() == thread
        if not here or wanted((category, str(message), filename, lineno)):
            show(message, category, filename, lineno, *more, **options)

    # Not catch_warnings: it changes the filters, after which everything is shown once more.
    warnings.showwarning = shown
    try:
        yield
    finally:
        if warnings.showwarning is shown:  # and not what another thread has put there since
            warnings.showwarning = show
