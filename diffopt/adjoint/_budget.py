"""Choose the fastest plan that fits into a number of bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from diffopt import schedule
from diffopt._loop.executor import run_forward
from diffopt._loop.free import free_bytes
from diffopt._loop.loop import Loop
from diffopt._loop.measure import StepBytes, differentiate_first_step, take_first_step
from diffopt._loop.store import Begun
from diffopt._model.shards import Shards
from diffopt._step.group import Group
from diffopt._step.message import MOST
from diffopt._values.state import State
from diffopt.adjoint._base import Checkpointed, Checkpoints
from diffopt.schedule import Plan, check_kind

_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * i) for i, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?|[KMGT]i)B")

_KINDS = ("cpu", "cuda")  # of devices that autocast is for
_BYTES_PER_STEP = 1024  # the loss of a step, its actions in the plan, what it captured
#: For what is not seen: kernels' scratch memory, and gaps between an allocator's blocks. On the CPU
#: the resident memory of the benchmarks' models came to up to 1.21 times what was seen.
_ALLOWANCE = 1.25

_PART_OF_FREE = 4  # the default budget is this part of what is free
#: So much is there in any case: nobody has to be asked whether a small unroll fits.
_ALWAYS = 16 * 2**20

_MOST_KNOWN = 64  # measurements, for each model
# Steps of the same model, function and shapes take the same memory: an outer loop measures once.
# The last is the one used last.
_known: MutableMapping[nn.Module, dict[Hashable, StepBytes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class MemoryBudget(Checkpointed):
    """The fastest way back whose predicted peak fits into a memory budget: the default.

    The unroll holds as many whole graphs as fit, those of the last steps first, since a step whose
    graph is held is never computed again. Of the steps before, the unroll holds as many states as
    fit, and where not even √T states do, as in ``Binomial``. So a short loop is as ``StoreAll``,
    and a long loop fits. The gradient is exact and does not depend on the budget.

    The first step shows how many bytes a state and a step's graph take; the first step is not taken
    twice. The sizes stay with the model, for later calls with the same function and shapes of the
    batches. A function that is made anew, or that is given the step number alone, is measured in
    every call. All steps count as the first.

    What counts is what the unroll allocates beyond what was alive at the call: not the model, the
    batches, or what the caller's own loss of the result takes. A quarter is added for kernels'
    scratch memory and the allocator's gaps, which are not seen. What differentiating a step takes
    is predicted from evaluating one, on the safe side; where by that not all graphs fit, the first
    step is differentiated once more than the gradient needs, to see it.

    Args:
        budget: bytes, or a string such as ``"512MiB"`` or ``"2GiB"``. None: a quarter of what is
            free at the call, on the device, or in the process's memory limit; at least 16 MiB.
        step: what one step takes, where that is known: see ``measured``.

    Raises:
        TypeError: ``budget`` is neither an int nor a string, or ``step`` no ``StepBytes``.
        ValueError: ``budget`` is no such string, or not above 0; or, when unrolling, not even one
            step fits into it: the message has the smallest budget that can.

    Cost: of the whole plan, ``measured(model).plan(T)`` says, the predicted peak included; of
    measuring, about 10 µs for each operation of the first step. A backward pass that is itself to
    be differentiated (``create_graph=True``) is outside the budget: see ``diffopt.unroll``.
    """

    budget: int | str | None = None
    step: StepBytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.bytes  # noqa: B018 - refuses what is not a number of bytes
        if self.step is not None:
            advice = f"leave it out, or write {self!r}.measured(model)"
            check_kind("step", self.step, StepBytes, advice)

    @property
    def bytes(self) -> int | None:
        """The budget in bytes; None where it is what is free at the call that decides."""
        size = self.budget
        if size is None:
            return None
        advice = 'pass a number of bytes, an int, or a string such as "2GiB"'
        check_kind("budget", size, (int, str), advice)
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

    def measured(self, model: nn.Module) -> MemoryBudget:
        """This budget for steps like those of ``model`` in its last unroll with a ``MemoryBudget``.

        Its ``plan(T)`` says how T such steps are done, and in how many bytes. Given to ``unroll``,
        it measures nothing, and takes the steps for such ones. After an unroll whose graphs all
        fitted, what differentiating a step takes is a prediction, on the safe side.

        Raises:
            ValueError: there was no such unroll.
        """
        known = _known.get(model)
        if not known:
            raise ValueError(
                f"how many bytes a step of this {type(model).__name__} takes is not known yet: "
                f"unroll it once with adjoint={self!r}, one step is enough, and ask then"
            )
        return replace(self, step=next(reversed(known.values())))

    def plan(self, steps: int) -> Plan:
        """The plan for ``steps`` steps that take ``step`` each, with its predicted peak.

        Raises:
            ValueError: ``step`` is not known, or the budget is too small.
        """
        if self.step is None:
            raise ValueError(
                f"{self!r} by itself does not know how many bytes a step takes: unroll the model "
                f"once, one step is enough, and write {self!r}.measured(model).plan({steps})"
            )
        return self._fitting(steps, self.step)

    def forward(self, loop: Loop) -> tuple[State, Any]:
        generators, begun = loop.generators.get(), None
        if loop.steps == 0:
            plan = schedule.store_all(0)
        elif together := [
            x for x in (loop.step.group, loop.step.loss.slots.shards) if x is not None
        ]:
            begun, plan = self._agreed(loop, together)
        else:
            begun, measured = (None, self.step) if self.step is not None else self._seen(loop)
            plan = self._fitting(loop.steps, measured)
        state, store = run_forward(loop, plan, self.new_snapshots(), begun)
        return state, Checkpoints(plan, generators, store, loop)

    def _agreed(self, loop: Loop, together: Sequence[Group | Shards]) -> tuple[Begun, Plan]:
        """The plan for the largest step and the least free memory among all processes.

        Every process takes the first step, whatever it knows already. It is not differentiated to
        see more, so a plan that does not store all graphs is one on the safe side.
        """
        begun, step, _ = take_first_step(loop)

        def maximum(number: int) -> int:
            for processes in together:
                number = processes.maximum(number)
            return number

        sizes = ("state", "graph", "workspace", "fixed")
        most: dict[str, Any] = {size: maximum(getattr(step, size)) for size in sizes}
        step = replace(step, **most)
        available = min(self._available(_everything(loop.steps, step), step), MOST)
        least = MOST - maximum(MOST - available)
        return begun, replace(self, budget=least)._fitting(loop.steps, step)

    def _seen(self, loop: Loop) -> tuple[Begun | None, StepBytes]:
        """What a step takes, and the first one if it had to be taken to see that.

        Where all graphs fit by a prediction on the safe side, that will do. Where they do not, the
        first step is differentiated besides.
        """
        known = _known.setdefault(loop.step.loss.slots.model, {})
        key = _signature(loop)
        begun, step = None, None if key is None else known.get(key)
        if step is None or not self._will_do(loop.steps, step):
            begun, step, meter = take_first_step(loop)
            if not self._will_do(loop.steps, step):
                least = _everything(loop.steps, replace(step, workspace=step.graph))
                all_may_fit = least <= self._available(least, step)
                step = differentiate_first_step(loop, begun, step, meter, retain_graph=all_may_fit)
        known.pop(key, None)  # the one used last comes last
        known[key] = step
        while len(known) > _MOST_KNOWN:  # a loss made anew for every call is never met again
            del known[next(iter(known))]
        return begun, step

    def _will_do(self, steps: int, step: StepBytes) -> bool:
        everything = _everything(steps, step)
        return step.differentiated or everything <= self._available(everything, step)

    def _available(self, wanted: int, step: StepBytes) -> int:
        """The bytes of the budget. What is free is asked where ``wanted`` may be too much only."""
        if self.bytes is not None:
            return self.bytes
        if wanted <= _ALWAYS:
            return _ALWAYS
        return max(_ALWAYS, free_bytes(step.devices) // _PART_OF_FREE)

    def _fitting(self, steps: int, step: StepBytes) -> Plan:
        fixed, everything = _fixed(steps, step), _everything(steps, step)
        available = self._available(everything, step)
        if everything <= available:
            return _storing_all(steps, everything)
        sizes = ("state", "graph", "workspace")
        in_bytes = {f"{size}_bytes": getattr(step, size) for size in sizes}
        smallest = _allowed(fixed + schedule.smallest_budget(steps, **in_bytes))
        if available < smallest:
            raise ValueError(self._too_small(steps, step, available, smallest))
        plan = schedule.budget(steps, **in_bytes, budget_bytes=int(available / _ALLOWANCE) - fixed)
        assert plan.predicted_peak_bytes is not None
        return replace(plan, predicted_peak_bytes=_allowed(plan.predicted_peak_bytes + fixed))

    def _too_small(self, steps: int, step: StepBytes, available: int, smallest: int) -> str:
        given = "" if self.budget is not None else f", {available / 2**20:,.2f} MiB at this call,"
        return (
            f"{self!r}{given} is too small for {steps} steps, of which one is predicted to take "
            f"{step.workspace / 2**20:,.2f} MiB to evaluate and differentiate, and a state "
            f"{step.state / 2**20:,.2f} MiB: write MemoryBudget({smallest}), which is "
            f"{smallest / 2**20:,.2f} MiB, or more"
        )


def _fixed(steps: int, step: StepBytes) -> int:
    return step.fixed + _BYTES_PER_STEP * steps


def _everything(steps: int, step: StepBytes) -> int:
    """What holding the graphs of all steps takes."""
    graphs = (steps - 1) * step.graph + step.workspace
    return _allowed(_fixed(steps, step) + graphs + step.state)


@lru_cache(maxsize=8)  # an outer loop asks for the same one again
def _storing_all(steps: int, peak: int) -> Plan:
    return replace(schedule.store_all(steps), predicted_peak_bytes=peak)


def _allowed(size: int) -> int:
    return math.ceil(_ALLOWANCE * size)


def _signature(loop: Loop) -> Hashable | None:
    """Equal for loops whose steps take as much memory; None where there is no telling."""
    with loop.generators.undisturbed():  # batches that are made when they are asked for
        loss = loop.step.loss.signature()
    if loss is None:
        return None
    opt = loop.step.opt
    return (
        loss,
        tuple((path, x.shape, x.dtype, x.device) for path, x in loop.start.tensors().items()),
        loop.step.kind,
        tuple(map(type, opt.rules)),
        tuple((k, type(v)) for group in opt.param_groups for k, v in group.items()),
        loop.step.loss.slots.model.training,
        loop.ledger is None,
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS),
    )
