"""The table of models in the documentation, made from the tables that the tests run over.

    python tests/models_table.py

writes it anew; ``test_models_table.py`` fails where it is not what the tests show.
"""

from __future__ import annotations

from pathlib import Path

from layers import LAYERS
from test_models import EXACT
from test_models_refused import REFUSED

PAGE = Path(__file__).resolve().parents[1] / "docs/pages/models.md"
BEGIN = "<!-- made by tests/models_table.py: begin -->\n"
END = "<!-- made by tests/models_table.py: end -->"


def table() -> str:
    rows = [(kind, "exact") for kind in EXACT]
    rows += [(kind, f"refused: {words}") for kind, (_, _, words) in REFUSED.items()]
    layers = [
        (
            f"`{layer.name}`",
            f"refused: {layer.refused}"
            if layer.refused
            else "exact, to rounding"
            if layer.rounds
            else "exact",
        )
        for layer in LAYERS
    ]
    return (
        "\n### Kinds of models\n\n"
        + _markdown("model", rows)
        + "\n### Layers of `torch.nn`\n\n"
        + _markdown("layer", layers)
        + "\n"
    )


def _markdown(what: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {result} |" for name, result in rows]
    return "\n".join([f"| {what} | meta-gradient |", "|---|---|", *lines]) + "\n"


def renewed(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
