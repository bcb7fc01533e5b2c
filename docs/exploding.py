"""Draws the pictures of "Exploding and useless gradients": docs/pages/images/exploding*.png.

    python docs/exploding.py

prints the page's table, too. It takes a minute.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.ticker import NullFormatter

import diffopt

sys.path.insert(0, str(Path(__file__).parent / "examples"))
import shared

IMAGES = Path(__file__).parent / "pages/images"
STEPS, RATES = 100, {0.1: shared.GREEN, 0.5: shared.BLUE, 1.0: shared.ORANGE}

train, validation = shared.digits(256, 500)
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 10),
)
picks = torch.randint(256, (STEPS, 32))
batches = [(train[0][pick], train[1][pick]) for pick in picks]


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def outer(log_lr, **options):
    inner = diffopt.SGD(model.parameters(), lr=lambda step: log_lr.exp())
    fast = diffopt.unroll(model, inner, batches, loss_fn, **options)
    return loss_fn(fast, validation), fast.params


def norms(rate: float, **options) -> list[float]:
    """Of what flows to the weights, from the first step's to the last's."""
    found: list[float] = []

    def monitor(step, cotangent):
        found.insert(0, sum(c.square().sum() for c in cotangent.values()).sqrt().item())

    loss, _ = outer(torch.tensor(math.log(rate)), monitor=monitor, **options)
    loss.backward()
    return found


def arguments(name: str) -> argparse.Namespace:
    return argparse.Namespace(out=IMAGES / f"{name}.png", dark=True)


def draw_explosion() -> None:
    with shared.picture(arguments("exploding"), figsize=(8, 3.6)) as axes:
        for rate, color in RATES.items():
            axes.plot(norms(rate), color=color, label=f"rate {rate}")
        bounded = norms(1.0, max_cotangent_norm=1.0)
        axes.plot(bounded, color=shared.ORANGE, linestyle=":", label="rate 1.0, bounded to 1")
        axes.set(title="What flows back to the weights", yscale="log", ylabel="norm")
        axes.set(xlabel="after step (the way back goes from right to left)")
        axes.legend()


@torch.no_grad()
def draw_slices(found: dict[float, diffopt.Metasmoothness]) -> None:
    with shared.picture(arguments("exploding-slices"), 1, 3, figsize=(11, 3.6)) as panels:
        for axes, (rate, color) in zip(panels, RATES.items(), strict=True):
            shifts = torch.linspace(-0.1, 0.25, 71)
            values = [outer(math.log(rate) + shift)[0].item() for shift in shifts]
            axes.plot(shifts, values, color=color, linewidth=1.2)
            sign = 1 if _rises(rate, found[rate]) else -1
            points = [sign * i * found[rate].step for i in range(3)]
            axes.plot(points, found[rate].losses, "o", color=shared.INK, markersize=5)
            ends = torch.tensor([-0.1, 0.25])
            tangent = found[rate].losses[0] + sign * found[rate].slope * ends
            axes.plot(ends, tangent, "--", color=shared.GREY, linewidth=1.2)
            low, high = min(values), max(values)
            pad = (high / low) ** 0.1
            axes.set(title=f"At rate {rate}", xlabel="change of log rate", yscale="log")
            axes.set_ylim(low / pad, high * pad)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.3g}" if high < 2 * low else NullFormatter())
        panels[0].set_ylabel("validation loss")


def _rises(rate: float, found: diffopt.Metasmoothness) -> bool:
    """Whether v, against the gradient, is towards larger rates."""
    with torch.no_grad():
        there = outer(torch.tensor(math.log(rate) + found.step))[0].item()
    return math.isclose(there, found.losses[1], rel_tol=1e-3)


def main() -> None:
    draw_explosion()
    found = {}
    print("| rate | loss | slope | `kept` | `deviation` | `agreement` |\n|---|--:|--:|--:|--:|--:|")
    for rate in RATES:
        found[rate] = m = diffopt.metasmoothness(outer, [torch.tensor(math.log(rate))], step=0.1)
        row = [f"{x:.2f}" for x in (m.kept, m.deviation, m.agreement)]
        print("|", " | ".join([f"{rate}", f"{m.losses[0]:.2f}", f"{m.slope:.2g}", *row]), "|")
    draw_slices(found)


if __name__ == "__main__":
    main()
