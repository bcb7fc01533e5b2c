"""An unroll inside an unroll: learn the rate at which a rate is learned.

Three levels. A network is trained with a learning rate. That rate is learned by gradient descent
on the validation loss, which takes a rate of its own. And this one is learned too, by a gradient
through the learning of the learning rate ([Chandra et al.,
2022](https://arxiv.org/abs/1909.13371), go on like that). The gradient of an unroll is
differentiable again, so that nothing special has to be written: the middle level's loss calls
`diffopt.unroll`.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(15, "updates of the rate of the rate"),
    middle=(5, "updates of the rate"),
    inner=(20, "steps of training"),
)

# %%
# ## Three levels

train, validation, test = shared.digits(300, 300, 1000, seed=args.seed)
network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


class Rate(torch.nn.Module):
    """The middle level's model: a learning rate, whose loss is that of the network it trains."""

    def __init__(self):
        super().__init__()
        self.log = torch.nn.Parameter(torch.tensor(math.log(0.02), dtype=torch.float64))

    def trained(self):
        log = self.log  # its present value: on the way back, the module holds another one
        inner = diffopt.Momentum(network.parameters(), lr=lambda t: log.exp())
        return diffopt.unroll(network, inner, [train] * args.inner, loss_fn)

    def forward(self):
        return loss_fn(self.trained(), validation)


network = network.double()
train, validation, test = ((x.double(), y) for x, y in (train, validation, test))
rate = Rate()
log_rate_of_rate = torch.tensor(math.log(0.05), dtype=torch.float64, requires_grad=True)


def learned_rate():
    """The rate after ``middle`` updates from 0.02, as a function of the rate of the rate."""
    middle = diffopt.SGD(rate.parameters(), lr=lambda t: log_rate_of_rate.exp())
    return diffopt.unroll(rate, middle, args.middle)  # the model returns its own loss


def final_loss():
    return learned_rate()()


# %%
# ## The gradient through both, against finite differences

(gradient,) = torch.autograd.grad(final_loss(), log_rate_of_rate)
with torch.no_grad():
    ends, h = [], 1e-4
    for shift in (h, -2 * h):
        log_rate_of_rate += shift
        ends.append(final_loss())
    log_rate_of_rate += h
slope = (ends[0] - ends[1]) / (2 * h)
error = ((gradient - slope) / slope).abs().item()
print(f"gradient {gradient:+.8f}, finite differences {slope:+.8f}, relative difference {error:.0e}")

# %%
# ## Learning the rate of the rate

history = []
outer = torch.optim.Adam([log_rate_of_rate], lr=0.3)
for _ in shared.bar(args.outer):
    loss = final_loss()
    outer.zero_grad()
    loss.backward()
    outer.step()
    history.append((loss.item(), log_rate_of_rate.exp().item()))

with torch.no_grad():
    runs = {
        "rate 0.02": rate.trained(),
        "rate learned at 0.05": None,
        "rate learned at the learned rate": learned_rate().apply(Rate.trained),
    }
    log_learned = log_rate_of_rate.item()
    log_rate_of_rate.fill_(math.log(0.05))
    runs["rate learned at 0.05"] = learned_rate().apply(Rate.trained)
result = {name: loss_fn(run, test).item() for name, run in runs.items()}
print(f"the rate of the rate went from 0.05 to {math.exp(log_learned):.2f}")
print(f"test loss after {args.inner} steps")
for name, loss in result.items():
    print(f"  {name:<33} {loss:.3f}")
result["error"] = error

# %%
# ## The picture

with shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    for (name, run), color in zip(
        runs.items(), (shared.GREY, shared.ORANGE, shared.BLUE), strict=True
    ):
        left.plot(run.losses, color=color, label=name)
    left.set(title="Training the network", xlabel="step", ylabel="training loss", ylim=(0, None))
    left.legend(fontsize=8)
    losses, rates = zip(*history, strict=True)
    right.plot(losses, color=shared.BLUE)
    right.set(title="Learning the rate of the rate", xlabel="update", ylabel="validation loss")
