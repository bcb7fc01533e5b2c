"""Differentiate through training: ``diffopt.unroll``, its adjoints and its optimizers."""

from diffopt import distributed
from diffopt._compile.compiled import CompileWarning
from diffopt._compile.trace import compile_seconds
from diffopt._loop.durable import Durable
from diffopt._step.microbatches import Microbatches
from diffopt._unroll.smoothness import Metasmoothness, metasmoothness
from diffopt._unroll.types import Model
from diffopt._unroll.unroll import unroll
from diffopt._unroll.unrolled import Unrolled
from diffopt.adjoint import (
    CG,
    Adjoint,
    Binomial,
    ConvergenceWarning,
    FirstOrder,
    ForwardMode,
    Implicit,
    MemoryBudget,
    Neumann,
    NormalCG,
    Segmented,
    Solution,
    Solver,
    StoreAll,
    Truncated,
)
from diffopt.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Momentum,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    from_scheduler,
    register,
)
from diffopt.schedule import Plan

__version__ = "0.1.0"

__all__ = [
    "ASGD",
    "CG",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adjoint",
    "Binomial",
    "CompileWarning",
    "ConvergenceWarning",
    "Durable",
    "FirstOrder",
    "ForwardMode",
    "Implicit",
    "MemoryBudget",
    "Metasmoothness",
    "Microbatches",
    "Model",
    "Momentum",
    "Muon",
    "NAdam",
    "Neumann",
    "NormalCG",
    "Optimizer",
    "Plan",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Segmented",
    "Solution",
    "Solver",
    "StoreAll",
    "Truncated",
    "Unrolled",
    "compile_seconds",
    "distributed",
    "from_scheduler",
    "metasmoothness",
    "register",
    "unroll",
]
