"""Differentiable optimizers: those of ``torch.optim``, each as one pure rule."""

from diffopt.optim.adam import Adam, AdamW
from diffopt.optim.base import Optimizer
from diffopt.optim.convert import convert, load_state_into, register
from diffopt.optim.rmsprop import RMSprop
from diffopt.optim.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Momentum",
    "Optimizer",
    "RMSprop",
    "convert",
    "load_state_into",
    "register",
]
