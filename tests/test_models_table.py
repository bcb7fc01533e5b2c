"""The documentation's table of models says what the tests show."""

from __future__ import annotations

from models_table import BEGIN, END, PAGE, renewed


def test_the_table_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page
    assert END in page
    assert page == renewed(page), "run python tests/models_table.py"
