"""Kills at random moments: the gradient is the same to the last bit, and little is done again.

Small by default; ``DIFFOPT_KILLS=50 pytest -s tests/reliability/test_kills.py`` prints the counts
of the documentation.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")

#: Runs, each killed at least once.
RUNS = int(os.environ.get("DIFFOPT_KILLS", "2"))


class Runs:
    """Runs in processes of their own, one after the other."""

    def __init__(self) -> None:
        self._forks = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "killed_run.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, **arguments: Any) -> int:
        """How the process ended: 0, or the negative number of a signal."""
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(arguments) + "\n")
        self._forks.stdin.flush()
        return int(json.loads(self._forks.stdout.readline()))

    def close(self) -> None:
        with self._forks:  # closes its input, at which it ends
            pass


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    made = Runs()
    yield made
    made.close()


@pytest.mark.parametrize("adjoint", ["segmented", "binomial"])
def test_kills_at_random_moments(adjoint: str, runs: Runs, tmp_path: Path) -> None:
    moments = random.Random(7)
    results = {"result": str(tmp_path / "result")}
    never = {"adjoint": adjoint, "last": 0, "seconds": 0.0}
    assert runs.run(folder=None, count=str(tmp_path / "clean"), **never, **results) == 0
    expected = (tmp_path / "result").read_text()
    passes = (tmp_path / "clean").read_bytes()
    least = len(passes)
    kills, again = {"f": 0, "b": 0}, 0
    for number in range(RUNS):
        folder, count = tmp_path / f"run{number}", tmp_path / f"count{number}"
        (tmp_path / "result").unlink()
        # One kill in four runs out of five; in the fifth up to four, if it comes to that.
        wanted = 4 if number % 5 == 4 else 1
        # In turn in either pass.
        forward = passes.count(b"f")
        first = (1, forward) if number % 2 == 0 else (forward + 1, least - 1)
        killed = 0
        while True:
            last = moments.randint(*first) if killed == 0 else moments.randint(1, least // 2)
            ended = runs.run(
                folder=str(folder),
                adjoint=adjoint,
                last=last if killed < wanted else 0,
                seconds=moments.uniform(0, 0.006),
                count=str(count),
                **results,
            )
            if ended != -signal.SIGKILL:
                break
            kills[chr(count.read_bytes()[-1])] += 1
            killed += 1
        assert killed, "the run was over before its kill"
        assert ended == 0
        assert (tmp_path / "result").read_text() == expected
        assert [path.name for path in folder.iterdir()] == ["lock"]
        again += count.stat().st_size - least
    total = sum(kills.values())
    print(
        f"\n{adjoint}: {RUNS} runs, killed {kills['f']} times in the forward and {kills['b']} in "
        f"the backward pass: {RUNS} gradients equal to the bit; of {least} evaluations of the loss "
        f"{again / total:.1f} done again after a kill, in the mean"
    )
    # An interval of 5 steps of the journal, a segment, the steps of the observation.
    assert again / total < least / 2
