"""A learned optimizer: a small network in the place of Adam's rule.

The update of a weight is a function of its gradients so far. Adam's is made by hand; here it is a
network of 114 parameters, the same for every weight ([Andrychowicz et al.,
2016](https://arxiv.org/abs/1606.04474); [Metz et al., 2020](https://arxiv.org/abs/2009.11243)). It
is learned by the gradient of the validation loss through whole training runs, each from other
weights on other minibatches. The result is the test loss of new runs, also of a network of another
shape. The baselines are Adam with the best constant rate of a grid, and with the best cosine.

The network is used by an optimizer's rule, and needs no declaration: what a step uses gets its
gradient.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(60, "updates of the optimizer"),
    inner=(60, "steps of a run"),
    runs=(8, "runs per update, each with other weights and minibatches"),
    new_runs=(30, "new runs that the result is measured on"),
)

# %%
# ## The rule
#
# Of each weight the network sees three averages of its gradients, of short, middle and long memory,
# each divided by the root of the average square, as in Adam; and how far the run has come. It gives
# a factor for the step and a shift. At the start both do nothing, so the rule is Adam's.

MEMORIES = (0.5, 0.9, 0.98)


class LearnedRule(diffopt.Optimizer):
    elementwise = True  # each weight for itself: tasks= may update those of all runs at once

    def __init__(self, params, net, lr):
        super().__init__(params, {"lr": lr, "time": lambda step: step / args.inner})
        self.net = net

    def _init(self, hyper, param):
        names = [*(f"average_{beta}" for beta in MEMORIES), "square"]
        return {name: torch.zeros_like(param) for name in names}

    def _update(self, hyper, params, grads, states):
        made = [self._one(hyper, *one) for one in zip(params, grads, states, strict=True)]
        return [p for p, _ in made], [state for _, state in made]

    def _one(self, hyper, param, grad, state):
        new = {"square": 0.95 * state["square"] + 0.05 * grad**2}
        for beta in MEMORIES:
            new[f"average_{beta}"] = beta * state[f"average_{beta}"] + (1 - beta) * grad
        scale = (new["square"] + 1e-12).rsqrt()
        seen = [new[f"average_{beta}"] * scale for beta in MEMORIES]
        time = torch.full_like(param, hyper["time"])
        factor, shift = self.net(torch.stack([*seen, time], -1)).unbind(-1)
        return param - hyper["lr"] * (factor.exp() * seen[1] + shift), new


# %%
# ## The runs

train_set, validation, test = shared.digits(600, 600, 597, seed=args.seed)


def network(width=32, layers=1):
    sizes = [64, *[width] * layers, 10]
    parts = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]  # noqa: B905, RUF007
    return torch.nn.Sequential(*[m for part in parts for m in (part, torch.nn.ReLU())][:-1])


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(optimizer, runs, **shape):
    """Runs at once, each from random weights on random minibatches."""
    x, y = train_set
    picks = torch.randint(len(x), (args.inner, runs, 16))
    batches = [(x[pick], y[pick]) for pick in picks]
    starts, _ = torch.func.stack_module_state([network(**shape) for _ in range(runs)])
    model = network(**shape)
    opt = optimizer(model.parameters())
    return diffopt.unroll(model, opt, batches, loss_fn, tasks=runs, initial=starts)


def losses(runs, data):
    return runs.apply(lambda model: loss_fn(model, data))


# %%
# ## Learning it
#
# It starts as Adam at a good rate. Long runs have steep places: the meta-gradient is clipped.

net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
torch.nn.init.zeros_(net[2].weight)
torch.nn.init.zeros_(net[2].bias)


def learned(params):
    return LearnedRule(params, net, lr=0.02)


outer = torch.optim.Adam(net.parameters(), lr=2e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.outer)
history = []
for _ in shared.bar(args.outer):
    loss = losses(train(learned, args.runs), validation).mean()
    outer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.2)
    outer.step()
    decay.step()
    history.append(loss.item())

# %%
# ## Against Adam
#
# With the best constant rate, and the best peak rate of a cosine, by validation loss; for a network
# of another shape, too, they are chosen anew, while the learned optimizer is the same.


def constant(rate):
    return lambda params: diffopt.Adam(params, lr=rate)


def cosine(peak):
    def rate(step):
        return peak * (1 + math.cos(math.pi * step / args.inner)) / 2

    return lambda params: diffopt.Adam(params, lr=rate)


@torch.no_grad()
def measure(optimizer, data, **shape):
    torch.manual_seed(args.seed + 1)
    return losses(train(optimizer, args.new_runs, **shape), data).mean().item()


result = {}
for about, shape in {"": {}, ", two hidden layers of 48": {"width": 48, "layers": 2}}.items():
    result[f"learned{about}"] = measure(learned, test, **shape)
    for name, family in {"Adam": constant, "Adam, cosine": cosine}.items():
        rates = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
        best = min(rates, key=lambda rate: measure(family(rate), validation, **shape))
        result[f"{name}{about}"] = measure(family(best), test, **shape)
print(f"test loss after {args.inner} steps, mean of {args.new_runs} new runs")
for name, loss in result.items():
    print(f"  {name:<40} {loss:.3f}")

# %%
# ## The picture

with shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    left.plot(history, color=shared.BLUE)
    left.set(title="Learning the optimizer", xlabel="update", ylabel="validation loss")
    colors = [shared.BLUE, shared.ORANGE, shared.GREY] * 2
    right.barh(list(result), list(result.values()), color=colors)
    right.set(title="Test loss of new runs")
    right.invert_yaxis()
