"""What stands for the step number while a step is traced."""

from __future__ import annotations

from typing import Any

from diffopt._compile.trace import Untraceable


class _StepNumber:
    """Using it is an error."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise Untraceable(
        "loss_fn uses the step number, which would be the same in all steps once compiled: pass "
        "batches instead, such as [torch.tensor(t) for t in range(T)]"
    )


_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_CONVERSIONS = {"__hash__", "__str__", "__format__"}
for _name in {*dir(int)} - {*dir(object)} | _COMPARISONS | _CONVERSIONS:
    setattr(_StepNumber, _name, _refuse)

STEP_NUMBER = _StepNumber()
