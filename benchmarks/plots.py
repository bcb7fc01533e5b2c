"""Two pictures: time against memory for each workload, and both against the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from cases import WORKLOADS
from libraries import LIBRARIES
from matplotlib.axes import Axes
from results import Result

#: diffopt in blues, the peers in warm colours, with a marker each.
STYLES = {
    "diffopt": ("#1f4e9c", "o"),
    "diffopt-segment5": ("#1f4e9c", "s"),
    "diffopt-sqrt": ("#1f4e9c", "^"),
    "diffopt-default": ("#5b8fd9", "D"),
    "diffopt-store": ("#5b8fd9", "v"),
    "diffopt-compile": ("#00a2c7", "*"),
    "higher": ("#c0392b", "o"),
    "torchopt": ("#e67e22", "s"),
    "torch_maml": ("#8e5a2b", "^"),
    "torch_maml-checkpoint5": ("#8e5a2b", "v"),
    "plain": ("#7f8c8d", "x"),
    "jax": ("#2e8b57", "P"),
}


def draw(results: Sequence[Result], folder: Path) -> list[str]:
    """The names of the pictures that there was something to show in."""
    drawn = []
    for name, picture in (("tradeoff", _tradeoff), ("length", _length)):
        figure = picture([r for r in results if r.case.tasks == 1])
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"benchmark-{name}.png", dpi=120, metadata={"Software": None})
            plt.close(figure)
            drawn.append(f"benchmark-{name}.png")
    return drawn


def _tradeoff(results: Sequence[Result]) -> plt.Figure | None:
    shown = {(r.case.workload, r.case.optimizer): r for r in results if r.case.steps == 20}
    workloads = [w for w in WORKLOADS if (w, "sgd") in shown or (w, "adam") in shown]
    optimizers = [o for o in ("sgd", "adam") if any((w, o) in shown for w in workloads)]
    if not workloads:
        return None
    figure, axes = plt.subplots(
        len(optimizers),
        len(workloads),
        figsize=(3.3 * len(workloads) + 1.8, 3.0 * len(optimizers) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row, optimizer in zip(axes, optimizers, strict=True):
        for ax, workload in zip(row, workloads, strict=True):
            ax.set_title(f"{workload}, {optimizer}", fontsize=10)
            if (r := shown.get((workload, optimizer))) is None:
                ax.set_axis_off()
                continue
            for name, (colour, marker) in STYLES.items():
                time, peak = r.milliseconds(name), r.peak(name)
                if time is not None and peak is not None:
                    ax.scatter(
                        peak,
                        time,
                        color=colour,
                        marker=marker,
                        s=45,
                        label=_label(name),
                    )
            ax.set(
                xscale="log",
                xlabel="peak memory, MiB",
                ylabel="ms per step",
                ylim=(0, None),
            )
            ax.grid(alpha=0.3, which="both")
    _legend(figure, axes.flat)
    return figure


def _length(results: Sequence[Result]) -> plt.Figure | None:
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in sorted(results, key=lambda r: r.case.steps):
        groups.setdefault((r.case.workload, r.case.optimizer), []).append(r)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(10.5, 3.2 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    quantities: list[tuple[str, Callable[[Result, str], float | None]]] = [
        ("ms per step", Result.milliseconds),
        ("peak memory, MiB", Result.peak),
    ]
    for row, ((workload, optimizer), group) in zip(axes, groups.items(), strict=True):
        for ax, (title, value) in zip(row, quantities, strict=True):
            for name, (colour, marker) in STYLES.items():
                points = [(r.case.steps, y) for r in group if (y := value(r, name)) is not None]
                if points:
                    ax.plot(
                        *zip(*points, strict=True),
                        color=colour,
                        marker=marker,
                        label=_label(name),
                    )
            ax.set(xscale="log", yscale="log", xlabel="T, inner steps", ylabel=title)
            ax.set_title(f"{workload}, {optimizer}", fontsize=10)
            ax.grid(alpha=0.3, which="both")
    _legend(figure, axes.flat)
    return figure


def _label(name: str) -> str:
    library = LIBRARIES[name]
    title = library.title.replace("`", "")
    return f"diffopt, {title}" if library.module == "diffopt" else title


def _legend(figure: plt.Figure, axes: Sequence[Axes]) -> None:
    handles = {
        label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
