"""Where values stand in a module, and what is set up there to run later.

Two things that a loss may set up run only when it is differentiated: layers that recompute
themselves (``torch.utils.checkpoint``) and hooks on gradients. By then other values may stand in
the module, and the pass may be another one than the user meant. No mode sees either: they are no
operations. So four names of PyTorch's are replaced, for the whole process, while values stand in a
module. The replacements do nothing else than PyTorch's own on a thread where none do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as torch_checkpoint
import torch.utils.hooks as torch_hooks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffopt._derivatives.table import (
    beyond_second_derivatives,
    is_beyond_second,
    with_second_derivatives,
)
from diffopt._model.modes import Modes
from diffopt._model.slots import Loaded, ModuleSlots, Values
from diffopt._torch import dtensors
from diffopt._torch.checkpoint import HAS_FRAME, CheckpointFrame, belongs_to_checkpoint
from diffopt._torch.functions import function_of, run_backward_inside
from diffopt._torch.replaced import Shared, replaced
from diffopt._values.tree import tensors_in

Hook = Callable[..., Any]


class InnerHooks:
    """The hooks that the loss of a step registers: on tensors, or a module's backward hooks.

    The hooks are part of how the inner gradient is computed, and act only then. Another backward
    pass over the same graph takes the gradient's derivative, where PyTorch would call the hooks
    again. A step is evaluated inside ``with``.

    Attributes:
        within: what every evaluation is done within besides.
    """

    within: AbstractContextManager[Any] = nullcontext()

    def __init__(self) -> None:
        self.acting = False
        self.registered = False  # whether any was
        self.recomputes = False  # whether a layer is computed again in the backward pass

    def __enter__(self) -> None:
        self.acting = True
        self.within.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.within.__exit__(*exception)
        self.acting = False

    def only_here(self, hook: Hook) -> Hook:
        """``hook``, doing nothing in other backward passes."""
        self.registered = True
        return lambda *args: hook(*args) if self.acting else None


class _Entry(NamedTuple):
    """A module with values standing in it, the modes there, and the hooks of a step's loss."""

    slots: ModuleSlots
    modes: Modes
    hooks: InnerHooks | None


class _Standing(threading.local):
    """What stands in modules on this thread, the outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Entry] = []

    def hooks(self) -> InnerHooks | None:
        """The hooks of the innermost step under evaluation."""
        return next((x.hooks for x in reversed(self.stack) if x.hooks is not None), None)


_standing = _Standing()


@contextmanager
def standing(
    slots: ModuleSlots,
    modes: Modes,
    hooks: InnerHooks | None = None,
    *,
    as_at_call: bool = False,
    routed: bool = True,
) -> Iterator[None]:
    """Where values may be loaded into a module and functions of it be evaluated.

    Args:
        hooks: takes note of the hooks that are registered; None leaves them alone.
        as_at_call: see ``ModuleSlots.as_at_call``.
        routed: see ``Modes.active``.
    """
    with slots.unchanged(), modes.active(routed=routed), _as_now:
        if as_at_call:
            slots.as_at_call()
        _standing.stack.append(_Entry(slots, modes, hooks))
        try:
            yield
        finally:
            _standing.stack.pop()


class _Moment:
    """What stands in modules at one moment, to be stood there again for a recomputation."""

    def __init__(self) -> None:
        self._values = [
            (
                slots,
                modes,
                slots.training(),
                slots.loaded.params,
                _copied(slots, slots.loaded.buffers),
            )
            for slots, modes, _ in _standing.stack
            if slots.loaded is not None
        ]
        self._beyond_second = is_beyond_second()

    @contextmanager
    def again(self) -> Iterator[None]:
        """The recomputation works on copies of the buffers: they are not advanced a second time."""
        now = {slots for slots, *_ in _standing.stack}
        with ExitStack() as stack:
            hooks = _standing.hooks()
            if hooks is not None and not hooks.acting:  # a step's derivative is being taken
                stack.enter_context(with_second_derivatives)
            stack.enter_context(beyond_second_derivatives(self._beyond_second))
            for slots, modes, training, params, buffers in self._values:
                if slots in now:
                    stack.enter_context(_loaded_before(slots))
                else:
                    stack.enter_context(standing(slots, modes))
                    slots.set_training(training)
                slots.load(params, _copied(slots, buffers))
            yield


@contextmanager
def _loaded_before(slots: ModuleSlots) -> Iterator[None]:
    """Afterwards the same values stand in the module again."""
    before = slots.loaded
    try:
        yield
    finally:
        if before is not None:
            slots.load(*before)


def load_again(slots: ModuleSlots, loaded: Loaded | None) -> None:
    """Stand values in the module that stood there before, if others do now."""
    if loaded is not None and slots.loaded is not loaded:
        slots.load(loaded.params, _copied(slots, loaded.buffers))


#: Modules whose Functions read no module in their backward passes.
_READING_NOTHING = ("diffopt._derivatives.", "diffopt._torch.", "torch.distributed.tensor.")


def stand_again_in_backward(result: Any, inputs: Iterable[Tensor], since: int) -> None:
    """Stand the present values in the module again where custom Functions run backward.

    The backward pass of a ``torch.autograd.Function`` may read the module, as adjoint methods do
    and unrolls inside, after the module has been given back.

    Args:
        result: a pytree of what was computed while the values stood.
        inputs: what ``result`` was computed from.
        since: ``present_sequence()`` before that. Nodes with a smaller number were there before.

    Limits: a Function is found where it was called on this thread, behind a tensor in ``result``.
    """
    passed: set[Any] = {None, *(x.grad_fn for x in inputs)}
    nodes: list[Any] = [x.grad_fn for x in tensors_in(result)]
    moment: _Moment | None = None
    while nodes:
        node = nodes.pop()
        if node in passed or node._sequence_nr() < since:
            continue
        passed.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        function = function_of(node)
        if function is not None and not function.__module__.startswith(_READING_NOTHING):
            moment = _Moment() if moment is None else moment
            run_backward_inside(node, moment.again)


def _copied(slots: ModuleSlots, buffers: Values) -> Values:
    with torch.no_grad():
        return {
            name: x.clone() if slots.changing is None or name in slots.changing else x
            for name, x in buffers.items()
        }


class _Frame(CheckpointFrame):
    """A checkpointed layer, which is recomputed with the values that stand there now."""

    def __init__(self, recompute: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        moment = _Moment()
        hooks = _standing.hooks()
        if hooks is not None:
            hooks.recomputes = True

        def recompute_as_now(*inputs: Any) -> None:
            with moment.again():
                recompute(*inputs)

        super().__init__(recompute_as_now if _standing.stack else recompute, *args, **kwargs)


_apply_reentrant: Any = torch_checkpoint.CheckpointFunction.apply


def _reentrant(*args: Any) -> Any:
    """What ``checkpoint(..., use_reentrant=True)`` goes through."""
    if _standing.stack and torch.is_grad_enabled():
        raise NotImplementedError(
            "a layer calls torch.utils.checkpoint with use_reentrant=True, which can be "
            "differentiated neither with respect to given tensors nor twice: pass "
            "use_reentrant=False"
        )
    return _apply_reentrant(*args)


class _BackwardHook(torch_hooks.BackwardHook):
    """A module's full backward hooks, for one call of the module."""

    def __init__(self, module: Any, user_hooks: Any, user_pre_hooks: Any) -> None:
        hooks = _standing.hooks()
        if hooks is not None:
            user_hooks = [hooks.only_here(hook) for hook in user_hooks]
            user_pre_hooks = [hooks.only_here(hook) for hook in user_pre_hooks]
        super().__init__(module, user_hooks, user_pre_hooks)


_register_hook: Any = torch.Tensor.register_hook


def _register_inner_hook(self: Tensor, hook: Hook) -> Any:
    hooks = _standing.hooks()
    return _register_hook(self, hook if hooks is None else hooks.only_here(hook))


_enter_hooks: Any = saved_tensors_hooks.__enter__


def _enter_hooks_of_no_checkpoint(self: saved_tensors_hooks) -> None:
    """In place of ``_Frame``, where PyTorch makes no frames that can be replaced."""
    if _standing.stack and belongs_to_checkpoint(self):
        raise NotImplementedError(
            "a layer calls torch.utils.checkpoint, which PyTorch "
            f"{torch.__version__} computes again in a way that diffopt does not know: it would see "
            "the weights of another step. Call the layer without it"
        )
    _enter_hooks(self)


_recomputed: tuple[Any, str, Any] = (torch_checkpoint, "_CheckpointFrame", _Frame)
if not HAS_FRAME:
    _recomputed = (saved_tensors_hooks, "__enter__", _enter_hooks_of_no_checkpoint)
_as_now = Shared(
    lambda: replaced(
        _recomputed,
        (torch_checkpoint, "CheckpointFunction", SimpleNamespace(apply=_reentrant)),
        (torch.nn.modules.module, "BackwardHook", _BackwardHook),
        (torch.Tensor, "register_hook", _register_inner_hook),
        *dtensors.as_now(),
    )
)
