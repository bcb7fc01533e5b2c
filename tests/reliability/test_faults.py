"""Full disks, read-only folders and damaged files: the right gradient, or one sentence.

Small by default; ``DIFFOPT_FAULTS=200 pytest -s tests/reliability/test_faults.py`` prints the
counts of the documentation.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faulty import STEPS, Run, outcome, same

import diffopt
from diffopt import Binomial, Durable, Segmented
from diffopt._loop.files import OnDisk

#: Damaged files, for each adjoint and kind of storage.
FAULTS = int(os.environ.get("DIFFOPT_FAULTS", "12"))

Make = Callable[[Any], diffopt.Adjoint]
ADJOINTS: dict[str, Make] = {
    "segmented": lambda s: Segmented(3, s),
    "binomial": lambda s: Binomial(3, s),
}
every_adjoint = pytest.mark.parametrize("make", ADJOINTS.values(), ids=ADJOINTS)


class Stop(BaseException):
    """As Ctrl-C."""


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and for failures of power alone


def stopped(adjoint: diffopt.Adjoint, stop: int) -> None:
    """Run as far as an evaluation of the loss."""

    def during(n: int) -> None:
        if n == stop:
            raise Stop

    run = Run(during)
    with pytest.raises(Stop):
        run.gradients(adjoint)
    run.assert_unchanged()


# --- A full disk ----------------------------------------------------------------------------------


class Disk:
    """Has room for some files, and for half of the one after them."""

    def __init__(self, room: int) -> None:
        self.room = room

    def take(self) -> bool:
        """Whether there is room for one more."""
        self.room -= 1
        return self.room >= 0

    @contextmanager
    def instead(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let files be written to this disk."""
        opened, put, disk = OnDisk.open, OnDisk.put, self

        class File:
            def __init__(self, *args: Any) -> None:
                self.file, self.fits = opened(*args), disk.take()

            def __enter__(self) -> File:
                return self

            def __exit__(self, *args: object) -> None:
                self.file.close()

            def write(self, data: memoryview) -> int:
                if not self.fits:
                    self.file.write(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

        def put_on_disk(self: OnDisk, name: str, write: Any) -> None:
            def half(path: Path) -> None:
                write(path)
                os.truncate(path, path.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            put(self, name, write if disk.take() else half)

        def open_on_disk(self: OnDisk, name: str, mode: str) -> Any:
            return File(self, name, mode) if mode == "xb" else opened(self, name, mode)

        with monkeypatch.context() as patch:
            patch.setattr(OnDisk, "open", open_on_disk)
            patch.setattr(OnDisk, "put", put_on_disk)
            yield


@every_adjoint
@pytest.mark.parametrize("durable", [False, True], ids=["folder", "durable"])
def test_a_disk_that_is_full_at_any_file(
    make: Make, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if durable:
        pytest.importorskip("safetensors")
    expected = Run().gradients(make(None))
    adjoint = make(Durable(tmp_path, 2) if durable else tmp_path)
    for room in range(10 * STEPS):
        run = Run()
        with Disk(room).instead(monkeypatch):
            found = outcome(run, adjoint)
        if not isinstance(found, Exception):
            assert same(found, expected)
            break
        assert isinstance(found, OSError)
        assert found.errno == errno.ENOSPC
        assert "No space left on device: make room there" in str(found)
        # With room again, the same call gives the same gradient.
        assert same(Run().gradients(adjoint), expected)
    assert 2 <= room < 10 * STEPS - 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] * durable
    print(f"\n{room} full disks")


# --- A folder that cannot be written to -----------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_read_only_folder(tmp_path: Path) -> None:
    """Root may write everywhere, so it becomes another user where it runs this."""
    pytest.importorskip("safetensors")
    body = """
        import os, sys, tempfile
        from pathlib import Path
        from diffopt import Durable, Segmented
        from faulty import Run, is_a_sentence, same

        def stop(n):
            if n == 7:
                raise KeyboardInterrupt

        clean = Run()
        expected = clean.gradients(Segmented(3, Durable(tempfile.mkdtemp(), 1)))
        plain, begun = (Path(tempfile.mkdtemp()) for _ in range(2))
        try:
            Run(stop).gradients(Segmented(3, Durable(begun, 1)))
        except KeyboardInterrupt:
            pass
        if os.geteuid() == 0:
            for path in (plain, begun, *begun.iterdir()):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        for folder in (plain, begun):
            folder.chmod(0o555)
        (begun / "lock").chmod(0o444)
        for storage in (plain, Durable(plain), Durable(begun, 1)):
            run = Run()
            try:
                run.gradients(Segmented(3, storage))
            except PermissionError as error:
                assert is_a_sentence(error)
                print(error)
            run.assert_unchanged()
        for folder in (plain, begun):
            folder.chmod(0o755)
        (begun / "lock").chmod(0o644)
        run = Run()
        print(same(run.gradients(Segmented(3, Durable(begun, 1))), expected))
        print(run.calls < clean.calls)
    """
    path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    plain, durable, begun, *last = done.stdout.splitlines()
    assert "cannot hold snapshots, Permission denied: pass a folder that exists and can" in plain
    assert "cannot hold a run, Permission denied: pass a folder that can be written to" in durable
    assert "Durable(" in begun
    assert "Permission denied" in begun
    assert last == ["True", "True"]


# --- Damaged files --------------------------------------------------------------------------------


def cut(path: Path, moments: random.Random) -> None:
    os.truncate(path, moments.randrange(path.stat().st_size))


def flip(path: Path, moments: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    path.write_bytes(data)


def exchange(path: Path, moments: random.Random) -> None:
    """Put another of the files in its place."""
    others = [p for p in path.parent.iterdir() if p != path and p.suffix == path.suffix]
    if not others:
        cut(path, moments)
    else:
        path.write_bytes(moments.choice(others).read_bytes())


def append(path: Path, moments: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def remove(path: Path, moments: random.Random) -> None:
    path.unlink()


HARMS = [cut, flip, exchange, append, remove]


@every_adjoint
def test_damaged_files_of_a_run(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    expected, clean = Run().gradients(make(None)), Run()
    clean.gradients(make(Durable(tmp_path / "clean", 1)))
    moments, right, refused = random.Random(3), 0, 0
    for number in range(FAULTS):
        folder = tmp_path / f"run{number}"
        adjoint = make(Durable(folder, 1))
        stopped(adjoint, moments.randint(3, clean.calls))
        written = sorted(p for p in folder.iterdir() if p.name != "lock")
        moments.choice(HARMS)(moments.choice(written), moments)
        found = outcome(Run(), adjoint)
        if isinstance(found, Exception):
            assert isinstance(found, RuntimeError)
            assert "to begin anew" in str(found)
            assert str(folder) in str(found)
            refused += 1
        else:
            assert same(found, expected)
            right += 1
    print(f"\n{FAULTS} damaged runs: {right} right gradients, {refused} refused in one sentence")
    assert right  # where another entry does without the file


@every_adjoint
def test_damaged_snapshots(make: Make, tmp_path: Path) -> None:
    expected = Run().gradients(make(None))
    moments, right, refused = random.Random(4), 0, 0
    for _ in range(FAULTS):
        moment = moments.randint(STEPS + 1, STEPS + 5)

        def harm(n: int, moment: int = moment) -> None:
            written = sorted(tmp_path.glob("*/*.state"))
            if n == moment and written:
                # One that is not needed any more may be removed meanwhile.
                with suppress(FileNotFoundError):
                    moments.choice(HARMS)(moments.choice(written), moments)

        found = outcome(Run(harm), make(tmp_path))
        if isinstance(found, Exception):
            assert isinstance(found, RuntimeError | FileNotFoundError)
            assert "leave the files alone until the backward pass is over" in str(found)
            refused += 1
        else:
            assert same(found, expected)
            right += 1
        assert list(tmp_path.iterdir()) == []
    print(f"\n{FAULTS} damaged snapshots: {right} were not needed, {refused} refused")
    assert refused


def test_the_harms_do_harm(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    for harm in HARMS:
        path, other = tmp_path / "a.state", tmp_path / "b.state"
        path.write_bytes(b"abcdefgh")
        other.write_bytes(b"ABCDEFGH")
        harm(path, random.Random(0))
        assert not path.exists() or path.read_bytes() != b"abcdefgh"
        assert stat.S_ISREG(other.stat().st_mode)
