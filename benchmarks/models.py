"""The networks that are trained in the inner loop."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Conv4(nn.Module):
    """Four blocks of convolution, BatchNorm, ReLU and max pooling (Vinyals et al., 2016).

    BatchNorm uses the statistics of the batch alone, as in MAML (Finn et al., 2017).
    """

    def __init__(self, filters: int, classes: int, size: int) -> None:
        super().__init__()
        channels = [1, filters, filters, filters, filters]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4)
        )
        self.head = nn.Linear(filters * (size // 16) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.head(x.flatten(1))


class ResNet18(nn.Module):
    """Four stages of two residual blocks (He et al., 2016), with a 3x3 stem for small images."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(4):
            for i in range(2):
                out = width * 2**stage
                blocks.append(_Residual(channels, out, stride=2 if stage and not i else 1))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = None
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            self.norm3 = nn.BatchNorm2d(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.norm3(self.shortcut(x))))


class GPT(nn.Module):
    """A decoder-only transformer with pre-normalisation.

    Attention is written out: ``scaled_dot_product_attention`` has no second derivative on CPU.
    """

    def __init__(self, layers: int, dim: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(_Decoder(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        future = torch.full((length, length), -math.inf).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions.weight
        for layer in self.layers:
            x = layer(x, self.future)
        return self.head(self.norm(x))


class _Decoder(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, future: Tensor) -> Tensor:
        n, length, dim = x.shape
        split = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (n, heads, length, dim / heads)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + future
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
