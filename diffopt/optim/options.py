"""The options of an optimizer: their kinds, their ranges, and their values at a step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from diffopt.optim.scalars import values_unknown

#: A hyperparameter: a number, a tensor, or a schedule ``step -> number or tensor``.
Value = float | Tensor | Callable[[int], float | Tensor]

#: The options that choose between rules; all others are numbers, and differentiable.
SWITCHES = frozenset(
    {
        "adjust_lr_fn",
        "amsgrad",
        "capturable",
        "centered",
        "decoupled_weight_decay",
        "differentiable",
        "foreach",
        "fused",
        "maximize",
        "nesterov",
        "ns_steps",
    }
)


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that an option may be.

    Attributes:
        words: the range in words.
        holds: whether it contains all numbers from a lowest to a highest; false of NaN.
        what: what the error of ``torch.optim`` calls the option.
        learned: how an option that is learned stays within the range.
        together: that error names all entries of the tuple.
    """

    words: str
    holds: Callable[[float, float], bool]
    what: str = ""
    learned: str = ""
    together: bool = False


#: The range of one option, or of each entry of a tuple.
Ranges = Mapping[str, Range | tuple[Range, ...]]

ANY = Range("a number, not NaN", lambda low, high: low <= high)
FINITE = Range("finite", lambda low, high: -math.inf < low <= high < math.inf)


def at_least_0(what: str) -> Range:
    """The range of rates, decays and factors that have no bound above."""
    learned = "learn its logarithm, {key}=lambda t: log_{key}.exp()"
    return Range(
        "at least 0 and finite", lambda low, high: 0.0 <= low <= high < math.inf, what, learned
    )


def up_to_1(what: str) -> Range:
    """The range of a smoothing factor."""
    learned = "learn its logit, {key}=lambda t: logit.sigmoid()"
    return Range(
        "at least 0 and at most 1", lambda low, high: 0.0 <= low <= high <= 1, what, learned
    )


def within(**ranges: Range | tuple[Range, ...]) -> Ranges:
    """The ranges of an optimizer's options, by name."""
    return ranges


LR = at_least_0("learning rate")
EPS = at_least_0("epsilon value")
WEIGHT_DECAY = at_least_0("weight_decay value")
MOMENTUM = at_least_0("momentum value")
BETAS = tuple(
    Range(
        "at least 0 and below 1",
        lambda low, high: 0.0 <= low <= high < 1,
        f"beta parameter at index {index}",
        "learn its logit, lambda t: logit.sigmoid()",
    )
    for index in range(2)
)


def arguments(local: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the ``locals()`` of a constructor."""
    return {k: x for k, x in local.items() if k not in ("self", "params", "__class__")}


def items_of(value: Any) -> Sequence[Any]:
    """The entries of an option that is a tuple, or the option itself."""
    return value if isinstance(value, (tuple, list)) else (value,)


def check_kinds(rule: str, ranges: Ranges, key: str, value: Any) -> None:
    """Raise where an option is of a wrong kind, or a number that ``torch.optim`` refuses."""
    if key in SWITCHES:
        _check_switch(rule, key, value)
        return
    allowed = ranges.get(key)
    if isinstance(allowed, tuple):
        _check_tuple(rule, key, value, len(allowed))
    elif _is_listing(value) and (allowed is not None or not isinstance(value, (tuple, list))):
        raise TypeError(
            f"{rule}: {key} is a {type(value).__name__} of {len(value)}: one value for each step "
            f"is {key}=lambda t: {_plural(key)}[t], and one for each of some groups of parameters "
            "an entry of its param group"
        )
    for range_, item in _pairs(allowed, value):
        if isinstance(item, Tensor):
            _check_dtype(rule, key, item)
        elif isinstance(item, Real):
            if not range_.holds(float(item), float(item)):
                shown = ", ".join(map(str, value)) if range_.together else item
                raise ValueError(f"Invalid {range_.what or f'{rule} {key}'}: {shown}")
        elif not callable(item):
            raise TypeError(
                f"{rule}: {key} must be a number, a tensor or a callable from the step number to "
                f"either, not {item!r}"
            )


def check_shapes(rule: str, options: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    """Raise where a tensor option would change the shape of a parameter."""
    for key, value in options.items():
        for item in items_of(value):
            if not (isinstance(item, Tensor) and item.dim() and item.numel() > 1):
                continue
            for name, p in params.items():
                if not broadcasts(item.shape, p.shape):
                    raise ValueError(
                        f"{rule}: {key} of shape {tuple(item.shape)} does not broadcast to "
                        f"parameter {name!r} of shape {tuple(p.shape)}: one value for each step is "
                        f"{key}=lambda t: {_plural(key)}[t], one for each task (tasks=N) "
                        f"{key}=lambda t: {_plural(key)}, and one for all a 0-d tensor; one for "
                        "each entry takes a param group for each parameter"
                    )


def values_at(
    rule: str, ranges: Ranges, keys: Iterable[str], group: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """The options of a param group at a step: callables called, tensors as they are.

    No tensor on an accelerator is looked at, which would wait for it, and none while a step is
    traced or batched.

    Raises:
        TypeError: a callable returned no number or tensor.
        ValueError: a value is out of its range.
    """
    values = {}
    for key in keys:
        value = group[key]
        if key not in SWITCHES:
            allowed = ranges.get(key)
            if isinstance(value, (tuple, list)):
                pairs = enumerate(_pairs(allowed, value))
                value = tuple(_item_at(rule, f"{key}[{i}]", *pair, step) for i, pair in pairs)
            else:
                value = _item_at(rule, key, allowed or ANY, value, step)
        values[key] = value
    return values


def is_scheduled(value: Any) -> bool:
    """Whether an option, or an entry of it, is a callable of the step number."""
    return any(map(callable, items_of(value)))


def _item_at(rule: str, key: str, allowed: Any, option: Any, step: int) -> Any:
    kind = type(option)
    if kind is float or kind is int:
        if not allowed.holds(option, option):
            raise _out_of_range(rule, key, allowed, option, step)
        return option
    value = option(step) if callable(option) else option
    if isinstance(value, Tensor):
        _check_dtype(rule, key, value)
        if key == "lr" and value.numel() > 1:
            allowed = FINITE  # with a rate for each entry its direction is learned, too: Meta-SGD
        if not value.is_floating_point():  # whose arithmetic may wrap around
            value = value.to(torch.get_default_dtype())
        if not _can_be_read(value):
            return value
        if (wrong := _outside(value, allowed)) is not None:
            raise _out_of_range(rule, key, allowed, wrong, step)
        return value
    if not isinstance(value, Real):
        raise TypeError(
            f"{rule}: {key}, called with step {step}, returned {value!r}: return a number or a "
            "tensor"
        )
    # Among real numbers are bools and NumPy's scalars.
    number: Any = value
    number = int(number) if isinstance(number, int) else float(number)
    return _item_at(rule, key, allowed, number, step)


def _out_of_range(rule: str, key: str, allowed: Range, value: float, step: int) -> ValueError:
    advice = f": {allowed.learned.format(key=key)}" if allowed.learned else ""
    return ValueError(
        f"{rule}: {key} is {value} at step {step}, and has to be {allowed.words}{advice}"
    )


#: Large tensors found within a range, by identity, with the version that they had then.
_WITHIN: dict[tuple[int, str], tuple[weakref.ref[Tensor], int]] = {}


def _outside(x: Tensor, allowed: Range) -> float | None:
    """A value that the range does not contain. A large tensor is looked at once a version."""
    if x.numel() == 1:
        value: float = x.detach().item()
        return None if allowed.holds(value, value) else value
    place = id(x), allowed.words
    known, version = _WITHIN.get(place, (None, -1))
    current = -2 if x.is_inference() else x._version
    if known is not None and known() is x and version == current:
        return None
    low, high = (end.item() for end in x.detach().aminmax())
    if not allowed.holds(low, high):
        return low if not allowed.holds(low, low) else high
    _WITHIN[place] = weakref.ref(x, lambda _: _WITHIN.pop(place, None)), current
    return None


def _can_be_read(x: Tensor) -> bool:
    """Whether ``x`` has values that can be read without waiting."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.numel() > 0
        and not values_unknown()
        and x.untyped_storage().nbytes() > 0
    )


def _check_switch(rule: str, key: str, value: Any) -> None:
    if isinstance(value, Tensor) or callable(value):
        raise NotImplementedError(
            f"{rule}: {key} is a switch and has no derivative: pass a bool, not a "
            f"{type(value).__name__}"
        )
    if isinstance(value, Collection) and key != "adjust_lr_fn":  # a str is one, and is true
        raise TypeError(f"{rule}: {key} is a switch: pass a bool, not {value!r}")


def _check_tuple(rule: str, key: str, value: Any, length: int) -> None:
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{rule}: {key} is {_shown(value)}: pass a tuple of {length}, each entry a number, a "
            "tensor or a callable from the step number to either"
        )
    if len(value) != length:
        raise ValueError(f"{rule}: {key} has {len(value)} entries: pass a tuple of {length}")


def _check_dtype(rule: str, key: str, value: Tensor) -> None:
    if value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"{rule}: {key} is a tensor of {value.dtype}: pass one of real numbers")


def _pairs(allowed: Range | tuple[Range, ...] | None, value: Any) -> Sequence[tuple[Range, Any]]:
    """Each entry of an option, or the option itself, with its range."""
    if not isinstance(value, (tuple, list)):
        return ((allowed if isinstance(allowed, Range) else ANY, value),)
    ranges = allowed if isinstance(allowed, tuple) else (allowed or ANY,) * len(value)
    return list(zip(ranges, value, strict=True))


def _is_listing(value: Any) -> bool:
    array = not isinstance(value, Tensor) and getattr(value, "ndim", 0) > 0
    return isinstance(value, (tuple, list)) or array


def _plural(key: str) -> str:
    return "rates" if key == "lr" else "values"


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind}" if isinstance(value, Tensor) or callable(value) else repr(value)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be multiplied with one of shape ``to`` and not widen it."""
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )
