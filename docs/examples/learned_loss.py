"""A learned loss: find a loss function that is not led astray by wrong labels.

Cross-entropy is a function of the probability that the network gives to the label. Here that
function is learned: a small network in its place, trained so that what *it* trains does well on
clean digits although 40% of the training labels are wrong ([Bechtle et al.,
2021](https://arxiv.org/abs/1906.05374), learn losses in this way). Every outer step has another
network and other wrong labels. The result is measured on new ones, and on digits that learning has
not seen, against cross-entropy with the best of several numbers of steps.
"""

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(100, "updates of the loss"),
    inner=(60, "steps of training"),
    runs=(10, "networks that the result is measured on"),
)

# %%
# ## Training with any loss

(x, labels), clean, (new_x, new_labels), test = shared.digits(500, 300, 500, 497, seed=args.seed)


def spoiled(labels):
    wrong = torch.rand(len(labels)) < 0.4
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)


def train(x, labels, loss_of, steps=args.inner):
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
    inner = diffopt.Momentum(model.parameters(), lr=0.2)

    def loss_fn(model, step):
        log_p = F.log_softmax(model(x), 1).gather(1, labels[:, None])
        return loss_of(log_p).mean()

    return diffopt.unroll(model, inner, steps, loss_fn)


# %%
# ## Learning it
#
# It starts at cross-entropy: what is learned is added to it.

correction = torch.nn.Sequential(torch.nn.Linear(2, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1))
torch.nn.init.zeros_(correction[2].weight)
torch.nn.init.zeros_(correction[2].bias)


def learned(log_p):
    return correction(torch.cat([log_p, log_p.exp()], 1)) - log_p


def cross_entropy(log_p):
    return -log_p


outer = torch.optim.Adam(correction.parameters(), lr=0.02)
history = []
for _ in shared.bar(args.outer):
    trained = train(x, spoiled(labels), learned)
    loss = F.cross_entropy(trained(clean[0]), clean[1])
    outer.zero_grad()
    loss.backward()
    outer.step()
    history.append(loss.item())

# %%
# ## On new networks, digits and wrong labels


@torch.no_grad()
def accuracy(loss_of, steps=args.inner):
    torch.manual_seed(args.seed + 1)
    scores = []
    for _ in range(args.runs):
        trained = train(new_x, spoiled(new_labels), loss_of, steps)
        scores.append((trained(test[0]).argmax(1) == test[1]).float().mean())
    return torch.stack(scores).mean().item()


steps = {n: accuracy(cross_entropy, n) for n in sorted({5, 10, 20, 40, args.inner})}
best = max(steps, key=steps.get)
result = {
    "learned": accuracy(learned),
    "cross-entropy": steps[args.inner],
    "cross-entropy, stopped at its best": steps[best],
}
print(f"test accuracy after {args.inner} steps on 40% wrong labels, mean of {args.runs} networks")
for name, score in result.items():
    print(f"  {name:<35} {score:.1%}" + (f"  (step {best})" if "best" in name else ""))

# %%
# ## The picture

with torch.no_grad(), shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    p = torch.linspace(0.002, 1, 300)[:, None]
    for name, loss_of, color in (
        ("cross-entropy", cross_entropy, shared.GREY),
        ("learned", learned, shared.BLUE),
    ):
        values = loss_of(p.log())
        left.plot(p, values - values[-1], color=color, label=name)
    left.set(title="Loss", xlabel="probability of the label", ylim=(-2, 6))
    left.legend()
    right.plot(history, color=shared.BLUE)
    right.set(title="Learning the loss", xlabel="update", ylabel="loss on clean digits")
