"""Loops of small steps in C++ that allocate nothing from round to round: private names of PyTorch.

TorchInductor writes a loop as a ``while`` around calls of its kernels, in which every tensor of
every round is an object with memory of its own, and every product of matrices a call of ATen's. In
a step of a few thousand numbers that is nine tenths of the time. Here a tensor within the loop is
an address in an *arena*, laid out once. The arena is there twice: rounds write to the one and the
other in turn, so that what a round hands on is still there in the next. Products of small matrices
are written out in C++, with all sizes known to its compiler.

Limits: on the CPU; all sizes within the loop are known when it is compiled, and no kernel is called
in it but TorchInductor's own and products of matrices. ``NotSmall`` says that a loop is none of
these; then TorchInductor's own code serves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen import common
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine, WrapperLine
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import DeferredLineBase
from torch._inductor.virtualized import V

from diffopt._torch.products import NotSmall, are_numbers, product_call, span

#: The most bytes of the tensors of one round.
MOST_BYTES = 1 << 23

_ALIGNMENT = 64

_HEADER = Path(__file__).with_name("small_loops.h")

# Without types, as PyTorch's private classes are.
_Writer: Any = CppWrapperCpu
_Deferred: Any = DeferredLineBase
_Line: Any = WrapperLine
_Pass: Any = CustomGraphPass


class SmallLoops(_Writer):  # type: ignore[misc]
    """TorchInductor's writer of C++, with loops of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._arenas: dict[int, _Arena] = {}  # by the id of a graph within a loop

    @staticmethod
    def create(
        is_subgraph: bool,
        subgraph_name: str | None,
        parent_wrapper: Any,
        partition_signatures: Any = None,
    ) -> SmallLoops:
        """As for ``CppWrapperCpu``."""
        return SmallLoops()

    def write_header(self) -> None:
        """Write what stands before all code."""
        super().write_header()
        self.header.splice(_HEADER.read_text())

    @property
    def _arena(self) -> _Arena | None:
        """The arena of the loop that is being written."""
        return self._arenas.get(id(self.get_codegened_graph()))

    def codegen_while_loop(self, while_loop: Any, stack_output: bool = False) -> None:
        """Write a loop."""
        if stack_output or self._arena is not None:
            raise NotSmall("there is a loop in a loop, or one that stacks its results")
        name = while_loop.get_name()
        carried = [x.codegen_reference() for x in while_loop.carried_inputs]
        closed_over = [x.codegen_reference() for x in while_loop.additional_inputs]
        condition, body = while_loop.cond_subgraph, while_loop.body_subgraph
        arena = _Arena(f"{name}_arena", f"{name}_round")
        self._arenas |= {id(condition.graph): arena, id(body.graph): arena}

        handed_on = [f"{name}_carried_{k}" for k in range(len(carried))]
        shared = [f"{name}_shared_{k}" for k in range(len(closed_over))]
        self.writeline(_ArenaLine(arena))
        for x, given in zip(handed_on, carried, strict=True):
            self.writeline(f"const Memory {x}_first = memory_of({given});")
            self.writeline(f"Memory {x} = {x}_first;")
        for x, given in zip(shared, closed_over, strict=True):
            self.writeline(f"const Memory {x} = memory_of({given});")
        self.writeline(f"for (int64_t {arena.round} = 0;; ++{arena.round}) {{")
        self.writeline(EnterSubgraphLine(self, condition.graph))
        self._codegen_part(condition, [*handed_on, *shared])
        (proceed,) = condition.graph.graph_outputs
        read = proceed.codegen_reference()
        if not isinstance(proceed, ir.ShapeAsConstantBuffer):
            read = f"*static_cast<bool*>({read}.data_ptr())"
        self.writeline(f"if (!({read})) break;")
        self.writeline(ExitSubgraphLine(self))
        self.writeline(EnterSubgraphLine(self, body.graph))
        self._codegen_part(body, [*handed_on, *shared])
        own = list(body.graph.graph_inputs)
        for k, (x, result) in enumerate(zip(handed_on, body.graph.graph_outputs, strict=True)):
            if result.get_name() in {*own} - {own[k]}:
                raise NotSmall("a round hands on what it was given, in another place")
            self.writeline(f"{x} = {result.codegen_reference()};")
        self.writeline(ExitSubgraphLine(self))
        self.writeline("}")
        results = self._get_while_loop_carried_output_names(while_loop)
        for k, result in enumerate(results):
            self._codegen_result(result, handed_on[k], carried[k], while_loop.carried_inputs[k])

    def _codegen_part(self, subgraph: Any, given: Sequence[str]) -> None:
        """The condition or the body of a loop, on the memory that it is given."""
        self.push_codegened_graph(subgraph.graph)
        try:
            for inner, x in zip(subgraph.graph.graph_inputs, given, strict=True):
                self.writeline(f"const Memory {inner} = {x};")
            parent = V.graph
            with V.set_graph_handler(subgraph.graph):
                subgraph.graph.codegen_subgraph(parent_graph=parent)
        finally:
            self.pop_codegened_graph()

    def _codegen_result(self, result: str, carried: str, given: str, tensor: Any) -> None:
        """The tensor that a loop has handed on in the end."""
        handle = f"{result}_handle"
        same = f"AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out({given}, &{handle}));"
        self.writeline(f"AtenTensorHandle {handle};")
        sizes, strides = list(tensor.get_size()), list(tensor.get_stride())
        if not are_numbers([*sizes, *strides]):  # rows, which are written in place
            self.writeline(f"check_same({carried}, {carried}_first);")
            self.writeline(same)
        else:
            device, index = self.codegen_device(tensor.get_device()).split(",")
            arguments = [str(len(sizes)), _array(sizes), _array(strides)]
            arguments += [self.codegen_dtype(tensor.get_dtype()), device, index, f"&{handle}"]
            size = span(sizes, strides) * tensor.get_dtype().itemsize
            made = f"aoti_torch_empty_strided({', '.join(arguments)})"
            self.writeline(f"if ({carried}.p == {carried}_first.p) {{")
            self.writeline(same)
            self.writeline("} else {")
            self.writeline(f"AOTI_TORCH_ERROR_CODE_CHECK({made});")
            self.writeline(f"fill({handle}, {carried}, {size}L);")
            self.writeline("}")
        self.writeline(f"RAIIAtenTensorHandle {result}({handle});")

    # Tensors within a loop.

    def make_buffer_allocation(self, buffer: Any) -> Any:
        """A tensor's memory."""
        arena = self._arena
        if arena is None:
            return super().make_buffer_allocation(buffer)
        shape, strides = list(V.graph.get_allocation_size(buffer)), list(buffer.get_stride())
        if not are_numbers([*shape, *strides]):
            raise NotSmall("the size of a tensor within it is not known")
        place = arena.take(span(shape, strides) * buffer.get_dtype().itemsize)
        return f"const Memory {buffer.get_name()} = {arena.name}.at({arena.round}, {place}L);"

    def codegen_reinterpret_view(
        self, data: Any, size: Any, stride: Any, offset: Any, writeline: Any, dtype: Any = None
    ) -> Any:
        """A view of a tensor."""
        if self._arena is None:
            return super().codegen_reinterpret_view(data, size, stride, offset, writeline, dtype)
        if dtype is not None and dtype != data.get_dtype():
            raise NotSmall("a tensor is read as another dtype")
        bytes = f"({self.codegen_sizevar(offset)}) * {data.get_dtype().itemsize}L"
        return f"{data.get_name()}.at({bytes})"

    def codegen_tensor_item(
        self, dtype: torch.dtype, tensor: str, scalar: str, indented_buffer: Any = None
    ) -> None:
        """A number that is read from a tensor."""
        if self._arena is None:
            super().codegen_tensor_item(dtype, tensor, scalar, indented_buffer)
            return
        kind = DTYPE_TO_CPP[dtype]
        writer = indented_buffer or self
        writer.writeline(f"{kind} {scalar} = *static_cast<{kind}*>({tensor}.data_ptr());")

    def generate_extern_kernel_out(self, node: Any) -> None:
        """A product of matrices."""
        if self._arena is None:
            super().generate_extern_kernel_out(node)
        else:
            self.writeline(_ProductLine(self, node))

    def generate_c_shim_extern_kernel_call(self, kernel: str, *args: Any, **more: Any) -> None:
        """A call of ATen's."""
        if self._arena is not None:
            raise NotSmall(f"it calls {kernel}")
        super().generate_c_shim_extern_kernel_call(kernel, *args, **more)


def _array(numbers: Sequence[Any]) -> str:
    text = ", ".join(f"{int(n)}L" for n in numbers)
    return f"std::array<int64_t, {len(numbers)}>{{{text}}}.data()"


class _Arena:
    """The memory of the tensors of a round.

    Attributes:
        name, round: what it and the number of the round are called.
        bytes: how many it takes.
    """

    def __init__(self, name: str, round: str) -> None:
        self.name, self.round, self.bytes = name, round, 0

    def take(self, count: int) -> int:
        """The offset of so many bytes."""
        offset = self.bytes
        self.bytes += -(-count // _ALIGNMENT) * _ALIGNMENT
        if self.bytes > MOST_BYTES:
            raise NotSmall("the tensors of a round take much memory")
        return offset


class _ArenaLine(_Deferred):  # type: ignore[misc]
    """Where an arena is made, of a size that is known only when the loop has been written."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__("arena")
        self._arena = arena

    def __call__(self) -> str:
        return f"Arena {self._arena.name}({max(self._arena.bytes, _ALIGNMENT)}L);"

    def _new_line(self, line: str) -> _ArenaLine:
        return self


@dataclass
class _ProductLine(_Line):  # type: ignore[misc]
    """Where a product of matrices is computed."""

    wrapper: SmallLoops
    node: Any

    def codegen(self, code: Any) -> None:
        """Write it."""
        code.writeline(product_call(self.node))


class Marked(_Pass):  # type: ignore[misc]
    """Changes nothing: it tells TorchInductor's cache on disk what the code was written by."""

    def __call__(self, graph: Any) -> None: ...

    def uuid(self) -> str:
        """A digest of all that writes loops."""
        files = (Path(__file__), Path(__file__).with_name("products.py"), _HEADER)
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def small_loops() -> Iterator[dict[str, Any]]:
    """Within it TorchInductor writes loops as here; yields the settings that belong to that."""
    common.init_backend_registration()
    before = common.device_codegens["cpu"]
    common.device_codegens["cpu"] = common.DeviceCodegen(
        before.scheduling, before.wrapper_codegen, SmallLoops, before.fx_wrapper_codegen
    )
    try:
        yield {"post_grad_custom_post_pass": Marked(), "cpp.threads": 1}
    finally:
        common.device_codegens["cpu"] = before
