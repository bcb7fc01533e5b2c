"""A MkDocs hook: formulas become MathML, which browsers draw without any script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex with `generic: true` makes of $...$ and $$...$$.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL
)

# Of \mathrm{d} and \mathrel{+}=: the converter makes an italic letter, and an operator of two.
_UPRIGHT = re.compile(r"<mi>&#x00064;</mi>")
_PLUS_EQUALS = re.compile(r"<mo><mrow><mo>&#x0002B;</mo></mrow></mo><mo>&#x0003D;</mo>")


def on_page_content(content: str, **_: Any) -> str:
    content = content.replace("::</p>", ":</p>")  # docstrings begin a block of code in that way
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    formula = convert(html.unescape(match[2]).strip(), display=display)
    formula = _UPRIGHT.sub('<mi mathvariant="normal">d</mi>', formula)
    formula = _PLUS_EQUALS.sub("<mo>+=</mo>", formula)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula
