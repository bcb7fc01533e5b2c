"""Loops of small steps in C++ that allocate nothing from round to round: private names of PyTorch.

TorchInductor writes a loop as a ``while`` around calls of its kernels, in which every tensor of
every round is an object with memory of its own, and every product of matrices a call of ATen's. In
a step of a few thousand numbers that is nine tenths of the time. Here a tensor within the loop is an
address in an *arena*, laid out once. The arena is there twice: rounds write to the one and the
other in turn, so that what a round hands on is still there in the next. Products of small matrices
are written out, with all sizes known to the compiler.

Limits: on the CPU; all sizes within the loop are known when it is compiled, and no kernel is called
in it but TorchInductor's own and products of matrices. ``NotSmall`` says that a loop is none of
these; then TorchInductor's own code serves.
"""

from __future__ import annotations

import hashlib
import math
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

#: The most multiplications of a product of matrices that is written out; libraries do larger ones
#: in less time.
MOST_MULTIPLICATIONS = 1 << 17

#: The most bytes of the tensors of one round.
MOST_BYTES = 1 << 20

_ALIGNMENT = 64

_HEADER = Path(__file__).with_name("small_loops.h").read_text()


class NotSmall(Exception):
    """Says why a loop cannot be written without allocations."""


class SmallLoops(CppWrapperCpu):  # type: ignore[misc]
    """TorchInductor's writer of C++, with loops of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._arenas: list[_Arena] = []
        self._graphs: dict[int, _Arena] = {}  # by the id of a graph within a loop

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
        super().write_header()
        self.header.splice(_HEADER)

    @property
    def _arena(self) -> _Arena | None:
        """The arena of the loop that is being written."""
        return self._graphs.get(id(self.get_codegened_graph()))

    def codegen_while_loop(self, while_loop: Any, stack_output: bool = False) -> None:
        """Write a loop."""
        if stack_output or self._arena is not None:
            raise NotSmall("a loop in a loop, or one that stacks its results")
        name = while_loop.get_name()
        carried = [x.codegen_reference() for x in while_loop.carried_inputs]
        closed_over = [x.codegen_reference() for x in while_loop.additional_inputs]
        results = self._get_while_loop_carried_output_names(while_loop)
        condition, body = while_loop.cond_subgraph, while_loop.body_subgraph
        arena = _Arena(f"{name}_arena", f"{name}_round")
        self._arenas.append(arena)
        self._graphs |= {id(condition.graph): arena, id(body.graph): arena}

        handed_on = [f"{name}_carried_{k}" for k in range(len(carried))]
        self.writeline(_ArenaLine(arena))
        for x, given in zip(handed_on, carried, strict=True):
            self.writeline(f"const Memory {x}_first = memory_of({given});")
            self.writeline(f"Memory {x} = {x}_first;")
        shared = [f"{name}_shared_{k}" for k in range(len(closed_over))]
        for x, given in zip(shared, closed_over, strict=True):
            self.writeline(f"const Memory {x} = memory_of({given});")
        self.writeline(f"for (int64_t {arena.round} = 0;; ++{arena.round}) {{")
        self.writeline(EnterSubgraphLine(self, condition.graph))
        self._codegen_part(condition, [*handed_on, *shared])
        (proceed,) = condition.graph.graph_outputs
        if isinstance(proceed, ir.ShapeAsConstantBuffer):
            self.writeline(f"if (!({proceed.codegen_reference()})) break;")
        else:
            self.writeline(
                f"if (!*static_cast<bool*>({proceed.codegen_reference()}.data_ptr())) break;"
            )
        self.writeline(ExitSubgraphLine(self))
        self.writeline(EnterSubgraphLine(self, body.graph))
        self._codegen_part(body, [*handed_on, *shared])
        own = list(body.graph.graph_inputs)
        for k, (x, result) in enumerate(zip(handed_on, body.graph.graph_outputs, strict=True)):
            given_back = result.get_name()
            if given_back in own and given_back != own[k]:
                raise NotSmall("a round hands on what it was given, in another place")
            self.writeline(f"{x} = {result.codegen_reference()};")
        self.writeline(ExitSubgraphLine(self))
        self.writeline("}")
        for result, x, given, tensor in zip(
            results, handed_on, carried, while_loop.carried_inputs, strict=True
        ):
            self._codegen_result(result, x, given, tensor)

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
        self.writeline(f"AtenTensorHandle {handle};")
        sizes, strides = tensor.get_size(), tensor.get_stride()
        if not _are_numbers([*sizes, *strides]):  # written in place, as stacked results are
            self.writeline(
                f"if ({carried}.p != {carried}_first.p) throw std::logic_error({carried!r});".replace(
                    "'", '"'
                )
            )
            self._copy_of(given, handle)
        else:
            sizes, strides = list(map(int, sizes)), list(map(int, strides))
            dtype = self.codegen_dtype(tensor.get_dtype())
            device, index = self.codegen_device(tensor.get_device()).split(",")
            size = _span(sizes, strides) * tensor.get_dtype().itemsize
            shape, stride = (self._array(x) for x in (sizes, strides))
            self.writeline(f"if ({carried}.p == {carried}_first.p) {{")
            self._copy_of(given, handle)
            self.writeline("} else {")
            self.writeline(
                "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided("
                f"{len(sizes)}, {shape}, {stride}, {dtype}, {device}, {index}, &{handle}));"
            )
            self.writeline(f"fill({handle}, {carried}, {size}L);")
            self.writeline("}")
        self.writeline(f"RAIIAtenTensorHandle {result}({handle});")

    def _copy_of(self, given: str, handle: str) -> None:
        self.writeline(
            f"AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out({given}, &{handle}));"
        )

    @staticmethod
    def _array(numbers: Sequence[int]) -> str:
        text = ", ".join(f"{n}L" for n in numbers)
        return f"std::array<int64_t, {len(numbers)}>{{{text}}}.data()"

    # Tensors within a loop.

    def make_buffer_allocation(self, buffer: Any) -> Any:
        """A tensor's memory."""
        arena = self._arena
        if arena is None:
            return super().make_buffer_allocation(buffer)
        shape = V.graph.get_allocation_size(buffer)
        strides = buffer.get_stride()
        if not _are_numbers([*shape, *strides]):
            raise NotSmall("a tensor within the loop whose size is not known")
        size = _span(list(map(int, shape)), list(map(int, strides)))
        place = arena.take(size * buffer.get_dtype().itemsize)
        return f"const Memory {buffer.get_name()} = {arena.name}.at({arena.round}, {place}L);"

    def codegen_reinterpret_view(
        self, data: Any, size: Any, stride: Any, offset: Any, writeline: Any, dtype: Any = None
    ) -> Any:
        """A view of a tensor."""
        if self._arena is None:
            return super().codegen_reinterpret_view(data, size, stride, offset, writeline, dtype)
        if dtype is not None and dtype != data.get_dtype():
            raise NotSmall("a tensor that is read as another dtype")
        return (
            f"{data.get_name()}.at(({self.codegen_sizevar(offset)}) * {data.get_dtype().itemsize}L)"
        )

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
            raise NotSmall("its rounds take much memory")
        return offset


class _ArenaLine(DeferredLineBase):  # type: ignore[misc]
    """Where an arena is made, of a size that is known only when the loop has been written."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__("arena")
        self._arena = arena

    def __call__(self) -> str:
        return f"Arena {self._arena.name}({max(self._arena.bytes, _ALIGNMENT)}L);"

    def _new_line(self, line: str) -> _ArenaLine:
        return self


@dataclass
class _ProductLine(WrapperLine):  # type: ignore[misc]
    """Where a product of matrices is computed."""

    wrapper: SmallLoops
    node: Any

    def codegen(self, code: Any) -> None:
        code.writeline(product_call(self.node))


@dataclass(frozen=True)
class _Matrix:
    """A matrix in memory, or many of one form: where it is, its size and its strides."""

    place: str
    batch: int
    rows: int
    columns: int
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, x: Any) -> _Matrix:
        sizes, strides = list(x.get_size()), list(x.get_stride())
        if not _are_numbers([*sizes, *strides]):
            raise NotSmall("a product of matrices whose sizes are not known")
        sizes, strides = list(map(int, sizes)), list(map(int, strides))
        while len(sizes) < 3:
            sizes, strides = [1, *sizes], [0, *strides]
        batch, rows, columns = sizes
        return cls(x.codegen_reference(), batch, rows, columns, tuple(strides))  # type: ignore[arg-type]

    @property
    def transposed(self) -> _Matrix:
        b, r, c = self.strides
        return _Matrix(self.place, self.batch, self.columns, self.rows, (b, c, r))

    def expanded(self, like: _Matrix) -> _Matrix:
        """With zero strides where ``like`` is larger."""
        pairs = ((self.batch, like.batch), (self.rows, like.rows), (self.columns, like.columns))
        strides = tuple(
            0 if mine == 1 and wanted != 1 else s
            for (mine, wanted), s in zip(pairs, self.strides, strict=True)
        )
        return _Matrix(self.place, like.batch, like.rows, like.columns, strides)  # type: ignore[arg-type]


def product_call(node: Any) -> str:
    """C++ for ``mm``, ``bmm``, ``addmm`` or ``baddbmm``."""
    operation = str(node.python_kernel_name).rpartition(".")[2]
    if operation not in ("mm", "bmm", "addmm", "baddbmm") or node.output_view:
        raise NotSmall(f"it calls {operation}")
    if any(value not in (1, None) for value in node.kwargs.values()):
        raise NotSmall("a sum of products with factors")
    if node.get_dtype() not in (torch.float32, torch.float64):
        raise NotSmall(f"products of matrices of {node.get_dtype()}")
    *added, a, b = map(_Matrix.of, node.inputs)
    c = _Matrix.of(node)
    d = added[0].expanded(c) if added else None
    if c.batch * c.rows * c.columns * a.columns > MOST_MULTIPLICATIONS:
        raise NotSmall("a product of large matrices")
    lanes = 64 // node.get_dtype().itemsize
    plain = _cost(a, b, c, lanes)
    turned = _cost(b.transposed, a.transposed, c.transposed, lanes)
    if turned < plain:
        a, b, c = b.transposed, a.transposed, c.transposed
        d = d and d.transposed
    numbers = [c.batch, c.rows, c.columns, a.columns, *a.strides, *b.strides, *c.strides]
    numbers += d.strides if d else (0, 0, 0)
    kind = DTYPE_TO_CPP[node.get_dtype()]
    places = [c.place, a.place, b.place, *([d.place] if d else [])]
    added_to = "true" if d else "false"
    text = ", ".join(f"{n}L" for n in numbers)
    return f"product<{kind}, {added_to}, {text}>({', '.join(places)});"


def _cost(a: _Matrix, b: _Matrix, c: _Matrix, lanes: int) -> float:
    """About how many cycles ``product`` takes, which goes along the columns of ``b`` and ``c``."""
    cycles = c.rows * a.columns * math.ceil(c.columns / lanes) / 1.5
    if b.strides[2] != 1:
        cycles += b.rows * b.columns
    if c.strides[2] != 1:
        cycles += 2 * c.rows * c.columns
    return cycles


def _are_numbers(sizes: Sequence[Any]) -> bool:
    return all(getattr(x, "is_number", isinstance(x, int)) for x in sizes)


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements there are from the first to the last."""
    if 0 in sizes:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


class Marked(CustomGraphPass):  # type: ignore[misc]
    """Changes nothing: it tells TorchInductor's cache on disk what the code was written by."""

    def __call__(self, graph: Any) -> None: ...

    def uuid(self) -> str:
        """A digest of this file and of the C++."""
        return hashlib.sha256(Path(__file__).read_bytes() + _HEADER.encode()).hexdigest()


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
