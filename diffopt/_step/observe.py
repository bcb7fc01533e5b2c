"""Seeing what a step uses while it runs.

A step may use anything that Python lets it see: a closure's tensor, a generator in a dataclass, a
parameter behind three attributes. Whatever it is called and wherever it is kept, to have an effect
it is handed to PyTorch, and there an ``Observer`` sees it. Nothing is looked for.

Limits: what is handed to TorchScript, to compiled code or to an extension in C++ is not seen. The
graph of a step is therefore walked as well (``Captured.walk``): a leaf that the observer did not
see is found there, and any other tensor from before the step that it did not see is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffopt._step.generators import Generators
from diffopt._step.graph import Edge, edge_of
from diffopt._step.kinds import PLAIN, kind_of
from diffopt._step.owners import Owners, has_memory
from diffopt._step.unchanged import Ref, Unchanged
from diffopt._torch.autograd import in_forward_mode, present_sequence
from diffopt._torch.dtensors import stored
from diffopt._torch.functorch import is_wrapped
from diffopt._values.tree import tensors_in
from diffopt.optim.scalars import has_tangent


class Observer(TorchFunctionMode):
    """Sees the tensors and generators that the steps of a first pass hand to PyTorch.

    Args:
        generators: is told of each generator before it draws.
        originals: the module's own inner parameters, by name, in whose place others stand.
        constants: the module's other parameters, by name.
        move: is told of a parameter among them that a step is about to change in place, of the copy
            that takes its place, and of the step. Whatever is done to the parameter from then on in
            that step is done to the copy.

    Attributes:
        edges: tensors with a history that were there before the step that used them, by edge.
        replaced: whether any step called an operation that has its derivative from this package.
        originals_used: what the step used of the originals' memory, by parameter name.

    Cost: about a microsecond for each function of PyTorch that a step calls.
    """

    def __init__(
        self,
        generators: Generators,
        originals: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        move: Callable[[str, Tensor, int], object],
    ) -> None:
        super().__init__()
        self.edges: dict[Edge, Tensor] = {}
        self.replaced = False
        self.originals_used: dict[str, Tensor] = {}
        self._generators = generators
        self._owners = Owners(originals, constants)
        self._constants, self._move = constants, move
        self._copies: dict[str, Tensor] = {}  # of the constants that the step changes
        self._moving: set[str] = set()
        self._before = {
            n: (x, x._version, x.data_ptr()) for n, x in constants.items() if not x.is_inference()
        }
        self._gradients: dict[int, str] = {}  # the names of those given to a transform
        self._step = 0
        self._running: Any = None  # a function in Python that is run with this mode on
        self._since = 0
        self._in_gradient: dict[int, Tensor] | None = None
        self._own: dict[int, Tensor] = {}  # the step's
        self._known: dict[int, Tensor] = {}  # used by the step; held, so that no id is used again
        self._before_gradient: dict[int, Tensor] = {}
        self._plain: set[int] = set()  # those that did not require grad when they were met
        self._made: dict[int, Ref] = {}  # by the step
        self._earlier: dict[int, Ref] = {}  # by a step before, and still there
        self._fresh: set[int] = set()  # addresses of memory that the step took
        self._used: dict[int, tuple[Ref, int]] = {}  # by any step, and how it was then

    def begin(self, step: int, own: Iterable[Tensor], since: int) -> None:
        """Step ``step`` begins, on its ``own`` tensors.

        Args:
            since: the least sequence number of the nodes that it makes.
        """
        self._step, self._since, self._in_gradient = step, since, None
        self._gradients.clear()
        self._earlier |= {key: ref for key, ref in self._made.items() if ref() is not None}
        self._own = {id(x): x for x in own}
        self._known = dict(self._own)
        self._moving |= self._copies.keys()
        for noted in (self._made, self._plain, self._fresh, self.originals_used, self._copies):
            noted.clear()

    def transforms(self, grads: Mapping[str, Tensor]) -> None:
        """The gradients, by parameter name, are given to a function that may change them."""
        self._gradients = {
            x.untyped_storage().data_ptr(): name for name, x in grads.items() if has_memory(x)
        }

    def begin_gradient(self) -> None:
        """The gradient of the loss is about to be taken."""
        self._before_gradient, self._known = self._known, {}
        self._in_gradient = {}

    def end_gradient(self) -> dict[int, Tensor]:
        """It has been taken: gives the tensors that require grad and that hooks used there."""
        used, self._in_gradient = self._in_gradient or {}, None
        self._before_gradient.update(self._known)
        self._known, self._before_gradient = self._before_gradient, {}
        return used

    def is_made(self, x: Tensor) -> bool:
        """Whether a step was seen to make ``x``."""
        return _holds(self._made, x) or _holds(self._earlier, x)

    def may_be_made(self, x: Tensor) -> bool:
        """Whether the step may have made the leaf ``x``, in a way that was not seen."""
        return id(x) in self._plain or (has_memory(x) and x.data_ptr() in self._fresh)

    def refuse_duals(self, tensors: Iterable[Tensor]) -> None:
        """Raise ``NotImplementedError`` where a tensor has a tangent, which would be lost."""
        for x in tensors if in_forward_mode() else ():
            if has_tangent(x):
                raise NotImplementedError(
                    f"step {self._step} uses a tensor of shape {tuple(x.shape)} that is a dual "
                    "number (torch.autograd.forward_ad), and its tangent would be lost on the way: "
                    "use adjoint=diffopt.ForwardMode([...]) for derivatives in forward mode"
                )

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Take note of tensors that steps use unseen."""
        for x in tensors:
            if not x.is_inference() and id(x) not in self._used:
                self._used[id(x)] = weakref.ref(x), x._version

    def end(self) -> Unchanged:
        """The last step has been taken: gives what the steps used and neither made nor changed.

        Raises:
            NotImplementedError: a step has changed a parameter in place that is not trained, and
                that was not seen.
        """
        for name, (x, version, address) in self._before.items():
            if x._version != version or x.data_ptr() != address:
                raise NotImplementedError(
                    f"a step changed the parameter {name!r}, which is not trained, in place and "
                    "in a way that cannot be seen, such as from TorchScript: change it by "
                    "PyTorch's own functions, or make it a buffer"
                )
        used = Unchanged(self._used.values())
        for noted in (self._own, self._known, self._made, self._earlier, self._used, self.edges):
            noted.clear()
        return used

    def met(self) -> Iterator[Tensor]:
        """The tensors that steps used without making them and that still exist, in order."""
        return (x for ref, _ in self._used.values() if (x := ref()) is not None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if kind.inspects:
            return func(*args, **kwargs)
        if kind.writes or "out" in kwargs:
            self._check_writing(kwargs.get("out", args[0] if args else None))
        if self._copies:
            args = tuple(self._copied(x) for x in args)
            kwargs = {key: self._copied(x) for key, x in kwargs.items()}
        self.see(args)
        if kwargs:
            self.see(kwargs.values())
        if kind.replacement is not None:
            self.replaced = True
            result = kind.replacement(*args, **kwargs)
        elif kind.opened is None or func is self._running:
            result = func(*args, **kwargs)
        else:
            outer, self._running = self._running, func
            try:
                with self:
                    result = kind.opened(*args, **kwargs)
            finally:
                self._running = outer
        if isinstance(result, Tensor):
            self._make(result, args)
        elif type(result) in (tuple, list):
            for x in result:
                if isinstance(x, Tensor):
                    self._make(x, args)
        return result

    def see(self, values: Iterable[Any]) -> None:
        """Take note of the tensors and generators in what a function is given."""
        for x in values:
            if isinstance(x, Tensor):
                key = id(x)
                if key not in self._known:
                    ref = self._made.get(key)
                    if ref is None or ref() is not x:
                        self._meet(x)
            elif type(x) in PLAIN:
                continue
            elif isinstance(x, (list, tuple)):
                self.see(x)
            elif isinstance(x, dict):
                self.see(x.values())
            elif isinstance(x, torch.Generator):
                self._generators.meet(x)

    def _meet(self, x: Tensor) -> None:
        """Take note of a tensor that the step uses for the first time and did not make."""
        key = id(x)
        if is_wrapped(x):
            self._known[key] = x
            return
        self.refuse_duals([x])
        if x.requires_grad and not x.is_leaf:
            if _holds(self._earlier, x):
                raise NotImplementedError(
                    f"step {self._step} uses a tensor of shape {tuple(x.shape)} that an earlier "
                    "step made and that requires grad: from step to step, derivatives go by way "
                    "of the parameters, the optimizer's state and the buffers alone. Keep it in a "
                    "buffer of the model, or detach it"
                )
            edge = edge_of(x)
            if self._since <= edge[0]._sequence_nr() < present_sequence():
                self._made[key] = weakref.ref(x)  # by a function that modes are not shown
                return
            self.edges[edge] = x
        self._known[key] = x
        if not x.requires_grad:
            self._plain.add(key)
        elif self._in_gradient is not None:
            self._in_gradient[key] = x
        owner = self._owners.of(x)
        # A custom backward pass reads the step's own tensors; they are aliases at the start.
        if owner is not None and owner.inner and key not in self._own:
            self.originals_used[owner.name] = x
        if not x.is_inference():
            if key not in self._used:
                self._used[key] = weakref.ref(x), x._version
            if not x.is_cpu:
                self._generators.meet_device(x.device)

    def _make(self, x: Tensor, args: tuple[Any, ...]) -> None:
        key = id(x)
        if key in self._known:
            return
        self._made[key] = weakref.ref(x)
        if not x.requires_grad and self._in_gradient is None and has_memory(x):
            address = x.data_ptr()
            if all(y.data_ptr() != address for y in _flat(args) if has_memory(y)):
                self._fresh.add(address)

    def _check_writing(self, target: Any) -> None:
        for x in tensors_in(target):
            if self._gradients and not (torch.is_grad_enabled() and x.requires_grad):
                self._check_gradients(x)
            owner = self._owners.of(x)
            if owner is None or owner.name in self._copies:
                continue
            if owner.inner:
                raise changed_in_place(owner.name, self._step)
            if owner.name in self._moving:
                raise NotImplementedError(
                    f"step {self._step} changes the model's own parameter {owner.name!r} in place, "
                    "and not the value that it has in the unroll, which stands in the module: take "
                    "it from the module, and keep it in no list, closure or global"
                )
            with torch.enable_grad():  # at the start the copy is the parameter, also to autograd
                self._copies[owner.name] = self._constants[owner.name].clone()
            self._made[id(self._copies[owner.name])] = weakref.ref(self._copies[owner.name])
            self._move(owner.name, self._copies[owner.name], self._step)

    def _check_gradients(self, x: Tensor) -> None:
        x = stored(x)
        name = self._gradients.get(x.untyped_storage().data_ptr()) if has_memory(x) else None
        if name is not None:
            raise NotImplementedError(
                f"grad_transform changes the gradient of {name!r} in place where that is not "
                "recorded, as under torch.no_grad() or through .data, so that the meta-gradient "
                "would be wrong: return new tensors, and leave grad mode on"
            )

    def _copied(self, x: Any) -> Any:
        """``x`` with the copies for the memory of the parameters that the step changes."""
        if isinstance(x, (list, tuple)) and type(x) in (list, tuple):
            return type(x)(map(self._copied, x))
        owner = self._owners.of(x) if isinstance(x, Tensor) else None
        copy = None if owner is None else self._copies.get(owner.name)
        if owner is None or copy is None:
            return x
        original = self._constants[owner.name]
        if x is original:
            return copy
        offset = x.storage_offset() - original.storage_offset() + copy.storage_offset()
        with torch.enable_grad():
            base = copy if x.requires_grad else copy.detach()
            return base.as_strided(x.shape, x.stride(), offset)


def changed_in_place(name: str, step: int) -> NotImplementedError:
    """The error for a loss that changes an inner parameter in place."""
    return NotImplementedError(
        f"the loss of step {step} changes parameter {name!r} in place, which has no derivative: "
        "compute what it needs from the parameter, as a parametrization does"
    )


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _flat(x)


def _holds(refs: Mapping[int, Ref], x: Tensor) -> bool:
    ref = refs.get(id(x))
    return ref is not None and ref() is x
