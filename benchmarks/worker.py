"""One library in a process of its own, told what to do by lines of JSON on standard input.

    {"do": "hello"}                        whether the library can be used here
    {"do": "prepare", "case": {...}}       build the case, compile and warm up
    {"do": "run"}                          take one meta-gradient, timed
    {"do": "compare", "path": ...}         compare the one just taken with a saved one
    {"do": "forget"}                       drop the case and its memory
    {"do": "peak", "case": {...}}          take one, and see how much memory it needs
    {"do": "check", "case": {...}, "path": ...}  take one, and compare it with a saved one
    {"do": "save", "case": {...}, "path": ...}   take one, and save it

Each is answered by one line of JSON; what fails, by ``{"error": ...}``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, build
from libraries import LIBRARIES

#: A timed run is preceded by another one if they take at most so many seconds: what the memory and
#: the caches of an idle process have been through meanwhile is not to be part of the time.
WARMED = 6.0

Gradient = dict[str, Any]
Run = Callable[[], Gradient]


class Worker:
    def __init__(self, library: str) -> None:
        self._library = LIBRARIES[library]
        self._module = self._library.load()
        self._run: Run | None = None
        self._gradient: Gradient | None = None
        self._cuda = False
        self._seconds = 0.0

    def hello(self) -> dict[str, Any]:
        """Why the library cannot be used here, if so."""
        available = getattr(self._module, "available", lambda **options: None)
        return {"unavailable": available(**self._library.options)}

    def prepare(self, case: Case) -> dict[str, Any]:
        self._cuda = case.device.startswith("cuda")
        self._seconds = 0.0
        started = time.perf_counter()
        self._run = self._prepared(case)
        # A few steps are enough to compile what does not depend on their number; what does, is
        # compiled by prepare() itself.
        self._prepared(replace(case, steps=min(case.steps, 3)))()
        self._wait()
        return {"first_seconds": time.perf_counter() - started}

    def run(self) -> dict[str, Any]:
        assert self._run is not None
        self._gradient = None
        if self._seconds < WARMED:
            self._run()
        gc.collect()
        self._wait()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        started, worked = time.perf_counter(), time.process_time()
        if events:
            events[0].record()
        self._gradient = self._run()
        if events:
            events[1].record()
        self._wait()
        self._seconds = time.perf_counter() - started
        answer = {"seconds": self._seconds, "cpu_seconds": time.process_time() - worked}
        if events:
            answer["device_seconds"] = events[0].elapsed_time(events[1]) / 1e3
        return answer

    def peak(self, case: Case) -> dict[str, Any]:
        """Memory beyond what is alive before the run, in bytes.

        What the libraries set up once (thread pools, compiled code) is not counted: a run that
        is only as long as that takes comes before.
        """
        self._cuda = case.device.startswith("cuda")
        run = self._prepared(case)
        compiles = self._library.module == "jax"  # for this very number of steps
        warm = run if compiles else self._prepared(replace(case, steps=min(case.steps, 3)))
        warm()
        del warm
        release()
        if not self._cuda:
            with PeakResident() as memory:
                gradient = run()
            del gradient
            return {"peak": memory.peak - memory.start}
        if self._library.module == "jax":
            import jax

            stats = jax.devices("gpu")[0].memory_stats()
            return {"peak": stats["peak_bytes_in_use"] - stats["bytes_in_use"]}
        self._wait()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        gradient = run()
        self._wait()
        del gradient
        return {"peak": torch.cuda.max_memory_allocated() - start}

    def save(self, case: Case, path: str) -> dict[str, Any]:
        np.savez(path, **as_float64(self._prepared(case)()))
        return {}

    def check(self, case: Case, path: str) -> dict[str, Any]:
        return {"distance": distance(self._prepared(case)(), path)}

    def compare(self, path: str) -> dict[str, Any]:
        assert self._gradient is not None
        return {"distance": distance(self._gradient, path)}

    def forget(self) -> dict[str, Any]:
        self._run = self._gradient = None
        release()
        return {}

    def _prepared(self, case: Case) -> Run:
        return self._module.prepare(build(case), **self._library.options)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def as_float64(gradient: Gradient) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, np.float64)
        for name, x in gradient.items()
    }


def distance(gradient: Gradient, path: str) -> float:
    """From a saved one, relative to its Euclidean norm; NaN where anything is."""
    ours = as_float64(gradient)
    with np.load(path) as saved:
        theirs = {name: saved[name] for name in saved}
    if set(ours) != set(theirs):
        raise ValueError(f"gradients of other parameters: {sorted(set(ours) ^ set(theirs))}")
    apart = sum(((ours[n] - theirs[n]) ** 2).sum() for n in theirs)
    return float(np.sqrt(apart / sum((x**2).sum() for x in theirs.values())))


def release() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakResident:
    """The most physical memory this process had while the block ran.

    ``ru_maxrss`` cannot be used as it is: it never falls, not even to what is resident at the
    start, and begins with what the parent process had when it started this one. Linux counts
    anew on request; elsewhere a thread looks on.
    """

    def __enter__(self) -> PeakResident:
        self.start = self.peak = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._watching = None
        except OSError:
            self._done = threading.Event()
            self._watching = threading.Thread(target=self._watch)
            self._watching.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._watching is None:
            self.peak = _status("VmHWM")
        else:
            self._done.set()
            self._watching.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _status("VmRSS"))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main(library: str, threads: int) -> None:
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            request["case"] = Case(**request["case"])
        try:
            if worker is None:
                worker = Worker(library)
            answer = getattr(worker, request.pop("do"))(**request)
        except ModuleNotFoundError as error:
            answer = {"error": f"{error.name} is not installed"}
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().split("\n")[0]
            answer = {"error": f"{type(error).__name__}: {said}"[:300]}
        # An error's frames held on to the memory of what failed.
        if "error" in answer:
            release()
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
