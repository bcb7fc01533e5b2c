"""Measuring one case: every library in a process of its own, taking turns."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from cases import Case

HERE = Path(__file__).resolve().parent

#: For processes whose memory is read off: freed tensors go back to the system at once, and large
#: ones are always mapped on their own, so that what is resident is what is alive.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

#: The steps over which gradients are compared in float64: enough for every term of every rule.
CHECKED_STEPS = 3

#: The longest loop whose float64 reference is taken at full length.
REFERENCE_STEPS = 100


class Failed(Exception):
    """A library could not do what it was asked; the message is for the table."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        timeout: seconds that a single answer may take, compilation included.
        memory: whether to measure peak memory and float64 agreement, in fresh processes.
        clock: ``seconds``, or ``cpu_seconds`` that the process worked, over its threads.
    """

    threads: int = 2
    timeout: float = 600.0
    memory: bool = True
    clock: str = "seconds"


class Process:
    """A ``worker.py`` that serves one library."""

    def __init__(
        self, library: str, settings: Settings, log: TextIO, environment: dict[str, str]
    ) -> None:
        threads = str(settings.threads)
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self._timeout = settings.timeout
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), library, threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            | environment,
        )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            if reason := self.ask("hello")["unavailable"]:
                raise Failed(reason)
        except Failed:
            self.close()
            raise

    def ask(self, do: str, case: Case | None = None, **more: Any) -> dict[str, Any]:
        request = {"do": do, **({"case": case.json()} if case else {}), **more}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise Failed(f"no answer within {self._timeout:.0f} s") from None
        except BrokenPipeError:
            line = None
        if line is None:
            raise Failed(f"the process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


class Bench:
    """The processes that take turns, kept from case to case. Use it in a ``with`` statement."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self._settings = settings
        self._log_path = log
        self._processes: dict[str, Process] = {}
        self._unavailable: dict[str, str] = {}

    def __enter__(self) -> Bench:
        self._stack = ExitStack()
        self._log = self._stack.enter_context(self._log_path.open("a"))
        self._references = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.callback(lambda: [process.close() for process in self._processes.values()])
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def measure(self, case: Case, libraries: Sequence[str], repeats: int) -> dict[str, Any]:
        """Everything about one case, ready for JSON; seconds and bytes throughout.

        Args:
            repeats: how many rounds, in each of which every library runs once.
        """
        found: dict[str, dict[str, Any]] = {name: {} for name in libraries}
        whole, short = self._save_references(case)
        rounds = self._time(case, found, whole, repeats)
        if self._settings.memory:
            self._examine(case, found, short)
        return {"case": case.json(), "rounds": rounds, "libraries": found}

    def _save_references(self, case: Case) -> tuple[Path | None, Path]:
        """The meta-gradient in float64, at full length where that fits, and over a few steps."""
        exact = replace(case, dtype="float64")
        paths: list[Path | None] = []
        for steps in (case.steps, min(case.steps, CHECKED_STEPS)):
            path = self._references / f"{replace(case, steps=steps).name}.npz"
            if steps > REFERENCE_STEPS:
                paths.append(None)
                continue
            if not path.exists():
                reference = self._process("reference")
                reference.ask("save", replace(exact, steps=steps), path=str(path))
            paths.append(path)
        whole, short = paths
        assert short is not None
        return whole, short

    def _time(
        self,
        case: Case,
        found: dict[str, dict[str, Any]],
        reference: Path | None,
        repeats: int,
    ) -> list[dict[str, float]]:
        taking_part = []
        for name, entry in found.items():
            with _noted(entry):
                entry.update(self._process(name).ask("prepare", case))
                taking_part.append(name)
        # A first full round does not count.
        rounds: list[dict[str, float]] = []
        order = random.Random(0)
        for i in range(repeats + 1):
            order.shuffle(taking_part)
            seconds = {}
            for name in list(taking_part):
                with _noted(found[name]):
                    seconds[name] = self._processes[name].ask("run")[self._settings.clock]
                if "failed" in found[name]:
                    taking_part.remove(name)
            if i > 0:
                rounds.append(seconds)
        for name in taking_part:
            if reference is not None:
                with _noted(found[name]):
                    answer = self._processes[name].ask("compare", path=str(reference))
                    found[name]["timed_distance"] = answer["distance"]
        for process in self._processes.values():
            if process.alive:
                process.ask("forget")
        return rounds

    def _examine(self, case: Case, found: dict[str, dict[str, Any]], reference: Path) -> None:
        """Peak memory, and the agreement in float64, each library in a fresh process, two at once:
        neither depends on how fast they run."""
        exact = replace(case, dtype="float64", steps=min(case.steps, CHECKED_STEPS))

        def examine(name: str) -> None:
            process = None
            try:
                process = self._start(name, EXACT_MEMORY | {"OMP_WAIT_POLICY": "passive"})
                found[name].update(process.ask("peak", case))
                found[name].update(process.ask("check", exact, path=str(reference)))
            except Failed as error:
                found[name].setdefault("failed", str(error))
            finally:
                if process is not None:
                    process.close()

        able = [name for name, entry in found.items() if "failed" not in entry]
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(examine, able))

    def _process(self, library: str) -> Process:
        if library in self._unavailable:
            raise Failed(self._unavailable[library])
        process = self._processes.get(library)
        if process is None or not process.alive:
            try:
                self._processes[library] = self._start(library, {})
            except Failed as error:
                self._unavailable[library] = str(error)
                raise
        return self._processes[library]

    def _start(self, library: str, environment: dict[str, str]) -> Process:
        return Process(library, self._settings, self._log, environment)


@contextmanager
def _noted(entry: dict[str, Any]) -> Iterator[None]:
    """A library that fails does not end the run: its place in the table says why."""
    try:
        yield
    except Failed as error:
        entry["failed"] = str(error)
