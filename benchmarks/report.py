"""From measurements to Markdown tables, plots and the documentation's page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import plots
from cases import OPTIMIZERS, WORKLOADS
from libraries import LIBRARIES
from results import Result

NAMES = {"sgd": "SGD", "momentum": "Momentum", "adam": "Adam", "rmsprop": "RMSprop"}
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
#: On the page for contributors, beside the other in ``inside``.
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: begin -->", "<!-- claims: end -->"


def summary(result: dict[str, Any], seconds: float) -> str:
    """One case, for the terminal."""
    r = Result.read(result)
    against = r.baseline()
    lines = [f"{r.case.name} ({seconds:.0f} s), ratios to {against}"]
    for name, entry in r.libraries.items():
        if "failed" in entry and not r.times(name):
            lines.append(f"  {name:24} {entry['failed']}")
            continue
        ratio = r.ratio(name, against) if against else None
        low, high = r.spread(name, against) if ratio is not None else (0, 0)
        cells = [
            f"{r.milliseconds(name):9.2f} ms/step",
            f"{ratio:5.2f}x ({low:.2f}-{high:.2f})" if ratio is not None else "",
            f"{peak:8.1f} MiB" if (peak := r.peak(name)) is not None else "",
            f"float64 {entry['distance']:.0e}" if "distance" in entry else "",
            f"float32 {entry['timed_distance']:.0e}" if "timed_distance" in entry else "",
            entry.get("failed", ""),
        ]
        lines.append(f"  {name:24} " + "  ".join(filter(None, cells)))
    return "\n".join(lines)


def write(out: Path, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """``results.json``, ``tables.md`` and the plots."""
    (out / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    read = [Result.read(result) for result in results]
    pictures = plots.draw(read, out)
    text = "\n\n".join(filter(None, (claims.table(read), markdown(about, read, pictures))))
    (out / "tables.md").write_text(text)
    print(f"\n{text}\nWritten to {out}/")


def write_into_page(page: Path, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between the marks of both pages, and the pictures beside them."""
    read = [Result.read(result) for result in results]
    images = page.parent / "images"
    pictures = [f"images/{name}" for name in plots.draw(read, images)]
    _fill(page, BEGIN, markdown(about, read, pictures), END)
    inside = page.parent / "inside/benchmarks.md"
    if (told := claims.table(read)) and inside.exists():
        _fill(inside, CLAIMS_BEGIN, f"{told}\n", CLAIMS_END)


def _fill(page: Path, begin: str, text: str, end: str) -> None:
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def markdown(about: dict[str, Any], results: Sequence[Result], pictures: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    parts = [
        f"Measured on {about['processor']}, {threads}, "
        f"{about['memory'] / 2**30:.0f} GiB, device {about['device']}; Python {about['python']}, "
        f"{versions}; diffopt at {about['commit']}."
    ]
    parts += [f"![{_alt(picture)}]({picture})" for picture in pictures]
    groups: dict[tuple[str, int, int], list[Result]] = {}
    order = list(WORKLOADS)
    for r in sorted(
        results,
        key=lambda r: (r.case.tasks, order.index(r.case.workload), r.case.steps),
    ):
        groups.setdefault((r.case.workload, r.case.steps, r.case.tasks), []).append(r)
    for (workload, steps, tasks), group in groups.items():
        group.sort(key=lambda r: list(OPTIMIZERS).index(r.case.optimizer))
        many = f", {tasks} tasks" if tasks > 1 else ""
        parts += [
            f"### {WORKLOADS[workload].title}, T = {steps:,}{many}",
            _table(group),
        ]
        parts += _remarks(group)
    return "\n\n".join(parts) + "\n"


def _alt(picture: str) -> str:
    return {
        "tradeoff": "Time per step against peak memory",
        "length": "Time per step and peak memory against the number of steps",
    }[Path(picture).stem.removeprefix("benchmark-")]


def _table(group: Sequence[Result]) -> str:
    """Rows are libraries; the columns of each optimizer: time, its ratio, peak memory."""
    names = [name for name in LIBRARIES if any(r.times(name) for r in group)]
    head = ["library"]
    for r in group:
        head += [f"{NAMES[r.case.optimizer]}, ms per step", "ratio", "peak MiB"]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for name in names:
        ours = LIBRARIES[name].module == "diffopt"
        row = [f"diffopt, {LIBRARIES[name].title}" if ours else LIBRARIES[name].title]
        for r in group:
            row += _cells(r, name)
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(r: Result, name: str) -> list[str]:
    time, against = r.milliseconds(name), r.baseline()
    if time is None:
        return ["–", "–", "–"]
    ratio = r.ratio(name, against) if against else None
    mark = {"nan": " (NaN)", "other": " †"}.get(r.verdict(name), "")
    peak = r.peak(name)
    return [
        f"{time:.3g}{mark}" if time < 100 else f"{time:.0f}{mark}",
        "–" if ratio is None else f"{ratio:.2f}",
        "–" if peak is None else f"{peak:.0f}",
    ]


def _remarks(group: Sequence[Result]) -> list[str]:
    told = []
    for r in group:
        for name, entry in r.libraries.items():
            title, optimizer = LIBRARIES[name].title, NAMES[r.case.optimizer]
            if "failed" in entry:
                told.append(f"{title}, {optimizer}: {entry['failed']}.")
            elif r.verdict(name) == "other":
                told.append(
                    f"† {title}, {optimizer}: another rule than PyTorch's; its float64 gradient "
                    f"over {min(3, r.case.steps)} steps is off by {entry['distance']:.0e}."
                )
    compiled = [
        f"{LIBRARIES[name].title} {NAMES[r.case.optimizer]} {entry['first_seconds']:.0f} s"
        for r in group
        for name, entry in r.libraries.items()
        if ("compile" in name or name == "jax") and "first_seconds" in entry
    ]
    if compiled:
        told.append(f"Compilation and first call: {', '.join(compiled)}.")
    return [" ".join(told)] if told else []
