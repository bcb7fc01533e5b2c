r"""Meta-SGD: learn initial weights, and a learning rate for every single weight.

[Li et al. (2017)](https://arxiv.org/abs/1707.09835). Where MAML learns from where to adapt,
Meta-SGD also learns in which direction: the inner step is $\theta - \alpha \odot \nabla L$ with a
learned $\alpha$ for each weight, of either sign. The tasks are sine curves, of which five points
are given, and one step is taken. The baselines are MAML with a fixed rate, and with one learned
rate.

Learning rates of an optimizer are not negative, so that the learned ones are applied by
`grad_transform`, which changes the inner gradients by any differentiable function.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(1500, "updates"),
    tasks=(16, "curves per update"),
    new_tasks=(1000, "curves that the result is measured on"),
)

# %%
# ## The learners
#
# Each learns its initial weights; they differ in which rates they learn.


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(1, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 1),
    )


class Learner:
    def __init__(self, rates):
        torch.manual_seed(args.seed)
        self.model = network()
        names, params = zip(*self.model.named_parameters(), strict=True)
        self.rates = rates(params)
        self.rate_of = dict(zip(names, self.rates, strict=True))
        self.inner = torch.optim.SGD(params, lr=1.0)
        learned = {rate for rate in self.rates if rate.requires_grad}
        self.outer = torch.optim.Adam([*self.model.parameters(), *learned])
        self.history = []

    def scaled(self, grads):
        return {name: self.rate_of[name] * grad for name, grad in grads.items()}

    def query(self, support, query):
        """The loss of each task on other points, after one step."""
        how = {"grad_transform": self.scaled, "tasks": len(support[0])}
        fast = diffopt.unroll(self.model, self.inner, [support], loss_fn, **how)
        return fast.apply(loss_fn, query)

    def learn(self, support, query):
        self.outer.zero_grad()
        loss = self.query(support, query).mean()
        loss.backward()
        self.outer.step()
        self.history.append(loss.item())


def rate_per_weight(params):
    return [torch.full_like(p, 0.01).requires_grad_() for p in params]


def one_rate(params):
    return [torch.tensor(0.01, requires_grad=True)] * len(params)


def fixed_rate(params):
    return [torch.tensor(0.01)] * len(params)


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def draw(tasks, points):
    """(support, query): ``points`` and 20 points of each curve."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, points + 20, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:, :points], y[:, :points]), (x[:, points:], y[:, points:])


# %%
# ## Learning, from the same tasks

learners = {
    "Meta-SGD": Learner(rate_per_weight),
    "MAML, one learned rate": Learner(one_rate),
    "MAML, rate 0.01": Learner(fixed_rate),
}
for _ in shared.bar(args.outer):
    tasks = draw(args.tasks, points=5)
    for learner in learners.values():
        learner.learn(*tasks)

# %%
# ## On new curves

support, query = draw(args.new_tasks, points=5)
with torch.no_grad():
    result = {
        name: learner.query(support, query).mean().item() for name, learner in learners.items()
    }
print(f"mean squared error on {args.new_tasks} new curves, five points and one step each")
for name, score in result.items():
    print(f"  {name:<23} {score:.2f}")
rates = torch.cat([rate.detach().flatten() for rate in learners["Meta-SGD"].rates])
print(
    f"rates from {rates.min():.2f} to {rates.max():.2f}; {(rates < 0).float().mean():.0%} negative"
)

# %%
# ## The picture

with shared.picture(args, 1, 3, figsize=(11, 3.4)) as (left, middle, right):
    colors = (shared.BLUE, shared.ORANGE, shared.GREY)
    for (name, learner), color in zip(learners.items(), colors, strict=True):
        smooth = torch.tensor(learner.history).unfold(0, min(100, args.outer), 1).mean(1)
        left.plot(smooth, color=color, label=name)
    left.set(title="Loss after one step", xlabel="update", ylim=(0, None))
    left.legend()
    middle.hist(rates, 60, color=shared.BLUE)
    middle.set(title="Learned rates", xlabel="rate", ylabel="weights", yscale="log")
    right.barh(list(result), list(result.values()), color=[shared.BLUE, shared.ORANGE, shared.GREY])
    right.set(title="Error on new curves")
    right.invert_yaxis()
