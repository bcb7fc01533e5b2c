"""A context that is entered when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch


class Late:
    """The module stands ready for steps that run uncompiled, from the first of them on.

    Compiled code does not touch the module, and making it ready takes as long as ten compiled steps
    of a small network. Where one step of an unroll ran uncompiled, it is ready from the beginning
    the next time: the step may be differentiated then.
    """

    def __init__(self) -> None:
        self._needed = False
        self._waiting: tuple[ExitStack, AbstractContextManager[None]] | None = None

    @contextmanager
    def of(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Where ``enter`` enters ``context``; it is left at the end."""
        with ExitStack() as stack:
            self._waiting = stack, context
            if self._needed or torch.is_inference_mode_enabled():
                self.enter()
            try:
                yield
            finally:
                self._waiting = None

    def enter(self) -> None:
        """Enter the context, and do so at once from now on."""
        self._needed = True
        if self._waiting is not None:
            (stack, context), self._waiting = self._waiting, None
            stack.enter_context(context)
