"""MAML++: a loss after every inner step, and rates and statistics for each step.

[Antoniou et al. (2019)](https://arxiv.org/abs/1810.09502) make MAML train better by, among other
things, a *multi-step loss*: the query loss after every inner step counts, the last one more and
more as training goes on; by *rates per layer and step*; and by batch normalization whose
*statistics, scale and shift* are those of the step. The tasks are few-shot classification of
handwritten digits: five of them, one image of each, every image turned by an angle of its own,
shuffled labels. The result is measured on images that learning has not seen; the baselines are MAML
with one fixed rate and the same statistics in all steps, and the class of the nearest image.

What the loss returns beside itself is in `fast.aux`, connected: the query loss of every step costs
one unroll and no graph.
"""

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(400, "updates"),
    inner=(3, "steps of adaptation"),
    tasks=(8, "tasks per update"),
    new_tasks=(400, "tasks that the result is measured on"),
)

# %%
# ## The network
#
# Support images move the running statistics of their step, and all images are normalized by them.
# The statistics are buffers, a part of the state of the loop.


class StepNorm(torch.nn.Module):
    """Batch normalization with running statistics, a scale and a shift for each step."""

    def __init__(self, features, steps):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(steps, features))
        self.shift = torch.nn.Parameter(torch.zeros(steps, features))
        self.register_buffer("mean", torch.zeros(steps, features))
        self.register_buffer("var", torch.ones(steps, features))

    def forward(self, x, step, support):
        step = min(step, len(self.scale) - 1)
        if support:
            with torch.no_grad():
                var, mean = torch.var_mean(x, 0)
                self.mean[step].mul_(0.9).add_(0.1 * mean)
                self.var[step].mul_(0.9).add_(0.1 * var)
        x = (x - self.mean[step]) * (self.var[step] + 1e-3).rsqrt()
        return x * self.scale[step] + self.shift[step]


class Network(torch.nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(64, 128), torch.nn.Linear(128, 64), torch.nn.Linear(64, 5)]
        )
        self.norms = torch.nn.ModuleList([StepNorm(128, steps), StepNorm(64, steps)])

    def forward(self, x, step, support=False):
        x = x.flatten(1)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(F.layer_norm(layer(x), (layer.out_features,)), step, support).relu()
        return self.layers[-1](x)


# %%
# ## Two learners
#
# The weights after a step are those that the next one begins with, which returns their query loss.


def query_loss(model, query, step):
    x, y = query
    return F.cross_entropy(model(x, step), y)


def loss_fn(model, batch):
    step, (x, y), query = batch
    after_the_last = query_loss(model, query, step - 1) if step else None
    return F.cross_entropy(model(x, step, support=True), y), after_the_last


class Learner:
    def __init__(self, plus_plus):
        torch.manual_seed(args.seed)
        self.history = []
        self.model = Network(steps=args.inner if plus_plus else 1)
        self.log_rates = torch.full((3, args.inner), 0.1).log().requires_grad_(plus_plus)
        self.inner = diffopt.SGD(
            {"params": layer.parameters(), "lr": lambda step, i=i: self.log_rates[i, step].exp()}
            for i, layer in enumerate(self.model.layers)
        )
        learned = [{"params": self.model.parameters()}]
        learned += [{"params": [self.log_rates], "lr": 2e-2}] * plus_plus
        self.outer = torch.optim.Adam(learned, lr=2e-3)

    def adapted(self, support, query):
        batches = [(step, support, query) for step in range(args.inner)]
        return diffopt.unroll(self.model, self.inner, batches, loss_fn, tasks=len(support[0]))

    def learn(self, support, query, last):
        """One update; ``last`` is how much the loss after the last step counts, of 1."""
        fast = self.adapted(support, query)
        at_the_end = fast.apply(query_loss, query, args.inner - 1)
        losses = torch.stack([*fast.aux[1:], at_the_end]).mean(1)
        weights = torch.full((args.inner,), (1 - last) / max(args.inner - 1, 1))
        weights[-1] = last
        self.outer.zero_grad()
        (weights @ losses).backward()
        self.outer.step()
        for name, statistics in self.model.named_buffers():
            statistics.copy_(fast.buffers[name].mean(0))
        self.history.append(losses[-1].item())


# %%
# ## Learning, from the same tasks
#
# The losses count alike at first, and after half of the updates only the last one does.

learning, new = (shared.FewShot(*part) for part in shared.digits(900, 897, seed=args.seed))
learners = {"MAML++": Learner(plus_plus=True), "MAML": Learner(plus_plus=False)}
for step in shared.bar(args.outer):
    tasks = learning.draw(args.tasks, shots=1, queries=5)
    gone = min(1.0, 2 * step / args.outer)
    learners["MAML++"].learn(*tasks, last=gone + (1 - gone) / args.inner)
    learners["MAML"].learn(*tasks, last=1.0)

# %%
# ## Images that neither has seen

support, query = new.draw(args.new_tasks, shots=1, queries=10)


def hits(model, query):
    x, y = query
    return (model(x, args.inner - 1).argmax(1) == y).float().mean()


with torch.no_grad():
    result = {
        name: learner.adapted(support, query).apply(hits, query).mean().item()
        for name, learner in learners.items()
    }
distances = torch.cdist(query[0].flatten(2), support[0].flatten(2))
nearest = support[1].gather(1, distances.argmin(2))
result["nearest image"] = (nearest == query[1]).float().mean().item()
print(f"accuracy on {args.new_tasks} new tasks, one image of each class, {args.inner} steps")
for name, score in result.items():
    print(f"  {name:<14} {score:.1%}")

# %%
# ## The picture

with shared.picture(args, 1, 3, figsize=(11, 3.4)) as (left, middle, right):
    for (name, learner), color in zip(learners.items(), (shared.BLUE, shared.ORANGE), strict=True):
        smooth = torch.tensor(learner.history).unfold(0, min(20, args.outer), 1).mean(1)
        left.plot(smooth, color=color, label=name)
    left.set(title="Loss after the last step", xlabel="update", ylim=(0, None))
    left.legend()
    for i, rates in enumerate(learners["MAML++"].log_rates.detach().exp()):
        middle.plot(range(1, args.inner + 1), rates, "o-", label=f"layer {i + 1}")
    middle.set(title="Learned rates", xlabel="step", yscale="log", xticks=range(1, args.inner + 1))
    middle.legend(fontsize=8)
    colors = [shared.BLUE, shared.ORANGE, shared.GREY]
    right.barh(list(result), list(result.values()), color=colors)
    right.set(title="Accuracy on new images", xlim=(0, 1))
    right.invert_yaxis()
