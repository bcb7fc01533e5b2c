"""Data reweighting: find wrong labels by learning a weight for every example.

A quarter of the training labels are wrong. Each example gets a weight in the training loss, and the
weights are learned so that the network which training ends with does well on a small set of clean
digits ([Ren et al., 2018](https://arxiv.org/abs/1803.09050), who look one step ahead; here the
gradient goes through the whole run). The loss function simply uses the weights: nothing has to
be declared.
"""

import shared
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

import diffopt

args = shared.arguments(
    __doc__,
    outer=(40, "updates of the weights"),
    inner=(100, "steps of one training run"),
    train=(800, "training examples, a quarter of them with a wrong label"),
    clean=(200, "clean digits"),
)

# %%
# ## Digits with wrong labels

(x, labels), clean, test = shared.digits(args.train, args.clean, 700, seed=args.seed)
wrong = torch.rand(args.train) < 0.25
noisy = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)

model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
inner = diffopt.Momentum(model.parameters(), lr=0.1)


def accuracy(trained):
    with torch.no_grad():
        return (trained(test[0]).argmax(1) == test[1]).float().mean().item()


# %%
# ## Learning the weights
#
# `logits` is captured by the loss, and so gets a gradient.

logits = torch.zeros(args.train, requires_grad=True)
outer = torch.optim.Adam([logits], lr=0.1)


def weighted_loss(model, step):
    losses = F.cross_entropy(model(x), noisy, reduction="none")
    return (logits.sigmoid() * losses).sum() / logits.sigmoid().sum()


history = []
for _ in shared.bar(args.outer):
    trained = diffopt.unroll(model, inner, args.inner, weighted_loss)
    loss = F.cross_entropy(trained(clean[0]), clean[1])
    outer.zero_grad()
    loss.backward()
    outer.step()
    history.append((loss.item(), roc_auc_score(wrong, -logits.detach())))

# %%
# ## Against training without weights
#
# The baselines train on all labels as they are, on the clean digits alone, and on both together.


def trained_on(x, y):
    with torch.no_grad():
        return diffopt.unroll(
            model, inner, args.inner, lambda model, step: F.cross_entropy(model(x), y)
        )


with torch.no_grad():
    weighted = diffopt.unroll(model, inner, args.inner, weighted_loss)
everything = torch.cat([x, clean[0]]), torch.cat([noisy, clean[1]])
result = {
    "auc": history[-1][1],
    "weighted": accuracy(weighted),
    "all labels as they are": accuracy(trained_on(x, noisy)),
    "the clean digits alone": accuracy(trained_on(*clean)),
    "both together": accuracy(trained_on(*everything)),
    "true labels (out of reach)": accuracy(trained_on(x, labels)),
}

print(f"finding the {int(wrong.sum())} wrong labels: area under the ROC curve {result['auc']:.3f}")
print("test accuracy, trained on")
print(f"  {'learned weights':<28} {result['weighted']:.1%}")
for name in list(result)[2:]:
    print(f"  {name:<28} {result[name]:.1%}")

# %%
# ## The picture

weights = logits.sigmoid().detach()
with shared.picture(args, 1, 3, figsize=(11, 3.4)) as (left, middle, right):
    bins = torch.linspace(0, 1, 26)
    left.hist(weights[~wrong], bins, color=shared.BLUE, alpha=0.7, label="right label")
    left.hist(weights[wrong], bins, color=shared.ORANGE, alpha=0.7, label="wrong label")
    left.set(title="Learned weights", xlabel="weight", ylabel="examples")
    left.legend(loc="upper center")
    losses, aucs = zip(*history, strict=True)
    middle.plot(losses, color=shared.BLUE)
    middle.set(title="Loss on clean digits", xlabel="outer step", ylim=(0, None))
    right.plot(aucs, color=shared.BLUE)
    right.set(title="Finding wrong labels", xlabel="outer step", ylabel="area under ROC curve")
    right.set(ylim=(0.5, 1.02))
