"""What is said on every process of a group where one has failed, or where they have come apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffopt._step.message import Entry


class GroupError(RuntimeError):
    """A process of the group failed, or the processes came apart; every process knows of it."""


def text_of(error: BaseException) -> str:
    """How the other processes quote an error."""
    return f"{type(error).__name__}: {error}"


def know(error: BaseException) -> None:
    """Note that the other processes fail as well, or have been told of ``error``."""
    error.__dict__["_known_to_group"] = True


def is_known(error: BaseException) -> bool:
    """Whether ``know`` was told of ``error``."""
    return isinstance(error, GroupError) or "_known_to_group" in error.__dict__


def refuse_failed(texts: Sequence[str], where: Sequence[str]) -> None:
    """Raise where a process has failed.

    Args:
        texts: by process, what it failed with; empty where it did not.
        where: by process, where it is.
    """
    failed = [
        f"process {rank} stopped {place} with {text}"
        for rank, (text, place) in enumerate(zip(texts, where, strict=True))
        if text
    ]
    if failed:
        raise GroupError(
            f"{'; '.join(failed)}. So this unroll has ended on all processes of the group"
        )


def refuse_apart(entries: Sequence[Entry]) -> None:
    """Raise where the processes are not at one place."""
    if len({entry.place for entry in entries}) > 1:
        where = "; ".join(f"process {rank} is {entry}" for rank, entry in enumerate(entries))
        raise GroupError(
            f"the processes of the group have come apart: {where}. Call unroll and backward as "
            "often on all of them, in the same order, with the same options"
        )


def refuse_different(said: Sequence[Mapping[str, Any]]) -> None:
    """Raise where the processes are about to do something else: what each says, by its name."""
    for key, first in said[0].items():
        for rank, other in enumerate(said):
            if _ordered(other.get(key)) != _ordered(first):
                raise GroupError(
                    f"{key} differ between the processes of the group: "
                    f"{_difference(first, other.get(key), rank)}. Call unroll on all of them with "
                    "the same model, optimizer and options; only the batches may differ"
                )


def _difference(first: Any, other: Any, rank: int) -> str:
    if isinstance(first, Mapping) and isinstance(other, Mapping):
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                first, other = (f"{name!r}: {x.get(name, 'missing')}" for x in (first, other))
                break
        else:
            return f"their order on process {rank} is another"
    return f"process 0 has {first}, process {rank} has {other}"


def _ordered(said: Any) -> Any:
    return list(said.items()) if isinstance(said, Mapping) else said
