"""The only home of private PyTorch names.

One small file for each part of PyTorch. Where a version lacks a name, the feature that needs it is
lost with a message that says so; importing diffopt works.
"""

from diffopt._torch.version import check_torch

check_torch()
