"""Whether this PyTorch can be used at all."""

from __future__ import annotations

import torch
from torch.autograd import graph


def check_torch() -> None:
    """Raise where a gradient edge does not keep the node of a custom Function alive.

    Before PyTorch 2.9 that ended in segmentation faults. The field shows it, without trying.

    Raises:
        ImportError: this PyTorch is too old.
    """
    fields = getattr(getattr(graph, "GradientEdge", None), "_fields", ())
    if "ownership_token" not in fields:
        raise ImportError(
            f"diffopt needs PyTorch 2.9 or later, and this is {torch.__version__}, whose gradient "
            "edges do not keep custom functions alive: pip install 'torch>=2.9'"
        )
