"""How many bytes one step takes: seen when the first one is taken, under a meter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffopt._loop.loop import Loop
from diffopt._loop.store import Begun
from diffopt._torch.dispatch import TorchDispatchMode
from diffopt._torch.dtensors import stored
from diffopt._torch.modes import unseen
from diffopt._values.outputs import StepCotangents

_UNIT = 512  # bytes: allocators give whole multiples of this, or of less
#: What the nodes and objects of a graph take, for each operation. An MLP of two layers, whose step
#: has 45 operations, took 25 KiB a step in resident memory besides its tensors.
_PER_OPERATION = 1024


@dataclass(frozen=True)
class StepBytes:
    """What one step takes, in bytes.

    Attributes:
        state: what a state does not share with the one before, and the generators' beside it.
        graph: what is held of a step that was recorded, the state after it included.
        workspace: what evaluating and differentiating a step takes at its peak.
        fixed: what is held for the whole backward pass: the cotangent of the result, and the sums
            of what flows to captured tensors.
        devices: where the model is.
        differentiated: whether a step has been differentiated to see ``workspace``, which is
            predicted otherwise.
    """

    state: int
    graph: int
    workspace: int
    fixed: int
    devices: frozenset[torch.device]
    differentiated: bool = False


def take_first_step(loop: Loop) -> tuple[Begun, StepBytes, Meter]:
    """Take the first step of ``loop`` with its graph, and see what that takes.

    The workspace is predicted, since nothing is differentiated yet. A step's graph, G, holds what
    the loss and its gradient saved. Differentiating it makes cotangents of these and of what was
    not saved, and frees G meanwhile: that is about the peak P ≥ G of evaluating the step. The
    derivative of the rule makes a few tensors for each that the state has. So

        workspace = G + 5/4 P + 4 · state.

    On feed-forward, convolutional, recurrent and attention networks, and weights without
    activations, with each of the optimizers, that was 1.07 to 2.14 times what the meter sees when
    the step is differentiated.

    With a ledger, by which a step computed again has to be the first one to the last bit, the step
    is taken without its graph, and once more with it: gradients whose graph is kept may differ in
    the last bit.
    """
    before = loop.snapshot(loop.start)
    if loop.ledger is None:
        with Meter() as meter:
            graph, after = loop.first_recorded(loop.start, 0)
            state = meter.bytes_of(after.tensors().values())
    else:
        after = loop.first(loop.start, 0)
        with torch.no_grad(), loop.generators.undisturbed(), Meter() as meter:
            graph, again = loop.recorded(loop.restored(before), 0)
            state = meter.bytes_of(again.tensors().values())
            del again
    graph_bytes = max(meter.held + _PER_OPERATION * meter.operations, 1)
    captured = (loop.captured.tensors[i] for i in loop.captured.at(0))
    sizes = StepBytes(
        state=state + _bytes(before.generators),
        graph=graph_bytes,
        workspace=graph_bytes + 5 * max(meter.peak, graph_bytes) // 4 + 4 * state,
        fixed=state + 2 * _bytes(captured),
        devices=frozenset(x.device for x in after.params.values()),
    )
    return Begun(before, graph, after), sizes, meter


def differentiate_first_step(
    loop: Loop, begun: Begun, sizes: StepBytes, meter: Meter, *, retain_graph: bool
) -> StepBytes:
    """``found``, with the workspace that taking a vector-Jacobian product of the step showed.

    The product is thrown away. Where a step has no derivative, which is for the backward pass to
    say if there is one, the prediction stays.

    Args:
        meter: by which the step was seen.
        retain_graph: leave the step's graph whole. That takes up to 1.44 times as much on the
            networks of ``take_first_step`` as where the graph is freed meanwhile.
    """
    graph = begun.graph
    assert graph is not None
    if not retain_graph:
        begun.graph = None
    tensors = loop.step.differentiable(begun.after)
    losses = loop.losses.all()
    assert losses is not None
    beside_tensors = sizes.graph - meter.held
    meter.begin_peak()
    with loop.generators.undisturbed(), torch.no_grad(), meter:
        cotangent = {path: torch.ones_like(x) for path, x in tensors.items()}
        aux = loop.extras.ones()
        with loop.captured.sealed(0) as shared:
            try:
                graph.vjp(
                    cotangent,
                    StepCotangents(torch.ones_like(losses[0]), aux),
                    loop.captured.edges(0),
                    retain_graph=retain_graph or shared,
                )
            except (RuntimeError, NotImplementedError):
                return replace(sizes, differentiated=True)
    return replace(sizes, workspace=meter.peak + beside_tensors, differentiated=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of an operation's arguments or results: these are nested once at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, Tensor))


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that come into being while it is active, until they go.

    They may go while it is not active. It may be entered again.

    It does not see memory that no tensor has: kernels' scratch space, the nodes of graphs.

    Which storages have gone is looked at only where there seem to be more bytes than ever, so that
    the peak may come out larger by up to a sixty-fourth.

    Attributes:
        operations: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._held = 0  # bytes, of which some may have gone
        self._peak = 0  # bytes that were alive at once
        self._most = 0  # of ``_held``, since that was looked at
        # A weak reference of Python's to a storage may dangle where the storage is PyTorch's alone.
        self._alive: dict[int, tuple[int, StorageWeakRef]] = {}  # 0 bytes for those from before

    @property
    def held(self) -> int:
        """Bytes alive now."""
        for key, (size, storage) in list(self._alive.items()):
            if storage.expired():  # type: ignore[no-untyped-call]
                del self._alive[key]
                self._held -= size
        self._most = self._held
        return self._held

    @property
    def peak(self) -> int:
        """The most bytes there were at once."""
        return max(self._peak, self._most)

    def begin_peak(self) -> None:
        """From now on ``peak`` is of what comes."""
        self._peak = self.held

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """The bytes that ``tensors`` have of those alive now."""
        keys = {x.untyped_storage()._cdata for x in tensors}
        return sum(self._alive[key][0] for key in keys if key in self._alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations += 1
        with unseen():  # not the step's own calls, for those who watch it
            for x in _tensors(args):
                self._note(x, counted=False)
            if kwargs:
                for x in _tensors(kwargs.values()):
                    self._note(x, counted=False)
            result = func(*args, **(kwargs or {}))
            for x in _tensors((result,)):
                self._note(x, counted=True)
        return result

    def _note(self, x: Tensor, counted: bool) -> None:
        if x.layout is not torch.strided:  # its parts have been seen
            return
        storage = stored(x).untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        if storage.device.type == "meta":  # of a tracer: no memory
            return
        size = -(-storage.nbytes() // _UNIT) * _UNIT if counted else 0
        self._alive[key] = size, StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._held += size
        if self._held > self._peak + self._peak // 64:
            self._peak = max(self._peak, self.held)
        self._most = max(self._most, self._held)
