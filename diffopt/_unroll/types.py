"""Types for annotations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class Model(Protocol):
    """What a ``loss_fn`` is given: the model in a step, and the unroll's result after it.

    For annotations: every ``torch.nn.Module`` is one, and so is an ``Unrolled``. Attributes that
    are not listed here are of any type.

    Examples:
        >>> def loss_fn(model: diffopt.Model, batch: tuple[Tensor, Tensor]) -> Tensor:
        ...     x, y = batch
        ...     return F.cross_entropy(model(x), y) + model.head.weight.square().sum()
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...

    def parameters(self, recurse: bool = ...) -> Iterator[Tensor]: ...

    def named_parameters(
        self, prefix: str = ..., recurse: bool = ..., remove_duplicate: bool = ...
    ) -> Iterator[tuple[str, Tensor]]: ...
