"""Whole networks: a residual one with all that is stateful in it, and a small language model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffopt

IMAGES = torch.linspace(0, 40, 4 * 3 * 6 * 6, dtype=torch.double).sin().reshape(4, 3, 6, 6)
LABELS = torch.tensor([0, 1, 2, 1])


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout2d(0.3)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.drop(F.silu(self.norm(self.first(x)))))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        Residual(4),
        Residual(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4, 3),
    ).double()


def classify(model: Any, t: int) -> Tensor:
    return F.cross_entropy(model(IMAGES.roll(t, -1)), LABELS)


def query(model: Any) -> Tensor:
    return F.cross_entropy(model(IMAGES.flip(-1)), LABELS)


def trained_in_place(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for t in range(12):
        opt.zero_grad()
        classify(model, t).backward()
        opt.step()
    return model


def test_residual_network_with_batch_norm_and_dropout() -> None:
    expected = trained_in_place(resnet())
    found = {}
    for segment in (1, 5, 12):
        model = resnet()
        torch.manual_seed(1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        fast = diffopt.unroll(model, inner, 12, classify, segment=segment)
        for name, x in expected.named_buffers():
            torch.testing.assert_close(fast.buffers[name], x, rtol=1e-10, atol=1e-12)
            if name.endswith("num_batches_tracked"):
                assert fast.buffers[name] == 12
        for name, p in expected.named_parameters():
            torch.testing.assert_close(fast.params[name], p, rtol=1e-10, atol=1e-12)
        torch.manual_seed(2)
        outer = fast.apply(query)
        found[segment] = torch.autograd.grad(outer, list(model.parameters()))
    for g1, g5, g12 in zip(*found.values(), strict=True):
        assert torch.equal(g1, g5)
        assert torch.equal(g1, g12)

    torch.manual_seed(3)
    v = [torch.randn_like(g) for g in found[1]]

    def moved(h: float) -> float:
        model = resnet()
        with torch.no_grad():
            for p, u in zip(model.parameters(), v, strict=True):
                p.add_(u, alpha=h)
        model = trained_in_place(model)
        torch.manual_seed(2)
        return query(model).item()

    h = 1e-5
    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    along = sum((g * u).sum().item() for g, u in zip(found[1], v, strict=True))
    assert along == pytest.approx(slope, rel=1e-5)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).reshape(batch, length, 3, 2, width // 2)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 7, length: int = 5, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


TOKENS = (
    torch.arange(4 * 3 * 6).mul(5).remainder(11).remainder(7).reshape(3, 4, 6)
)  # 3 batches of 4


def next_token(model: Any, tokens: Tensor) -> Tensor:
    """Of each example."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT().double()


def groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, whose weights decay, and the rest."""
    params = list(model.parameters())
    return [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]


STEPS = [TOKENS[0], TOKENS[1], TOKENS[0], TOKENS[1]]
LR, WEIGHTS = [0.03, 0.01], [1.0, 0.6, 1.3, 0.9]


def gpt_trained_in_place(model: GPT, lr: list[float], weights: list[float]) -> float:
    matrices, vectors = groups(model)
    opt = torch.optim.AdamW(
        [
            {"params": matrices, "lr": lr[0], "weight_decay": 0.1},
            {"params": vectors, "lr": lr[1], "weight_decay": 0.0},
        ],
        eps=1e-4,
    )
    w = torch.tensor(weights, dtype=torch.double)
    for tokens in STEPS:
        opt.zero_grad()
        (w * next_token(model, tokens)).mean().backward()
        opt.step()
    return next_token(model, TOKENS[2]).mean().item()


def difference(of: Any, h: float = 1e-5) -> float:
    return (8 * (of(h) - of(-h)) - (of(2 * h) - of(-2 * h))) / (12 * h)


@pytest.mark.parametrize(
    "adjoint", [diffopt.StoreAll(), diffopt.Segmented(2), diffopt.Binomial(2)], ids=repr
)
def test_tied_gpt_with_default_attention(adjoint: diffopt.Adjoint) -> None:
    model = gpt()
    matrices, vectors = groups(model)
    lr = [torch.tensor(x, dtype=torch.double, requires_grad=True) for x in LR]
    weights = torch.tensor(WEIGHTS, dtype=torch.double, requires_grad=True)
    inner = diffopt.AdamW(
        [
            {"params": matrices, "lr": lr[0], "weight_decay": 0.1},
            {"params": vectors, "lr": lr[1], "weight_decay": 0.0},
        ],
        eps=1e-4,
    )
    fast = diffopt.unroll(
        model,
        inner,
        STEPS,
        lambda m, tokens: (weights * next_token(m, tokens)).mean(),
        adjoint=adjoint,
    )
    outer = next_token(fast, TOKENS[2]).mean()
    assert outer.item() == pytest.approx(gpt_trained_in_place(gpt(), LR, WEIGHTS), rel=1e-9)
    outer.backward()
    assert "head.weight" not in fast.params
    assert model.head.weight is model.embed.weight

    torch.manual_seed(4)
    for _ in range(2):
        v = [torch.randn_like(p) for p in model.parameters()]

        def moved(h: float, v: list[Tensor] = v) -> float:
            shifted = copy.deepcopy(model)
            with torch.no_grad():
                for p, u in zip(shifted.parameters(), v, strict=True):
                    p.add_(u, alpha=h)
            return gpt_trained_in_place(shifted, LR, WEIGHTS)

        along = sum((p.grad * u).sum().item() for p, u in zip(model.parameters(), v, strict=True))
        assert along == pytest.approx(difference(moved), rel=1e-5)
    for i in range(2):

        def at_rate(h: float, i: int = i) -> float:
            return gpt_trained_in_place(
                gpt(), [x + h * (j == i) for j, x in enumerate(LR)], WEIGHTS
            )

        assert lr[i].grad.item() == pytest.approx(difference(at_rate), rel=1e-5)
    for i in range(4):

        def weighted(h: float, i: int = i) -> float:
            shifted = [x + h * (j == i) for j, x in enumerate(WEIGHTS)]
            return gpt_trained_in_place(gpt(), LR, shifted)

        assert weights.grad[i].item() == pytest.approx(difference(weighted, 1e-4), rel=1e-5)
