"""Data attribution: which training examples made this loss what it is?

How would the loss on test digits change if some training examples had not been there? The answer
by retraining takes one training run for each question. One *metagradient*, the derivative of the
test loss with respect to a weight of 1 on every training example, through all 1,000 steps of
training, answers all of them at first order (MAGIC,
[Ilyas and Engstrom, 2025](https://arxiv.org/abs/2504.16430)). Here the prediction is compared with
what it predicts: the network is retrained without random subsets of the data, many at once by
`tasks=`, and the predicted changes are ranked against the true ones.
"""

import shared
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import diffopt

args = shared.arguments(
    __doc__,
    inner=(1000, "steps of training"),
    train=(1000, "training examples"),
    subsets=(100, "random subsets of each size to retrain without"),
)

# %%
# ## A training run with a weight on every example
#
# Minibatches, momentum and a decaying rate, as one trains. A batch is
# (which examples, all weights).

train, test = shared.digits(args.train, 500, seed=args.seed)
picks = [torch.randint(args.train, (50,)) for _ in range(args.inner)]
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
inner = diffopt.Momentum(
    model.parameters(), lr=lambda step: 0.05 * (1 - step / args.inner), weight_decay=1e-3
)


def loss_fn(model, batch):
    pick, weights = batch
    losses = F.cross_entropy(model(train[0][pick]), train[1][pick], reduction="none")
    return (weights[pick] * losses).mean()


def test_loss(model):
    return F.cross_entropy(model(test[0]), test[1])


# %%
# ## One metagradient
#
# The baseline is what takes no unroll: the similarity of an example's gradient to that of the test
# loss, at the end of training. (It is the metagradient through one more step of gradient descent.)


def influence(start, opt, picks):
    """The metagradient of the test loss with respect to the weights of the examples."""
    weights = torch.ones(args.train, requires_grad=True)
    batches = [(pick, weights) for pick in picks]
    trained = diffopt.unroll(model, opt, batches, loss_fn, initial=start, progress=len(picks) > 1)
    loss = test_loss(trained)
    return torch.autograd.grad(loss, weights)[0], trained.detach(), loss.item()


exact, trained, loss = influence(None, inner, picks)
one_step = torch.optim.SGD(model.parameters(), lr=1.0)
similarity, _, _ = influence(trained.params, one_step, [torch.arange(args.train)])

# %%
# ## Retraining without random subsets
#
# Leaving a subset out changes its weights from 1 to 0, and the loss, by first order, by minus the
# sum of their influences. All subsets of one size are retrained at once.


@torch.no_grad()
def retrain_without(subsets):
    """The change of the test loss, truly, for each row of booleans."""
    kept = (~subsets).float()
    batches = [(pick.expand(args.subsets, -1), kept) for pick in picks]
    runs = diffopt.unroll(model, inner, batches, loss_fn, tasks=args.subsets, progress=True)
    return runs.apply(test_loss) - loss


sizes = (0.01, 0.02, 0.05, 0.1)
outcomes = {}
for size in sizes:
    subsets = torch.rand(args.subsets, args.train).argsort(1) < size * args.train
    predicted = [-(subsets * values).sum(1) for values in (exact, similarity)]
    outcomes[size] = (*predicted, retrain_without(subsets))

print(f"test loss {loss:.3f} after {args.inner} steps; {args.subsets} subsets of each size")
print("left out   change of the loss     rank correlation with the prediction (Spearman)")
print("                                  metagradient    similarity of gradients")
result = {}
for size, (predicted, similar, true) in outcomes.items():
    result[size] = [spearmanr(guess, true).statistic for guess in (predicted, similar)]
    print(
        f"  {size:4.0%}     {true.min():+.4f} to {true.max():+.4f}"
        f"{result[size][0]:14.3f}{result[size][1]:19.3f}"
    )

# %%
# ## The picture
#
# On the right the training digits whose absence would have hurt and helped most, with their labels.

predicted, _, true = outcomes[0.02]
with shared.picture(args, 1, 3, figsize=(11, 3.4), width_ratios=(1, 1, 1.2)) as axes:
    left, middle, right = axes
    left.plot(predicted, true, "o", color=shared.BLUE, alpha=0.7, markersize=4)
    left.axline((0, 0), slope=1, color=shared.GREY, linewidth=1)
    left.set(title="Left out: 2% of the data", xlabel="predicted change", ylabel="true change")
    for i, (name, color) in enumerate((("metagradient", shared.BLUE), ("similarity", shared.GREY))):
        ranks = [result[size][i] for size in sizes]
        middle.plot([f"{size:.0%}" for size in sizes], ranks, "o-", color=color, label=name)
    middle.set(title="Rank correlation", xlabel="left out", ylim=(min(0, *ranks), 1.02))
    middle.legend(loc="lower right")
    order = exact.argsort()  # negative: a larger weight lowers the loss
    helpful, harmful = order[:5], order[-5:].flip(0)
    rows = [torch.cat([*train[0][some].reshape(-1, 8, 8)], 1) for some in (helpful, harmful)]
    gap = torch.full((3, 40), float("nan"))
    right.imshow(torch.cat([rows[0], gap, rows[1]]).numpy(), cmap="gray_r")
    right.set_title("Most helpful, most harmful", pad=20)
    right.set(xticks=[], yticks=[])
    right.grid(False)
    for row, some in ((-0.7, helpful), (10.3, harmful)):
        for i, label in enumerate(train[1][some].tolist()):
            right.text(8 * i, row, str(label), color=shared.ORANGE, fontsize=9, va="bottom")
