"""Several differentiable optimizers of ``higher`` over one patched module, stepped at once.

Nothing here imports ``higher``: what it has is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from diffopt.optim.options import is_scheduled

Grads = Sequence[Tensor | None]
GradCallback = Callable[[Grads], Grads]


def transform_of(
    callbacks: Sequence[GradCallback | None], of_each: Sequence[set[str]], fast_names: list[str]
) -> Callable[[Any], Any]:
    """The ``grad_callback`` of each optimizer, which takes all gradients in a row.

    In a loop of ``dopt.step(loss)`` over several optimizers, a callback is given no gradient for
    the weights that an earlier one has updated: the loss does not depend on their new values.

    Args:
        callbacks: of each optimizer, or None.
        of_each: the names of the weights that each has.
        fast_names: those of all weights, in the order of the module.
    """

    def transform(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left, results = dict(grads), {}
        for callback, own in zip(callbacks, of_each, strict=True):
            changed: Grads = tuple(left.get(name) for name in fast_names)
            if callback is not None:
                changed = callback(changed)
            named = zip(fast_names, changed, strict=True)
            results.update({n: x for n, x in named if n in left and n in own and x is not None})
            left = {name: x for name, x in left.items() if name not in own}
        return results

    return transform


def check_together(dopts: Sequence[Any], counting: Sequence[Any]) -> None:
    """Refuse optimizers that one unroll cannot step as a loop over them would.

    Args:
        dopts: all of them.
        counting: those that count their steps, for options that are callables.

    Raises:
        ValueError: there are none, some keep a graph and some do not, or their counts differ.
    """
    if not dopts:
        raise ValueError("the list of optimizers is empty: pass at least one")
    if len({dopt._track_higher_grads for dopt in dopts}) > 1:
        raise ValueError(
            "some optimizers of the list have track_higher_grads=True and some False: a graph is "
            "kept for all of them or for none"
        )
    counts = sorted({dopt.steps for dopt in counting})
    if len(counts) > 1 and any(map(_has_callables, counting)):
        raise ValueError(
            f"optimizers of the list have taken {counts[0]} and {counts[-1]} steps, and an unroll "
            "has one step number for the options that are callables of it: give them the same, "
            "dopt.steps = n, or take the steps in which they differ by dopt.step(loss)"
        )


def _has_callables(dopt: Any) -> bool:
    groups = zip(dopt.rule.rules, dopt.param_groups, strict=True)
    return any(is_scheduled(group[key]) for rule, group in groups for key in rule.defaults)
