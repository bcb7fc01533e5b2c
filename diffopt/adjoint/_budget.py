"""Choose the fastest plan that fits into a number of bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffopt import schedule
from diffopt._loop.loop import Loop
from diffopt._loop.measure import Sizes, measure
from diffopt.adjoint._base import Checkpointed
from diffopt.schedule import Plan

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * i) for i, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?|[KMGT]i)B")

_KINDS = ("cpu", "cuda")  # of devices that autocast is for
_BYTES_PER_STEP = 1024  # the loss of a step, its actions in the plan, what it captured
#: For what is not seen: kernels' scratch memory, and gaps between an allocator's blocks. On the CPU
#: the resident memory of the benchmarks' models came to up to 1.21 times what was seen.
_ALLOWANCE = 1.25

_MOST_KNOWN = 64  # measurements, for each model
# Steps of the same model, function and shapes take the same memory: an outer loop measures once.
_measured: MutableMapping[nn.Module, dict[Hashable, Sizes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class MemoryBudget(Checkpointed):
    """The fastest way back whose predicted peak fits into a memory budget.

    One step is taken on trial, once for each model, loss function and shape of the batches, to see
    how many bytes a state and a step's graph take; for a function that is made anew, or that is
    given the step number alone, in every call. Then as many whole graphs are held as fit, since a
    step whose graph is held is never computed again, those of the last steps first; of the steps
    before, as many states as fit, and where not even √T states do, as in ``Binomial``. The gradient
    is exact and does not depend on the budget.

    What counts is what the unroll allocates beyond what was alive at the call: not the model, the
    batches, or what the caller's own loss of the result takes. A quarter is added for kernels'
    scratch memory and the allocator's gaps, which are not seen. All steps are taken to be like the
    first.

    Args:
        budget: bytes, or a string such as ``"512MiB"`` or ``"2GiB"``.

    Raises:
        TypeError: ``budget`` is neither an int nor a string.
        ValueError: it is no such string, or not above 0; or, when unrolling, not even one step fits
            into it: the message has the smallest budget that can.

    Cost: of the whole plan, ``plan(T)`` says after the first unroll, the predicted peak included;
    of the trial, an evaluation and a vector-Jacobian product. A backward pass that is itself to be
    differentiated (``create_graph=True``) is outside the budget: see ``diffopt.unroll``.
    """

    budget: int | str
    _last: list[Sizes] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.bytes  # noqa: B018 - refuses what is not a number of bytes

    @property
    def bytes(self) -> int:
        """The budget in bytes."""
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, str)):
            raise TypeError(
                f"budget is a {type(self.budget).__name__}: pass a number of bytes, an int, or a "
                'string such as "2GiB"'
            )
        size = self.budget
        if isinstance(size, str):
            match = _SIZE.fullmatch(size.strip())
            if match is None:
                raise ValueError(
                    f'budget={size!r} is not a number of bytes: write it like "512MiB" or "2GiB"'
                )
            size = int(float(match[1]) * _UNITS[match[2]])
        if size <= 0:
            raise ValueError(f"budget={self.budget!r} holds nothing: pass more than 0 bytes")
        return size

    def plan(self, steps: int) -> Plan:
        """The plan for steps like those measured last, with its predicted peak.

        Raises:
            ValueError: nothing was measured yet, or the budget is too small.
        """
        if not self._last:
            raise ValueError(
                f"{self!r} does not know yet how many bytes a step takes: unroll with it once, "
                "one step is enough, and ask for the plan then"
            )
        return self._fitting(steps, self._last[0])

    def plan_for(self, loop: Loop) -> Plan:
        if loop.steps == 0:
            return schedule.store_all(0)
        self._last[:] = [_sizes(loop)]
        return self.plan(loop.steps)

    def _fitting(self, steps: int, sizes: Sizes) -> Plan:
        fixed = sizes.fixed + _BYTES_PER_STEP * steps
        in_bytes = {
            "state_bytes": sizes.state,
            "graph_bytes": sizes.graph,
            "workspace_bytes": sizes.workspace,
        }
        smallest = _allowed(fixed + schedule.smallest_budget(steps, **in_bytes))
        if self.bytes < smallest:
            raise ValueError(
                f"{self!r} is too small for {steps} steps, of which one takes "
                f"{sizes.workspace / 2**20:,.2f} MiB to evaluate and differentiate, and a state "
                f"{sizes.state / 2**20:,.2f} MiB: write MemoryBudget({smallest}), which is "
                f"{smallest / 2**20:,.2f} MiB, or more"
            )
        plan = schedule.budget(steps, **in_bytes, budget_bytes=int(self.bytes / _ALLOWANCE) - fixed)
        assert plan.predicted_peak_bytes is not None
        return replace(plan, predicted_peak_bytes=_allowed(plan.predicted_peak_bytes + fixed))


def _allowed(size: int) -> int:
    return math.ceil(_ALLOWANCE * size)


def _sizes(loop: Loop) -> Sizes:
    """Measure a step of ``loop``, if no such step has been measured before."""
    loss = loop.step.loss.signature()
    if loss is None:
        return measure(loop)
    model, opt = loop.step.loss.slots.model, loop.step.opt
    key = (
        loss,
        tuple((path, x.shape, x.dtype, x.device) for path, x in loop.start.tensors().items()),
        tuple(map(type, opt.rules)),
        tuple((k, type(v)) for group in opt.param_groups for k, v in group.items()),
        model.training,
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS),
    )
    known = _measured.setdefault(model, {})
    if key not in known:
        while len(known) >= _MOST_KNOWN:  # a loss made anew for every call is never met again
            del known[next(iter(known))]
        known[key] = measure(loop)
    return known[key]
