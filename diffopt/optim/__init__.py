"""The optimizers of ``torch.optim``, differentiable: each states one pure rule."""

from diffopt.optim.adadelta import Adadelta
from diffopt.optim.adagrad import Adagrad
from diffopt.optim.adam import Adam, AdamW
from diffopt.optim.adamax import Adamax
from diffopt.optim.asgd import ASGD
from diffopt.optim.base import Optimizer
from diffopt.optim.convert import convert, load_state_into, register
from diffopt.optim.joint import Joint
from diffopt.optim.muon import Muon
from diffopt.optim.nadam import NAdam
from diffopt.optim.radam import RAdam
from diffopt.optim.rmsprop import RMSprop
from diffopt.optim.rprop import Rprop
from diffopt.optim.scheduled import from_scheduler
from diffopt.optim.sgd import SGD, Momentum

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Joint",
    "Momentum",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "convert",
    "from_scheduler",
    "load_state_into",
    "register",
]
