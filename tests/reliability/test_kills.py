"""Kills at random moments: the gradient is the same to the last bit, and little is done again.

Small by default; ``DIFFOPT_KILLS=50 pytest -s tests/reliability/test_kills.py`` prints the counts
of the documentation.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by signal")

#: Runs, each killed at least once.
RUNS = int(os.environ.get("DIFFOPT_KILLS", "2"))


def run(
    folder: str, adjoint: str, last: int, seconds: float, count: Path
) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "killed_run.py"
    return subprocess.run(
        [sys.executable, str(script), folder, adjoint, str(last), str(seconds), str(count)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("adjoint", ["segmented", "binomial"])
def test_kills_at_random_moments(adjoint: str, tmp_path: Path) -> None:
    moments = random.Random(7)
    clean = run("none", adjoint, 0, 0, tmp_path / "clean")
    assert clean.returncode == 0, clean.stderr
    passes = (tmp_path / "clean").read_bytes()
    least = len(passes)
    kills, again = {"f": 0, "b": 0}, 0
    for number in range(RUNS):
        folder, count = tmp_path / f"run{number}", tmp_path / f"count{number}"
        # One kill in four runs out of five; in the fifth up to four, if it comes to that.
        wanted = 4 if number % 5 == 4 else 1
        # In turn in either pass.
        forward = passes.count(b"f")
        first = (1, forward) if number % 2 == 0 else (forward + 1, least - 1)
        killed = 0
        while True:
            last = moments.randint(*first) if killed == 0 else moments.randint(1, least // 2)
            done = run(
                str(folder), adjoint, last * (killed < wanted), moments.uniform(0, 0.006), count
            )
            if done.returncode != -signal.SIGKILL:
                break
            kills[chr(count.read_bytes()[-1])] += 1
            killed += 1
        assert killed, "the run was over before its kill"
        assert done.returncode == 0, done.stderr
        assert done.stdout == clean.stdout
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
