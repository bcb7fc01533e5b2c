"""Evaluating the user's loss with given values standing in the module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import compress
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor

from diffopt._derivatives.sharded import whole
from diffopt._model.buffers import BufferStandIns, CopiedBuffers
from diffopt._model.precision import Precision
from diffopt._model.slots import ModuleSlots
from diffopt._step.observe import changed_in_place
from diffopt._step.tasks import check_leads, over_tasks
from diffopt._torch.dtensors import is_dtensor
from diffopt._values.tree import differ, tensors_in

#: The loss, the user's extras, and the buffers as the evaluation left them.
Evaluation = tuple[Tensor, Any, dict[str, Tensor]]

_NOTHING = nullcontext()


class InnerLoss:
    """The loss of one unroll as a function of parameters, buffers and the position in the loop.

    Args:
        slots: where the inner parameters and the buffers live in the user's module.
        loss_fn: ``loss_fn(model, item)``, the user's function.
        item_at: the batch, or the step number, at a position of the loop.
        first_step: the step number of position 0, for messages.

    Attributes:
        tasks: N, where it is a loss of N tasks.
        scale: what the loss is multiplied by before its gradient is taken.
    """

    tasks: int | None = None
    scale: float | Tensor = 1.0

    def __init__(
        self,
        slots: ModuleSlots,
        loss_fn: Callable[[Any, Any], Any],
        item_at: Callable[[int], Any],
        first_step: int,
    ) -> None:
        self.slots = slots
        self.buffers: BufferStandIns = BufferStandIns(slots)
        self.loss_fn = loss_fn
        self.precision = Precision(slots.inner)
        self._untouched = _Untouched()
        self.item_at = item_at
        self._first_step = first_step

    def later(self, by: int) -> Self:
        """This loss with the positions counted from ``by`` on."""
        item_at, loss = self.item_at, copy(self)
        loss.item_at = lambda t: item_at(by + t)
        loss._first_step = self._first_step + by
        return loss

    def signature(self) -> Hashable:
        """Equal for losses that take as much memory; None where there is no telling.

        That is the same function, of batches of the same shapes. What a function of the step
        number alone works on is not known.
        """
        tensors = list(tensors_in(self.item_at(0)))
        if not tensors:
            return None
        function = self.loss_fn
        reference = weakref.WeakMethod if isinstance(function, MethodType) else weakref.ref
        try:
            known = reference(function)
            hash(known)
        except TypeError:  # an object that has no hash, or of which there are no weak references
            return None
        return known, tuple((x.shape, x.dtype, x.device) for x in tensors)

    def of_item(self, item: Any) -> Self:
        """This loss with one batch, or step number, for all positions."""
        loss = copy(self)
        loss.item_at = lambda t: item
        return loss

    def traced(self, item: Any) -> Self:
        """``of_item``, with nothing decided by the values of tensors, which a tracer has not."""
        loss = self.of_item(item)
        loss.buffers = CopiedBuffers(self.buffers.tracked)
        loss._untouched = _Untouched(compare=False)
        return loss

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
        within: AbstractContextManager[Any] = _NOTHING,
    ) -> Evaluation:
        """Evaluate; the module keeps the values until the next evaluation.

        Args:
            within: what the batch is asked for and the user's function is called in.
        """
        step = self._first_step + t
        buffers = self.slots.completed(buffers, step)
        stand_ins = self.buffers.stand_in(buffers)
        params = self.precision.narrowed(params)
        before = self._untouched.before(params)
        with within:
            out = self._call(params, stand_ins, self.item_at(t), step)
        loss, aux, left = self._taken(out, stand_ins, step)
        self._untouched.check(params, before, step)
        for name in self.slots.written_shards():
            raise changed_in_place(name, step)
        return loss, aux, self.buffers.after(buffers, stand_ins, left, step)

    def total(self, loss: Tensor) -> Tensor:
        """The scalar whose gradient is taken."""
        if isinstance(self.scale, Tensor):
            return loss * self.scale.to(loss.dtype)
        return loss if self.scale == 1 else loss * self.scale

    def transform_grads(
        self, transform: Callable[[dict[str, Tensor]], Any], grads: dict[str, Tensor]
    ) -> Any:
        """The user's ``grad_transform`` of the inner gradients."""
        return transform(grads)

    def transform_with_model(
        self,
        transform: Callable[..., Any],
        grads: dict[str, Tensor],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
    ) -> Any:
        """The user's ``grad_transform`` of the inner gradients, the model and the batch.

        Buffers that the transform advances by calling the model are left as they were.
        """
        self.slots.load(
            self.precision.narrowed(params), {name: x.clone() for name, x in buffers.items()}
        )
        return transform(grads, self.slots.model, self.item_at(t))

    def _call(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], item: Any, step: int
    ) -> Any:
        """What the user's function returns."""
        self.slots.load(params, buffers)
        return self.loss_fn(self.slots.model, item)

    def _taken(self, out: Any, buffers: Mapping[str, Tensor], step: int) -> Evaluation:
        """The evaluation, of what ``_call`` returned."""
        loss, aux = loss_and_aux(out, step)
        return loss, aux, self.slots.read_buffers()


class TaskLosses(InnerLoss):
    """The losses of N tasks at once, shape (N,): every tensor leads with the task dimension.

    Only the evaluation is mapped, by ``torch.vmap``. As no task sees another's parameters, the
    gradient of the sum holds every task's own, and the optimizers' rules, being elementwise, need
    not know.
    """

    tasks: int

    def __init__(
        self,
        slots: ModuleSlots,
        loss_fn: Callable[[Any, Any], Any],
        item_at: Callable[[int], Any],
        first_step: int,
        tasks: int,
    ) -> None:
        super().__init__(slots, loss_fn, item_at, first_step)
        self.tasks = tasks

    def total(self, loss: Tensor) -> Tensor:
        return loss.sum()

    def transform_grads(
        self, transform: Callable[[dict[str, Tensor]], Any], grads: dict[str, Tensor]
    ) -> Any:
        result: list[Any] = []

        def one(grads: dict[str, Tensor]) -> dict[str, Tensor]:
            result[:] = [transform(grads)]
            if not isinstance(result[0], Mapping):
                return {}
            return {name: g for name, g in result[0].items() if isinstance(g, Tensor)}

        mapped = torch.vmap(one, randomness="different")(grads)
        return _with_tensors(result[0], mapped)

    def transform_with_model(
        self,
        transform: Callable[..., Any],
        grads: dict[str, Tensor],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        t: int,
    ) -> Any:
        result: list[Any] = []

        def one(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], tree: Any) -> Any:
            self.slots.load(params, buffers)
            own, item = tree
            result[:] = [transform(own, self.slots.model, item)]
            if not isinstance(result[0], Mapping):
                return {}
            return {name: g for name, g in result[0].items() if isinstance(g, Tensor)}

        copies = {name: x.clone() for name, x in buffers.items()}
        params = self.precision.narrowed(params)
        try:
            mapped = over_tasks(one, params, copies, (grads, self.item_at(t)))
        except RuntimeError as error:
            if "does not have a grad_fn" in str(error):
                raise RuntimeError(
                    f"with tasks={self.tasks}, grad_transform runs under torch.vmap, where "
                    "torch.autograd.grad sees no graph: take the gradient with torch.func.grad, "
                    "which works without tasks, too"
                ) from error
            raise
        return _with_tensors(result[0], mapped)

    def _call(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], item: Any, step: int
    ) -> Evaluation:
        check_leads(item, self.tasks, f"the batch of step {step}")

        def one(
            params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], item: Any
        ) -> Evaluation:
            out = InnerLoss._call(self, params, buffers, item, step)
            loss, aux, left = InnerLoss._taken(self, out, buffers, step)
            # What was changed in place was changed in the memory that is mapped over.
            replaced = {name: x for name, x in left.items() if x is not buffers[name]}
            return loss, aux, replaced

        evaluation: Evaluation = over_tasks(one, params, buffers, item)
        self.slots.loaded = None  # tensors of the mapping, which nothing can read any more
        return evaluation

    def _taken(self, out: Any, buffers: Mapping[str, Tensor], step: int) -> Evaluation:
        loss, aux, replaced = out
        return loss, aux, {**buffers, **replaced}


def _with_tensors(result: Any, mapped: Mapping[str, Tensor]) -> Any:
    """What a transform returned, with the tensors of all tasks in it."""
    if not isinstance(result, Mapping):
        return result
    return {name: mapped.get(name, g) for name, g in result.items()}


class _Untouched:
    """Refuses a loss that changes parameters in place.

    That change would have no derivative, and be made in the memory of a snapshot or of the
    caller's own parameters. Version counters show it, except where it is made through ``.data``;
    so the first evaluation is compared by value.
    """

    def __init__(self, *, compare: bool = True) -> None:
        self._compare = compare

    def before(self, params: Mapping[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        """The versions of the parameters, and copies where those are to be compared."""
        copies = [x.detach().clone() for x in params.values()] if self._compare else []
        return [x._version for x in params.values()], copies

    def check(
        self, params: Mapping[str, Tensor], before: tuple[list[int], list[Tensor]], step: int
    ) -> None:
        """Raise where they have changed since ``before``."""
        versions, copies = before
        if not copies and versions == [x._version for x in params.values()]:
            return
        changed = [v != x._version for v, x in zip(versions, params.values(), strict=True)]
        if copies:
            self._compare = False
            now = [x.detach() for x in params.values()]
            changed = [a or b for a, b in zip(changed, differ(copies, now), strict=True)]
            for x, copy_ in compress(zip(now, copies, strict=True), changed):
                x.copy_(copy_)
        for name in compress(params, changed):
            raise changed_in_place(name, step)


def loss_and_aux(out: Any, step: int) -> tuple[Tensor, Any]:
    """What a ``loss_fn`` returned, checked: a scalar loss and anything beside it."""
    aux = None
    if isinstance(out, tuple) and len(out) == 2:
        out, aux = out
    elif isinstance(out, Tensor):
        pass
    elif isinstance(out, Mapping) and "loss" in out:
        out = out["loss"]
    elif isinstance(getattr(out, "loss", None), Tensor):
        out = out.loss  # the convention of models that compute their own loss
    if is_dtensor(out):
        out = whole(out)
    if aux is not None and any(map(is_dtensor, tensors_in(aux))):
        raise NotImplementedError(
            f"the loss of step {step} returned a DTensor in aux, which may hold no other than "
            "plain tensors: return its x.full_tensor()"
        )
    if not isinstance(out, Tensor):
        raise TypeError(
            f"the loss of step {step} is a {type(out).__name__}: loss_fn has to return a scalar "
            "tensor, or the pair (loss, aux)"
        )
    if out.numel() != 1:
        raise ValueError(
            f"the loss of step {step} has shape {tuple(out.shape)}, which is not a scalar: "
            "reduce it, for example with .mean()"
        )
    if out.is_complex():
        raise ValueError(
            f"the loss of step {step} is complex ({out.dtype}), and a gradient descends in real "
            "numbers: return a real one, such as its .abs() or .real"
        )
    return out if out.dim() == 0 else out.reshape(()), aux
