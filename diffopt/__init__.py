"""Differentiate through training: ``diffopt.unroll``, its adjoints and its optimizers."""

from diffopt._unroll import unroll
from diffopt._unrolled import Unrolled
from diffopt.adjoint import Adjoint, Binomial, Segmented, StoreAll
from diffopt.optim import SGD, Adam, AdamW, Momentum, Optimizer, RMSprop, register
from diffopt.schedule import Plan

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Adjoint",
    "Binomial",
    "Momentum",
    "Optimizer",
    "Plan",
    "RMSprop",
    "Segmented",
    "StoreAll",
    "Unrolled",
    "register",
    "unroll",
]
