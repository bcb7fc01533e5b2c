"""Splitting a step's batch into parts."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from diffopt._values.hidden import hidden_tensors
from diffopt._values.tree import map_tensors, tensors_in

#: What a part's loss is multiplied by.
Coefficient = float | Tensor

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Microbatches:
    """Split each step's batch into parts, so that one part's graph is alive at a time.

    The loss of the step is the mean over the parts' losses, weighted by ``weight(part)``, or their
    sum, and the step is that of one batch. Every tensor of the batch that has dimensions is split
    along its first one, in which they have to agree, into pieces whose lengths differ by one at
    most; 0-d tensors and what is no tensor are given to every part. A batch of fewer examples than
    ``parts`` is split into single examples.

    Args:
        parts: m, how many.
        weight: ``weight(part)``, a number or a 0-d tensor, which may require grad. For a loss that
            is a mean over what a mask leaves, the mask's sum: ``lambda part: part["mask"].sum()``.
            None: the number of examples. A part whose weight is 0 is left out. With ``group``, the
            sum over the parts is the weight of a process's share of the batch.
        reduction: ``"mean"``, or ``"sum"`` where the loss sums over the examples. With ``group``,
            the inner gradients are added up over the processes then.

    Raises:
        TypeError, ValueError: a value is not of its kind, or out of its range.
    """

    parts: int
    weight: Callable[[Any], Any] | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.parts, bool) or not isinstance(self.parts, int):
            raise TypeError(
                f"microbatches is a {type(self.parts).__name__}: pass how many parts, an int, or "
                "diffopt.Microbatches(parts)"
            )
        if self.parts < 1:
            raise ValueError(f"microbatches={self.parts}: pass 1 part or more")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction={self.reduction!r}: pass "mean" or "sum"')
        if self.weight is not None and not callable(self.weight):
            raise TypeError(f"weight is a {type(self.weight).__name__}: pass a function of a part")
        if self.weight is not None and self.reduction == "sum":
            raise ValueError(
                'weight is for a mean over the parts, but reduction is "sum": leave it'
            )

    def split(self, batch: Any, step: int) -> list[Any]:
        """The parts of a batch, which are views of it."""
        if isinstance(batch, UserDict):  # as a tokenizer of Hugging Face gives
            pieces = self.split(batch.data, step)
            return [_with_data(batch, piece) for piece in pieces]
        for leaf, x in hidden_tensors(batch):
            raise TypeError(
                f"microbatches={self.parts} splits the tensors of the batch of step {step}, but it "
                f"is a {type(leaf).__name__} or holds one, with a tensor of shape "
                f"{tuple(x.shape)}, which no pytree shows: pass its tensors in a tuple "
                "or a dict, or let loss_fn capture what the parts share"
            )
        lengths = {x.shape[0] for x in tensors_in(batch) if x.dim()}
        if len(lengths) != 1:
            found = ", ".join(str(tuple(x.shape)) for x in tensors_in(batch)) or "none"
            raise ValueError(
                f"microbatches={self.parts} splits the tensors of the batch of step {step} along "
                f"their first dimension, in which they have to agree, but their shapes are: "
                f"{found}. Let loss_fn capture what the parts share, or pass it as a 0-d tensor"
            )
        (length,) = lengths
        count = max(1, min(self.parts, length))
        ends = [length * k // count for k in range(count + 1)]

        def piece(start: int, stop: int) -> Any:
            return map_tensors(lambda x: x[start:stop] if x.dim() else x, batch)

        return [piece(start, stop) for start, stop in pairwise(ends)]

    def shares(self, parts: Sequence[Any], step: int) -> Shares:
        """What each part counts for in the loss of a step."""
        if self.reduction == "sum":
            return Shares([1.0] * len(parts), None)
        if self.weight is None:
            pytrees = [part.data if isinstance(part, UserDict) else part for part in parts]
            weights: list[Coefficient] = [
                float(next(x.shape[0] for x in tensors_in(part) if x.dim())) for part in pytrees
            ]
            weights = weights if sum(weights) else [1.0] * len(parts)  # of an empty batch
        else:
            weights = [_checked(self.weight(part), step) for part in parts]
        total: Any = sum(weights)
        if not isinstance(total, Tensor) and total == 0:
            raise ValueError(
                f"the weights of the parts of step {step} sum to 0, so that there is no mean: "
                "return a weight above 0 for some part"
            )
        return Shares([w / total if isinstance(w, Tensor) or w else None for w in weights], total)


@dataclass(frozen=True)
class Shares:
    """What the parts of a step's batch count for.

    Attributes:
        coefficients: what the loss of each part is multiplied by; None for a part left out.
        weight: that of the whole batch, beside the batches of other processes; None: losses are
            added up.
    """

    coefficients: list[Coefficient | None]
    weight: Coefficient | None


def _with_data(batch: UserDict[Any, Any], data: Any) -> UserDict[Any, Any]:
    """A batch of the same kind that holds other data."""
    made = copy(batch)
    made.data = data
    return made


def _checked(weight: Any, step: int) -> Coefficient:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(
                f"weight returned a tensor of shape {tuple(weight.shape)} at step {step}: return a "
                "number or a 0-d tensor, such as part['mask'].sum()"
            )
        return weight.reshape(()) if weight.requires_grad else float(weight)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(
            f"weight returned a {type(weight).__name__} at step {step}: return a number or a 0-d "
            "tensor"
        )
    return float(weight)


def parts_of(
    given: Any, model: nn.Module, *, counted: bool, tasks: int | None, compile: bool
) -> Microbatches | None:
    """``given`` as ``Microbatches``, checked.

    Args:
        counted: whether the steps have numbers and no batches.

    Raises:
        TypeError, ValueError, NotImplementedError: batches cannot be split, or the parts would not
            make up the batch.
    """
    if given is None:
        return None
    microbatches = given if isinstance(given, Microbatches) else Microbatches(given)
    m = microbatches.parts
    if counted:
        raise ValueError(
            f"microbatches={m} splits each step's batch, but steps is an int, so that there is "
            "none: pass a list of batches"
        )
    refused = {"tasks": tasks, "compile": compile or None}
    for name, value in refused.items():
        if value is not None:
            raise NotImplementedError(
                f"microbatches={m} and {name}={value} do not go together: leave one of them out"
            )
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS) and module.training:
            where = f"submodule {name!r}" if name else "the model"
            raise NotImplementedError(
                f"{where} is a {type(module).__name__} in training mode, which normalizes by the "
                f"statistics of what it is given, so that microbatches={m} would not equal one "
                "batch: call its eval(), use GroupNorm or LayerNorm, or leave microbatches out"
            )
    return microbatches
