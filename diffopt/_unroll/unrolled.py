"""What an unroll gives back: trained values, connected to what they were trained from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from diffopt._model.modes import Modes
from diffopt._model.slots import ModuleSlots
from diffopt._model.standing import stand_again_in_backward, standing
from diffopt._step.tasks import Values, check_leads, over_tasks
from diffopt._torch.autograd import present_sequence
from diffopt._values.state import State
from diffopt.optim import load_state_into

P = ParamSpec("P")
R = TypeVar("R")


class Unrolled:
    """The result of ``diffopt.unroll``.

    Attributes:
        params: every parameter that the optimizer held, by its ``named_parameters()`` name, each
            with the shape and dtype of the model's. Those that do not require grad are the
            model's own, unchanged.
        buffers: all buffers of the model after the last step, by name.
        losses: the loss before each update, shape (T,), differentiable.
        aux: what ``loss_fn`` returned beside the loss, one per step, cut from the graph; None where
            it returned nothing else.
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
        given: Mapping[str, Tensor],
        losses: Tensor,
        aux: list[Any],
        step: int,
        tasks: int | None = None,
    ) -> None:
        self._slots = slots
        self._inner = list(state.params)
        self.params: dict[str, Tensor] = {**given, **state.params}  # in the model's order
        self.buffers: dict[str, Tensor] = dict(state.buffers)
        self.opt_state: dict[str, dict[str, Tensor]] = {
            name: dict(entries) for name, entries in state.opt.items()
        }
        self.losses = losses
        self.aux = aux
        self.step = step
        self.tasks = tasks

    def __repr__(self) -> str:
        return (
            f"Unrolled({type(self._slots.model).__name__}, step={self.step}, "
            f"{len(self.params)} parameters, {self.losses.shape[-1]} losses)"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the trained values: ``fast(x)``.

        The buffers that the call would advance (running statistics) are advanced in a copy.
        """
        return self.apply(_call, *args, **kwargs)

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
        slots = self._slots
        inner = {name: self.params[name] for name in self._inner}

        def on_model(params: Values, buffers: Values, given: Any) -> R:
            slots.load(params, buffers)
            own_args, own_kwargs = given
            return fn(slots.model, *own_args, **own_kwargs)

        devices = {x.device for x in self.params.values()}
        with standing(slots, Modes(slots.model, devices)):
            buffers = {name: x.clone() for name, x in self.buffers.items()}
            if self.tasks is None:
                since = present_sequence()
                out = on_model(inner, buffers, (args, kwargs))
                stand_again_in_backward(out, (inner, buffers, args, kwargs), since)
                return out
            check_leads((args, kwargs), self.tasks, "an argument")
            result: R = over_tasks(on_model, inner, buffers, (args, kwargs))
            return result

    def load_into(self, model: nn.Module, opt: torch.optim.Optimizer | None = None) -> None:
        """Write the values into ``model`` in place, and the optimizer state into ``opt``.

        Args:
            model: a module with the same parameter and buffer names, such as the one unrolled.
            opt: a ``torch.optim`` or ``diffopt`` optimizer over its parameters, which then
                continues as if it had run all along.

        Raises:
            ValueError: a name or a shape does not fit, as with the result of ``tasks=N``. Nothing
                has been written then.
        """
        targets: list[tuple[Tensor, Tensor]] = []
        for kind, ours, theirs in (
            ("parameter", self.params, dict(model.named_parameters())),
            ("buffer", self.buffers, dict(model.named_buffers())),
        ):
            for name, x in ours.items():
                if name not in theirs:
                    raise ValueError(f"load_into: the model has no {kind} {name!r}")
                if theirs[name].shape != x.shape:
                    raise ValueError(
                        f"load_into: {kind} {name!r} has shape {tuple(x.shape)} here and "
                        f"{tuple(theirs[name].shape)} in the model"
                    )
                targets.append((theirs[name], x))
        if opt is not None:
            owned = dict(model.named_parameters())
            held = {p for group in opt.param_groups for p in group["params"]}
            for name in self.opt_state:
                if owned[name] not in held:
                    raise ValueError(
                        f"load_into: opt does not hold the model's parameter {name!r}: build it "
                        "over the parameters of that model"
                    )
            load_state_into(
                opt,
                {owned[name]: entries for name, entries in self.opt_state.items()},
                steps=self.step,
            )
        with torch.no_grad():
            for target, x in targets:
                if target is not x:
                    target.copy_(x)

    def detach(self) -> Unrolled:
        """The same values with the graph cut, to continue from without keeping the past."""
        cut = self._copy()
        cut.params = {name: x.detach() for name, x in self.params.items()}
        cut.buffers = {name: x.detach() for name, x in self.buffers.items()}
        cut.opt_state = {
            name: {key: x.detach() for key, x in entries.items()}
            for name, entries in self.opt_state.items()
        }
        cut.losses = self.losses.detach()
        return cut

    def _copy(self) -> Unrolled:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Tensors and an int only, for ``torch.save``; ``aux`` is left out."""
        cut = self.detach()
        return {
            "params": cut.params,
            "buffers": cut.buffers,
            "opt_state": cut.opt_state,
            "losses": cut.losses,
            "step": cut.step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the values of a ``state_dict()`` of the same structure.

        Typically on ``diffopt.unroll(model, opt, 0)`` in a new process. The values are copied to
        the device and dtype that they have here, and carry no graph.

        Raises:
            ValueError: keys, names or shapes differ; this object is unchanged then.
        """
        expected = {"params", "buffers", "opt_state", "losses", "step"}
        if set(state_dict) != expected:
            raise ValueError(
                f"load_state_dict: keys are {sorted(state_dict)}, expected {sorted(expected)}, "
                "as Unrolled.state_dict() gives them"
            )
        fitted = {}
        for key in ("params", "buffers"):
            ours: dict[str, Tensor] = getattr(self, key)
            theirs: Mapping[str, Tensor] = state_dict[key]
            if set(ours) != set(theirs):
                raise ValueError(
                    f"load_state_dict: {key} differ by {sorted(set(ours) ^ set(theirs))}: load "
                    "into an Unrolled of the same model and optimizer"
                )
            for name, x in theirs.items():
                if x.shape != ours[name].shape:
                    raise ValueError(
                        f"load_state_dict: {name!r} has shape {tuple(ours[name].shape)} here and "
                        f"{tuple(x.shape)} in the state dict"
                    )
            fitted[key] = {name: _like(x, ours[name]) for name, x in theirs.items()}
        if set(state_dict["opt_state"]) != set(self.opt_state):
            raise ValueError(
                "load_state_dict: optimizer state is for "
                f"{sorted(state_dict['opt_state'])}, here for {sorted(self.opt_state)}"
            )
        for name, entries in state_dict["opt_state"].items():
            for key, x in entries.items():  # an optimizer may have more of them after a first step
                here = self.opt_state[name].get(key, x)
                if x.shape != here.shape:
                    raise ValueError(
                        f"load_state_dict: {key} of {name!r} has shape {tuple(here.shape)} here "
                        f"and {tuple(x.shape)} in the state dict"
                    )
        self.params, self.buffers = fitted["params"], fitted["buffers"]
        self.opt_state = {
            name: {key: _beside(key, x, self.params[name]) for key, x in entries.items()}
            for name, entries in state_dict["opt_state"].items()
        }
        self.losses = _like(state_dict["losses"], self.losses)
        self.step = int(state_dict["step"])
        self.aux = []


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x.detach().to(device=other.device, dtype=other.dtype, copy=True)


def _beside(key: str, x: Tensor, param: Tensor) -> Tensor:
    """Optimizer state lives with its parameter, the step count on the CPU."""
    device = x.device if key == "step" else param.device
    return x.detach().to(device=device, copy=True)
