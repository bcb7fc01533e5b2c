"""Which transforms of PyTorch are active around the present call."""

from __future__ import annotations

try:
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # pragma: no cover - a PyTorch that has it elsewhere: nothing is refused then
    peek_interpreter_stack = None  # type: ignore[assignment]


def active_transform() -> str | None:
    """The innermost ``torch.func`` transform, such as ``vmap`` or ``grad``; None where none is."""
    level = peek_interpreter_stack() if peek_interpreter_stack is not None else None
    return None if level is None else level.key().name.lower()
