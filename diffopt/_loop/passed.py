"""What is to be known of steps that another process took, so that they need not be taken again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt._loop.extras import Extras
from diffopt._loop.loop import Loop
from diffopt._loop.losses import Losses
from diffopt._loop.progress import Progress
from diffopt._loop.run_terms import fingerprint
from diffopt._loop.shelf import Damaged
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._loop.written import foreign
from diffopt._step.message import MOST
from diffopt._values.tree import Path

#: What a step used and gave besides its loss, of JSON's kinds.
Step = dict[str, Any]


class FirstUse(NamedTuple):
    """The position of the step that used a captured tensor first.

    Attributes:
        fingerprint: the tensor's.
        place: its place among those that this step used first.
    """

    step: int
    fingerprint: str
    place: int


@dataclass
class Passed:
    """The steps taken so far, in order.

    Attributes:
        steps: what each used, and gave besides its loss.
        losses: one for each, in pieces.
        first: by the index of a captured tensor, where it was used first.
        extras: by position, those of a step that gave any, and to which of their tensors
            derivatives flow. Of steps that were taken here they are the loop's.
        digests: by position, those of ``verify``, where there are any.
    """

    steps: list[Step] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    first: list[FirstUse] = field(default_factory=list)
    extras: dict[int, tuple[Any, list[int]]] = field(default_factory=dict)
    digests: dict[int, dict[Path, int]] = field(default_factory=dict)

    def record(self, loop: Loop, stop: int) -> dict[str, Any]:
        """Note the steps up to ``stop``, and give a tree to be written of what they used and gave.

        Raises:
            NotImplementedError: a step gave extras that cannot be written.
        """
        start, known = len(self.steps), len(self.first)
        for t in range(start, stop):
            self.steps.append({**loop.captured.use(t), **loop.given(t)})
            new = [i for i in loop.captured.at(t) if i >= len(self.first)]
            self.first += [FirstUse(0, "", 0)] * len(new)
            for place, i in enumerate(loop.captured.met(new, loop.observer)):
                self.first[i] = FirstUse(t, fingerprint(loop.captured.tensors[i]), place)
        losses = loop.losses.all()
        return {
            "runs": [(len(list(same)), step) for step, same in groupby(self.steps[start:])],
            "first": [tuple(use) for use in self.first[known:]],
            "losses": torch.empty(0) if losses is None else losses[start:stop].clone(),
            "extras": {t: x for t in range(start, stop) if (x := _extras(loop, t)) is not None},
            "digests": {t: row for t in range(start, stop) if (row := _digests(loop, t))},
        }

    @classmethod
    def read(cls, records: Iterable[Mapping[str, Any]]) -> Passed:
        """From all that ``record`` gave."""
        passed = cls()
        for record in records:
            for count, step in record["runs"]:
                passed.steps += [step] * count
            passed.first += [FirstUse(*use) for use in record["first"]]
            passed.losses.append(record["losses"])
            if len(record["losses"]) != sum(count for count, _ in record["runs"]):
                raise Damaged("a record of steps has not as many losses as steps")
            passed.extras |= record["extras"]
            passed.digests |= record["digests"]
        return passed

    def deliver(self, loop: Loop, captured: Sequence[int]) -> None:
        """Note these steps in ``loop``, as if it had taken them.

        Args:
            captured: the index that each captured tensor has in ``loop``.
        """
        device = next(iter(loop.start.params.values())).device
        losses = [x.to(device) for piece in self.losses for x in piece]
        for t, (step, loss) in enumerate(zip(self.steps, losses, strict=True)):
            loop.pass_by(t, loss, self.extras.get(t, (None, ())), step, captured)
            if loop.ledger is not None and t in self.digests:
                loop.ledger.digests[loop.step.first_step + t] = self.digests[t]
        self.extras, self.digests = {}, {}


def _extras(loop: Loop, t: int) -> tuple[Any, list[int]] | None:
    """What step ``t`` gave besides its loss, and to which of its tensors derivatives flow."""
    tree, attached = loop.extras.at(t)
    if (kind := foreign(tree)) is not None:
        raise NotImplementedError(
            f"aux of step {loop.step.first_step + t} holds a {kind}, which Durable cannot keep: "
            "return plain tensors, numbers and texts, in lists, tuples and dicts"
        )
    return None if tree is None else (tree, attached)


def _digests(loop: Loop, t: int) -> dict[Path, int]:
    """The digests of step ``t``, by path, where there are any."""
    return {} if loop.ledger is None else loop.ledger.digests.get(loop.step.first_step + t, {})


def meet_again(loop: Loop, passed: Passed, first: Snapshot | None, states: Snapshots) -> list[int]:
    """Take the steps again that used a captured tensor first, to find the tensors of this process.

    Step 0 is taken in any case, and what is taken is compared with the losses noted.

    Returns:
        the index of each captured tensor in ``loop``.

    Raises:
        RuntimeError: a loss or a captured tensor is another than it was.
    """
    indices = [0] * len(passed.first)
    if not passed.steps:
        return indices
    losses = torch.cat(passed.losses)
    wanted = [0, *(use.step for use in passed.first)]
    trial, noted = _without_consequences(loop), 0
    with loop.generators.undisturbed():
        while (t := _next(wanted, noted, loop)) is not None:
            start = max(s for s in states if s <= t)
            trial.losses = Losses(t - start + 1)
            state = loop.restored(first if first and not start else states[start])
            for before in range(start, t):
                state = trial.pass_over(state, before)
            for _ in range(noted, t):
                trial.captured.note_use({"at": [], "parts": {}}, [])
            trial.first(state, t)
            noted = t + 1
            loss = trial.losses.all()
            assert loss is not None
            _compare(loop.step.first_step + t, loss[-1], losses[t])
            used = trial.captured.met(trial.captured.at(t), loop.observer)
            new = [i for i in used if all(i not in trial.captured.at(s) for s in range(t))]
            for i, use in enumerate(passed.first):
                if use.step == t:
                    x = trial.captured.tensors[new[use.place]] if use.place < len(new) else None
                    if x is None or fingerprint(x) != use.fingerprint:
                        raise RuntimeError(
                            f"step {loop.step.first_step + t} of the run that is taken up used a "
                            "tensor that requires grad and that now is another, or has another "
                            "value: call with the tensors as they were, or empty the folder"
                        )
                    (indices[i],) = loop.captured.include([x])
    return indices


def _next(wanted: Sequence[int], noted: int, loop: Loop) -> int | None:
    """The next of the steps that are wanted, here or on another process of a group."""
    after = min((t for t in wanted if t >= noted), default=loop.steps)
    if (group := loop.step.group) is not None:
        after = MOST - group.maximum(MOST - after)
    return after if after < loop.steps else None


def _without_consequences(loop: Loop) -> Loop:
    """``loop``, for steps of which what they give and use is noted apart."""
    trial = copy(loop)
    trial.captured = loop.captured.apart()
    trial.extras, trial.progress, trial.ledger = Extras(), Progress(0, shown=False), None
    return trial


def _compare(step: int, now: Tensor, before: Tensor) -> None:
    now = now.detach().to(before.device)
    eps = torch.finfo(before.dtype).eps
    if not torch.allclose(now, before, rtol=eps**0.5, atol=eps, equal_nan=True):
        raise RuntimeError(
            f"step {step}, computed again, gives another loss ({now.tolist()}, not "
            f"{before.tolist()}) than in the run that is taken up: loss_fn or its data differ. "
            "Call with what the run began with, or empty the folder"
        )
