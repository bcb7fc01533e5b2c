"""Second derivatives, of which an unroll takes one in every step: {operation: replacement}.

``missing`` has second derivatives that PyTorch lacks or has wrong. ``gelu``, ``batch_norm`` and
``layer_norm`` derive by hand what PyTorch puts together from many operations: much of a step's time
goes there. Values and first derivatives come from PyTorch's kernels, and are the same to the last
bit.

An operation has several names, and each name is a row: in ``torch.nn.functional``, in ``torch``
and in ``torch.ops.aten``, whose arguments come in another order (``aliases``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from diffopt._derivatives import aliases
from diffopt._derivatives.attention import math_attention, scaled_dot_product_attention
from diffopt._derivatives.batch_norm import batch_norm, instance_norm
from diffopt._derivatives.conditions import beyond_second_derivatives, is_beyond_second
from diffopt._derivatives.gelu import gelu
from diffopt._derivatives.layer_norm import layer_norm
from diffopt._derivatives.missing import (
    cdist,
    hardsigmoid,
    is_suspect,
    linear_cross_entropy,
    refuse_missing,
    refuse_wrong,
    weight_norm,
)
from diffopt._derivatives.routing import Routed
from diffopt._torch.operations import Operation, builtins, overloads

#: Public functions of Python's, which the replacements have the signatures of.
_IN_PYTHON: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "hardsigmoid": hardsigmoid,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "linear_cross_entropy": linear_cross_entropy,
}

#: The operations of ATen, and what is done in their place. The signatures are ATen's.
_IN_ATEN: dict[str, Callable[..., Any]] = {
    "_native_batch_norm_legit": aliases.native_batch_norm_legit,
    "_weight_norm": weight_norm,
    "_weight_norm_interface": aliases.weight_norm_interface,
    "batch_norm": aliases.batch_norm,
    "cdist": aliases.cdist,
    "gelu": gelu,
    "hardsigmoid": hardsigmoid,
    "hardsigmoid_": partial(hardsigmoid, inplace=True),
    "instance_norm": aliases.instance_norm,
    "layer_norm": aliases.layer_norm,
    "native_batch_norm": aliases.native_batch_norm,
    "native_layer_norm": aliases.native_layer_norm,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}

#: What cannot be replaced, since nobody can tell what its further results stand for: refused where
#: it would be differentiated, with what to call instead.
_REFUSED = {
    "_batch_norm_impl_index": "torch.nn.functional.batch_norm",
    "_batch_norm_with_update": "torch.nn.functional.batch_norm",
    "_native_batch_norm_legit_functional": "torch.nn.functional.batch_norm",
    "cudnn_batch_norm": "torch.nn.functional.batch_norm",
    "miopen_batch_norm": "torch.nn.functional.batch_norm",
}


def _rows() -> Iterator[tuple[Operation, Operation]]:
    yield torch.cdist, cdist
    for name, replacement in _IN_PYTHON.items():
        operation = getattr(F, name, None)
        if operation is not None:  # linear_cross_entropy is new in PyTorch 2.13
            yield operation, replacement
    for name, replacement in _IN_ATEN.items():
        for operation in builtins(name):
            yield operation, aliases.unless_out(operation, replacement)
        for operation in overloads(name):
            yield operation, aliases.unless_out(operation, aliases.of_self(replacement))
    for name, instead in _REFUSED.items():
        for operation in (*builtins(name), *overloads(name)):
            yield operation, aliases.refused(operation, name, instead)


#: Every operation that has another derivative here, by its function object.
REPLACEMENTS: dict[Operation, Operation] = dict(_rows())

#: Where these operations have their derivatives from here.
with_second_derivatives = Routed(REPLACEMENTS)

__all__ = [
    "REPLACEMENTS",
    "beyond_second_derivatives",
    "is_beyond_second",
    "is_suspect",
    "math_attention",
    "refuse_missing",
    "refuse_wrong",
    "with_second_derivatives",
]
