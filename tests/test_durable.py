"""Runs that are interrupted at any moment and taken up again: the same gradient, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import diffopt
from diffopt import Binomial, Durable, Segmented
from diffopt._loop.checksum import checksum
from diffopt._loop.files import OnDisk
from diffopt._loop.shelf import Shelf

pytest.importorskip("safetensors")

STEPS = 12
Adjoints = Callable[[Any], diffopt.Adjoint]

ADJOINTS: dict[str, Adjoints] = {
    "segmented": lambda s: Segmented(4, s),
    "every-state": lambda s: Segmented(1, s),
    "binomial": lambda s: Binomial(3, s),
}
every_adjoint = pytest.mark.parametrize("make", ADJOINTS.values(), ids=ADJOINTS)


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and for failures of power alone


class Stop(BaseException):
    """As Ctrl-C."""


class Problem:
    """A network with dropout and running statistics; each call makes everything anew, as a process
    would that was started again."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.calls = 0

    def get(self, name: str, default: Any) -> Any:
        return self.changes.get(name, default)

    def gradients(self, adjoint: diffopt.Adjoint, stop: int = 0, **options: Any) -> list[Any]:
        torch.manual_seed(0)
        width = self.get("width", 4)
        model = nn.Sequential(
            nn.Linear(3, width),
            nn.Identity() if self.get("late norm", False) else nn.BatchNorm1d(width),
            nn.Dropout(0.3),
            nn.Tanh(),
            nn.Linear(width, 1),
        )
        with torch.no_grad():
            model[0].bias += self.get("shift", 0.0)
        model.to(self.get("dtype", torch.float64))
        x = torch.randn(8, 3, dtype=self.get("dtype", torch.float64))
        lr = torch.tensor(self.get("lr", 0.05), requires_grad=True)
        decay = torch.tensor(self.get("decay", 0.01), requires_grad=True)
        late = torch.full((width,), self.get("late", 0.1), requires_grad=True)
        opt = self.get("optimizer", diffopt.Adam)(model.parameters(), lr=lr)
        self.calls = 0

        def loss(model: nn.Module, t: int) -> Any:
            self.calls += 1
            if self.calls == stop:
                raise Stop
            value = model(x * self.get("scale", 1.0)).square().mean()
            value = value + decay * sum(p.square().sum() for p in model.parameters())
            if t >= 5:  # captured only by then
                value = value + (model[0].bias * late).sum()
            if self.get("late norm", False) and t >= 7:  # with a derivative of the package
                value = value + nn.functional.layer_norm(model[0].weight, (3,)).exp().sum()
            if not self.get("aux", False):
                return value
            pair = (model[0].weight * 2, model[1].running_mean), {1: t, "none": [None, 0.1, "text"]}
            return value, {"seen": value.exp(), "more": pair, "kind": self.get("kind", True)}

        torch.manual_seed(1)
        fast = diffopt.unroll(
            model, opt, self.get("steps", STEPS), loss, adjoint=adjoint, **options
        )
        drawn = torch.rand(3)
        total = fast.losses.sin().sum() + sum(p.square().sum() for p in fast.params.values())
        if self.get("aux", False):
            scale = self.get("of aux", 1.0)
            total = total + scale * sum((a["seen"] * a["more"][0][0]).sum() for a in fast.aux)
        total = total * self.get("outer", 1.0)
        inputs = [lr, decay, late, *model.parameters()]
        grads = torch.autograd.grad(total, inputs, **self.get("backward", {}))
        if self.get("again", False):
            grads = torch.autograd.grad(total, inputs)
        self.aux = [pytree.tree_flatten(aux) for aux in fast.aux]
        extras = [x for leaves, _ in self.aux for x in leaves if isinstance(x, Tensor)]
        return [total, drawn, fast.losses, *fast.buffers.values(), *extras, *grads]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def interrupted(adjoint: diffopt.Adjoint, stop: int, **changes: Any) -> None:
    """Run until loss call number ``stop``."""
    with pytest.raises(Stop):
        Problem(**changes).gradients(adjoint, stop)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


# --- Taken up -----------------------------------------------------------------------------------


@every_adjoint
def test_without_an_interruption(make: Adjoints, tmp_path: Path) -> None:
    expected = Problem().gradients(make(None))
    assert_same(Problem().gradients(make(Durable(tmp_path / "run"))), expected)
    assert left(tmp_path / "run") == []
    assert_same(Problem().gradients(make(Durable(tmp_path / "run"))), expected)


@every_adjoint
def test_an_operation_that_only_later_steps_call(make: Adjoints, tmp_path: Path) -> None:
    """The process that takes the run up calls it on the way back alone."""
    expected = Problem(**{"late norm": True}).gradients(make(None))
    durable = Durable(tmp_path / "run")
    interrupted(make(durable), STEPS + 4, **{"late norm": True})
    assert_same(Problem(**{"late norm": True}).gradients(make(durable)), expected)


@every_adjoint
@pytest.mark.parametrize("every", [1, 3, 100])
def test_interrupted_anywhere(make: Adjoints, every: int, tmp_path: Path) -> None:
    problem = Problem()
    expected = problem.gradients(make(None))
    durable = Durable(tmp_path, every)
    for stop in range(2, problem.calls + 1, 4 if every == 3 else 7):
        interrupted(make(durable), stop)
        assert_same(problem.gradients(make(durable)), expected)
        assert left(tmp_path) == []


@every_adjoint
def test_little_is_done_again(make: Adjoints, tmp_path: Path) -> None:
    """After each interruption: step 0 and what met ``late`` first, and the way from an entry."""
    problem = Problem()
    expected = problem.gradients(make(None))
    clean = problem.calls
    for stop in range(2, clean, 4):
        interrupted(make(Durable(tmp_path, 1)), stop)
        assert_same(problem.gradients(make(Durable(tmp_path, 1))), expected)
        observed = 1 if stop <= 7 else 2 + STEPS // 2  # the way to step 5, from a kept state
        assert problem.calls + stop <= clean + 1 + observed + 5


@every_adjoint
@pytest.mark.parametrize("options", [{}, {"verify": True}], ids=["", "verified"])
def test_extras_and_digests_are_kept(
    make: Adjoints, options: dict[str, Any], tmp_path: Path
) -> None:
    problem = Problem(aux=True)
    expected = problem.gradients(make(None), **options)
    extras = problem.aux
    durable, clean = make(Durable(tmp_path, 2)), problem.calls
    for stop in range(2, clean, 7):
        with pytest.raises(Stop):
            Problem(aux=True).gradients(durable, stop, **options)
        assert_same(problem.gradients(durable, **options), expected)
        assert left(tmp_path) == []
        for (leaves, form), (kept, kept_form) in zip(extras, problem.aux, strict=True):
            assert form == kept_form
            for a, b in zip(leaves, kept, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_what_the_first_pass_gave_is_verified_after_a_kill(tmp_path: Path) -> None:
    """Step 3 gives another last bit in the second process, which only digests tell."""
    model, x, late = nn.Linear(2, 1), torch.ones(3, 2), 0.0

    def loss(model: nn.Module, t: int) -> Tensor:
        if t == 11:
            raise Stop
        return model(x).square().mean() + (t == 3) * late * model.weight.sum()

    def unroll(steps: int) -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        adjoint = Segmented(4, Durable(tmp_path, 1))
        fast = diffopt.unroll(model, opt, steps, loss, adjoint=adjoint, verify=True)
        return fast.params["weight"].sum()

    with pytest.raises(Stop):
        unroll(12)
    loss_of = loss

    def loss(model: nn.Module, t: int) -> Tensor:
        return loss_of(model, min(t, 10))

    late = 1e-15
    total = unroll(12)
    with pytest.raises(RuntimeError, match="step 3, computed again, gives another"):
        total.backward()


def test_results_may_be_changed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in the background is what the steps gave, not what became of it."""
    write = Shelf.write

    def slowly(self: Shelf, *args: Any) -> None:
        time.sleep(0.02)
        write(self, *args)

    monkeypatch.setattr(Shelf, "write", slowly)
    model, x = nn.Linear(2, 1), torch.ones(3, 2)

    def unroll() -> diffopt.Unrolled:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        return diffopt.unroll(
            model,
            opt,
            3,
            lambda m, t: (m(x).square().mean(), m.weight * 1),
            adjoint=Segmented(1, Durable(tmp_path)),
        )

    first = unroll()
    expected = [x.clone() for x in (*first.params.values(), first.losses, *first.aux)]
    with torch.no_grad():
        for changed in (*first.params.values(), first.losses, *first.aux):
            changed.fill_(7)
    second = unroll()
    assert_same([*second.params.values(), second.losses, *second.aux], expected)


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    expected = Problem().gradients(Binomial(3))
    adjoint, times = Binomial(3, Durable(tmp_path, 1)), 0
    for _ in range(40):
        try:
            found = Problem().gradients(adjoint, 11)
            break
        except Stop:
            times += 1
    assert 3 < times < 40
    assert_same(found, expected)


def test_a_graph_that_is_retained_or_recorded(tmp_path: Path) -> None:
    expected = Problem(again=True, backward={"retain_graph": True}).gradients(Segmented(4))
    durable = Segmented(4, Durable(tmp_path))
    found = Problem(again=True, backward={"retain_graph": True}).gradients(durable)
    assert_same(found, expected)
    assert left(tmp_path) == []
    interrupted(durable, STEPS + 5, backward={"retain_graph": True})
    assert_same(Problem().gradients(durable), Problem().gradients(Segmented(4)))
    recorded = Problem(backward={"create_graph": True}).gradients(durable)
    expected = Problem(backward={"create_graph": True}).gradients(Segmented(4))
    assert_same(recorded, expected)
    assert left(tmp_path)  # a graph that was not freed keeps its states
    assert_same(Problem().gradients(durable), Problem().gradients(Segmented(4)))


def test_a_later_call_takes_the_folder_over(tmp_path: Path) -> None:
    model, batch = nn.Linear(2, 1), torch.ones(3, 2)

    def unroll() -> Tensor:
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(
            model,
            opt,
            [batch] * 3,
            lambda m, x: m(x).square().mean(),
            adjoint=Segmented(1, Durable(tmp_path)),
        )
        return fast.params["weight"].sum()

    first, second = unroll(), unroll()
    second.backward()
    with pytest.raises(RuntimeError, match=r"a later call of unroll in this process took its fold"):
        first.backward()


# --- Refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": STEPS + 1}, "number of steps: 12 there and 13 here"),
        ({"width": 5}, r"form of params 0.weight: \(4, 3\), torch.float64, on cpu there and \(5"),
        ({"dtype": torch.float32}, "form of params 0.weight: .*float64.* there and .*float32"),
        ({"lr": 0.04}, "hyperparameter lr of param group 0 at step 0: 0.05 there and 0.04 here"),
        ({"shift": 0.1}, "start of params 0.bias: other values"),
        ({"optimizer": diffopt.SGD}, "optimizer: Adam there and SGD here, and"),
    ],
)
def test_another_run(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, 9)
    before = left(tmp_path)
    with pytest.raises(ValueError, match=rf"holds another run, which differs in {message}"):
        Problem(**changes).gradients(adjoint)
    assert left(tmp_path) == before
    assert_same(Problem().gradients(adjoint), Problem().gradients(Segmented(4)))


def test_another_plan_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(Segmented(4, Durable(tmp_path, 1)), 9)
    with pytest.raises(ValueError, match=r"differs in plan: 12 steps: .* there and 12 steps"):
        Problem().gradients(Segmented(3, Durable(tmp_path, 1)))
    with pytest.raises(ValueError, match="differs in verify: False there and True here"):
        Problem().gradients(Segmented(4, Durable(tmp_path, 1)), verify=True)
    with pytest.raises(ValueError, match="differs in bound max_cotangent_norm: None there and 1"):
        Problem().gradients(Segmented(4, Durable(tmp_path, 1)), max_cotangent_norm=1.0)
    monkeypatch.setattr(diffopt, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"differs in diffopt: .* there and 9\.9 here"):
        Problem().gradients(Segmented(4, Durable(tmp_path, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 1.1}, "step 0, computed again, gives another loss .* loss_fn or its data"),
        ({"late": 0.2}, "step 5, computed again, gives another loss"),
        ({"decay": 0.02}, "step 0, computed again, gives another loss"),
    ],
)
def test_other_data(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, 11)
    with pytest.raises(RuntimeError, match=message):
        Problem(**changes).gradients(adjoint)
    assert_same(Problem().gradients(adjoint), Problem().gradients(Segmented(4)))


def test_another_outer_loss(tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, STEPS + 8)
    with pytest.raises(
        RuntimeError, match=r"what flows back .* is not what flowed back in the pas"
    ):
        Problem(outer=2.0).gradients(adjoint)
    durable = Segmented(4, Durable(tmp_path / "aux", 1))
    interrupted(durable, STEPS + 8, aux=True)
    with pytest.raises(RuntimeError, match=r"what flows back .* is not what flowed back"):
        Problem(aux=True, **{"of aux": 2.0}).gradients(durable)
    # Before the way back has begun, it may be any.
    interrupted(Segmented(4, Durable(tmp_path / "b", 1)), 9)
    found = Problem(outer=2.0).gradients(Segmented(4, Durable(tmp_path / "b", 1)))
    assert_same(found, Problem(outer=2.0).gradients(Segmented(4)))


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path))
    sparse = torch.eye(2).to_sparse()
    for kind, name in (({1, 2}, "set"), (sparse, "Tensor of layout torch.sparse_coo")):
        with pytest.raises(
            NotImplementedError, match=f"aux of step 0 holds a {name}, which Durable cannot keep"
        ):
            Problem(aux=True, kind=kind).gradients(adjoint)


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="folder is a int: pass a path"):
        Durable(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="folder='': pass a folder of this run alone"):
        Durable("")
    with pytest.raises(ValueError, match="every is 0, but must be at least 1"):
        Durable("runs", 0)
    with pytest.raises(FileNotFoundError, match=r"cannot hold a run, No such file .*: pass a fold"):
        Problem().gradients(Segmented(4, Durable(tmp_path / "a" / "b")))


def test_safetensors_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-diffopt\[durable\]'"):
        Problem().gradients(Segmented(4, Durable(tmp_path)))


# --- Damage -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("kind", ["manifest", "state", "record", "back"])
@pytest.mark.parametrize("stop", [9, STEPS + 9])
def test_the_newest_file_is_damaged(
    harm: Callable[[Path], None], kind: str, stop: int, tmp_path: Path
) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, stop)
    found = [tmp_path / name for name in left(tmp_path) if name.startswith(kind)]
    if not found:
        assert (kind, stop) == ("back", 9)
        return
    harm(found[-1])
    if kind == "record" and stop > STEPS:  # both entries of the way back need it
        with pytest.raises(RuntimeError, match=r"holds a run of which no entry is whole: the file"):
            Problem().gradients(adjoint)
        return
    assert_same(Problem().gradients(adjoint), Problem().gradients(Segmented(4)))


def test_all_manifests_are_damaged(tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, 9)
    for path in tmp_path.glob("manifest-*"):
        flip(path)
    with pytest.raises(RuntimeError, match=r"no entry is whole: its manifests are damaged. Empty"):
        Problem().gradients(adjoint)


def test_a_state_on_the_way_back_is_damaged(tmp_path: Path) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    interrupted(adjoint, 12)
    states = [tmp_path / name for name in left(tmp_path) if name.startswith("state")]
    manifest = json.loads(sorted(tmp_path.glob("manifest-*"))[-1].read_text().split("\n", 1)[1])
    flip(tmp_path / manifest["states"]["4"][0])
    assert len(states) > 2
    with pytest.raises(RuntimeError, match=r"does not hold what .*: the state at step 4 is lost"):
        Problem().gradients(adjoint)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adjoint = Segmented(4, Durable(tmp_path, 1))
    put, calls = OnDisk.put, 0

    def full(self: Any, name: str, write: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise OSError(28, os.strerror(28))
        put(self, name, write)

    monkeypatch.setattr(OnDisk, "put", full)
    with pytest.raises(OSError, match=r"No space left on device: make room there and call again"):
        Problem().gradients(adjoint)
    monkeypatch.setattr(OnDisk, "put", put)
    assert left(tmp_path)
    assert_same(Problem().gradients(adjoint), Problem().gradients(Segmented(4)))


def test_what_a_kill_in_a_write_leaves_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    whole, half = shelf.file("state"), shelf.file("state")
    tensors = {"x": torch.arange(6.0).view(2, 3), "none": torch.empty(0), "y": torch.tensor(True)}
    shelf.write(whole, tensors, "note")

    def killed(x: Tensor) -> memoryview:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("diffopt._loop.shelf.memory_of", killed)
        with pytest.raises(Stop):
            shelf.write(half, tensors)
    assert left(tmp_path) == [whole.name, half.name.replace("safetensors", "partial")]
    found, note = shelf.read(whole)
    assert note == "note"
    assert_same([*found.values()], [*tensors.values()])
    (tmp_path / "of somebody else").touch()
    shelf.publish({}, {whole.name})
    assert left(tmp_path) == ["manifest-00000003.json", "of somebody else", whole.name]
    shelf.clear()
    assert left(tmp_path) == ["of somebody else"]
    shelf.close()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4096, 5000, 100_001])
def test_the_checksum_tells_changes(size: int) -> None:
    data = torch.arange(size).to(torch.uint8)
    first = checksum(data)
    assert checksum(data.clone()) == first
    assert (
        checksum(torch.cat([torch.ones(3, dtype=torch.uint8), data])[3:]) == first
    )  # wherever it lies
    assert checksum(torch.cat([data, data[:1] * 0])) != first or not size
    for i in {0, size // 2, size - 1} if size else ():
        other = data.clone()
        other[i] += 1
        assert checksum(other) != first
    if size > 8192:
        assert checksum(torch.cat([data[4096:8192] + 1, data[:4096], data[8192:]])) != first


# --- Processes ----------------------------------------------------------------------------------


def script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    setup = f"""
        import os, sys, torch, diffopt, warnings
        model = torch.nn.Linear(20, 20)
        x = torch.randn(4, 20)
        def unroll(folder={str(folder)!r}):
            opt = diffopt.SGD(model.parameters(), lr=0.1)
            adjoint = diffopt.Segmented(1, diffopt.Durable(folder, 1))
            loss = lambda m, t: m(x).square().mean()
            return diffopt.unroll(model, opt, 6, loss, adjoint=adjoint).params["weight"].sum()
    """
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(setup) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_a_forked_process_and_one_of_its_own(tmp_path: Path) -> None:
    body = """
        total = unroll()
        warnings.simplefilter("ignore")  # of Python, about forks beside threads
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                total.backward()
            except RuntimeError as error:
                print(error)
            try:
                unroll()
            except RuntimeError as error:
                print(error)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        total.backward()
        print(model.weight.grad.any().item(), os.listdir(sys.argv[-1]) if len(sys.argv) > 2 else "")
    """
    done = script(tmp_path, body)
    assert done.returncode == 0, done.stderr
    forked, used, rest = done.stdout.splitlines()
    assert forked.startswith("this process was forked after the call of unroll")
    assert "is in use by another process: give every run a folder of its own" in used
    assert rest.startswith("True")
    assert left(tmp_path) == []
