"""What is to be known of steps that another process took, so that they need not be taken again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffopt._loop.extras import Extras
from diffopt._loop.loop import Loop
from diffopt._loop.losses import Losses
from diffopt._loop.progress import Progress
from diffopt._loop.run_terms import digest
from diffopt._loop.shelf import Damaged
from diffopt._loop.snapshots import Snapshot, Snapshots
from diffopt._loop.written import Read, Written, of_tree, tree_of
from diffopt._step.message import MOST
from diffopt._values.tree import Path

#: What a step used and gave besides its loss, of JSON's kinds.
Step = dict[str, Any]


@dataclass
class Passed:
    """The steps taken so far, in order.

    Attributes:
        steps: what each used, and gave besides its loss.
        losses: one for each, in pieces.
        first: by the index of a captured tensor, the step that used it first, its checksum, and
            its place among those that this step used first.
        extras: by position, those of a step that gave any, and to which of their tensors
            derivatives flow. Of steps that were taken here they are the loop's.
        digests: by position, those of ``verify``, where there are any.
    """

    steps: list[Step] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    first: list[tuple[int, str, int]] = field(default_factory=list)
    extras: dict[int, tuple[Any, list[int]]] = field(default_factory=dict)
    digests: dict[int, dict[Path, int]] = field(default_factory=dict)

    def record(self, loop: Loop, stop: int) -> Written:
        """Take note of the steps up to ``stop``. Gives what is to be written of them."""
        start, known = len(self.steps), len(self.first)
        for t in range(start, stop):
            self.steps.append({**loop.captured.use(t), **loop.given(t)})
            self._note_first(loop, t)
        losses = loop.losses.all()
        piece = torch.empty(0) if losses is None else losses[start:stop].clone()
        runs = [(len(list(same)), step) for step, same in groupby(self.steps[start:])]
        tensors = {"losses": piece}
        note = {"runs": runs, "first": self.first[known:]}
        note["extras"] = list(_extras_of(loop, range(start, stop), tensors))
        note["digests"] = list(_digests_of(loop, range(start, stop), tensors))
        return tensors, note

    def _note_first(self, loop: Loop, t: int) -> None:
        new = [i for i in loop.captured.at(t) if i >= len(self.first)]
        self.first += [(0, "", 0)] * len(new)
        for place, i in enumerate(loop.captured.met(new, loop.observer)):
            self.first[i] = t, digest(loop.captured.tensors[i]), place

    @classmethod
    def read(cls, records: Sequence[Read]) -> Passed:
        """From all that was written."""
        passed = cls()
        for tensors, note in records:
            for count, step in note["runs"]:
                passed.steps += [step] * count
            passed.first += [(t, value, place) for t, value, place in note["first"]]
            passed.losses.append(tensors["losses"])
            if len(passed.losses[-1]) != sum(count for count, _ in note["runs"]):
                raise Damaged("a record of steps has not as many losses as steps")
            for t, tree, attached in note["extras"]:
                passed.extras[t] = tree_of(tree, tensors), attached
            for t, *paths in note["digests"]:
                row = tensors[f"digests {t}"].tolist()
                passed.digests[t] = dict(zip(map(tuple, paths), row, strict=True))
        return passed

    def deliver(self, loop: Loop, captured: Sequence[int]) -> None:
        """Put ``loop`` where it was after these steps.

        Args:
            captured: the index that each captured tensor has in ``loop``.
        """
        device = next(iter(loop.start.params.values())).device
        losses = [x.to(device) for piece in self.losses for x in piece]
        for t, (step, loss) in enumerate(zip(self.steps, losses, strict=True)):
            loop.pass_by(t, loss, self.extras.get(t, (None, ())), step, captured)
            if loop.ledger is not None and t in self.digests:
                loop.ledger.note_again(loop.step.first_step + t, self.digests[t])
        self.extras, self.digests = {}, {}


def _extras_of(loop: Loop, steps: range, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Of each step that gave extras, what is to be known of them; their tensors are put apart."""
    for t in steps:
        tree, attached = loop.extras.at(t)
        if tree is None:
            continue
        number, count = loop.step.first_step + t, 0

        def put(x: Tensor, t: int = t) -> str:
            nonlocal count
            name, count = f"aux {t} {count}", count + 1
            tensors[name] = x
            return name

        def refuse(kind: str, number: int = number) -> Exception:
            return NotImplementedError(
                f"aux of step {number} holds a {kind}, which Durable cannot keep: return plain "
                "tensors, numbers and texts, in lists, tuples and dicts"
            )

        yield t, of_tree(tree, put, refuse), attached


def _digests_of(loop: Loop, steps: range, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Of each step with digests, its position and their paths; the digests are put apart."""
    if loop.ledger is None:
        return
    for t in steps:
        if found := loop.ledger.noted(loop.step.first_step + t):
            tensors[f"digests {t}"] = torch.tensor(list(found.values()))
            yield t, *found


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
    wanted = [0, *(t for t, _, _ in passed.first)]
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
            found = trial.losses.all()
            assert found is not None
            _compare(loop.step.first_step + t, found[-1], losses[t])
            used = trial.captured.met(trial.captured.at(t), loop.observer)
            new = [i for i in used if not _has(trial, t, i)]
            for i, (step, value, place) in enumerate(passed.first):
                if step == t:
                    x = trial.captured.tensors[new[place]] if place < len(new) else None
                    if x is None or digest(x) != value:
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


def _has(trial: Loop, t: int, i: int) -> bool:
    """Whether a step before ``t`` used captured tensor ``i``."""
    return any(i in trial.captured.at(before) for before in range(t))


def _compare(step: int, now: Tensor, before: Tensor) -> None:
    now = now.detach().to(before.device)
    eps = torch.finfo(before.dtype).eps
    if not torch.allclose(now, before, rtol=eps**0.5, atol=eps, equal_nan=True):
        raise RuntimeError(
            f"step {step}, computed again, gives another loss ({now.tolist()}, not "
            f"{before.tolist()}) than in the run that is taken up: loss_fn or its data differ. "
            "Call with what the run began with, or empty the folder"
        )
