"""Learn how to train a small network, through 500 Adam steps.

The inner problem is an ordinary training run: a three-layer network, 600 handwritten digits,
500 steps of Adam. The outer problem tunes that run: its initial weights, a learning rate for each
layer and the weight decay, so that the network the run ends with does well on 600 other digits,
the validation split. The gradient of the validation loss goes through all 500 steps. A third
split, the test digits, is only looked at.

    python docs/examples/digits.py                 # one to two minutes on two cores
    python docs/examples/digits.py --help

Three things are printed beside the result: the gradient of two hyperparameters against finite
differences, the peak memory against keeping every step's graph, and, for fairness, the untuned
run trained on both splits, since tuning has seen the validation labels too.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import diffopt

BATCH = 64
ADJOINTS = {"Segmented": diffopt.Segmented(), "StoreAll": diffopt.StoreAll()}
Batch = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    train: Batch
    validation: Batch
    test: Batch


def load_splits(seed: int, dtype: torch.dtype = torch.float32) -> Splits:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=dtype) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return Splits(*((x[part], y[part]) for part in order.tensor_split([600, 1200])))


def draw_batches(data: Batch, steps: int, seed: int) -> list[Batch]:
    """The same ``steps`` minibatches for the same seed."""
    x, y = data
    draw = torch.Generator().manual_seed(seed)
    picks = (torch.randint(len(y), (BATCH,), generator=draw) for _ in range(steps))
    return [(x[pick], y[pick]) for pick in picks]


def cross_entropy(model, batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


class Recipe:
    """A training run and what can be tuned about it."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
        ).to(dtype)
        self.layers = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        # Logarithms, so that what is learned stays positive.
        start = math.log(1e-3)
        self.log_lr = torch.full((3,), start, dtype=dtype, requires_grad=True)
        self.log_decay = torch.tensor(start, dtype=dtype, requires_grad=True)

    def train(self, batches: list[Batch], loss_fn=cross_entropy, adjoint=None):
        adam = diffopt.Adam(
            {
                "params": layer.parameters(),
                "lr": lambda step, i=i: self.log_lr[i].exp(),
                "weight_decay": lambda step: self.log_decay.exp(),
            }
            for i, layer in enumerate(self.layers)
        )
        return diffopt.unroll(self.model, adam, batches, loss_fn, adjoint=adjoint)


@torch.no_grad()
def score(model, data: Batch) -> tuple[float, float]:
    """Loss and accuracy."""
    x, y = data
    logits = model(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


# -- The three things to do ------------------------------------------------------------------------


def learn(recipe: Recipe, splits: Splits, batches: list[Batch], outer: int):
    """Tune the recipe with ``outer`` gradients of the validation loss.

    Returns the best recipe by validation loss, a row (validation loss, test loss) for each outer
    step, and whether Ctrl-C ended it early.
    """
    optimizer = torch.optim.Adam(
        [
            {"params": recipe.model.parameters(), "lr": 3e-3},
            {"params": [recipe.log_lr, recipe.log_decay], "lr": 0.1},
        ]
    )
    best, history, stopped = copy.deepcopy(recipe), [], False
    with tqdm(total=outer, desc="outer steps", unit="step") as bar:
        try:
            while len(history) <= outer:
                last = len(history) == outer  # one run more, to score what the last update gave
                with torch.set_grad_enabled(not last):
                    tuned = recipe.train(batches)
                    loss = cross_entropy(tuned, splits.validation)
                history.append((loss.item(), score(tuned, splits.test)[0]))
                if history[-1] == min(history):
                    best = copy.deepcopy(recipe)
                if not last:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    bar.update()
                bar.set_postfix(validation_loss=f"{loss.item():.3f}")
        except KeyboardInterrupt:
            stopped = True
    return best, history, stopped


def check_gradient(seed: int, inner: int) -> None:
    """Two hyperparameter gradients in float64, against central finite differences."""
    splits = load_splits(seed, torch.float64)
    recipe = Recipe(seed, torch.float64)
    batches = draw_batches(splits.train, inner, seed)

    def validation_loss() -> Tensor:
        return cross_entropy(recipe.train(batches), splits.validation)

    validation_loss().backward()
    print("  d(validation loss)/d(log ·)    diffopt        finite differences   rel. difference")
    for name, tensor, index in (
        ("learning rate, layer 1", recipe.log_lr, 0),
        ("weight decay", recipe.log_decay, ()),
    ):
        ends = []
        h = 1e-7  # with 1e-4 curvature shows: weight decay is 3 % off with --seed 1
        with torch.no_grad():
            for shift in (h, -h):
                tensor[index] += shift
                ends.append(validation_loss().item())
                tensor[index] -= shift
        slope = (ends[0] - ends[1]) / (2 * h)
        exact = tensor.grad[index].item()
        error = abs(exact - slope) / abs(slope)
        print(f"  {name:<28}  {exact:+.8e}   {slope:+.8e}     {error:.0e}")


def resident_bytes(which: str) -> int:
    """``VmRSS``, what this process holds now, or ``VmHWM``, the most it ever held.

    ``resource.getrusage`` knows only a peak, and on Linux a new process inherits its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def print_peak(adjoint: str, seed: int, inner: int) -> None:
    """In a process of its own: one meta-gradient's peak memory over the start, and CPU time."""
    splits, recipe = load_splits(seed), Recipe(seed)
    batches = draw_batches(splits.train, inner, seed)

    def gradient(steps: int) -> None:
        run = recipe.train(batches[:steps], adjoint=ADJOINTS[adjoint])
        cross_entropy(run, splits.validation).backward()

    gradient(2)  # what is loaded or allocated once, whatever the number of steps
    before, began = resident_bytes("VmRSS"), time.process_time()
    gradient(inner)
    seconds = time.process_time() - began
    print(resident_bytes("VmHWM") - before, seconds)


def compare_memory(seed: int, inner: int) -> None:
    for adjoint in ADJOINTS:
        command = [sys.executable, __file__, "--peak", adjoint]
        command += ["--seed", str(seed), "--inner", str(inner)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"  {adjoint + '()':<13} not measured: {done.stderr.strip().splitlines()[-1]}")
        else:
            peak, seconds = map(float, done.stdout.split())
            print(f"  {adjoint + '()':<13} {peak / 2**20:7.1f} MiB   {seconds:5.2f} s")


# -- What is printed and drawn ---------------------------------------------------------------------


def follow(recipe: Recipe, splits: Splits, batches: list[Batch]):
    """Train once without gradients, noting the validation loss before every step."""

    def loss_fn(model, batch: Batch):
        return cross_entropy(model, batch), cross_entropy(model, splits.validation)

    with torch.no_grad():
        run = recipe.train(batches, loss_fn)
    return run, torch.stack(run.aux)


def print_result(start: Recipe, tuned: Recipe, runs: dict, splits: Splits) -> None:
    print(f"{'':34}{'validation':>20}{'test':>22}")
    print(f"{'':34}{'loss':>9}{'accuracy':>11}{'loss':>11}{'accuracy':>11}")
    for name, run in runs.items():
        cells = "".join(
            "  {:7.3f}{:>11.1%}  ".format(*score(run, split))
            for split in (splits.validation, splits.test)
        )
        print(f"  {name:<32}{cells}".rstrip())
    print("  * on the training and the validation digits: tuning has seen both as well")
    print()
    for i, (before, after) in enumerate(zip(start.log_lr.exp(), tuned.log_lr.exp(), strict=True)):
        print(f"  learning rate, layer {i + 1}   {before:.1e} -> {after:.1e}")
    print(f"  weight decay             {start.log_decay.exp():.1e} -> {tuned.log_decay.exp():.1e}")
    before, after = (parameters_to_vector(r.model.parameters()) for r in (start, tuned))
    moved = (after - before).norm() / before.norm()
    print(f"  initial weights          moved by {moved:.0%} of their norm")


def draw(
    path: Path, headline: str, start: Recipe, tuned: Recipe, curves: dict, history: list
) -> None:
    """The validation loss along the run, before and after; the outer steps; what they found."""
    import matplotlib  # only here: the processes that measure memory begin without it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    ink, grey, blue, orange = "#22262b", "#9aa1a9", "#1f6feb", "#e8590c"
    style = {
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": grey,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.grid": True,
        "grid.color": "#e8eaed",
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12.5, 4.3), width_ratios=(1.3, 1, 1), layout="constrained"
        )
        figure.get_layout_engine().set(wspace=0.06)
        figure.suptitle(headline + "\n", x=0.052, ha="left", fontsize=14)

        plain = FuncFormatter(lambda value, _: f"{value:g}")
        for (name, (train, validation)), color in zip(curves.items(), (grey, blue), strict=True):
            left.plot(train, color=color, alpha=0.3, linewidth=0.7)
            left.plot(validation, color=color, linewidth=2.2, label=name)
        left.set(title="One training run", xlabel="Adam step", ylabel="loss", yscale="log")
        left.yaxis.set_major_formatter(plain)
        left.plot([], [], color=grey, alpha=0.5, linewidth=0.9, label="thin: its minibatches")
        left.legend(title="validation loss", alignment="left")

        for name, values, color in zip(
            ("validation", "test"), zip(*history, strict=True), (blue, orange), strict=True
        ):
            middle.plot(values, color=color, linewidth=2.2, marker="o", markersize=3.5)
            end = (len(values) - 1, values[-1])
            middle.annotate(name, end, (7, -3), textcoords="offset points", color=color)
        middle.set(title="Learning to train", xlabel="outer step", ylabel="loss after the run")
        middle.set(ylim=(0, None), xlim=(None, len(history) * 1.28))
        middle.xaxis.get_major_locator().set_params(integer=True)

        names = ["learning rate\nof layer 1", "of layer 2", "of layer 3", "weight\ndecay"]
        before, after = (
            [*recipe.log_lr.exp().tolist(), recipe.log_decay.exp().item()]
            for recipe in (start, tuned)
        )
        places = range(len(names))
        right.hlines(places, before, after, color=grey, linewidth=2.2, zorder=1)
        right.scatter(before, places, 45, "white", edgecolor=grey, linewidth=1.8, zorder=2)
        right.scatter(after, places, 60, blue, zorder=3)
        for place, a, b in zip(places, before, after, strict=True):
            side = (
                {"xytext": (9, 0), "ha": "left"} if b >= a else {"xytext": (-9, 0), "ha": "right"}
            )
            right.annotate(f"{b:.2g}", (b, place), textcoords="offset points", va="center", **side)
        right.set(title="What was learned", xlabel="start (open) and learned (full)", xscale="log")
        right.set_xlim(min(before + after) / 5, max(before + after) * 4)
        right.xaxis.set_major_formatter(plain)
        right.set_yticks(places, names)
        right.set_ylim(len(names) - 0.5, -0.5)
        right.grid(axis="y", visible=False)
        right.tick_params(axis="y", length=0)
        for axes in (left, right):
            axes.minorticks_off()

        figure.savefig(path, dpi=160)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learn the initial weights, a learning rate for each layer and the weight "
        "decay of a small network through its training run, on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the picture")
    parser.add_argument("--outer", type=int, default=12, help="gradients of the validation loss")
    parser.add_argument("--inner", type=int, default=500, help="Adam steps of one training run")
    parser.add_argument("--seed", type=int, default=0, help="splits, batches, initial weights")
    parser.add_argument("--peak", choices=ADJOINTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.outer < 1 or args.inner < 2:
        parser.error("--outer must be at least 1 and --inner at least 2")
    torch.set_num_threads(1)  # tensors this small are not worth sharing out
    if args.peak:
        return print_peak(args.peak, args.seed, args.inner)
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.absolute().parent}")
    began = time.perf_counter()

    print(f"Gradient through {args.inner} Adam steps against finite differences, float64:")
    check_gradient(args.seed, args.inner)

    print("\nPeak memory over the start, and CPU time, of one such gradient in float32:")
    compare_memory(args.seed, args.inner)

    print("\nLearning (Ctrl-C ends it early and reports what was learned so far):", flush=True)
    splits, start = load_splits(args.seed), Recipe(args.seed)
    batches = draw_batches(splits.train, args.inner, args.seed)
    tuned, history, stopped = learn(copy.deepcopy(start), splits, batches, args.outer)
    if stopped:
        print("Stopped early: what follows is the best so far.")
    if not history:
        return None

    untuned_run, untuned_curve = follow(start, splits, batches)
    tuned_run, tuned_curve = follow(tuned, splits, batches)
    both = tuple(map(torch.cat, zip(splits.train, splits.validation, strict=True)))
    with torch.no_grad():
        fair_run = start.train(draw_batches(both, args.inner, args.seed))
    print()
    print_result(
        start,
        tuned,
        {
            "untuned": untuned_run,
            "tuned": tuned_run,
            "untuned, trained on both *": fair_run,
        },
        splits,
    )
    curves = {
        "untuned": (untuned_run.losses, untuned_curve),
        "tuned": (tuned_run.losses, tuned_curve),
    }
    accuracy = [score(run, splits.test)[1] for run in (untuned_run, tuned_run)]
    headline = "Test accuracy {:.1%}, and {:.1%} with the tuned run".format(*accuracy)
    draw(args.out, headline, start, tuned, curves, history)
    print(f"\nThe picture is in {args.out}. {time.perf_counter() - began:.0f} s in all.")
    return None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
