"""The benchmarks measure what they say: same work for everyone, right gradients, right ratios."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fenced import TOP

sys.path.append(str(TOP / "benchmarks"))

import compare
import environment
import headline
import scaling
from cases import OPTIMIZERS, WORKLOADS, Case, build
from claims import CLAIMS, table
from libraries import LIBRARIES, plain
from presets import PRESETS, full
from report import BEGIN, END
from results import Result
from worker import PeakResident, as_float64

#: (library's file, optimizer): what its gradient is known to be instead of the reference's.
DEVIATIONS = {
    ("higher", "adam"): "another rule",
    ("torchopt", "adam"): "nan",
    ("torchopt", "rmsprop"): "nan",
    ("torch_maml", "adam"): "refused",
    ("torch_maml", "rmsprop"): "refused",
}


def _gradient(library: str, case: Case) -> np.ndarray:
    chosen = LIBRARIES[library]
    pytest.importorskip(chosen.module)
    module = chosen.load()
    if hasattr(module, "available") and (reason := module.available(**chosen.options)):
        pytest.skip(reason)
    found = as_float64(module.prepare(build(case), **chosen.options)())
    return np.concatenate([found[name].ravel() for name in sorted(found)])


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "library",
    [n for n, x in LIBRARIES.items() if n != "plain" and not {"tasks", "compile"} & {*x.options}],
)
def test_the_libraries_do_the_same_work(library: str, optimizer: str) -> None:
    case = Case("tiny-mlp", optimizer, 6, dtype="float64")
    deviation = DEVIATIONS.get((LIBRARIES[library].module, optimizer))
    if deviation == "refused":
        with pytest.raises(NotImplementedError):
            _gradient(library, case)
        return
    found, expected = _gradient(library, case), _gradient_by_hand(case)
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if deviation == "nan":
        assert math.isnan(distance)
    elif deviation == "another rule":
        assert 1e-6 < distance < 1
    else:
        # torch_maml holds hyperparameters in float32.
        assert distance < (1e-6 if library.startswith("torch_maml") else 1e-12)


def _gradient_by_hand(case: Case) -> np.ndarray:
    found = as_float64(plain.prepare(build(case))())
    return np.concatenate([found[name].ravel() for name in sorted(found)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "workload"),
    [
        ("diffopt", "tiny-conv4"),
        ("diffopt", "tiny-resnet18"),
        ("diffopt", "tiny-gpt"),
        ("diffopt", "sinusoid"),
        ("jax", "tiny-gpt"),  # the convolutions take XLA half a minute to compile
    ],
)
def test_the_networks_are_the_same(library: str, workload: str) -> None:
    case = Case(workload, "sgd", 2, dtype="float64")
    found, expected = _gradient(library, case), _gradient_by_hand(case)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * abs(expected).max())


@pytest.mark.parametrize("library", ["diffopt", "diffopt-tasks", "higher"])
def test_many_tasks(library: str) -> None:
    case = Case("tiny-mlp", "momentum", 3, tasks=2, dtype="float64")
    found, expected = _gradient(library, case), _gradient_by_hand(case)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loop_by_hand_follows_torch_optim(optimizer: str) -> None:
    problem = build(Case("tiny-mlp", optimizer, 4, dtype="float64"))
    theirs = problem.torch_optimizer()
    params = {name: x.detach().clone() for name, x in problem.model.named_parameters()}
    state = [{name: torch.zeros_like(x) for name, x in params.items()} for _ in range(2)]
    for t, batch in enumerate(problem.batches[0]):
        theirs.zero_grad()
        problem.loss_fn(problem.model, batch).backward()
        grads = {name: x.grad for name, x in problem.model.named_parameters()}
        params, state = plain.RULES[optimizer](params, grads, state, t, **problem.options)
        theirs.step()
    for name, x in problem.model.named_parameters():
        torch.testing.assert_close(params[name], x.detach(), rtol=1e-10, atol=1e-12)


def _result(**libraries: dict[str, Any]) -> Result:
    rounds = [{n: x["seconds"][i] for n, x in libraries.items()} for i in range(3)]
    return Result(Case("gpt", "sgd"), rounds, libraries)


def test_ratios_are_taken_within_a_round() -> None:
    result = _result(
        diffopt={"seconds": [1.0, 20.0, 3.0], "peak": 2**20, "distance": 0.0},
        higher={"seconds": [2.0, 10.0, 3.0], "peak": 10 * 2**20, "distance": 0.0},
        torchopt={"seconds": [0.1, 0.1, 0.1], "peak": 2**20, "distance": math.nan},
    )
    assert result.ratio("diffopt", "higher") == 1.0
    assert result.milliseconds("diffopt") == 150.0
    assert result.fastest_peer() == "higher"  # TorchOpt is faster, and wrong
    told = table([result])
    assert "| gpt-sgd-T20 | 1.4 | 1 | met |" in told
    assert "| gpt-sgd-T20 | 0.2 | 0.1 | met |" in told


def test_every_claim_is_measured_by_the_full_run() -> None:
    measured = {cell.case.name for cell in full()}
    assert {name for claim in CLAIMS for name in claim.cases} <= measured
    for cells in (preset() for preset in PRESETS.values()):
        assert {cell.case.workload for cell in cells} <= WORKLOADS.keys()
        assert {name for cell in cells for name in cell.libraries} <= LIBRARIES.keys()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is resident")
def test_peak_memory_is_what_was_held_at_once() -> None:
    gc.collect()  # what earlier tests have left does not go meanwhile
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with PeakResident() as memory:
        for _ in range(3):
            held = np.ones(2**23)  # 64 MiB
            del held
    assert 60 < (memory.peak - memory.start) / 2**20 < 80


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    options = ["--workloads", "tiny-mlp", "--optimizers", "adam", "--steps", "20"]
    options += ["--libraries", "diffopt,torch_maml", "--repeats", "2", "--threads", "1"]
    options += ["--out", str(tmp_path / "out"), "--docs", str(page)]
    done = subprocess.run(
        [sys.executable, TOP / "benchmarks/compare.py", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"CI": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert "done before" not in done.stdout
    found = json.loads((tmp_path / "out/results.json").read_text())["results"][0]
    assert [set(seconds) for seconds in found["rounds"]] == [{"diffopt"}] * 2
    ours = found["libraries"]["diffopt"]
    assert ours["distance"] < 1e-12
    assert ours["timed_distance"] < 1e-3
    assert ours["peak"] > 0
    why = found["libraries"]["torch_maml"]["failed"]
    assert "not installed" in why or "no adam" in why
    assert "diffopt, `Segmented(1)`" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert (tmp_path / "images/benchmark-tradeoff.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(environment, "confine", lambda *limits, **more: None)  # not the tests
    compare.main(options)
    assert "done before" in capsys.readouterr().out


def _row(parameters: int, tokens: int, states: int) -> dict[str, Any]:
    """A peak of 12 bytes a parameter and state, 40 or 60 a parameter, 7 an activation, 2 MiB."""
    peak = (
        2**21
        + parameters * (12 * states + (40 if states else 60))
        + 7 * tokens * scaling.LAYERS * 32
    )
    return {
        "parameters": parameters,
        "tokens": tokens,
        "width": 32,
        "states": states,
        "peak": peak,
    }


def test_the_fit_of_peaks_finds_what_they_are_made_of() -> None:
    rows = [_row(p, n, s) for p in (10**5, 10**6) for n in (100, 900) for s in (0, 4, 16)]
    found = scaling.bytes_by(rows)
    expected = {"state": 12, "working": 40, "working_stored": 60, "activation": 7, "rest": 2}
    expected["off"] = 0
    assert found == pytest.approx(expected, abs=1e-6)


def test_growth_is_the_slope_of_the_logarithms() -> None:
    rows = [{"steps": t, "peak": 3.0 * t**0.5} for t in (16, 64, 256)]
    assert scaling.exponent(rows, "steps", "peak") == pytest.approx(0.5)
    row = {"forward": 1.0, "training": 4.0, "metagradient": 13.0}
    assert scaling.passes(row, 0.5) == 15.0


def test_the_page_on_scaling_shows_what_was_recorded() -> None:
    page = scaling.PAGE.read_text("utf-8")
    assert scaling.filled(page, scaling.recorded()) == page


def test_a_peak_of_scaling_is_measured() -> None:
    assert scaling.peak_of(64, 1, 3, "Segmented(1)") > 10**6


def test_the_headline_is_drawn_from_what_was_recorded(tmp_path: Path) -> None:
    results = headline.recorded()
    assert [r.case.steps for r in results] == [10, 30, 100, 300, 1000]
    for result in results:
        for name in headline.LINES:
            assert result.peak(name)
            assert result.least_milliseconds(name) or result.case.steps == 1000
    headline.draw(results, tmp_path / "headline.png")
    for name in ("headline.png", "headline-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (headline.PICTURE.parent / name).exists()


@pytest.mark.parametrize("page", ["README.md", "docs/pages/index.md"])
def test_the_front_page_tells_what_was_recorded(page: str) -> None:
    text = " ".join((TOP / page).read_text("utf-8").split())
    *shorter, longest = headline.recorded()
    assert longest.case.steps == 1000
    theirs = max(longest.peak(name) for name in ("higher", "torchopt"))
    assert f"{theirs:,.0f} MiB for 1,000 steps" in text
    assert f"{longest.peak('diffopt-sqrt'):,.0f} MiB with `Segmented()`" in text
    for result in shorter:  # "about twice the time"
        ours = result.least_milliseconds("diffopt-sqrt")
        assert 1.5 < ours / result.least_milliseconds("higher") < 2.6
