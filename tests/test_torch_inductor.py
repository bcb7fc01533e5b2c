"""The private names of PyTorch that compiled loops use, one test each."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import assert_all_close, batches, mse, tiny

import diffopt
from diffopt._torch import inductor


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
