"""Checking that a step computed again is, to the last bit, the step computed first."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt._values.state import State
from diffopt._values.tree import Path

_WORDS = 1 << 18  # hashed at once, so that the memory this takes stays small
_GOLDEN, _FIRST, _SECOND = (  # the constants of SplitMix64, as signed numbers
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)


class Ledger:
    """The digests of what the steps gave in the first pass.

    Attributes:
        digests: by the number of a step, one number for each tensor of its state, and its loss's.
    """

    def __init__(self) -> None:
        self.digests: dict[int, dict[Path, int]] = {}

    def note(self, step: int, state: State, loss: Tensor) -> None:
        """Note what ``step`` gave."""
        self.digests[step] = _digests(state, loss)

    def check(self, step: int, state: State, loss: Tensor) -> None:
        """Compare what ``step`` gives now, if it was noted.

        Raises:
            RuntimeError: a tensor differs from the first pass in at least one bit.
        """
        if step not in self.digests:
            return
        first, now = self.digests[step], _digests(state, loss)
        for path, x in now.items():
            if x != first[path]:
                raise RuntimeError(
                    f"step {step}, computed again, gives another {' '.join(path)} than in the "
                    "forward pass: loss_fn keeps state or uses data that changed, draws random "
                    "numbers that are not PyTorch's, or a kernel is nondeterministic (see "
                    "torch.use_deterministic_algorithms)"
                )


def _digests(state: State, loss: Tensor) -> dict[Path, int]:
    digests = {("loss",): digest(loss), **{p: digest(x) for p, x in state.tensors().items()}}
    numbers = torch.stack([x.cpu() for x in digests.values()]).tolist()
    return dict(zip(digests, numbers, strict=True))


def digest(x: Tensor) -> Tensor:
    """A 64-bit hash of the bytes of a tensor, as a 0-d int64 tensor on its device.

    Each 8-byte word is hashed with its index (SplitMix64; Steele, Lea and Flood, 2014, "Fast
    Splittable Pseudorandom Number Generators"), and the results are summed. Two tensors that
    differ in any way have the same sum with a probability of about 2⁻⁶⁴.

    Cost: about a dozen passes over the tensor, in pieces of 2 MiB.
    """
    data = x.detach().contiguous().flatten()
    if data.stride() != (1,):  # a single number may have any
        data = data.new_empty(data.shape).copy_(data)
    data = data.view(torch.uint8)
    if len(data) % 8:
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words), _WORDS):
        piece = words[start : start + _WORDS]
        index = torch.arange(start, start + len(piece), device=x.device)
        total += _mixed(piece + index * _GOLDEN).sum()
    return total


def _mixed(z: Tensor) -> Tensor:
    z = _folded(z, 30) * _FIRST
    z = _folded(z, 27) * _SECOND
    return _folded(z, 31)


def _folded(z: Tensor, bits: int) -> Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))
