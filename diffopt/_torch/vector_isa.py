"""Which vector instructions TorchInductor compiles for, found out in less time.

For every set of instructions that the processor has, TorchInductor compiles and loads a program
that tests whether the C++ compiler and PyTorch's headers can do with it: once a machine, and the
most of what a small network's compilation takes there. Then it takes the widest. Here it stops at
the first set that passes the test, and the test runs while the steps are being traced.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffopt._torch.feature import optional
from diffopt._torch.replaced import Shared, replaced

_log = logging.getLogger("diffopt")

_MODULE = "torch._inductor.cpu_vec_isa"


class _UntilOnePasses(list[Any]):
    """Sets of instructions, the widest first; it ends after the first that can be used.

    While they are looked at on one thread, others wait: the tests change what they share.
    """

    def __iter__(self) -> Iterator[Any]:
        for thread in _looking:
            if thread is not threading.current_thread():
                thread.join()
        has = optional(_MODULE, "x86_isa_checker")()
        for isa in super().__iter__():
            yield isa
            if all(flag in has for flag in str(isa).split()) and isa:
                return


@contextmanager
def _first_alone() -> Iterator[None]:
    """Within it the widest set alone is looked for, if that is not known yet, and nobody chose."""
    module: Any = optional("torch._inductor", "cpu_vec_isa")
    known = optional(_MODULE, "valid_vec_isa_list")
    names = ("supported_vec_isa_list", "x86_isa_checker")
    served = all(hasattr(module, name) for name in names) and hasattr(known, "cache_info")
    if not served or known.cache_info().currsize or _is_chosen():
        yield
        return
    sets = _UntilOnePasses(module.supported_vec_isa_list)
    try:
        with replaced((module, "supported_vec_isa_list", sets)):
            yield
    finally:
        known.cache_clear()  # others may ask for the narrower sets


#: As ``_first_alone``, for however many threads.
widest_alone = Shared(_first_alone)


def _is_chosen() -> bool:
    config: Any = optional("torch._inductor", "config")
    return bool(os.getenv("ATEN_CPU_CAPABILITY")) or config.cpp.simdlen is not None


def find_out() -> None:
    """Begin to look for the instructions on another thread, where nobody has yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing TorchInductor gives some
        pick = optional(_MODULE, "pick_vec_isa")
        optional("torch._inductor.compile_fx", "compile_fx")  # not to be imported on two threads
    if pick is not None and not _looking:
        context = contextvars.copy_context()  # where TorchInductor has its settings
        _looking.append(threading.Thread(target=context.run, args=(_look, pick), daemon=True))
        _looking[0].start()


_looking: list[threading.Thread] = []


def _look(pick: Any) -> None:
    try:
        with widest_alone:
            pick()
    except Exception as error:  # who compiles will meet it again
        _log.debug("looking for vector instructions failed: %s", error)
