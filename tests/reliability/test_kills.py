"""Kills at random moments: the gradient is the same to the last bit, and little is done again.

Small by default; ``DIFFOPT_KILLS=50 pytest -s tests/reliability`` prints the counts of the
documentation.
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

KILLS = int(os.environ.get("DIFFOPT_KILLS", "4"))


def run(folder: str, adjoint: str, seconds: float, count: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "killed_run.py"
    return subprocess.run(
        [sys.executable, str(script), folder, adjoint, str(seconds), str(count)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("adjoint", ["segmented", "binomial"])
def test_kills_at_random_moments(adjoint: str, tmp_path: Path) -> None:
    moments = random.Random(7)
    clean = run("none", adjoint, 0, tmp_path / "clean")
    assert clean.returncode == 0, clean.stderr
    least = (tmp_path / "clean").stat().st_size
    kills, runs, again = 0, 0, 0
    while kills < KILLS // 2:
        folder, count = tmp_path / f"run{runs}", tmp_path / f"count{runs}"
        killed = 0
        while True:
            # Five at most, so that a run comes to its end.
            last = killed == 5 or kills + killed >= KILLS // 2
            seconds = 0 if last else moments.uniform(0.05, 0.6)
            done = run(str(folder), adjoint, seconds, count)
            if done.returncode != -signal.SIGKILL:
                break
            killed += 1
        assert done.returncode == 0, done.stderr
        assert done.stdout == clean.stdout
        assert [path.name for path in folder.iterdir()] == ["lock"]
        again += count.stat().st_size - least
        kills, runs = kills + killed, runs + 1
    print(f"\n{adjoint}: {kills} kills, {runs} runs, as many equal gradients; {again / kills:.1f}")
    print(f"evaluations of {least} done again for each kill")
    # An interval of 5 steps of the journal, a segment, the steps of the observation.
    assert again / kills < least / 2
