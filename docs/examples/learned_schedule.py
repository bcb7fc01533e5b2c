"""A learning-rate schedule of 200 learned rates.

A run of 200 steps has 200 learning rates. Each is a parameter here, learned by the gradient of the
validation loss through the whole run; every outer step trains other networks on other
minibatches, so that the schedule serves runs that it has not seen. The baselines are a constant
rate and a cosine schedule, each with the best peak rate of a grid.

A hyperparameter may be a function of the step: `lr=lambda t: log_rates[t].exp()`.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(80, "updates of the schedule"),
    inner=(200, "steps of a run"),
    runs=(16, "runs per update, each with other weights and minibatches"),
    new_runs=(100, "new runs that the result is measured on"),
)

# %%
# ## The run

train_set, validation, test = shared.digits(600, 600, 597, seed=args.seed)


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(rate, runs):
    """Runs at once, each from random weights on random minibatches, with ``rate(t)`` at step t."""
    x, y = train_set
    picks = torch.randint(len(x), (args.inner, runs, 16))
    batches = [(x[pick], y[pick]) for pick in picks]
    starts, _ = torch.func.stack_module_state([network() for _ in range(runs)])
    model = network()
    opt = diffopt.Momentum(model.parameters(), lr=rate, weight_decay=1e-3)
    return diffopt.unroll(model, opt, batches, loss_fn, tasks=runs, initial=starts)


def mean_loss(runs, data):
    return runs.apply(lambda model: loss_fn(model, data)).mean()


# %%
# ## Learning the rates
#
# A run whose rates are far too large is chaotic: its gradient is exact, huge, and of no use. So the
# rates are kept below 0.3, and the meta-gradient is clipped.

log_rates = torch.full((args.inner,), math.log(0.1), requires_grad=True)
outer = torch.optim.SGD([log_rates], lr=8.0, momentum=0.9)
decay = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 0.0, args.outer)
history = []
for _ in shared.bar(args.outer):
    loss = mean_loss(train(lambda t: log_rates[t].exp(), args.runs), validation)
    outer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(log_rates, 0.03)
    outer.step()
    decay.step()
    with torch.no_grad():
        log_rates.clamp_(max=math.log(0.3))
    history.append(loss.item())

# %%
# ## Against a constant rate and a cosine
#
# Each with the best peak rate by validation loss; all on the same new runs.


def constant(peak):
    return lambda t: peak


def cosine(peak):
    return lambda t: peak * (1 + math.cos(math.pi * t / args.inner)) / 2


@torch.no_grad()
def measure(rate, data):
    torch.manual_seed(args.seed + 1)
    return mean_loss(train(rate, args.new_runs), data).item()


rates = log_rates.detach().exp()
schedules = {"learned": lambda t: rates[t]}
for name, family in (("cosine", cosine), ("constant", constant)):
    peaks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    best = min(peaks, key=lambda peak: measure(family(peak), validation))
    schedules[f"{name}, peak {best:g}"] = family(best)

result = {name: measure(rate, test) for name, rate in schedules.items()}
print(f"test loss after {args.inner} steps, mean of {args.new_runs} new runs")
for name, loss in result.items():
    print(f"  {name:<20} {loss:.4f}")

# %%
# ## The picture

with shared.picture(args, 1, 2, figsize=(11, 3.6)) as (left, right):
    colors = (shared.BLUE, shared.ORANGE, shared.GREY)
    for (name, rate), color in zip(schedules.items(), colors, strict=True):
        left.plot([float(rate(t)) for t in range(args.inner)], color=color, label=name)
    left.set(title="Schedules", xlabel="step", ylabel="learning rate", yscale="log")
    left.set_ylim(bottom=1e-4)
    left.legend(loc="lower left")
    right.plot(history, color=shared.BLUE)
    right.set(title="Learning the schedule", xlabel="outer step", ylabel="validation loss")
