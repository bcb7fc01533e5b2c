"""The gallery's examples, run small, show what their pages say; what is committed is theirs."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fenced import TOP

pytest.importorskip("sklearn")
sys.path.insert(0, str(TOP / "docs"))
gallery = importlib.import_module("gallery")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(name, outer=3)``: what the example calls ``result``."""
    threads = torch.get_num_threads()

    def run(name: str, **options: float) -> Any:
        picture = tmp_path / f"{name}.png"
        argv = [name, "--dark", "--out", str(picture)]
        argv += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.syspath_prepend(str(gallery.EXAMPLES))
        with torch.random.fork_rng():
            namespace = runpy.run_path(str(gallery.EXAMPLES / f"{name}.py"), run_name="__main__")
        for path in (picture, picture.with_stem(f"{name}-dark")):
            assert path.read_bytes().startswith(b"\x89PNG")
        return namespace["result"]

    yield run
    torch.set_num_threads(threads)


def test_maml_fits_new_curves_better_than_pretraining(run: Any) -> None:
    result = run("maml_sinusoids", outer=400, test_tasks=60)
    assert len(result["maml"]) == 11  # before, and after each of ten steps
    assert result["maml"][10] < 0.75 * result["pretrained"][10]


def test_reweighting_finds_wrong_labels(run: Any) -> None:
    result = run("reweighting", outer=8, inner=40, train=300)
    assert result["auc"] > 0.8
    assert result["weighted"] > result["all labels as they are"]


def test_distilled_images_teach_more_than_real_ones(run: Any) -> None:
    result = run("distillation", outer=60, inner=10, draws=4)
    assert result["distilled"] > result["ten real images"] + 0.05


def test_the_metagradient_predicts_retraining(run: Any) -> None:
    result = run("attribution", inner=150, train=600, subsets=40)
    metagradient, similarity = result[0.02]
    assert metagradient > 0.9
    assert metagradient > similarity


def test_a_learned_schedule_is_better_than_a_constant_rate(run: Any) -> None:
    result = run("learned_schedule", outer=15, inner=40, runs=6, new_runs=30)
    (constant,) = (loss for name, loss in result.items() if name.startswith("constant"))
    assert result["learned"] < constant


def test_a_rate_per_weight_adapts_better_than_one_rate(run: Any) -> None:
    result = run("meta_sgd", outer=150, new_tasks=200)
    assert result["Meta-SGD"] < 0.9 * result["MAML, one learned rate"]


def test_multi_step_losses_rates_and_statistics_adapt_better(run: Any) -> None:
    result = run("maml_plus_plus", outer=25, new_tasks=60)
    assert result["MAML++"] > result["MAML"] + 0.01
    assert result["MAML++"] > result["nearest image"]


def test_imaml_has_the_gradient_of_the_path_and_learns_as_well(run: Any) -> None:
    result = run("imaml", outer=8, tasks=4, new_tasks=50)
    assert result["difference"] < 1e-3
    assert result["iMAML"] > result["not meta-learned"]
    assert abs(result["iMAML"] - result["MAML"]) < 0.05


def test_a_learned_loss_withstands_wrong_labels(run: Any) -> None:
    result = run("learned_loss", outer=25, inner=30, runs=6)
    assert result["learned"] > result["cross-entropy"]


def test_a_learned_optimizer_is_better_than_tuned_adam(run: Any) -> None:
    result = run("learned_optimizer", outer=30, runs=2, new_runs=5)
    assert result["learned"] < min(result["Adam"], result["Adam, cosine"])


def test_the_cell_found_is_better_than_the_mean_cell(run: Any) -> None:
    result = run("darts", outer=30, inner=60, cells=3, repeats=1)
    assert result["found"] > result["mean of random cells"]


def test_a_generator_that_looks_ahead_reaches_more_of_the_gaussians(run: Any) -> None:
    result = run("unrolled_gan", outer=200, unrolled=3, runs=1)
    (at_once,), (ahead,) = result.values()
    assert ahead[0] >= at_once[0] + 3


def test_the_gradient_of_a_gradient_of_training_is_exact_and_of_use(run: Any) -> None:
    result = run("nested", outer=2, middle=2, inner=5)
    assert result["error"] < 1e-6
    assert result["rate learned at the learned rate"] < result["rate learned at 0.05"]


def test_learned_weights_choose_what_to_fine_tune_on(run: Any) -> None:
    result = run("lora", pretraining=150, outer=5, inner=10, pool=60)
    assert result["auc"] > 0.6
    assert result["learned weights"] < result["the pool as it is"]


@pytest.mark.parametrize("name", gallery.names())
def test_what_is_committed_was_printed_by_the_example_as_it_is(name: str) -> None:
    first, _, printed = (gallery.OUTPUT / f"{name}.txt").read_text("utf-8").partition("\n")
    assert first == gallery.digest(name), f"run: python docs/gallery.py {name}"
    assert printed.strip()
    assert (gallery.OUTPUT / f"{name}.png").exists()


#: What the pages show: a row of what the example printed is below (<) or above (>) another.
SHOWN = [
    ("reweighting", "learned weights > all labels as they are"),
    ("reweighting", "learned weights > the clean digits alone"),
    ("distillation", "on the ten learned images > on ten real images"),
    ("learned_schedule", r"learned < constant, peak \S+"),
    ("learned_schedule", r"learned < cosine, peak \S+"),
    ("maml_sinusoids", r"MAML, rate \S+ < pretrained, best rate \S+"),
    ("maml_plus_plus", "MAML\\+\\+ > MAML"),
    ("maml_plus_plus", "MAML\\+\\+ > nearest image"),
    ("meta_sgd", "Meta-SGD < MAML, one learned rate"),
    ("imaml", "iMAML > not meta-learned"),
    ("learned_loss", "learned > cross-entropy"),
    ("learned_loss", "learned > cross-entropy, stopped at its best"),
    ("learned_optimizer", "learned < Adam"),
    ("learned_optimizer", "learned < Adam, cosine"),
    ("learned_optimizer", "learned(, two hidden.*) < Adam(, two hidden.*)"),
    ("learned_optimizer", "learned(, two hidden.*) < Adam, cosine(, two hidden.*)"),
    ("darts", "found > mean of random cells"),
    ("unrolled_gan", r"\d steps ahead > the discriminator of the moment"),
    ("nested", "rate learned at the learned rate < rate learned at 0.05"),
    ("lora", "learned weights < the pool as it is"),
]


def printed(name: str) -> dict[str, list[float]]:
    """The numbers of every row that the example printed when it was run in full."""
    lines = (gallery.OUTPUT / f"{name}.txt").read_text("utf-8").splitlines()[1:]
    cells = [
        re.split(r"\s{2,}", re.sub(r"  \(.*\)", "", line.strip()), maxsplit=1) for line in lines
    ]
    found = {row[0]: re.findall(r"-?\d+(?:\.\d+)?", row[1]) for row in cells if len(row) == 2}
    return {label: [float(number) for number in numbers] for label, numbers in found.items()}


@pytest.mark.parametrize(("name", "claim"), SHOWN)
def test_what_the_full_run_printed_shows_what_the_page_says(name: str, claim: str) -> None:
    one, sign, other = re.split(" ([<>]) ", claim)
    rows = {label: numbers[-1] for label, numbers in printed(name).items() if numbers}
    (left,) = (number for label, number in rows.items() if re.fullmatch(one, label))
    (right,) = (number for label, number in rows.items() if re.fullmatch(other, label))
    assert left < right if sign == "<" else left > right


def test_the_full_attribution_predicts_retraining() -> None:
    rows = [numbers for label, numbers in printed("attribution").items() if label[-1] == "%"]
    assert len(rows) == 4
    for *_, metagradient, similarity in rows:
        assert metagradient >= 0.9
        assert metagradient > similarity


def test_every_example_has_a_place_in_the_gallery_and_in_the_navigation() -> None:
    files = {path.stem for path in gallery.EXAMPLES.glob("*.py")}
    assert files - {"shared", "digits", "precision"} == set(gallery.names())
    navigation = (TOP / "docs/mkdocs.yml").read_text("utf-8")
    assert all(f"examples/{name}.md" in navigation for name in gallery.names())
