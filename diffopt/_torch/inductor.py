"""TorchInductor, and the operator for loops that it compiles: private names of PyTorch.

A PyTorch without one of them costs a feature: no operator for loops, and steps are compiled one by
one; no TorchInductor, and they run uncompiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from diffopt._torch.vector_isa import widest_alone

Run = Callable[..., Sequence[Tensor]]

_log = logging.getLogger("diffopt")

#: A loop may be small where no tensor within it has more numbers: twice as many on few threads, as
#: it runs on one.
_FEW = 1 << 17
_FEW_THREADS = 4

#: How many rows a tensor of any number of rows has while a loop over them is compiled.
_ROWS = 4


def compile_graph(graph: GraphModule, examples: Sequence[Tensor], *, loop: bool = False) -> Run:
    """Compile with TorchInductor, for tensors of the examples' shapes, dtypes and strides.

    Args:
        loop: the graph is a loop, which is written in C++ together with its kernels.
    """
    with widest_alone:
        return _compiled(graph, examples, {}) if not loop else _compiled_loop(graph, examples)


def _compiled_loop(graph: GraphModule, examples: Sequence[Tensor]) -> Run:
    config: dict[str, Any] = {"cpp_wrapper": True, **_kept_on_disk()}
    if _is_small(graph):
        try:
            from diffopt._torch.small_loops import small_loops

            with small_loops() as more:
                return _without_wrappers(graph, examples, {**config, **more})
        except Exception as error:  # of whatever private names may have become
            _log.info("a loop is compiled as TorchInductor writes it: %s", error)
    return _without_wrappers(graph, examples, {**config, **_apart()})


def _apart() -> dict[str, Any]:
    """What has the code between the kernels of a loop compiled apart from them, and in less time.

    As one program with the kernels, that of a transformer takes minutes.
    """
    from torch._inductor import config

    name = "cpp_wrapper_build_separate"
    return {name: True} if hasattr(config, name) else {}


def _compiled(
    graph: GraphModule, examples: Sequence[Tensor], config: Mapping[str, Any], inner: Any = None
) -> Run:
    from torch._inductor.compile_fx import compile_fx

    # Numbers of low precision are rounded wherever uncompiled steps round them.
    patches = {"emulate_precision_casts": True, **config}
    more = {} if inner is None else {"inner_compile": inner}
    with _of_examples(examples):
        run: Any = compile_fx(graph, list(examples), config_patches=patches, **more)
    return run  # type: ignore[no-any-return]


def _without_wrappers(
    graph: GraphModule, examples: Sequence[Tensor], config: Mapping[str, Any]
) -> Run:
    """The code alone, called at once.

    What PyTorch puts around it handles inputs that are changed and results that share memory, of
    which a loop has none, and takes as long as ten steps of a small network.
    """
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx_inner

    made: list[Any] = []

    def inner(*args: Any, **more: Any) -> Any:
        made.append(compile_fx_inner(*args, **more))
        return made[-1]

    # That cache would hold the wrappers, too; the code is in TorchInductor's own.
    known = hasattr(functorch, "enable_autograd_cache")
    with functorch.patch(enable_autograd_cache=False) if known else nullcontext():
        run = _compiled(graph, examples, config, inner)
    if len(made) != 1:
        return run
    code: Any = made[0]
    if all(x.device.type == "cpu" for x in examples):  # nothing is tuned at the first call
        code = getattr(code, "current_callable", None) or code
    return lambda *inputs: code(list(inputs))


def _kept_on_disk() -> dict[str, Any]:
    """What has TorchInductor's cache on disk hold a loop, which it holds for few operators.

    It tells graphs apart by their code, inputs and submodules.
    """
    from torch._inductor import config

    scan: Any = loop_operator()
    if not hasattr(config, "unsafe_marked_cacheable_functions"):
        return {}
    name = f"{scan.__module__}.{scan.__name__}"
    return {"unsafe_marked_cacheable_functions": {name: "diffopt"}}


def _is_small(graph: GraphModule) -> bool:
    """Whether the rounds of a loop are of a few thousand numbers, as far as can be seen."""
    body: Any = graph.body
    calls = [str(node.target) for node in body.graph.nodes]
    if any("convolution" in call or "diffopt.product" in call for call in calls):
        return False
    values = [node.meta.get("val") for node in body.graph.nodes]
    few = _FEW * (2 if torch.get_num_threads() <= _FEW_THREADS else 1)
    return max((x.numel() for x in values if isinstance(x, Tensor)), default=0) <= few


def _of_examples(examples: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """What TorchInductor reads the open sizes of stand-ins from."""
    modes = {id(x.fake_mode): x.fake_mode for x in examples if hasattr(x, "fake_mode")}
    if not modes:
        return nullcontext()
    from torch._guards import TracingContext, tracing

    (mode,) = modes.values()
    return tracing(TracingContext(mode))


def operations_are_watched() -> bool:
    """Whether a mode sees every operation, as one that counts bytes does."""
    count: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return count is not None and count() > 0


@contextmanager
def said_to_compile() -> Iterator[None]:
    """Within it ``torch.compiler.is_compiling()`` is true, for models that then read no values.

    Where PyTorch keeps that otherwise, nothing changes.
    """
    if not hasattr(torch.compiler, "_is_compiling_flag"):
        yield
        return
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def loop_operator() -> Any | None:
    """``scan(body, carried, [rows], closed_over)``, or None where PyTorch does not have it."""
    try:
        from torch._higher_order_ops.scan import scan_op
    except ImportError:
        return None
    return scan_op


def stand_ins(examples: Sequence[Tensor], by_rows: Collection[int]) -> list[Tensor]:
    """Tensors without values for ``compile_graph``.

    Args:
        by_rows: the indices of those whose first dimension may be of any size.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(i: int, x: Tensor) -> Tensor:
        x = x.detach()
        sizes = [DimDynamic.STATIC] * x.dim()
        if i in by_rows:
            sizes[0] = DimDynamic.DYNAMIC
            # Of a single row the stride may be anything.
            shape, stride = (_ROWS, *x.shape[1:]), (x.shape[1:].numel(), *x.stride()[1:])
            x = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(x, symbolic_context=context)

    return [stand_in(i, x) for i, x in enumerate(examples)]
