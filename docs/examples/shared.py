"""What the examples share: command line, data, and the look of their pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

INK, PALE, GREY, BLUE, ORANGE, GREEN = (
    "#22262b",
    "#dfe3e8",
    "#8f979f",
    "#2f81f7",
    "#e8590c",
    "#2da44e",
)
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8f979f40",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.loc": "upper right",
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}


def arguments(description: str, **numbers: tuple[int | float, str]) -> argparse.Namespace:
    """Read the command line: ``name=(default, help)``, and ``--seed`` and ``--out``.

    Seeds PyTorch and keeps it to one thread, since tensors this small are not worth sharing out.
    """
    parser = argparse.ArgumentParser(
        description=description.strip().splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--out", type=Path, default=None, help="a file for the picture")
    parser.add_argument("--dark", action="store_true", help="also draw it for a dark page")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    return args


def bar(steps: int, what: str = "outer steps") -> Any:
    """A progress bar that counts to ``steps``."""
    return tqdm(range(steps), desc=what)


def digits(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Disjoint random parts of scikit-learn's handwritten digits, of the given sizes.

    Each is (images, labels): (n, 64) floats from 0 to 1, and (n,) integers from 0 to 9.
    """
    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    parts = order[: sum(sizes)].split(sizes)
    return [(x[part], y[part]) for part in parts]


@contextmanager
def picture(args: argparse.Namespace, *grid: int, **options: Any) -> Iterator[Any]:
    """``plt.subplots(*grid, **options)`` in the examples' style, saved to ``--out`` at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*grid, **options)
        yield axes
        if args.out:
            figure.savefig(args.out, dpi=130, facecolor="white")  # also for a README on a dark page
            if args.dark:
                _darken(figure)
                figure.savefig(
                    args.out.with_stem(args.out.stem + "-dark"), dpi=130, transparent=True
                )
        plt.close(figure)


def _darken(figure: Figure) -> None:
    """Give pale ink to whatever is drawn in dark ink."""
    for artist in figure.findobj(lambda a: hasattr(a, "get_color")):
        if artist.get_color() == INK:
            artist.set_color(PALE)
    for axes in figure.axes:
        axes.tick_params(colors=PALE)


class FewShot:
    """Five-way few-shot tasks: images (tasks, images, 1, 8, 8) and labels (tasks, images).

    Five of the ten digits; which of them has which label is drawn for the task. Every image is
    turned by an angle of its own, up to a quarter turn, and sheared.

    Args:
        images, labels: the digits to make tasks from.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.digits = [images[labels == digit].reshape(-1, 1, 8, 8) for digit in range(10)]

    def draw(self, tasks: int, shots: int, queries: int) -> tuple[Any, Any]:
        """(support, query), of ``shots`` and ``queries`` images of every class of every task."""
        n = shots + queries
        chosen = torch.rand(tasks, 10).argsort(1)[:, :5].flatten().tolist()
        pools = (self.digits[digit] for digit in chosen)
        x = torch.cat([pool[torch.randperm(len(pool))[:n]] for pool in pools])
        angle, shear = ((torch.rand(len(x)) - 0.5) * width for width in (torch.pi, 0.6))
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(x))
        maps = torch.stack([cos, shear - sin, zero, sin, cos + shear, zero], 1).unflatten(1, (2, 3))
        x = F.grid_sample(x, F.affine_grid(maps, x.shape, align_corners=False), align_corners=False)
        x = x.unflatten(0, (tasks, 5, n))  # (tasks, classes, images, 1, 8, 8)
        y = torch.arange(5)[None, :, None].expand(x.shape[:3])
        halves = (x[:, :, :shots], y[:, :, :shots]), (x[:, :, shots:], y[:, :, shots:])
        support, query = ((x.flatten(1, 2), y.flatten(1, 2)) for x, y in halves)
        return support, query
