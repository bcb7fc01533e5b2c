"""Large products of matrices by oneDNN in compiled code, where PyTorch's own are slow.

PyTorch computes a product of float32 matrices on the CPU by MKL, which on processors of other
makers than Intel leaves half of their vector units unused: 109 instead of 230 GFLOP/s on one core
of an AMD EPYC with AVX-512. oneDNN, which PyTorch has for other operations, uses all of them.

Limits: on the CPU, for float32 matrices; the operation and how TorchInductor calls it are private
names of PyTorch. Without one of them products are PyTorch's own.
"""

from __future__ import annotations

import logging
import platform
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from diffopt._torch.feature import optional

#: A product of fewer multiplications is left alone.
LEAST = 1 << 21

_log = logging.getLogger("diffopt")
_aten = torch.ops.aten
_make_library: Any = torch.library.Library
_library = _make_library("diffopt", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")
_linear: Any = optional("torch.ops.mkldnn", "_linear_pointwise")


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _linear(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]


def _of_no_values(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_library.impl("product", _product, "CPU")
_library.impl("product", _of_no_values, "Meta")


def use_fastest(graph: GraphModule) -> None:
    """Replace the large products in a traced graph, on processors where that is faster."""
    if not _is_faster() or torch.get_float32_matmul_precision() != "highest":
        return
    for node in list(graph.graph.nodes):
        if node.target in (_aten.mm.default, _aten.addmm.default) and _is_large(node):
            _replace(graph, node)


def _replace(graph: GraphModule, node: Node) -> None:
    *added, a, b = node.args
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(torch.ops.diffopt.product.default, (a, b))
        new.meta = dict(node.meta)
        if added:
            new = graph.graph.call_function(_aten.add.Tensor, (new, added[0]))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _is_large(node: Node) -> bool:
    values = [x.meta.get("val") if isinstance(x, Node) else None for x in node.args]
    if node.kwargs or not all(
        isinstance(x, Tensor) and x.is_cpu and x.dtype is torch.float32 for x in values
    ):
        return False
    (m, k), n = values[-2].shape, values[-1].shape[1]  # type: ignore[union-attr]
    return bool(m * n * k >= LEAST)


@cache
def _is_faster() -> bool:
    """Whether MKL is slow here, and TorchInductor can be told how to call oneDNN."""
    if platform.machine() not in ("x86_64", "AMD64") or _is_intel():
        return False
    backends: Any = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512" or _linear is None:
        return False
    try:
        _tell_inductor()
    except Exception as error:  # of whatever private names may have become
        _log.info("products of matrices are PyTorch's own: %s", error)
        return False
    return True


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "GenuineIntel" in platform.processor()


def _tell_inductor() -> None:
    ir: Any = import_module("torch._inductor.ir")
    calls: Any = import_module("torch._inductor.mkldnn_ir")
    lowering: Any = import_module("torch._inductor.lowering")
    kernel = ir.ExternKernel

    def lower(a: Any, b: Any) -> Any:
        a, b = kernel.realize_input(a), kernel.realize_input(lowering.permute(b, [1, 0]))
        size = [a.get_size()[0], b.get_size()[0]]
        layout = ir.FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=size)
        node = calls.LinearUnary(
            layout=layout, inputs=[a, b], constant_args=[None, "none", [-1], ""]
        )
        return ir.TensorBox.create(calls._create_output_node(node))

    operation = torch.ops.diffopt.product.default
    lowering.register_lowering(operation, type_promotion_kind=None)(lower)
