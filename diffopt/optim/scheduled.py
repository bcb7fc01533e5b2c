"""A ``torch.optim.lr_scheduler`` as a function of the step number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from diffopt.schedule import check_int


def from_scheduler(
    make: Callable[[torch.optim.Optimizer], LRScheduler],
    steps: int,
    lr: float,
    *,
    option: str = "lr",
    **options: Any,
) -> Callable[[int], Any]:
    """The rates of a ``torch.optim`` learning-rate scheduler, as a schedule ``step -> rate``.

    A scheduler changes an optimizer in place, which an unroll does not see: it works with the
    options as they are at the call. So the scheduler is run once, here, on an optimizer that is
    thrown away, as in ``for t in range(steps): opt.step(); scheduler.step()``; what it gives is
    PyTorch's own numbers, for any scheduler and any chain of them.

    Args:
        make: makes the scheduler of an optimizer with one param group:
            ``lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)``.
        steps: for how many steps.
        lr: the base learning rate, as the optimizer would be given it.
        option: the option to read, for schedulers that also change another: ``"momentum"`` with
            ``OneCycleLR``.
        options: further options of the optimizer that is thrown away, a ``torch.optim.SGD``, such
            as ``momentum=0.9``.

    Returns:
        a function of the step number, for ``lr=`` of a ``diffopt`` optimizer. The rates are
        numbers; for a rate to learn, scale one that was made with ``lr=1.0``:
        ``lr=lambda t: base * shape(t)``.

    Raises:
        TypeError: ``make`` gives no scheduler, or ``ReduceLROnPlateau``, whose rates depend on the
            losses.
        ValueError: ``steps`` is negative, the option is not there, or, when the schedule is
            called, the step number is ``steps`` or more.

    Examples:
        >>> import torch, diffopt
        >>> make = lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        >>> schedule = diffopt.from_scheduler(make, 5, lr=0.4)
        >>> [schedule(t) for t in range(5)]
        [0.4, 0.4, 0.2, 0.2, 0.1]
        >>> model = torch.nn.Linear(2, 2)
        >>> inner = diffopt.SGD(model.parameters(), lr=schedule)
    """
    check_int("steps", steps, 0, "pass how many steps there are")
    if not callable(make):
        raise TypeError(
            f"make is a {type(make).__name__}: pass a function of an optimizer that returns the "
            "scheduler, such as lambda opt: StepLR(opt, step_size=10)"
        )
    opt = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=lr, **options)
    scheduler = make(opt)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau sets the rate by the losses, so it is no function of the step "
            "number: change opt.param_groups between unrolls instead"
        )
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"make gives a {type(scheduler).__name__}: pass a function of an optimizer that "
            "returns a torch.optim.lr_scheduler, such as lambda opt: StepLR(opt, step_size=10)"
        )
    if len(opt.param_groups) != 1 or option not in opt.param_groups[0]:
        raise ValueError(f"the optimizer of the scheduler has no option {option!r}")
    values: list[float] = []
    for _ in range(steps):
        values.append(float(opt.param_groups[0][option]))
        opt.step()
        scheduler.step()

    def schedule(t: int) -> float:
        if not 0 <= t < steps:
            raise ValueError(
                f"step {t} is beyond this schedule, which was made for {steps} steps: call "
                "diffopt.from_scheduler with more"
            )
        return values[t]

    return schedule
