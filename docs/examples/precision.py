"""How far a meta-gradient in low precision is from the one in float64.

A network with 5,508 weights takes T steps on a batch of 64; the gradient of its loss on another
batch, in its initial weights and in the learning rate, is compared with the same run in float64.

    python docs/examples/precision.py
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

KINDS = {
    "float32": torch.float32,
    "bfloat16 under autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def gradients(kind: str, name: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """In the initial weights, as one vector, and in the learning rate."""
    torch.manual_seed(seed)
    layers = nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    dtype = KINDS.get(kind, torch.float64)
    model = nn.Sequential(*layers).bfloat16().to(dtype)  # every kind starts from equal weights
    x, query = torch.randn(2, 64, 16).bfloat16().to(dtype)
    labels = torch.randint(4, (2, 64))
    rate = 0.1 if name == "Momentum" else 0.01
    lr = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    inner = getattr(diffopt, name)(model.parameters(), lr=lr)
    casting = torch.autocast("cpu", torch.bfloat16) if "autocast" in kind else nullcontext()

    def loss_fn(model: nn.Module, t: int) -> Tensor:
        logits = model(x)
        return F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels[0])

    with casting:
        fast = diffopt.unroll(model, inner, steps, loss_fn)
        outer = F.cross_entropy(fast(query).double(), labels[1])
    in_lr, *in_weights = torch.autograd.grad(outer, [lr, *model.parameters()])
    return torch.cat([g.double().flatten() for g in in_weights]), in_lr


def main() -> None:
    print("| inner optimizer | T | computed in | error | cosine | error in the rate |")
    print("|---|---|---|---|---|---|")
    for name in ("Momentum", "Adam"):
        for steps in (5, 20, 100):
            exact = [gradients("float64", name, steps, seed) for seed in range(5)]
            for kind in KINDS:
                found = [gradients(kind, name, steps, seed) for seed in range(5)]
                pairs = [(a, b) for (a, _), (b, _) in zip(found, exact, strict=True)]
                rates = [(a, b) for (_, a), (_, b) in zip(found, exact, strict=True)]
                error = median([(a - b).norm() / b.norm() for a, b in pairs])
                cosine = median([F.cosine_similarity(a, b, dim=0) for a, b in pairs])
                rate = median([((a - b) / b).abs() for a, b in rates])
                print(f"| {name} | {steps} | {kind} | {error:.1e} | {cosine:.3f} | {rate:.1e} |")


def median(values: list[Tensor]) -> float:
    return torch.stack(values).median().item()


if __name__ == "__main__":
    main()
