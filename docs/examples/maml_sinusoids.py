"""MAML: learn initial weights that fit a new sine curve from ten points.

The experiment of [Finn et al. (2017)](https://arxiv.org/abs/1703.03400), section 5.1. A task is a
sine curve of random amplitude and phase. The network sees ten points of it and takes a few steps of
gradient descent. MAML learns the initial weights from which *one* such step fits a curve well,
by the gradient through that step. The baseline is pretrained on the same curves as one data set:
its initial weights fit their mean.

`tasks=` adapts a whole meta-batch of curves at once.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(8000, "updates of the initial weights"),
    tasks=(25, "curves per update"),
    test_tasks=(500, "curves that the result is measured on"),
)

# %%
# ## The tasks
#
# Every tensor leads with the task: `x` has the shape (tasks, points, 1).


def draw_curves(tasks):
    return 0.1 + 4.9 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)


def draw_points(curves, points=10):
    amplitude, phase = curves
    x = 10 * torch.rand(len(phase), points, 1) - 5
    return x, amplitude * torch.sin(x - phase)


def network():
    return torch.nn.Sequential(
        torch.nn.Linear(1, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 40),
        torch.nn.ReLU(),
        torch.nn.Linear(40, 1),
    )


def loss_fn(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


# %%
# ## Learning
#
# One inner step for all tasks, then the loss on ten other points of each curve. The baseline
# trains on the same points without adapting.

maml, pretrained = network(), network()
inner = torch.optim.SGD(maml.parameters(), lr=0.01)
outer = torch.optim.Adam(maml.parameters(), lr=1e-3)
pretraining = torch.optim.Adam(pretrained.parameters(), lr=1e-3)

for _ in shared.bar(args.outer):
    curves = draw_curves(args.tasks)
    support, query = draw_points(curves), draw_points(curves)

    fast = diffopt.unroll(maml, inner, [support], loss_fn, tasks=args.tasks)
    outer.zero_grad()
    fast.apply(loss_fn, query).mean().backward()
    outer.step()

    pretraining.zero_grad()
    (loss_fn(pretrained, support) + loss_fn(pretrained, query)).backward()
    pretraining.step()

# %%
# ## Ten steps on curves that neither has seen
#
# The baseline takes the best of several learning rates, with hindsight.

curves = draw_curves(args.test_tasks)
support, query = draw_points(curves), draw_points(curves, points=100)


@torch.no_grad()
def adapt(model, lr):
    """The fast weights after 0 to 10 steps, and their mean loss on the curves."""
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    runs = [
        diffopt.unroll(model, opt, [support] * t, loss_fn, tasks=args.test_tasks) for t in range(11)
    ]
    return runs, [run.apply(loss_fn, query).mean().item() for run in runs]


maml_runs, maml_losses = adapt(maml, 0.01)
tried = {lr: adapt(pretrained, lr) for lr in (0.001, 0.003, 0.01, 0.02, 0.05)}
best_lr = min(tried, key=lambda lr: tried[lr][1][-1])
pretrained_runs, pretrained_losses = tried[best_lr]

print("mean squared error on new curves, from ten points each")
print("                                before   1 step   10 steps")
for name, losses in (
    ("MAML, rate 0.01", maml_losses),
    (f"pretrained, best rate {best_lr:g}", pretrained_losses),
):
    print(f"  {name:<28}  {losses[0]:6.2f}   {losses[1]:6.2f}   {losses[10]:8.2f}")
result = {"maml": maml_losses, "pretrained": pretrained_losses}

# %%
# ## The picture

grid = torch.linspace(-5, 5, 200)[:, None]
task = int((curves[0].flatten() - 3.5).abs().argmin())  # one of a large amplitude
with torch.no_grad(), shared.picture(args, 1, 3, figsize=(11, 3.4), sharey=False) as axes:
    everywhere = grid.expand(args.test_tasks, -1, -1)
    for ax, name, runs in ((axes[0], "MAML", maml_runs), (axes[1], "Pretrained", pretrained_runs)):
        ax.plot(
            grid,
            curves[0][task] * torch.sin(grid - curves[1][task]),
            color=shared.GREY,
            label="the curve",
        )
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            values = runs[steps](everywhere)[task]
            ax.plot(grid, values, style, color=shared.BLUE, label=f"after {steps} steps")
        points = support[0][task], support[1][task]
        ax.plot(*points, "o", color=shared.ORANGE, label="its ten points")
        ax.set(title=name, ylim=(-5.5, 5.5), xlabel="x")
    axes[0].legend(fontsize=8, loc="lower right")
    axes[2].plot(pretrained_losses, color=shared.GREY, marker="o", label="pretrained")
    axes[2].plot(maml_losses, color=shared.BLUE, marker="o", label="MAML")
    axes[2].set(title="New curves", xlabel="steps", ylabel="mean squared error", ylim=(0, None))
    axes[2].legend()
