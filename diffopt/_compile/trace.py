"""Functions of tensors as graphs that can be compiled.

A function is traced once, with the values of its first call, by PyTorch's ``make_fx``. What
makes the trace right for other values is checked afterwards, and ``Untraceable`` raised where it is
not. Random numbers are lifted out: they are drawn before the graph is run, in its order and by
the operators that eager code draws them with, so that both see the same ones.
"""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode, resolve_name

from diffopt._derivatives.table import with_second_derivatives
from diffopt._loop.progress import compiling
from diffopt._torch.compiling import is_overload, without_autocast
from diffopt._torch.inductor import Run, compile_graph, said_to_compile
from diffopt._torch.onednn import use_fastest

aten = torch.ops.aten
_log = logging.getLogger("diffopt")
_seconds = 0.0


class Untraceable(Exception):
    """Says why a function cannot be traced."""


def compile_seconds() -> float:
    """Seconds that this process has spent tracing and compiling for ``compile=True`` so far.

    Each graph is also reported, as an INFO message of the logger ``diffopt``.
    """
    return _seconds


def compiled(graph: GraphModule, examples: Sequence[Tensor], *, loop: bool = False) -> Run:
    """Code for a graph; ``loop`` says that it is one.

    Raises:
        Untraceable: there can be none.
    """
    nodes = len(graph.graph.nodes)
    if loop:
        nodes += len(graph.body.graph.nodes)  # type: ignore[union-attr, arg-type]
    with _timed(f"compiled a graph of {nodes} nodes"), plain_arithmetic():
        try:
            return compile_graph(graph, examples, loop=loop)
        except Exception as error:
            raise Untraceable(f"it cannot be compiled ({_first_line(error)})") from error


@dataclass(frozen=True)
class Draw:
    """One drawing of random numbers: ``call(standin, *args, **kwargs)``."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    like: tuple[Any, ...] | None  # of the tensor to be filled, or whose shape is taken

    def __call__(self) -> Tensor:
        args = self.args
        if self.like is not None:
            shape, stride, dtype, device = self.like
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            args = (x, *args)
        drawn = self.target(*args, **dict(self.kwargs))
        result: Tensor = drawn[1] if self.target is aten.native_dropout.default else drawn
        return result


class Traced:
    """A function as a graph.

    Attributes:
        graph: it; it computes what is not passed through.
        draws: the random numbers to be drawn for each run, in order.
        passed: for each result the index of the input that it is, None where it is computed.
        used: the inputs that the graph takes: the function's, then one for each draw.
        placeholders: the nodes for them.
    """

    def __init__(self, graph: GraphModule, draws: list[Draw], inputs: int) -> None:
        self.graph = graph
        self.draws = draws
        self.passed, self._computes = _split_outputs(graph, inputs)
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.used = [i for i, node in enumerate(placeholders) if node.users]
        self.placeholders = [node for node in placeholders if node.users]
        for node in placeholders:
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
        self._run: Run | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run it. It is compiled at the first call, for inputs like those."""
        found: Iterator[Tensor] = iter(())
        if self._computes:
            given = [inputs[i] for i in self.used]
            if self._run is None:
                self._run = compiled(self.graph, [x.detach() for x in given])
            with plain_arithmetic():
                found = iter(self._run(*given))
        return [next(found) if i is None else inputs[i] for i in self.passed]


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Traced:
    """Trace ``function(*inputs)``, also its uses of the inputs that it does not take from there.

    Raises:
        Untraceable: the graph would not be right for other values of the inputs.
    """
    versions = [x._version for x in inputs]
    try:
        graph = _graph(function, inputs)
    except Untraceable:
        raise
    except Exception as error:
        if not _reads_values(error):
            raise Untraceable(_reason(error)) from error
        try:  # some models read values of masks, but not where they are told that they are compiled
            with said_to_compile():
                graph = _graph(function, inputs)
        except Exception:
            raise Untraceable(_reason(error)) from error
    if [x._version for x in inputs] != versions:
        raise Untraceable("it changes a tensor in place that it was given or has captured")
    draws = _lift_draws(graph)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        _check(node, graph)
    use_fastest(graph)
    return Traced(graph, draws, len(inputs))


def _graph(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    with _timed("traced a graph"), _quiet(), with_second_derivatives, _ValuesHidden():
        graph = make_fx(function, tracing_mode="real")(*inputs)
    for node in graph.graph.nodes:
        # The memory layouts that a compiler gives tensors may be others.
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return graph


def _check(node: Node, graph: GraphModule) -> None:
    if node.op == "get_attr":
        if any(user.target is not aten.lift_fresh_copy.default for user in node.users):
            shape = tuple(getattr(graph, str(node.target)).shape)
            raise Untraceable(
                f"it uses a tensor of shape {shape} whose origin could not be found, such as one "
                "made from NumPy or held by a cache"
            )
    elif _shape_depends_on_data(node):
        raise Untraceable(f"it has shapes that depend on data, by {node.target}{_where(node)}")


def _shape_depends_on_data(node: Node) -> bool:
    target = node.target
    if not is_overload(target):
        return False
    if torch.Tag.dynamic_output_shape not in target.tags:
        return False
    if target is not aten.index.Tensor:
        return True
    indices: Any = node.args[1]
    return any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices)


def _lift_draws(graph: GraphModule) -> list[Draw]:
    """Make every random number an input of the graph, after the others."""
    nodes = graph.graph.nodes
    last = [node for node in nodes if node.op == "placeholder"][-1]
    draws = []
    for node in list(nodes):
        target = node.target
        if not (is_overload(target) and torch.Tag.nondeterministic_seeded in target.tags):
            continue
        draws.append(_draw(node))
        with graph.graph.inserting_after(last):
            drawn = graph.graph.placeholder(f"drawn_{len(draws)}")
        last = drawn
        with graph.graph.inserting_before(node):
            if target is aten.native_dropout.default:
                _replace_dropout(graph, node, drawn)
            elif target._schema.is_mutable:
                node.replace_all_uses_with(
                    graph.graph.call_function(aten.copy_.default, (node.args[0], drawn))
                )
            else:
                node.replace_all_uses_with(drawn)
        graph.graph.erase_node(node)
        if _is_written(drawn):  # the derivative reads them again
            users = list(drawn.users)
            with graph.graph.inserting_after(drawn):
                copy = graph.graph.call_function(aten.clone.default, (drawn,))
            for user in users:
                user.replace_input_with(drawn, copy)
    return draws


def _draw(node: Node) -> Draw:
    target: Any = node.target
    first = node.args[0] if node.args else None
    name = target._schema.name.removeprefix("aten::")
    like = None
    args = node.args
    if isinstance(first, Node) and (
        name.endswith(("_like", "_")) or name == "native_dropout" or target is aten.bernoulli.p
    ):
        x = first.meta["val"]
        like = (tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
        args = args[1:]
    if any(isinstance(x, Node) for x in (*args, *node.kwargs.values())):
        raise Untraceable(
            f"it draws random numbers whose distribution depends on a tensor, by {target.name()}"
        )
    return Draw(target, tuple(args), tuple(node.kwargs.items()), like)


def _replace_dropout(graph: GraphModule, node: Node, mask: Node) -> None:
    x, p, training = node.args
    if training is False or p == 0 or p == 1:
        raise Untraceable("it calls native_dropout with nothing to draw")
    assert isinstance(p, float)
    kept = graph.graph.call_function(aten.mul.Tensor, (x, mask))
    scaled = graph.graph.call_function(aten.mul.Scalar, (kept, 1 / (1 - p)))
    for user in list(node.users):
        user.replace_all_uses_with(scaled if user.args[1] == 0 else mask)
        graph.graph.erase_node(user)


def _split_outputs(graph: GraphModule, inputs: int) -> tuple[list[int | None], bool]:
    """Which input each output is, None for those computed; the graph keeps the computed ones."""
    places = {n: i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    output = next(node for node in graph.graph.nodes if node.op == "output")
    passed: list[int | None] = []
    computed = []
    for node in output.args[0]:
        origin = node
        while origin.target in (aten.detach.default, aten.alias.default) or (
            origin.target is aten.clone.default and not _is_written(origin)
        ):
            origin = origin.args[0]
        i = places.get(origin)
        passed.append(i if i is not None and i < inputs else None)
        if passed[-1] is None:
            computed.append(node)
    output.args = (tuple(computed),)
    graph.graph.eliminate_dead_code()
    return passed, bool(computed)


def _is_written(node: Node) -> bool:
    """Whether the tensor of ``node``, or a view of it, may be changed in place."""
    for user in node.users:
        target = user.target
        if not is_overload(target):
            if user.op != "output":
                return True
        elif target._schema.is_mutable or target._schema.name in _WRITING:
            if not (target is aten.native_batch_norm.default and user.args[5] is False):
                return True
        elif any(a.alias_info for a in target._schema.arguments) and _is_written(user):
            return True
    return False


# Operators that change running statistics without saying so.
_WRITING = {
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_native_batch_norm_legit",
}


class _ValuesHidden(TorchFunctionMode):
    """Refuses what would take values out of a tensor without the tracer's noticing."""

    _refused = frozenset(
        getattr(Tensor, name)
        for name in ("numpy", "tolist", "__array__", "data_ptr", "__dlpack__", "untyped_storage")
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._refused:
            raise Untraceable(f"it reads values of a tensor, by {resolve_name(func)}")
        return func(*args, **(kwargs or {}))


def _reads_values(error: Exception) -> bool:
    text = str(error)
    return "data-dependent" in text or "value out of a tracing tensor" in text


def _reason(error: Exception) -> str:
    if _reads_values(error):
        return (
            "it reads a value of a tensor, as control flow that depends on data does"
            f"{_place(error)}"
        )
    return f"it cannot be traced ({_first_line(error)}){_place(error)}"


def _place(error: Exception) -> str:
    """The last line of the user's, or of a library's, that led to an error."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*own, "<"))
    ]
    return f", in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def _where(node: Node) -> str:
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if "File" in line]
    return f" ({frames[-1]})" if frames else ""


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Without autograd and autocast, which have done their work in the trace."""
    with torch.no_grad(), without_autocast():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, which speak of PyTorch's insides here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _timed(what: str) -> Iterator[None]:
    global _seconds
    start = time.perf_counter()
    with _quiet(), compiling():
        yield
    spent = time.perf_counter() - start
    _seconds += spent
    _log.info("%s in %.2f s", what, spent)
