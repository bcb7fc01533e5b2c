"""Several processes that run functions of test modules together, started once and kept.

``Processes().run(case, 2)`` calls ``case(rank, world)`` in two processes, inside a fresh gloo
group, and returns what it returned on each. A case that hangs is stopped, with its processes.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Seconds: of an exchange within a group, and of a whole case.
EXCHANGE, CASE = 30, 240


class Processes:
    """As many as a case needs, which serve the next ones too. ``close`` ends them."""

    def __init__(self) -> None:
        self._alive: list[subprocess.Popen[bytes]] = []

    def run(
        self, case: Callable[[int, int], Any], world: int, dying: tuple[int, ...] = ()
    ) -> list[Any]:
        """What ``case`` returned on each process; None for those of ``dying``, which end there.

        Raises:
            AssertionError: the case raised on a process; the message has every traceback.
        """
        self._alive += [_started() for _ in range(len(self._alive), world)]
        taking = self._alive[:world]
        with tempfile.TemporaryDirectory() as folder:
            for rank, process in enumerate(taking):
                order = case.__module__, case.__name__, str(Path(folder) / "store"), rank, world
                assert process.stdin is not None
                pickle.dump(order, process.stdin)
                process.stdin.flush()
            answers = [self._answer(p, r in dying) for r, p in enumerate(taking)]
        hung = any(kind == "hung" for kind, _ in answers)
        self._end(self._alive if hung else [taking[r] for r in dying])
        wrong = [f"process {r}: {x}" for r, (kind, x) in enumerate(answers) if kind != "returned"]
        if wrong:
            raise AssertionError("\n\n".join(wrong))
        return [x for _, x in answers]

    def _answer(self, process: subprocess.Popen[bytes], dies: bool) -> tuple[str, Any]:
        assert process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            if not waiting.select(timeout=CASE):
                return "hung", f"gave no answer within {CASE} s"
        try:
            answer: tuple[str, Any] = pickle.load(process.stdout)
        except EOFError:
            return ("returned", None) if dies else ("hung", "died")
        return answer

    def close(self) -> None:
        self._end(self._alive)

    def _end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.kill()
            process.communicate()
        self._alive = [p for p in self._alive if p not in processes]


def _started() -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-W", "error", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def _work() -> None:
    """Take orders until there are no more."""
    import torch
    from torch import distributed as dist

    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints is not an answer
    while True:
        try:
            module, name, store, rank, world = pickle.load(orders)
        except EOFError:
            return
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=EXCHANGE),
        )
        try:
            case = getattr(importlib.import_module(module), name)
            answer = ("returned", case(rank, world))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        dist.destroy_process_group()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _work()
