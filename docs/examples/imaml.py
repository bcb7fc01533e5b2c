r"""iMAML: the meta-gradient of a converged inner problem, without its path.

[Rajeswaran et al. (2019)](https://arxiv.org/abs/1909.04630). The inner problem keeps close to the
meta-learned weights $\phi$ by a proximal term, and is solved until it has converged:

$$ \theta^\star(\phi) = \mathrm{arg}\min_\theta
   \ L(\theta) + \tfrac{\lambda}{2} \|\theta - \phi\|^2. $$

There the gradient is zero, which determines the meta-gradient by one linear system, however long it
took to get there: `adjoint=diffopt.Implicit(...)` keeps one state and no path. The baseline
is MAML on the same problem, which goes back through all steps. The tasks are few-shot
classification of handwritten digits: five of them, one image of each, every image turned by an
angle of its own, shuffled labels; the result is measured on images not seen in learning.
"""

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(100, "updates"),
    inner=(50, "steps to solve the inner problem"),
    tasks=(8, "tasks per update"),
    new_tasks=(100, "tasks that the result is measured on"),
)

# %%
# ## The inner problem
#
# The loss captures the meta-learned weights: that is the only way in which $\phi$ has an influence,
# since a converged problem forgets where it started.

learning, new = (shared.FewShot(*part) for part in shared.digits(900, 897, seed=args.seed))


def network():
    torch.manual_seed(args.seed)
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 5),
    )


class Learner:
    def __init__(self, adjoint):
        self.adjoint, self.history = adjoint, []
        self.model = network()
        self.prior = list(self.model.parameters())
        self.inner = torch.optim.SGD(self.prior, lr=0.2)
        self.outer = torch.optim.Adam(self.prior, lr=1e-2)

    def proximal_loss(self, model, batch):
        x, y = batch
        pairs = zip(model.parameters(), self.prior, strict=True)
        distance = sum((p - q).square().sum() for p, q in pairs)
        return F.cross_entropy(model(x), y) + 0.5 * STRENGTH * distance

    def adapt(self, support):
        steps, tasks = [support] * args.inner, len(support[0])
        how = {"adjoint": self.adjoint, "tasks": tasks}
        return diffopt.unroll(self.model, self.inner, steps, self.proximal_loss, **how)

    def gradient(self, support, query):
        """The mean query loss, its gradient left in ``.grad``."""
        self.outer.zero_grad()
        loss = self.adapt(support).apply(query_loss, query).mean()
        loss.backward()
        return loss.item()

    def flat_gradient(self):
        return torch.cat([p.grad.flatten() for p in self.prior])


def query_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


STRENGTH = 1.0
solves = []
learners = {
    "iMAML": Learner(diffopt.Implicit(diffopt.CG(15, tol=1e-3), report=solves.append)),
    "MAML": Learner(diffopt.Segmented()),
}

# %%
# ## The same gradient
#
# Where the inner problem has converged, both are the same vector.

tasks = learning.draw(args.tasks, shots=1, queries=5)
for learner in learners.values():
    learner.gradient(*tasks)
implicit, unrolled = (learner.flat_gradient() for learner in learners.values())
difference = ((implicit - unrolled).norm() / unrolled.norm()).item()
print(f"meta-gradients of iMAML and MAML: relative difference {difference:.1e}")

# %%
# ## Learning, from the same tasks

for _ in shared.bar(args.outer):
    tasks = learning.draw(args.tasks, shots=1, queries=5)
    for learner in learners.values():
        learner.history.append(learner.gradient(*tasks))
        learner.outer.step()

# %%
# ## Images that neither has seen


support, query = new.draw(args.new_tasks, shots=1, queries=10)


def hits(model, batch):
    x, y = batch
    return (model(x).argmax(1) == y).float().mean()


@torch.no_grad()
def accuracy(learner):
    return learner.adapt(support).apply(hits, query).mean().item()


result = {name: accuracy(learner) for name, learner in learners.items()}
result["not meta-learned"] = accuracy(Learner(None))
print(f"accuracy on {args.new_tasks} new tasks, one image of each class")
for name, score in result.items():
    print(f"  {name:<17} {score:.1%}")
states = learners["MAML"].adjoint.plan(args.inner).peak_states
print(f"states kept for a meta-gradient: iMAML 1, MAML {states}")
result["difference"] = difference

# %%
# ## The picture

with shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    for (name, learner), style in zip(learners.items(), ("-", "--"), strict=True):
        color = shared.BLUE if name == "iMAML" else shared.ORANGE
        left.plot(learner.history, style, color=color, label=name, linewidth=1.5)
    left.set(title="Loss after adapting", xlabel="update", ylim=(0, None))
    left.legend()
    names = ["iMAML", "MAML", "not meta-learned"]
    colors = [shared.BLUE, shared.ORANGE, shared.GREY]
    right.barh(names, [result[name] for name in names], color=colors)
    right.set(title="Accuracy on new images", xlim=(0, 1))
    right.invert_yaxis()
