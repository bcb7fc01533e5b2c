"""LoRA with data weights: choose what to fine-tune a language model on.

A small language model of characters has learned English prose. It is to be fine-tuned to write
Python, by low-rank adapters ([Hu et al., 2021](https://arxiv.org/abs/2106.09685)), on a pool of
texts of which only a third is Python: the rest is more prose and shuffled characters. A weight for
every text is learned by the gradient of the loss on a little Python, through the whole fine-tuning.
The baseline fine-tunes on the pool as it is.

The adapters are the inner variables; everything else in the model is a constant of the unroll.
"""

import argparse
import inspect
import json

import shared
import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.metrics import roc_auc_score
from torch import nn

import diffopt

args = shared.arguments(
    __doc__,
    pretraining=(400, "steps of pretraining"),
    outer=(12, "updates of the weights"),
    inner=(20, "steps of fine-tuning"),
    pool=(60, "texts to fine-tune on"),
)
LENGTH = 40

# %%
# ## Texts
#
# The prose is that of scikit-learn's descriptions of its data sets, the Python that of two modules.

load = (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer, datasets.load_diabetes)
prose = "".join(bunch().DESCR for bunch in load)
python, new_python = inspect.getsource(argparse), inspect.getsource(json.decoder)
alphabet = sorted({*prose, *python, *new_python})
number_of = {character: i for i, character in enumerate(alphabet)}


def windows(text, n):
    """``n`` random pieces of the text, (n, LENGTH + 1) numbers."""
    numbers = torch.tensor([number_of[character] for character in text])
    return numbers.unfold(0, LENGTH + 1, 1)[torch.randperm(len(numbers) - LENGTH)[:n]]


third = args.pool // 3
garbage = windows(python, third)
garbage = garbage.gather(1, torch.rand(garbage.shape).argsort(1))
pool = torch.cat([windows(python, third), windows(prose, third), garbage])
is_python = torch.arange(len(pool)) < third
target, test = windows(new_python[:6000], 40), windows(new_python[6000:], 200)

# %%
# ## A language model with adapters


class LoRA(nn.Linear):
    """``x ↦ (W + B A) x``, where the low rank of B A is what is fine-tuned."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__(inputs, outputs)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Block(nn.Module):
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = LoRA(width, 3 * width), LoRA(width, width)
        self.mlp = nn.Sequential(LoRA(width, 2 * width), nn.GELU(), LoRA(2 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class LanguageModel(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(len(alphabet), width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, len(alphabet))

    def forward(self, texts):
        return self.head(self.blocks(self.embedding(texts[:, :-1]) + self.positions))


def losses(model, texts):
    """The mean loss of each text, per character."""
    logits = model(texts).transpose(1, 2)
    return F.cross_entropy(logits, texts[:, 1:], reduction="none").mean(1)


model = LanguageModel()
adapters = [p for name, p in model.named_parameters() if name.endswith((".a", ".b"))]
rest = [p for name, p in model.named_parameters() if not name.endswith((".a", ".b"))]
pretraining = torch.optim.AdamW(rest, lr=3e-3)
for _ in shared.bar(args.pretraining, "pretraining"):
    loss = losses(model, windows(prose, 32)).mean()
    pretraining.zero_grad()
    loss.backward()
    pretraining.step()

# %%
# ## Learning the weights
#
# Nothing but the adapters is trained inside, and nothing but the weights outside.

for p in rest:
    p.requires_grad_(False)
inner = diffopt.Adam(adapters, lr=0.01)


def fine_tuned(weights_of):
    def loss_fn(model, step):
        weights = weights_of()
        return (weights * losses(model, pool)).sum() / weights.sum()

    return diffopt.unroll(model, inner, args.inner, loss_fn)


logits = torch.zeros(len(pool), requires_grad=True)
outer = torch.optim.Adam([logits], lr=0.5)
history = []
for _ in shared.bar(args.outer):
    loss = losses(fine_tuned(logits.sigmoid), target).mean()
    outer.zero_grad()
    loss.backward()
    outer.step()
    history.append(loss.item())

# %%
# ## On Python that was not used for anything

with torch.no_grad():
    result = {
        "not fine-tuned": losses(model, test).mean().item(),
        "the pool as it is": losses(fine_tuned(lambda: torch.ones(len(pool))), test).mean().item(),
        "learned weights": losses(fine_tuned(logits.sigmoid), test).mean().item(),
        "its Python only (not known)": losses(fine_tuned(is_python.float), test).mean().item(),
    }
print(f"loss per character on other Python after {args.inner} steps, fine-tuned on")
for name, loss in result.items():
    print(f"  {name:<28} {loss:.3f}")
result["auc"] = roc_auc_score(is_python, logits.detach())
print(f"finding the Python in the pool: area under the ROC curve {result['auc']:.3f}")

# %%
# ## The picture

weights = logits.sigmoid().detach()
with shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    bins = torch.linspace(0, 1, 21)
    kinds = {"Python": shared.BLUE, "prose": shared.ORANGE, "shuffled": shared.GREY}
    left.hist(
        [weights[i * third : (i + 1) * third].numpy() for i in range(3)],
        bins.numpy(),
        stacked=True,
        color=list(kinds.values()),
        label=list(kinds),
    )
    left.set(title="Learned weights", xlabel="weight", ylabel="texts")
    left.legend(loc="upper center")
    right.plot(history, color=shared.BLUE)
    right.set(title="Learning the weights", xlabel="update", ylabel="loss on a little Python")
