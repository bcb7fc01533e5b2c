"""Arguments of a wrong kind or value: what was passed, and what to write instead."""

from __future__ import annotations

from typing import Any

Kinds = type | tuple[type, ...]


def check_kind(name: str, value: object, kinds: Kinds, advice: str) -> None:
    """Raise a ``TypeError`` unless ``value`` is of one of ``kinds``; a bool counts as no number."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} is a {type(value).__name__}: {advice}")


def check_int(name: str, value: Any, minimum: int, advice: str) -> None:
    """Raise unless ``value`` is an int, bools excepted, and ``minimum`` at least."""
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise TypeError(f"{name} is {value!r}, of type {kind}, but must be an int: {advice}")
    if value < minimum:
        raise ValueError(f"{name} is {value}, but must be at least {minimum}: {advice}")
