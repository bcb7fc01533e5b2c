"""Comparing what steps give when they are computed again with what they gave first.

A step that is computed again must be the same function of the same values. Whether it was is seen
from what it gives: its loss, the hyperparameters that callables gave, and the norm of the
gradients. They are there anyway, and are compared up to rounding, once at the end of a backward
pass, so that no step waits for an accelerator.

Limits: infinity and NaN count as one value. A step that changes none of these is not told apart.
``verify=True`` compares every bit of the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt._step.result import Checked

#: Numbers where they can be read without waiting, otherwise a tensor on its device.
_Value = tuple[float, ...] | Tensor


class Check:
    """What each step of a first pass gave, by its number, and whether it gives that again.

    Args:
        eps: the machine epsilon of the roughest dtype that steps are known to compute in. Up to
            the square root of that, and of the loss's own, values count as equal.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps
        self._first: dict[int, dict[str, _Value]] = {}
        self._scale: dict[str, float] = {}
        self._different: dict[int, str] = {}
        self._waiting: list[tuple[int, str, Tensor, Tensor]] = []

    def first(self, step: int, checked: Checked) -> None:
        """Note what ``step`` gives."""
        values = self._first[step] = _values(checked)
        for what, value in values.items():
            if isinstance(value, tuple):
                self._scale[what] = _largest(self._scale.get(what, 0.0), value)

    def noted(self, step: int) -> dict[str, list[float]]:
        """What ``step`` gave besides its loss, as plain numbers."""
        values = self._first.get(step, {})
        return {
            what: list(x) if isinstance(x, tuple) else x.tolist()
            for what, x in values.items()
            if what != "loss"
        }

    def note_again(self, step: int, given: Mapping[str, Any], loss: Tensor) -> None:
        """Note for a step that is not taken what ``noted`` said of it in another process."""
        for what in ("hyperparameter", "gradient"):
            if what in given:
                numbers = [torch.tensor(v, dtype=torch.float64) for v in given[what]]
                plain = loss.device.type == "cpu"
                self._first[step][what] = (
                    tuple(given[what]) if plain else torch.stack(numbers).to(loss)
                )

    def again(self, step: int, checked: Checked) -> None:
        """Compare what ``step`` gives now, if it was noted; ``settle`` says what came of it."""
        first, given = self._first.get(step, {}), _values(checked)
        if first == given and isinstance(given["loss"], tuple):
            return
        for what, now in given.items():
            before = first.get(what)
            if before is None:
                continue
            if isinstance(before, tuple) and isinstance(now, tuple):
                if not _agree(before, now, self._tolerance(checked.loss), self._scale[what]):
                    self._different.setdefault(step, _said(what, before, now))
            elif isinstance(before, Tensor) and isinstance(now, Tensor):
                self._waiting.append((step, what, before, now))
            else:
                self._different.setdefault(step, what)

    def first_losses(self, step: int, losses: Tensor) -> None:
        """Note the losses of the steps from ``step`` on, which give nothing else."""
        if losses.device.type != "cpu" or losses.dim() > 1:
            for i, loss in enumerate(losses):
                self.first(step + i, Checked(loss))
            return
        values = losses.tolist()
        self._first.update((step + i, {"loss": (v,)}) for i, v in enumerate(values))
        self._scale["loss"] = _largest(self._scale.get("loss", 0.0), values)

    def again_losses(self, step: int, losses: Tensor) -> None:
        """Compare the losses of the steps from ``step`` on."""
        for i, loss in enumerate(losses):
            self.again(step + i, Checked(loss))

    def settle(self) -> None:
        """Raise where a step gave something else than at first.

        Raises:
            RuntimeError: so it was; it names the first such step.
        """
        waiting, self._waiting = self._waiting, []
        different, self._different = self._different, {}
        if waiting:
            apart = torch.stack([_differ(a, b, self._tolerance(a)) for _, _, a, b in waiting])
            for (step, what, _, _), differs in zip(waiting, apart.tolist(), strict=True):
                if differs:
                    different.setdefault(step, what)
        if different:
            step = min(different)
            raise RuntimeError(
                f"step {step}, computed again, gives another {different[step]} than in the forward "
                "pass, so that the gradient would be wrong. The step depends on something that has "
                "changed since, or that changes by itself: a name that was bound anew, a number or "
                "a list of Python's that was changed, random numbers that are not PyTorch's, a "
                "hidden state or a counter that is kept from call to call, or a kernel that is "
                "nondeterministic. Pass such a thing inside the batch or keep it in a buffer of "
                "the model; call backward() before changing it; or use diffopt.StoreAll(), which "
                "computes no step again. verify=True names the tensor that differs first"
            )

    def _tolerance(self, x: Tensor) -> float:
        return float(max(self._eps, torch.finfo(x.dtype).eps) ** 0.5)


def _values(checked: Checked) -> dict[str, _Value]:
    loss, grads = checked.loss, checked.grads
    if len(grads) == 1 and not checked.hyper and not checked.aux:
        norm = grads[0]
        if loss.is_cpu and norm.is_cpu and not loss.dim():  # what most steps come to
            return {"loss": (loss.item(),), "gradient": (norm.item(),)}
    values = {"loss": _value([checked.loss])}
    if checked.aux:
        values["aux"] = _value(checked.aux)
    if checked.hyper:
        values["hyperparameter"] = _value(checked.hyper)
    if checked.grads:
        norms = _value(checked.grads)
        if isinstance(norms, tuple):
            values["gradient"] = norms if len(norms) == 1 else (math.hypot(*norms),)
        else:
            values["gradient"] = torch.linalg.vector_norm(norms).reshape(1)
    return values


def _largest(before: float, values: Sequence[float]) -> float:
    """The largest finite magnitude."""
    for value in values:
        if before < abs(value) < math.inf:
            before = abs(value)
    return before


def _value(values: Sequence[Any]) -> _Value:
    first = values[0]
    if len(values) == 1 and isinstance(first, Tensor) and first.is_cpu and not first.dim():
        return (first.item(),)
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, tuple) else (value,)
    tensors = [x for x in flat if isinstance(x, Tensor)]
    if all(x.is_cpu for x in tensors):
        numbers: list[float] = []
        for x in flat:
            if not isinstance(x, Tensor):
                numbers.append(float(x))
            elif x.dim():
                numbers += x.flatten().tolist()
            else:
                numbers.append(x.item())
        return tuple(numbers)
    device, dtype = tensors[0].device, tensors[0].dtype
    parts = [torch.as_tensor(x, dtype=dtype).to(device).flatten() for x in flat]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _agree(a: Sequence[float], b: Sequence[float], tolerance: float, scale: float) -> bool:
    if a == b:
        return True
    return len(a) == len(b) and all(
        x == y
        or not (math.isfinite(x) or math.isfinite(y))
        or abs(x - y) <= tolerance * max(abs(x), abs(y)) + tolerance**2 * scale
        for x, y in zip(a, b, strict=True)
    )


def _differ(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    if a.shape != b.shape:
        return torch.ones((), dtype=torch.bool, device=a.device)
    a, b = (torch.where(x.isfinite(), x, torch.nan) for x in (a, b))
    return ~torch.isclose(b, a, rtol=tolerance, atol=tolerance**2, equal_nan=True).all()


def _said(what: str, before: Sequence[float], now: Sequence[float]) -> str:
    if len(before) != len(now) or len(now) > 1:
        return what
    return f"{what} ({now[0]:.8g}, not {before[0]:.8g})"
