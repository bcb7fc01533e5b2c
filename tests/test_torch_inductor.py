"""The private names of PyTorch that compiled loops use, one test each."""

from __future__ import annotations

import platform
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import assert_all_close, batches, mse, tiny
from torch import nn

import diffopt
from diffopt._compile import code, trace
from diffopt._torch import inductor, onednn, vector_isa


def test_the_loop_operator_scans() -> None:
    scan = inductor.loop_operator()
    assert scan is not None
    start, rows = torch.zeros(()), torch.arange(4.0)
    end, before = scan(lambda x, row: (x + row, x.clone()), [start], [rows], ())
    assert end == 6
    assert before.tolist() == [0, 0, 1, 3]


def test_stand_ins_leave_the_number_of_rows_open() -> None:
    fixed, rows = torch.zeros(3, 2), torch.zeros(1, 2)
    a, b = inductor.stand_ins([fixed, rows], by_rows=[1])
    assert a.shape == (3, 2)
    assert not isinstance(b.shape[0], int)
    assert b.shape[1] == 2


def test_models_are_told_that_they_are_compiled_for_a_while() -> None:
    assert not torch.compiler.is_compiling()
    with inductor.said_to_compile():
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()


def test_without_an_operator_for_loops_steps_are_compiled_one_by_one(
    graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch._higher_order_ops.scan", None)
    assert inductor.loop_operator() is None
    model, data = tiny(), batches(4)
    found = []
    for compile in (False, True):
        opt = diffopt.Adam(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, mse, segment=2, compile=compile)
        found.append(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))
    assert_all_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    assert graphs == [False, False]


@dataclass
class Instructions:
    """A set of them, as TorchInductor has it: true where a program that uses them runs."""

    name: str
    work: bool
    asked: list[tuple[str, bool]]
    gate: threading.Event = field(default_factory=threading.Event)

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        here = threading.current_thread() is threading.main_thread()
        self.asked.append((self.name, here))
        if not here:
            assert self.gate.wait(60)
        return self.work


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Instructions]]:
    """Sets of instructions for TorchInductor, of which the processor has all but the first."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("TorchInductor tests instructions on x86 alone")
    from torch._inductor import cpu_vec_isa

    asked: list[tuple[str, bool]] = []
    gate = threading.Event()
    given = [("w new", True), ("w", False), ("middle", True), ("narrow", True)]
    sets = [Instructions(name, work, asked, gate) for name, work in given]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", sets)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["w", "middle", "narrow"])
    monkeypatch.setattr(vector_isa, "_looking", [])
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    yield sets
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_instructions_are_looked_for_until_some_work(sets: list[Instructions]) -> None:
    from torch._inductor import config, cpu_vec_isa

    known: Any = cpu_vec_isa.valid_vec_isa_list
    with vector_isa.widest_alone:
        assert known() == sets[2:3]
    assert "narrow" not in {name for name, _ in sets[0].asked}
    assert cpu_vec_isa.supported_vec_isa_list is sets
    assert known() == sets[2:]  # for everybody else
    with vector_isa.widest_alone:
        assert known() == sets[2:]  # where that is known
    known.cache_clear()
    with config.patch({"cpp.simdlen": 256}), vector_isa.widest_alone:
        assert known() == sets[2:]  # where somebody chooses among them


def test_instructions_are_looked_for_on_another_thread(sets: list[Instructions]) -> None:
    from torch._inductor import cpu_vec_isa

    vector_isa.find_out()
    vector_isa.find_out()
    opened = threading.Timer(0.1, sets[0].gate.set)
    opened.start()
    with vector_isa.widest_alone:
        assert cpu_vec_isa.valid_vec_isa_list() == sets[2:3]
    first_here = [here for _, here in sets[0].asked].index(True)
    assert not any(here for _, here in sets[0].asked[:first_here])
    assert ("middle", False) in sets[0].asked[:first_here]  # it had come to its end
    assert len(vector_isa._looking) == 1
    opened.join()


# Products of matrices.


class Wide(nn.Module):
    """Two products that are large enough, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128, bias=False))
        self.last = nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x)).square().mean()


def replaced(graph: Any) -> int:
    return sum("diffopt.product" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_onednn(transposed: bool) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    a, b = torch.randn(7, 5), torch.randn(5, 3)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    got = torch.ops.diffopt.product(a, b)
    torch.testing.assert_close(got, a @ b)
    meta = torch.ops.diffopt.product(a.to("meta"), b.to("meta"))
    assert (meta.shape, meta.stride(), meta.dtype) == (got.shape, got.stride(), got.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("faster", [True, False])
def test_large_products_go_to_onednn_where_that_is_faster(
    dtype: torch.dtype, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    handed: list[int] = []

    def keep(graph: Any, examples: Any, *, loop: bool = False) -> Any:
        handed.append(replaced(graph.body if loop else graph))
        return graph

    monkeypatch.setattr(trace, "compile_graph", keep)
    monkeypatch.setattr(code, "find_out", lambda: None)
    monkeypatch.setattr(onednn, "_is_faster", lambda: faster)
    model = Wide().to(dtype)
    data = [torch.randn(80, 128, dtype=dtype) for _ in range(3)]
    found = []
    for compile in (False, True):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(model, opt, data, segment=1, compile=compile)
        found.append(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))
    tight = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 0}
    assert_all_close(found[1], found[0], **tight)
    assert len(handed) == 2
    # The first layer's, the second's, and the three that their weights' gradient needs.
    expected = 5 if faster and dtype is torch.float32 else 0
    assert handed[0] == expected
    assert (handed[1] > expected) == bool(expected)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_products_by_onednn_in_a_compiled_loop(inductor: None) -> None:
    if not onednn._is_faster():
        pytest.skip("PyTorch's own products are as fast here")
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    data = [torch.randn(128, 128) for _ in range(3)]
    found = []
    for compile in (False, True):
        opt = diffopt.SGD(model.parameters(), lr=0.1)
        fast = diffopt.unroll(
            model, opt, data, lambda m, x: m(x).square().mean(), segment=1, compile=compile
        )
        found.append(torch.autograd.grad(fast.losses.sum(), list(model.parameters())))
    assert_all_close(found[1], found[0], rtol=1e-4, atol=1e-7)
