"""Draws docs/pages/images/steps.svg: steps, states, snapshots and the way back.

python docs/drawing.py
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "pages/images/steps.svg"
STEPS, SEGMENT = 9, 3
# Of middle lightness, so that they can be read on a light and on a dark page.
INK, BLUE, ORANGE = "#7d8590", "#2f81f7", "#e8590c"
LEFT, GAP, RADIUS = 150, 66, 13


def x(state: int) -> int:
    return LEFT + GAP * state


def circle(state: int, y: int, kept: bool, label: str) -> str:
    fill, text = (BLUE, "#ffffff") if kept else ("none", INK)
    return (
        f'<circle cx="{x(state)}" cy="{y}" r="{RADIUS}" fill="{fill}" stroke="{BLUE}"'
        f' stroke-width="1.6"/><text x="{x(state)}" y="{y + 4}" fill="{text}"'
        f' text-anchor="middle" font-size="11">{label}</text>'
    )


def arrow(start: int, end: int, y: int, color: str, dashed: bool = False) -> str:
    sign = 1 if end > start else -1
    a, b = x(start) + sign * (RADIUS + 2), x(end) - sign * (RADIUS + 7)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    head = f"{b + sign * 6},{y} {b},{y - 4} {b},{y + 4}"
    return (
        f'<line x1="{a}" y1="{y}" x2="{b}" y2="{y}" stroke="{color}" stroke-width="1.8"{dash}/>'
        f'<polygon points="{head}" fill="{color}"/>'
    )


def words(text: str, y: int, x: int = 8, color: str = INK, anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{color}" font-size="13" text-anchor="{anchor}">{text}</text>'
    )


def drawing() -> str:
    parts, y = [words("first pass", 44)], 40
    for t in range(STEPS + 1):
        parts.append(circle(t, y, t % SEGMENT == 0 and t < STEPS, f"s{t}"))
        if t < STEPS:
            parts.append(arrow(t, t + 1, y, INK))
    for number, begin in enumerate(reversed(range(0, STEPS, SEGMENT))):
        again, back = y + 76 + number * 104, y + 118 + number * 104
        name = ("last segment", "the one before", "first segment")[number]
        parts.append(words(name, again + 25))
        for t in range(begin, begin + SEGMENT):
            parts.append(circle(t, again, t == begin, f"s{t}"))
            if t < begin + SEGMENT - 1:
                parts.append(arrow(t, t + 1, again, BLUE, dashed=True))
        for t in range(begin, begin + SEGMENT):
            parts.append(arrow(t + 1, t, back, ORANGE))
            parts.append(
                f'<text x="{x(t)}" y="{back + 4}" fill="{ORANGE}" text-anchor="middle"'
                f' font-size="12">s̄{t}</text>'
            )
        parts.append(
            f'<text x="{x(begin + SEGMENT)}" y="{back + 4}" fill="{ORANGE}" text-anchor="middle"'
            f' font-size="12">s̄{begin + SEGMENT}</text>'
        )
    end, bottom = x(STEPS) + 26, 404
    legend = (
        (BLUE, "full: a state that is kept, a snapshot"),
        (BLUE, "dashed: computed again"),
        (ORANGE, "a step’s VJP, with the graph of that one step"),
    )
    for i, (color, text) in enumerate(legend):
        parts.append(words(text, bottom, 8 + (0, 262, 432)[i], color))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {end} {bottom + 14}"'
        ' font-family="system-ui, sans-serif" role="img">\n<title>Nine steps in segments of three:'
        " the first pass keeps states 0, 3 and 6; the way back takes the segments from the last to"
        " the first, computes their states again, and takes one VJP a step</title>\n"
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
