"""How the derivative is computed: one file an adjoint."""

from diffopt._loop.loop import Loop
from diffopt._loop.measure import StepBytes
from diffopt._loop.way_back import CapturedSum
from diffopt._values.state import Cotangent, State
from diffopt.adjoint._base import Adjoint, Checkpointed
from diffopt.adjoint._binomial import Binomial
from diffopt.adjoint._budget import MemoryBudget
from diffopt.adjoint._first_order import FirstOrder
from diffopt.adjoint._forward_mode import ForwardMode
from diffopt.adjoint._implicit import ConvergenceWarning, Implicit
from diffopt.adjoint._segmented import Segmented
from diffopt.adjoint._solvers import CG, Neumann, NormalCG, Solution, Solver
from diffopt.adjoint._store_all import StoreAll
from diffopt.adjoint._truncated import Truncated

__all__ = [
    "CG",
    "Adjoint",
    "Binomial",
    "CapturedSum",
    "Checkpointed",
    "ConvergenceWarning",
    "Cotangent",
    "FirstOrder",
    "ForwardMode",
    "Implicit",
    "Loop",
    "MemoryBudget",
    "Neumann",
    "NormalCG",
    "Segmented",
    "Solution",
    "Solver",
    "State",
    "StepBytes",
    "StoreAll",
    "Truncated",
]
