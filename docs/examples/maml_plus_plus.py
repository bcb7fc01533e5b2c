"""MAML++: a loss after every inner step, and a learned rate for every layer and step.

[Antoniou et al. (2019)](https://arxiv.org/abs/1810.09502) make MAML train better by, among other
things, a *multi-step loss*: the query loss after every inner step counts, the last one more and
more as training goes on; and by *rates per layer and step*. The tasks are few-shot classification
of handwritten digits: five of them, one image of each, every image turned by an angle of its own,
shuffled labels. The result is measured on images that learning has not seen; the baselines are MAML
with one fixed rate, and the class of the nearest image.

`initial=` continues an unroll where another ended, connected: here one step at a time, to compute
a loss in between.
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
# ## Two learners

learning, new = (shared.FewShot(*part) for part in shared.digits(900, 897, seed=args.seed))


def network():
    torch.manual_seed(args.seed)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 128),
        torch.nn.LayerNorm(128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 64),
        torch.nn.LayerNorm(64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 5),
    )


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


class Learner:
    def __init__(self, plus_plus):
        self.plus_plus, self.history = plus_plus, []
        self.model = network()
        layers = [layer for layer in self.model if list(layer.parameters())]
        self.rates = torch.full((len(layers), args.inner), 0.1, requires_grad=plus_plus)
        self.inner = diffopt.SGD(
            {"params": layer.parameters(), "lr": lambda step, i=i: self.rates[i, step]}
            for i, layer in enumerate(layers)
        )
        learned = [*self.model.parameters(), *[self.rates] * plus_plus]
        self.outer = torch.optim.Adam(learned, lr=2e-3)

    def adapted(self, support):
        """The fast weights after each step."""
        fast, steps = None, []
        for _ in range(args.inner):
            fast = diffopt.unroll(
                self.model, self.inner, [support], loss_fn, initial=fast, tasks=len(support[0])
            )
            steps.append(fast)
        return steps

    def learn(self, support, query, last):
        """One update; ``last`` is how much the loss after the last step counts, of 1."""
        losses = torch.stack([fast.apply(loss_fn, query).mean() for fast in self.adapted(support)])
        weights = torch.full((args.inner,), (1 - last) / (args.inner - 1))
        weights[-1] = last
        self.outer.zero_grad()
        (weights @ losses).backward()
        self.outer.step()
        self.history.append(losses[-1].item())


# %%
# ## Learning, from the same tasks
#
# The losses count alike at first, and after half of the updates only the last one does.

learners = {"MAML++": Learner(plus_plus=True), "MAML": Learner(plus_plus=False)}
for step in shared.bar(args.outer):
    tasks = learning.draw(args.tasks, shots=1, queries=5)
    gone = min(1.0, 2 * step / args.outer)
    learners["MAML++"].learn(*tasks, last=gone + (1 - gone) / args.inner)
    learners["MAML"].learn(*tasks, last=1.0)

# %%
# ## Images that neither has seen

support, query = new.draw(args.new_tasks, shots=1, queries=10)


def hits(model, batch):
    x, y = batch
    return (model(x).argmax(1) == y).float().mean()


with torch.no_grad():
    result = {
        name: learner.adapted(support)[-1].apply(hits, query).mean().item()
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
    for i, rates in enumerate(learners["MAML++"].rates.detach()):
        middle.plot(range(1, args.inner + 1), rates, "o-", label=f"layer {i + 1}")
    middle.set(title="Learned rates", xlabel="step", xticks=range(1, args.inner + 1))
    middle.legend(fontsize=8)
    colors = [shared.BLUE, shared.ORANGE, shared.GREY]
    right.barh(list(result), list(result.values()), color=colors)
    right.set(title="Accuracy on new images", xlim=(0, 1))
    right.invert_yaxis()
