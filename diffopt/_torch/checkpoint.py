"""What ``torch.utils.checkpoint`` makes of a layer that it is going to compute again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.autograd.graph import saved_tensors_hooks

from diffopt._torch.feature import optional

_Frame = optional("torch.utils.checkpoint", "_CheckpointFrame")

if TYPE_CHECKING:
    from torch.utils.checkpoint import _CheckpointFrame

    CheckpointFrame = _CheckpointFrame
else:
    #: Holds how a layer is computed again, with ``use_reentrant=False``.
    CheckpointFrame = _Frame or object

#: Whether a layer is computed again by way of ``CheckpointFrame``.
HAS_FRAME = _Frame is not None


def belongs_to_checkpoint(hooks: saved_tensors_hooks) -> bool:
    """Whether these hooks are those that ``checkpoint(use_reentrant=False)`` runs a layer under."""
    return type(hooks).__module__ == "torch.utils.checkpoint"
