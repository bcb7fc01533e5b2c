"""Draws the picture of the front page: docs/pages/images/headline.png, light and dark.

    python benchmarks/compare.py --preset headline --threads 1 --clock cpu_seconds --out out
    python benchmarks/headline.py --record out/results.json

The first command measures; ``--record`` keeps what was measured in ``headline.json`` beside this
file, from which the picture is drawn. A time is the least of the rounds, in which the libraries
take turns, and counts what the one thread worked: what else a machine does only adds to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from results import Result

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "docs/examples"))
import shared  # noqa: E402

RECORDED = HERE / "headline.json"
PICTURE = HERE.parent / "docs/pages/images/headline.png"

#: name in the results: (label, colour, marker).
LINES = {
    "diffopt-sqrt": ("diffopt, Segmented()", shared.BLUE, "o"),
    "diffopt-512": ('diffopt, MemoryBudget("512MiB")', shared.GREEN, "s"),
    "torch_maml-checkpoint5": ("torch_maml, checkpoints of 5", "#b07d2b", "v"),
    "torchopt": ("TorchOpt", "#c9449a", "D"),
    "higher": ("higher", shared.ORANGE, "P"),
    "plain": ("a plain loop", shared.GREY, "x"),
}


def record(path: Path) -> None:
    """Keep the rounds' times and the peaks."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    results = sorted(measured["results"], key=lambda result: result["case"]["steps"])
    kept = [{key: result[key] for key in ("case", "rounds", "libraries")} for result in results]
    text = json.dumps({"about": measured["about"], "results": kept}, indent=1)
    RECORDED.write_text(text + "\n", encoding="utf-8")


def recorded() -> list[Result]:
    found = json.loads(RECORDED.read_text(encoding="utf-8"))["results"]
    return [Result.read(result) for result in found]


def draw(results: list[Result], out: Path) -> None:
    args = argparse.Namespace(out=out, dark=True)
    with shared.picture(args, 1, 2, figsize=(11, 4)) as (left, right):
        for name, (label, color, marker) in LINES.items():
            for axes, value in ((left, Result.least_milliseconds), (right, Result.peak)):
                points = [(r.case.steps, y) for r in results if (y := value(r, name)) is not None]
                style = {"color": color, "marker": marker, "markersize": 6, "label": label}
                axes.plot(*zip(*points, strict=True), **style)
        left.set(title="Time for one step, forward and back", ylabel="milliseconds", ylim=(0, None))
        right.set(title="Peak memory", ylabel="MiB", yscale="log")
        for axes in (left, right):
            axes.set(xscale="log", xlabel="inner steps")
            shown = [t for t in (10, 30, 100, 300, 1000) if t < 1000 or axes is right]
            axes.set_xticks(shown, [f"{t:,}" for t in shown])
            axes.minorticks_off()
        right.set_yticks([10, 100, 1000, 10000], ["10", "100", "1,000", "10,000"])
        left.figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
        )


def table(results: list[Result]) -> str:
    """What is drawn, as Markdown."""
    steps = [f"{r.case.steps:,}" for r in results]
    lines = [
        f"| ms a step / peak MiB at T = | {' | '.join(steps)} |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for name, (label, _, _) in LINES.items():
        times = (r.least_milliseconds(name) for r in results)
        shown = ("–" if time is None else f"{time:.1f}" for time in times)
        peaks = (f"{r.peak(name):,.0f}" for r in results)
        cells = [f"{time} / {peak}" for time, peak in zip(shown, peaks, strict=True)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=Path, help="results.json of compare.py")
    parser.add_argument("--out", type=Path, default=PICTURE)
    given = parser.parse_args()
    if given.record:
        record(given.record)
    draw(recorded(), given.out)
    print(table(recorded()))


if __name__ == "__main__":
    main()
