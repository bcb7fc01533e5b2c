"""Wrong arguments in every combination: each is one sentence, and the model is what it was.

Small by default; ``DIFFOPT_COMBINATIONS=1000 pytest -s tests/reliability/test_arguments.py`` prints
the counts of the documentation.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import diffopt

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

COMBINATIONS = int(os.environ.get("DIFFOPT_COMBINATIONS", "40"))


def loss(model: nn.Module, t: Any) -> torch.Tensor:
    return model(torch.ones(3, 2)).square().mean()


BATCHES = r"pass the number of steps, or (a list of batches|batches to iterate over)"
SEGMENT = "write segment=10, or leave it out"
SUCH = r"pass an object such as diffopt\.\w+\("
OPTIMIZER = r"pass a diffopt or torch\.optim optimizer"
GRADIENTS = "it has to return a dict of gradients by parameter name"
GROUP = r"pass a torch\.distributed process group"
PARTS = "pass how many parts, an int"

#: Values of each argument, with what the message says of a wrong one: the argument, the cause and
#: what to pass; None for a right one.
VALUES: dict[str, list[tuple[Any, str | None]]] = {
    "opt": [
        ("SGD", None),
        (None, f"opt is a NoneType: {OPTIMIZER}"),
        (3, f"opt is a int: {OPTIMIZER}"),
        (torch.optim.SGD, f"opt is the class SGD: {OPTIMIZER}"),
        ([], "the list of optimizers is empty: pass at least one"),
    ],
    "loss_fn": [
        (loss, None),
        ("mse", "loss_fn is a str: pass a function"),
        (lambda model, t: 3.0, "the loss of step 0 is a float: loss_fn has to return a scalar te"),
        (lambda model, t: torch.ones(2), r"the loss of step 0 has shape \(2,\), which is not a sc"),
        (lambda model, t: torch.ones(()), "the loss of step 0 does not depend on any inner varia"),
    ],
    "steps": [
        (2, None),
        (0, None),
        ([], None),
        (-1, "steps=-1 is negative: pass 0 or more"),
        (True, f"steps is a bool: {BATCHES}"),
        (2.0, f"steps is a float: {BATCHES}"),
        ("2", f"steps is a str: {BATCHES}"),
        ({}, f"steps is a dict: {BATCHES}"),
        (None, f"steps is a NoneType: {BATCHES}"),
        (iter(()), "steps is a tuple_iterator that yields nothing: .* Pass a list, or a new"),
    ],
    "segment": [
        (None, None),
        (1, None),
        (0, f"segment is 0, but must be at least 1: {SEGMENT}"),
        (-3, f"segment is -3, but must be at least 1: {SEGMENT}"),
        (2.5, f"segment is 2.5, of type float, but must be an int: {SEGMENT}"),
        ("k", f"segment is 'k', of type str, but must be an int: {SEGMENT}"),
    ],
    "adjoint": [
        (None, None),
        (diffopt.StoreAll(), None),
        (diffopt.Segmented, f"adjoint is a class: {SUCH}"),
        ("cpu", f"adjoint is a str: {SUCH}"),
        (3, f"adjoint is a int: {SUCH}"),
    ],
    "initial": [
        (None, None),
        ({}, None),
        ({"weight": 3}, r"initial\['weight'\] is a int: pass a tensor"),
        ({"weight": torch.ones(3)}, r"initial\['weight'\] has shape \(3,\), the parameter has"),
        ({"nothing": torch.ones(1)}, "initial has a value for 'nothing', .*: use names of the"),
        (3, "initial is a int: pass an Unrolled, or a dict of tensors"),
    ],
    "grad_transform": [
        (None, None),
        (lambda grads: grads, None),
        (lambda grads: None, f"grad_transform returned a NoneType: {GRADIENTS}"),
        (lambda grads: 3, f"grad_transform returned a int: {GRADIENTS}"),
        (7, "grad_transform is a int: pass a function"),
    ],
    "max_cotangent_norm": [
        (None, None),
        (1.0, None),
        (0, "max_cotangent_norm=0 would stop every gradient: pass a number above 0"),
        (-1.0, "max_cotangent_norm=-1.0 would stop every gradient: pass a number above 0"),
        (float("nan"), "max_cotangent_norm=nan would stop every gradient: pass a number above 0"),
        ("1", "max_cotangent_norm is a str: pass a number"),
        (True, "max_cotangent_norm is a bool: pass a number"),
    ],
    "verify": [
        (False, None),
        (True, None),
        (None, "verify is a NoneType: pass True or False"),
        (1, "verify is a int: pass True or False"),
    ],
    "tasks": [
        (None, None),
        (0, "tasks=0: pass 1 or more, or None"),
        (-1, "tasks=-1: pass 1 or more, or None"),
        (2.5, "tasks is a float: pass how many there are, an int"),
        (True, "tasks is a bool: pass how many there are, an int"),
        ("2", "tasks is a str: pass how many there are, an int"),
    ],
    "compile": [(False, None), (1, "compile is a int: pass True or False")],
    "microbatches": [
        (None, None),
        (0, "microbatches=0: pass 1 part or more"),
        (2.5, f"microbatches is a float: {PARTS}"),
        (True, f"microbatches is a bool: {PARTS}"),
    ],
    "group": [(None, None), (3, f"group is a int: {GROUP}"), ("world", f"group is a str: {GROUP}")],
    "monitor": [(None, None), (3, "monitor is a int: pass a function")],
    "progress": [(False, None), ("yes", "progress is a str: pass True or False")],
}

#: Of either, whatever it is, with the other.
TOGETHER = r"both segment=.* and adjoint=.* were given.*: pass one of them"

#: What is noticed when a step is taken.
IN_STEPS = "the loss of step 0|grad_transform returned"

counts: Counter[str] = Counter()


def refusal(**arguments: Any) -> str | None:
    """The message, None if there is a gradient; the model is looked after in either case."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    held = dict(model.named_parameters())
    if arguments["opt"] == "SGD":
        arguments["opt"] = diffopt.SGD(model.parameters(), lr=0.1)
    found = None
    try:
        fast = diffopt.unroll(model, **arguments)
        fast.params["weight"].sum().backward()
        assert model.weight.grad is not None
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        found = str(error)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(x is held[n] for n, x in model.named_parameters())
    return found


RIGHT = {name: values[0][0] for name, values in VALUES.items()}
WRONG = [
    pytest.param(name, value, text, id=f"{name}-{i}")
    for name, values in VALUES.items()
    for i, (value, text) in enumerate(values)
    if text is not None
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_one_wrong_argument(name: str, value: Any, text: str) -> None:
    found = refusal(**{**RIGHT, name: value})
    assert found is not None
    assert re.match(text, found), found


@st.composite
def combinations(draw: Any) -> dict[str, tuple[Any, str | None]]:
    """A value of each argument, up to four of which may be wrong."""
    free = draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=4))
    return {
        name: draw(st.sampled_from([v for v in values if name in free or v[1] is None]))
        for name, values in VALUES.items()
    }


@hypothesis.settings(
    max_examples=COMBINATIONS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(chosen=combinations())
def check_combination(chosen: dict[str, tuple[Any, str | None]]) -> None:
    texts = {text for _, text in chosen.values() if text is not None}
    if chosen["segment"][0] is not None and chosen["adjoint"][0] is not None:
        texts.add(TOGETHER)
    found = refusal(**{name: value for name, (value, _) in chosen.items()})
    if found is not None:
        assert any(re.match(text, found) for text in texts), found
        counts["refused"] += 1
        return
    taken = chosen["steps"][0] == 2
    assert not any(taken or not re.match(IN_STEPS, text) for text in texts), texts
    counts["right"] += 1


def test_wrong_combinations() -> None:
    counts.clear()
    check_combination()
    print(f"\n{counts['refused']} combinations refused, {counts['right']} right")
    assert counts["refused"]
    assert counts["right"]
