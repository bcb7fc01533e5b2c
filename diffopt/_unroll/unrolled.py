"""What an unroll gives back: trained values, connected to what they were trained from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

from diffopt._model.modes import Modes
from diffopt._model.slots import ModuleSlots
from diffopt._model.standing import stand_again_in_backward, standing
from diffopt._step.tasks import Values, check_leads, over_tasks
from diffopt._torch.autograd import present_sequence
from diffopt._unroll import saved
from diffopt._unroll.stand_in import StandIn, contained, refuse_setting
from diffopt._values.state import State
from diffopt._values.tree import map_tensors, tensors_in
from diffopt.optim.convert import Optimizers

P = ParamSpec("P")
R = TypeVar("R")

_ATTRIBUTES = {"params", "buffers", "opt_state", "losses", "aux", "step", "tasks"}


class Unrolled(StandIn):
    """The result of ``diffopt.unroll``: the model with the trained values, and what led there.

    It stands where the model does: ``loss_fn(fast, batch)`` works for every loss that works on the
    model. ``fast(x)``, ``fast.head(x)``, ``fast.embed(x)``, ``fast.weight``, ``fast.parameters()``,
    ``fast[0]``, plain attributes and submodules of submodules are what they are on the model, with
    the trained values, differentiable, and with ``tasks=N`` mapped over the leading dimension. None
    of it advances ``buffers``: each call works on a copy. It runs in the mode the model is in at
    that time, so ``model.eval()`` before ``fast(x)`` serves; ``fast.eval()`` and ``fast.train()``
    set flags for this result alone.

    The names below, and ``apply``, ``load_into``, ``detach``, ``state_dict``, ``load_state_dict``,
    are this object's own where the model has them, too: ``fast.buffers`` is a dict, and a submodule
    called ``step`` is reached by ``fast.apply(lambda model, x: model.step(x), x)``. What would
    change the module (``fast.to(...)``, hooks, assigning to an attribute) is an
    ``AttributeError``; ``fast.apply(loss_fn, batch)`` serves a loss that does that.

    Attributes:
        params: every parameter that the optimizer held, by its ``named_parameters()`` name, each
            with the shape and dtype of the model's. Those that do not require grad are the
            model's own, unchanged.
        buffers: all buffers of the model after the last step, by name.
        losses: the loss before each update, shape (T,), differentiable.
        aux: what ``loss_fn`` returned beside the loss, one per step, with its tensors connected: an
            outer loss may use every step's, at the cost of their values and no graph. None where it
            returned nothing else.
        opt_state: by parameter name, then by ``torch.optim``'s name for the entry. Of the
            parameter's shape and dtype, or 0-dimensional, as there; float32 for parameters in
            bfloat16 and float16.
        step: inner steps taken, those of ``initial`` included.
        tasks: N where it was unrolled with ``tasks=N``: parameters, buffers and the state of the
            optimizer then lead with N (step counts apart), and ``losses`` is (N, T).
    """

    def __init__(
        self,
        slots: ModuleSlots,
        state: State,
        params: Mapping[str, Tensor],
        losses: Tensor,
        aux: list[Any],
        step: int,
        tasks: int | None = None,
    ) -> None:
        self._slots = slots
        self._inner = [*state.params, *slots.constants]  # trained, here or by one that led here
        self._flags: list[bool] | None = None
        self.params: dict[str, Tensor] = {**params, **state.params}  # in the model's order
        self.buffers: dict[str, Tensor] = dict(state.buffers)
        self.opt_state: dict[str, dict[str, Tensor]] = {
            name: dict(entries) for name, entries in state.opt.items()
        }
        self.losses = losses
        self.aux = aux
        self.step = step
        self.tasks = tasks
        self._generators = saved.generators_now({x.device for x in self.params.values()})

    def _diffopt_parts(self) -> tuple[Unrolled, nn.Module]:
        if "_slots" not in self.__dict__:  # while it is copied
            raise AttributeError("_slots")
        return self, self._slots.model

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ATTRIBUTES and not name.startswith("_"):
            _, model = self._diffopt_parts()
            if hasattr(model, name):
                refuse_setting(model, name)
        super().__setattr__(name, value)

    def __bool__(self) -> bool:
        return True  # also where the model has a length

    __contains__ = contained("__contains__")
    __getitem__ = contained("__getitem__")
    __iter__ = contained("__iter__")
    __len__ = contained("__len__")

    def __repr__(self) -> str:
        return (
            f"Unrolled({type(self._slots.model).__name__}, step={self.step}, "
            f"{len(self.params)} parameters, {self.losses.shape[-1]} losses)"
        )

    def apply(
        self, fn: Callable[Concatenate[nn.Module, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """``fn(model, *args, **kwargs)`` with these values standing in the model meanwhile.

        Args:
            fn: anything that takes the model first: ``lambda m, x: m.encoder(x)``, or a
                ``loss_fn`` that uses the model's attributes.
            args, kwargs: passed on. With tasks, ``fn`` is mapped over their leading dimension.

        Returns:
            what ``fn`` returns, differentiable.

        Raises:
            ValueError: with tasks, a tensor among the arguments does not lead with N.
        """
        return self._evaluate(fn, args, kwargs)

    def _evaluate(self, fn: Callable[..., R], args: Any, kwargs: Any, *, mapped: bool = True) -> R:
        """``fn(model, *args, **kwargs)`` with these values standing in the model.

        Args:
            mapped: with tasks, over the leading dimension. False only to list what there is.
        """
        slots = self._slots
        inner = {name: self.params[name] for name in self._inner}

        def on_model(params: Values, buffers: Values, arguments: Any) -> R:
            slots.load(params, buffers)
            own_args, own_kwargs = arguments
            return fn(slots.model, *own_args, **own_kwargs)

        with self._standing():
            buffers = {name: x.clone() for name, x in self.buffers.items()}
            if self.tasks is None or not mapped:
                since = present_sequence()
                out = on_model(inner, buffers, (args, kwargs))
                given = tensors_in(args), tensors_in(kwargs)
                computed_from = chain(inner.values(), buffers.values(), *given)
                stand_again_in_backward(out, computed_from, since)
                return out
            check_leads((args, kwargs), self.tasks, "an argument")
            result: R = over_tasks(on_model, inner, buffers, (args, kwargs))
            return result

    @contextmanager
    def _standing(self) -> Iterator[None]:
        slots = self._slots
        devices = {x.device for x in self.params.values()}
        with standing(slots, Modes(slots.model, devices)):
            if self._flags is not None:
                slots.set_training(self._flags)
            yield

    def _set_flags(self, change: Callable[[], Any]) -> None:
        """Take the training flags after ``change`` of the model as this result's own."""
        with self._standing():
            change()
            self._flags = self._slots.training()

    def load_into(self, model: nn.Module, opt: Optimizers | None = None) -> None:
        """Write the values into ``model`` in place, and the optimizer state into ``opt``.

        Args:
            model: a module with the same parameter and buffer names, such as the one unrolled.
            opt: a ``torch.optim`` or ``diffopt`` optimizer over its parameters, or a list of them,
                which then continue as if they had run all along. So does a later unroll with them:
                of a ``diffopt`` one, the steps are numbered on from ``step``, for the callables
                among its options and for a ``loss_fn`` that takes the number.

        Raises:
            TypeError: ``model`` is no module, or ``opt`` no optimizer.
            ValueError: a name or a shape does not fit, as with the result of ``tasks=N``. Nothing
                has been written then.
        """
        saved.write_into(self, model, opt)

    def detach(self) -> Unrolled:
        """The same values with the graph cut, to continue from without keeping the past."""
        cut = copy(self)
        for name in ("params", "buffers", "opt_state", "losses", "aux"):
            setattr(cut, name, map_tensors(Tensor.detach, getattr(self, name)))
        return cut

    def state_dict(self) -> dict[str, Any]:
        """Tensors and an int only, for ``torch.save``; ``aux`` is left out.

        With the states of PyTorch's generators (the CPU's, and those of the parameters' devices)
        at the end of the unroll. A ``torch.Generator`` of your own is yours to save.
        """
        return saved.state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the values of a ``state_dict()`` of the same structure.

        Typically on ``diffopt.unroll(model, opt, 0)`` in a new process. The values are copied to
        the device and dtype that they have here, and carry no graph. PyTorch's generators are set
        to the states in it, so that what follows draws what it would have drawn; a state dict from
        before there were any in it, without the key ``generators``, leaves them alone.

        Raises:
            TypeError: it is no mapping.
            ValueError: keys, names or shapes differ; this object is unchanged then.
        """
        saved.load_state_dict(self, state_dict)
