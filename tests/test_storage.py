"""Snapshots in host memory and in files: the same gradient, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffopt
from diffopt import Binomial, Segmented, StoreAll
from diffopt._loop import storage as _storage
from diffopt._loop.background import BACKLOG
from diffopt._loop.files import Folder, OnDisk
from diffopt._loop.snapshots import Snapshot
from diffopt._values.state import State

STEPS = 9


@pytest.fixture(autouse=True)
def _float64() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder, empty before the test and after it."""
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


class Problem:
    """A small network with dropout and running statistics, trained by Adam."""

    def __init__(self) -> None:
        layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)
        self.model, self.x = nn.Sequential(*layers), torch.randn(8, 3)
        self.lr = torch.tensor(0.05, requires_grad=True)
        self.during: Callable[[int], Any] = lambda t: None

    def loss(self, model: nn.Module, t: int) -> Tensor:
        self.during(t)
        return model(self.x).square().mean()

    def total(self, adjoint: diffopt.Adjoint) -> Tensor:
        torch.manual_seed(1)
        opt = diffopt.Adam(self.model.parameters(), lr=self.lr)
        fast = diffopt.unroll(self.model, opt, STEPS, self.loss, adjoint=adjoint)
        return fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())

    def gradients(self, total: Tensor, **options: Any) -> list[Tensor]:
        inputs = [self.lr, *self.model.parameters()]
        return list(torch.autograd.grad(total, inputs, allow_unused=True, **options))


@pytest.fixture
def problem() -> Problem:
    return Problem()


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


Stores = list[weakref.ref[_storage.InFolder]]


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    """All that were made to keep snapshots in files."""
    found: Stores = []
    init = _storage.InFolder.__init__

    def note(self: _storage.InFolder, folder: Folder) -> None:
        init(self, folder)
        found.append(weakref.ref(self))

    monkeypatch.setattr(_storage.InFolder, "__init__", note)
    return found


def settle(store: _storage.InFolder) -> None:
    """Let the background thread do what it was asked to do so far."""
    store._background.read(lambda: None).result()


def files(stores: Stores) -> list[Path]:
    """The files of the store made last, once all that was asked for is written."""
    store = stores[-1]()
    assert store is not None
    settle(store)
    assert isinstance(store._subfolder, OnDisk)
    return sorted(store._subfolder.where.iterdir())


every_adjoint = pytest.mark.parametrize(
    "make",
    [lambda s: Segmented(storage=s), lambda s: Segmented(1, s), lambda s: Binomial(3, s)],
    ids=["segmented", "every-state", "binomial"],
)


@every_adjoint
def test_the_gradient_is_the_same(make: Any, problem: Problem, folder: Path) -> None:
    expected = problem.gradients(problem.total(StoreAll()))
    for storage in ("cpu", folder, str(folder)):
        assert_equal(problem.gradients(problem.total(make(storage))), expected)
        assert list(folder.iterdir()) == []


@every_adjoint
def test_a_graph_that_is_retained_keeps_its_files(
    make: Any, problem: Problem, folder: Path
) -> None:
    expected = problem.gradients(problem.total(StoreAll()))
    for storage in ("cpu", folder):
        total = problem.total(make(storage))
        for retain in (True, True, False):
            assert_equal(problem.gradients(total, retain_graph=retain), expected)
            assert bool(list(folder.iterdir())) == (retain and storage == folder)


def test_second_derivative(problem: Problem, folder: Path) -> None:
    def second(adjoint: diffopt.Adjoint) -> list[Tensor]:
        first = problem.gradients(problem.total(adjoint), create_graph=True)
        return problem.gradients(torch.stack([g.sin().sum() for g in first]).sum())

    assert_equal(second(Binomial(3, folder)), second(StoreAll()))


def test_files_hold_the_states_and_memory_does_not(
    problem: Problem, folder: Path, stores: Stores
) -> None:
    total = problem.total(Segmented(1, folder))
    state = sum(p.numel() for p in problem.model.parameters()) * 8 * 3
    sizes = [path.stat().st_size for path in files(stores)]
    assert len(sizes) == STEPS
    assert all(state <= size <= state + 200 for size in sizes)
    store = stores[-1]()
    assert store is not None
    forms = [file.form.tensors() for file in store._files.values()]
    assert all(x.is_meta for form in forms for x in form.values())
    del total, store


# --- Nothing is left behind -------------------------------------------------------------------


def test_dropping_the_graph_removes_the_files(
    problem: Problem, folder: Path, stores: Stores
) -> None:
    gc.disable()
    try:
        total = problem.total(Segmented(2, folder))
        assert files(stores)
        del total
        assert list(folder.iterdir()) == []
    finally:
        gc.enable()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_removes_the_files(
    problem: Problem, folder: Path, error: type[BaseException], backward: bool
) -> None:
    calls = 0

    def fail(t: int) -> None:
        nonlocal calls
        calls += 1
        if calls == (STEPS + 3 if backward else 5):
            assert list(folder.iterdir())
            raise error("stop")

    problem.during = fail
    # The traceback, which pytest holds, has all frames: cleaning up must not wait for them.
    with pytest.raises(error, match="stop"):
        problem.gradients(problem.total(Segmented(2, folder)))
    assert list(folder.iterdir()) == []


def script(folder: Path, body: str) -> str:
    setup = f"""
        import os, signal, sys, torch, diffopt
        model = torch.nn.Linear(200, 200)
        x = torch.randn(4, 200)
        folder = {str(folder)!r}
        def unroll(steps, loss_fn=lambda m, t: m(x).square().mean(), **options):
            opt = diffopt.SGD(model.parameters(), lr=0.1)
            adjoint = diffopt.Segmented(1, folder)
            return diffopt.unroll(model, opt, steps, loss_fn, adjoint=adjoint, **options)
    """
    return textwrap.dedent(setup) + textwrap.dedent(body)


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script(folder, body)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_ctrl_c_removes_the_files(folder: Path) -> None:
    body = """
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        def loss_fn(m, t):
            if t == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return m(x).square().mean()
        unroll(6, loss_fn)
    """
    done = run(folder, body)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits file sizes")
def test_a_full_disk_a_forked_process_and_the_end_of_the_interpreter(folder: Path) -> None:
    body = """
        import resource, warnings
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        try:
            unroll(5).params["weight"].sum().backward()
        except OSError as error:
            print(error)
        print(os.listdir(folder))

        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        total = unroll(5).params["weight"].sum()
        warnings.simplefilter("ignore")  # of Python, about forks beside threads
        sys.stdout.flush()  # or the child would print it, too
        child = os.fork()
        if child == 0:
            sys.exit(0)
        print(os.waitpid(child, 0)[1])
        total.backward()
        print(model.weight.grad.any().item())

        fast = unroll(5)
        print(len(os.listdir(folder)))
    """
    done = run(folder, body)
    assert done.returncode == 0, done.stderr
    full, *rest = done.stdout.splitlines()
    assert full.startswith("[Errno 27] a snapshot of 0.2 MiB could not be written to")
    assert "File too large: make room there" in full
    assert rest == ["[]", "0", "True", "1"]


# --- Errors -----------------------------------------------------------------------------------


def test_a_missing_folder(problem: Problem, tmp_path: Path) -> None:
    message = r"storage='.*/none' cannot hold snapshots, No such file .*: pass a folder that exists"
    with pytest.raises(FileNotFoundError, match=message):
        problem.total(Segmented(2, tmp_path / "none"))


def test_a_file_for_a_folder(problem: Problem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot hold snapshots, Not a directory"):
        problem.total(Segmented(2, tmp_path / "file"))


def test_an_empty_name() -> None:
    with pytest.raises(ValueError, match=r'storage="" names no folder: pass "." for the present'):
        Segmented(2, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_the_way_back_in_a_forked_process(folder: Path) -> None:
    body = """
        import warnings
        total = unroll(5).params["weight"].sum()
        warnings.simplefilter("ignore")  # of Python, about forks beside threads
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                total.backward()
            except RuntimeError as error:
                print(error)
            sys.stdout.flush()
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        total.backward()
        print(model.weight.grad.any().item())
    """
    done = run(folder, body)
    assert done.returncode == 0, done.stderr
    said, *rest = done.stdout.splitlines()
    assert said.startswith("this process was forked after the call of unroll, whose snapshots are")
    assert rest == ["0", "True"]


@pytest.mark.parametrize("adjoint", [Segmented, Binomial])
def test_a_wrong_kind_of_storage(adjoint: Any) -> None:
    with pytest.raises(TypeError, match='storage is a int: pass "cpu", a folder, or None'):
        adjoint(2, storage=3)


def test_a_full_disk(problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = OnDisk.open

    class Full:
        def __init__(self, folder: OnDisk, name: str, mode: str) -> None:
            self.file = real_open(folder, name, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OnDisk, "open", lambda *args: Full(*args))
    message = r"of 0.0 MiB could not be written to .*, No space left on device: make room there"
    with pytest.raises(OSError, match=message) as error:
        problem.gradients(problem.total(Segmented(1, folder)))
    assert error.value.errno == errno.ENOSPC
    assert list(folder.iterdir()) == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (truncate, RuntimeError, r"has \d+ bytes instead of \d+: it was altered"),
        (lengthen, RuntimeError, r"has \d+ bytes instead of \d+: it was altered"),
        (flip, RuntimeError, "does not hold what was written to it: it was altered"),
        (Path.unlink, FileNotFoundError, "cannot be read, No such file or directory: leave the"),
    ],
)
@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_file_that_was_harmed(
    problem: Problem,
    folder: Path,
    stores: Stores,
    harm: Callable[[Path], None],
    error: type[Exception],
    message: str,
    which: int,
) -> None:
    total = problem.total(Segmented(1, folder))
    harm(files(stores)[which])
    with pytest.raises(error, match=rf"the snapshot file '.*\.state' {message}"):
        problem.gradients(total)
    assert list(folder.iterdir()) == []


# --- In the background ------------------------------------------------------------------------


def test_computing_goes_on_while_a_file_is_written(
    problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write waits until the second step has begun: were it waited for, nothing would."""
    begun, write = threading.Event(), _storage._File.write

    def late(self: Any, copy: Any) -> None:
        assert begun.wait(timeout=30)
        write(self, copy)

    monkeypatch.setattr(_storage._File, "write", late)
    problem.during = lambda t: begun.set() if t == 1 else None
    expected = problem.gradients(problem.total(StoreAll()))
    begun.clear()
    assert_equal(problem.gradients(problem.total(Segmented(1, folder))), expected)


def test_the_next_files_are_read_before_it_is_wanted(
    problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = _storage._File.read, []
    wanted: list[int] = []
    get = _storage.InFolder.__getitem__

    def record(self: Any) -> Any:
        asked.append(int(self.name.partition(".")[0]))
        return read(self)

    def note(self: Any, t: int) -> Any:
        wanted.append(t)
        settle(self)
        assert len(asked) >= len(wanted) - 1
        if len(wanted) > 1:
            assert t in asked
            assert len(asked) >= min(len(wanted) + 1, STEPS)  # two ahead
        return get(self, t)

    monkeypatch.setattr(_storage._File, "read", record)
    monkeypatch.setattr(_storage.InFolder, "__getitem__", note)
    problem.gradients(problem.total(Segmented(1, folder)))
    assert wanted == list(reversed(range(STEPS)))
    assert asked == wanted


def test_few_snapshots_wait_to_be_written(
    problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    save = _storage.InFolder.__setitem__

    def record(self: Any, t: int, snapshot: Any) -> None:
        save(self, t, snapshot)
        waiting.append(len(self._background._writing))

    monkeypatch.setattr(_storage.InFolder, "__setitem__", record)
    problem.total(Segmented(1, folder))
    assert len(waiting) == STEPS
    assert max(waiting) <= BACKLOG


# --- Layouts ----------------------------------------------------------------------------------


def snapshot_of(tensors: dict[str, Tensor]) -> Snapshot:
    return Snapshot(State(tensors, {}, {}), (torch.arange(3, dtype=torch.uint8),))


def test_every_layout_and_dtype_comes_back(folder: Path) -> None:
    tensors = {
        "transposed": torch.randn(3, 5).T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "a slice": torch.randn(6, 6)[1:3, ::2],
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(3).half(),
        "a number": torch.tensor(3.5, dtype=torch.float32),
        "integers": torch.arange(5),
        "booleans": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    stored = _storage.InFolder(OnDisk(folder))
    stored[4] = snapshot_of(tensors)
    found = stored[4]
    for name, x in tensors.items():
        y = found.state.params[name]
        assert y.dtype == x.dtype
        assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0)), name
        if x.stride() == torch.empty_like(x).stride():
            assert y.stride() == x.stride()
    assert torch.equal(found.generators[0], torch.arange(3, dtype=torch.uint8))
    stored.close()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["cpu", "folder"])
def test_from_an_accelerator_and_back(kind: str, folder: Path) -> None:
    stored = _storage.open_storage("cpu" if kind == "cpu" else folder)
    tensors = {"w": torch.randn(1000, 1000, device="cuda"), "step": torch.tensor(3.0)}
    expected = {name: x.clone() for name, x in tensors.items()}
    for t in range(4):
        stored[t] = snapshot_of({"w": tensors["w"] + t, "step": tensors["step"]})
    for t in (3, 1, 2, 0):
        stored.prefetch(t)
        found = stored[t].state.params
        assert found["w"].device == tensors["w"].device
        assert torch.equal(found["w"], expected["w"] + t)
        assert found["step"].device.type == "cpu"
    if kind == "cpu":
        assert all(s.state.params["w"].is_pinned() for s in stored._held.values())
    stored.close()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["cpu", "folder"])
def test_the_gradient_on_an_accelerator(kind: str, folder: Path) -> None:
    problem = Problem()
    problem.model, problem.x = problem.model.cuda(), problem.x.cuda()
    expected = problem.gradients(problem.total(Segmented(2)))
    storage = "cpu" if kind == "cpu" else folder
    assert_equal(problem.gradients(problem.total(Segmented(2, storage))), expected)
