"""How the derivative is computed: one file an adjoint."""

from diffopt.adjoint._base import Adjoint, Checkpointed
from diffopt.adjoint._binomial import Binomial
from diffopt.adjoint._segmented import Segmented
from diffopt.adjoint._store_all import StoreAll

__all__ = ["Adjoint", "Binomial", "Checkpointed", "Segmented", "StoreAll"]
