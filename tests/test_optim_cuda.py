"""The rules on an accelerator."""

from __future__ import annotations

import pytest
import torch
from optimizers import (
    Case,
    assert_same,
    every_case,
    some_params,
)


@pytest.mark.cuda
@every_case
def test_on_cuda(case: Case) -> None:
    theirs = {n: p.cuda() for n, p in some_params().items()}
    reference = case.theirs(theirs.values())
    params = {n: p.clone() for n, p in theirs.items()}
    opt = case.ours(params.values())
    lr = torch.tensor(case.options.get("lr", 1.0), dtype=torch.float64, requires_grad=True)
    hyper = [{**opt.hyperparameters(0)[0], "lr": lr}]
    state, learned = opt.init(params), opt.init(params)
    moved = {n: p.clone().requires_grad_() for n, p in params.items()}
    start = moved
    for _ in range(7):
        grads = {n: torch.randn_like(p) for n, p in params.items()}
        for n, p in theirs.items():
            p.grad = grads[n]
        reference.step()
        params, state = opt.update(params, grads, state)
        moved, learned = opt.update(moved, grads, learned, hyper=hyper)
    assert_same(params, theirs)
    assert_same({n: p.detach() for n, p in moved.items()}, theirs, rtol=1e-6, atol=1e-7)
    for n, p in theirs.items():
        expected = {k: x for k, x in reference.state[p].items() if x is not None}
        assert_same(state[n], expected)  # devices included
    total = torch.stack([p.sum() for p in moved.values()]).sum()
    slopes = torch.autograd.grad(total, [lr, *start.values()])
    assert [x.device.type for x in slopes] == ["cpu", "cuda", "cuda", "cuda"]
